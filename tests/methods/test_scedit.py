"""SCEdit against its equations, its published counts, and diffusers' own U-Net."""

import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import petl
from petl import testing
from petl.cli.catalog.method_page import page_of
from petl.cli.catalog.reference import build_for_diffusion, counted
from petl.core.layers.layer import LayerInfo, LayerShape
from petl.methods.scedit import SceditAdapter, SceditConfig
from petl.testing.models import OTHER_MODELS, TinyUNet, noise_batch, tiny_unet

CONTRACT = {
    "models": ("unet",),
    "lr": 5e-2,
    "refuses": ("both_adapters_can_be_active",),
    "excused": {
        "layers_that_are_never_called_are_refused": "its targets are blocks that it chooses"
    },
    "acts_with": {"skips": {"skips": [0]}},
}
UNET = OTHER_MODELS["unet"]
CHANNELS = [16, 8, 8, 8]  # of the skips of the tiny U-Net
HOSTS = [f"up_blocks.{i}.resnets.{j}" for i, j in product(range(2), range(2))]


def gelu(value: float) -> float:
    return value * (1 + math.erf(value / math.sqrt(2))) / 2


def dot(row: list[float], values: list[float]) -> float:
    return sum(w * v for w, v in zip(row, values, strict=True))


def by_hand(x: torch.Tensor, adapter: Any, scale: float) -> torch.Tensor:
    """The equation as a loop over pixels, in Python's floats."""
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    W1, b1, W2, b2 = (getattr(adapter, name).tolist() for name in names)
    out = x.clone()
    N, C, H, W = x.shape
    for n, i, j in product(range(N), range(H), range(W)):
        pixel = x[n, :, i, j].tolist()
        z = [dot(row, pixel) + b for row, b in zip(W1, b1, strict=True)]
        a = [gelu(value) for value in z]
        for c in range(C):
            out[n, c, i, j] += scale * (dot(W2[c], a) + b2[c])
    return out


def adapter_of(channels: int, width: int, **fields) -> Any:
    config = SceditConfig(**fields)
    info = LayerInfo("block", "default", petl.core.layers.context.ForwardContext(), None)
    info.settings = {"channels": channels}
    return SceditAdapter(LayerShape(width, 1), config, info)


def stirred(base: nn.Module | None = None, **fields) -> Any:
    torch.manual_seed(0)
    return testing.stir(petl.wrap(UNET.base() if base is None else base, "scedit", **fields)).eval()


def adapters_of(model: Any, name: str = "default") -> dict[str, Any]:
    return {key: layer.adapters[name] for key, layer in layers(model).items()}


def layers(model: Any) -> dict[str, Any]:
    found = testing.tuner_layers(model.get_base_model())
    return {name.rpartition(".petl_scedit")[0]: layer for name, layer in found.items()}


# Mathematics


def test_a_skip_of_two_channels_is_edited_as_computed_on_paper():
    """z = (1, -1) and gelu(1) = 0.841345, gelu(-1) = -0.158655."""
    adapter = adapter_of(2, 3, scaling=2.0)
    with torch.no_grad():
        adapter.down_weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        adapter.down_bias.copy_(torch.tensor([-1.0, 2.0]))
        adapter.up_weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        adapter.up_bias.copy_(torch.tensor([0.5, 0.0]))
    joined = torch.tensor([7.0, 2.0, 3.0]).view(1, 3, 1, 1)  # h, then x = (2, 3)
    out = adapter.edited(joined).flatten().tolist()
    assert out == pytest.approx([7.0, 2 + 2 * 1.341345, 3 + 2 * 0.682690], abs=1e-5)


@pytest.mark.parametrize("scaling", [1.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.01])
def test_the_edit_is_that_of_a_loop_over_pixels(ratio, scaling):
    torch.manual_seed(0)
    adapter = adapter_of(4, 7, ratio=ratio, scaling=scaling)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    assert len(adapter.down_weight) == {1.0: 4, 0.5: 2, 0.01: 1}[ratio]
    joined = torch.randn(2, 7, 3, 2)
    before = joined.clone()
    out = adapter.edited(joined)
    assert torch.equal(joined, before)
    assert torch.equal(out[:, :3], joined[:, :3])
    torch.testing.assert_close(out[:, 3:], by_hand(joined[:, 3:], adapter, scaling))


@pytest.mark.parametrize("scaling", [1.0, 0.5, 0.0])
def test_a_whole_unet_is_the_base_with_edited_skips(scaling):
    model, batch = stirred(ratio=0.25), UNET.batch(1)
    model.peft_config["default"].scaling = scaling  # read at each forward pass
    base = UNET.base()

    def edit(adapter, block, args):
        h = args[0].shape[1] - adapter.up_weight.shape[0]
        x = by_hand(args[0][:, h:], adapter, scaling)
        return (torch.cat([args[0][:, :h], x], 1), *args[1:])

    assert [len(a.up_bias) for a in adapters_of(model).values()] == CHANNELS
    for host, adapter in adapters_of(model).items():
        base.get_submodule(host).register_forward_pre_hook(partial(edit, adapter))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
        assert torch.equal(model(**batch).logits, UNET.base()(**batch).logits) == (scaling == 0)


def test_gradients_are_those_of_the_equation():
    torch.manual_seed(0)
    adapter = adapter_of(3, 5).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    tensors = dict(adapter.named_parameters())

    def function(joined, *values):
        named = dict(zip(tensors, values, strict=True))
        return torch.func.functional_call(
            _Edit(adapter), {f"a.{k}": v for k, v in named.items()}, (joined,)
        )

    inputs = [torch.randn(2, 5, 2, 2).double().requires_grad_()]
    inputs += [p.detach().clone().requires_grad_() for p in tensors.values()]
    torch.autograd.gradcheck(function, inputs)


class _Edit(nn.Module):
    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.a = adapter

    def forward(self, joined: torch.Tensor) -> torch.Tensor:
        return self.a.edited(joined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_at_the_base_to_the_bit(dtype):
    batch = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in UNET.batch().items()
    }
    # frozen as in a wrapped model: which algorithm torch takes for a convolution depends on it
    expected = UNET.base().to(dtype).requires_grad_(False)(**batch).logits
    model = petl.wrap(UNET.base().to(dtype), "scedit")
    assert all(p.dtype == torch.float32 for p in testing.trainable(model).values())
    assert torch.equal(model.eval()(**batch).logits, expected)
    assert not torch.equal(testing.stir(model)(**batch).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)


def test_in_the_first_step_only_the_way_back_learns():
    grads = testing.gradients(petl.wrap(UNET.base(), "scedit"), UNET.batch())
    moved = {name.rpartition(".")[2] for name, grad in grads.items() if grad.any()}
    assert len(grads) == 16
    assert moved == {"up_weight", "up_bias"}


# Which skips


@pytest.mark.parametrize("skips", [[0], [1, 3], [2, 0]])
def test_a_subset_of_skips_is_edited_each_with_its_own_channels(skips):
    model = stirred(skips=skips)
    chosen = [HOSTS[i] for i in sorted(skips)]
    assert list(layers(model)) == chosen
    found = [tuple(a.down_weight.shape) for a in adapters_of(model).values()]
    assert found == [(CHANNELS[i], CHANNELS[i]) for i in sorted(skips)]
    seen = {}
    for host in HOSTS:
        norm = model.get_base_model().get_submodule(host).norm1
        norm.register_forward_pre_hook(lambda m, args, host=host: seen.update({host: args[0]}))
    joined = {}
    for host in HOSTS:
        block = model.get_base_model().get_submodule(host)
        block.register_forward_pre_hook(lambda m, args, host=host: joined.update({host: args[0]}))
    model(**UNET.batch())
    assert [h for h in HOSTS if not torch.equal(seen[h], joined[h])] == chosen


@pytest.mark.parametrize(
    ("ratio", "count"), [(1.0, 19_680_000), (0.5, 9_844_800), (0.25, 4_927_200)]
)
def test_counts_are_those_of_stable_diffusion(ratio, count):
    model = petl.wrap(build_for_diffusion(), "scedit", ratio=ratio)
    assert sum(p.numel() for p in testing.trainable(model).values()) == count


def test_the_listing_counts_the_defaults_on_stable_diffusion():
    assert counted("scedit")[0] == 19_680_000


# Memory, and where the graph ends


def kept(model: Any, batch: Any) -> int:
    """Bytes of the storages that a training pass keeps for backward, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**batch).loss
    loss.backward()
    return sum(found.values())


def test_kept_bytes_do_not_depend_on_the_encoder():
    batch = UNET.batch()
    deep = [kept(stirred(tiny_unet(more)), batch) for more in (0, 4)]
    assert deep[0] == deep[1]
    lora = [
        kept(petl.wrap(tiny_unet(more), "lora", target_modules=["to_q", "to_v"]), batch)
        for more in (0, 4)
    ]
    assert lora[0] < lora[1]  # the measure sees the encoder
    asking = {
        **batch,
        **{name: batch[name].clone().requires_grad_() for name in ("sample", "text")},
    }
    assert kept(stirred(), asking) == deep[0]
    assert asking["sample"].grad is asking["text"].grad is None


def test_a_skip_is_kept_once_and_its_bottleneck_not_at_all():
    joined = torch.randn(1, 6, 4, 4, requires_grad=True)  # of one row, a slice is contiguous
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.untyped_storage().nbytes() // 4), t)[1], lambda t: t
    ):
        adapter_of(4, 6, ratio=2.0).edited(joined)
    assert sorted(sizes) == [4, 8, 32, 32, 4 * 16]  # biases, matrices, the skip


def test_tensors_are_detached_in_training_only():
    model = stirred()
    seen = []
    block = model.get_base_model().down_blocks[0].resnets[0]
    block.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    batch = UNET.batch()
    batch["sample"].requires_grad_()
    for training in (True, False):
        model.train(training)(**batch)
    with model.disable_adapter():
        model.train()(**batch)
    assert seen == [False, True, True]  # guidance by a gradient of the sample needs the second
    model.unload()(**batch)
    assert seen[-1]


def test_nested_arguments_are_detached():
    class Nested(Plain):
        def forward(self, sample, added):
            self.seen = [sample, added["text"], *added["more"]]
            return TinyUNet.forward(self, sample, added["timestep"], added["text"])

    batch = noise_batch(2, 0)
    del batch["labels"]
    batch["text"].requires_grad_()
    sample = batch.pop("sample").requires_grad_()
    model = petl.wrap(Nested(), "scedit").train()
    model(sample, added={**batch, "more": (sample, sample)})
    assert not any(tensor.requires_grad for tensor in model.get_base_model().seen)


# Models that are no PreTrainedModel


class Plain(nn.Module):
    """The tiny U-Net as a plain module without a config."""

    forward = TinyUNet.forward

    def __init__(self) -> None:
        super().__init__()
        for name, child in tiny_unet().named_children():
            self.add_module(name, child)


def test_a_plain_module_is_saved_loaded_and_disabled(tmp_path):
    batch = UNET.batch()
    base = Plain().requires_grad_(False)(**batch).logits
    model = stirred(Plain())
    edited = model(**batch).logits
    assert not torch.allclose(edited, base)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    model.save_pretrained(tmp_path)
    again = petl.load(Plain(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, edited)
    assert torch.equal(again.unload()(**batch).logits, base)
    with pytest.raises(petl.InputError):
        petl.load(_shallow(), tmp_path)


def _shallow() -> nn.Module:
    model: Any = Plain()
    del model.up_blocks[1]
    return model


# Several adapters


def test_adapters_of_different_skips_may_be_active_together():
    model, batch = stirred(skips=[0]), UNET.batch()
    model.add_adapter("other", petl.build_config("scedit", skips=[1, 2]))
    model.add_adapter("same", petl.build_config("scedit", skips=[0]))
    one = model.eval()(**batch).logits
    model.base_model.set_adapter(["default", "other"])
    testing.stir(model, "other")
    assert not torch.allclose(model(**batch).logits, one)
    with pytest.raises(petl.InputError):
        model.base_model.set_adapter(["default", "same"])


# Refusals


def without(part: str) -> nn.Module:
    model: Any = UNET.base()
    delattr(model, part)
    return model


def narrower() -> nn.Module:
    model: Any = UNET.base()
    model.up_blocks[1].resnets[0].in_channels = 8  # as in the decoder of a VAE
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(without, "mid_block"), "TinyUNet .*mid_block"),
        (partial(without, "up_blocks"), "TinyUNet .*up_blocks"),
        (narrower, r"up_blocks\.1\.resnets\.0 .*in_channels=8"),
    ],
)
def test_models_of_another_form_are_refused(build, message):
    with pytest.raises(petl.InputError, match=message):
        petl.wrap(build(), "scedit")


def test_a_feature_map_of_another_width_is_refused():
    block = stirred().get_base_model().up_blocks[0].resnets[0]
    with pytest.raises(petl.InputError, match=r"\[1, 8, 2, 2\]"):
        block(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8))


def test_the_page_says_that_petls_loop_does_not_train_it():
    assert "not in petl train: petl has no diffusion task" in "\n".join(page_of("scedit").facts)
