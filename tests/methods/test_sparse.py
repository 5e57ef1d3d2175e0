"""Sparse fine-tuning: the layer, its budget, memory, file and errors."""

import math
import weakref

import pytest
import torch
from accelerate import Accelerator
from sparse_fixtures import (
    CYCLE,
    LINEARS,
    A,
    adamw,
    adapters,
    batches,
    randomized,
    step_through,
    trained,
    wrapped,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import petl
from petl import testing
from petl.errors import InputError, UnsupportedError
from petl.ops.sparse import BLOCK

CONTRACT = {
    "fields": {"total_step": 100},
    "acts_with": {
        ("reselection_steps", "initial_reselection_rate"): {
            "selection_accumulation_steps": 1,
            "reselection_steps": 3,
            "total_step": 8,
        },
        "total_step": {"total_step": 1},
        "num_tunable_weights": {"num_tunable_weights": 1000},
        "rank_pattern": {"rank_pattern": {"q_proj": 5, "k_proj": 1}},
        "num_deltas": {
            "target_modules": ["0.self_attn.q_proj"],
            "num_deltas": {"model.layers.0.self_attn.q_proj": 7},
        },
    },
}  # of the run; train.py fills it in

# The layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_outputs_and_gradients_are_those_of_the_dense_weight_plus_values(name):
    tiny = testing.TINY_MODELS[name]
    model = randomized(wrapped(tiny.base(), modules_to_save=[])).train()
    batch = tiny.batch()
    dense = tiny.base().train()
    for key, adapter in adapters(model).items():
        with torch.no_grad():  # in storage order, also for Conv1D
            dense.get_submodule(key).weight.view(-1)[adapter.indices.long()] += adapter.values
    output, expected = model(**batch), dense(**batch)
    torch.testing.assert_close(output.logits, expected.logits, atol=2e-5, rtol=2e-5)
    output.loss.backward()
    expected.loss.backward()
    for key, adapter in adapters(model).items():
        wanted = dense.get_submodule(key).weight.grad.view(-1)[adapter.indices.long()]
        torch.testing.assert_close(adapter.values.grad, wanted, atol=2e-5, rtol=2e-5)
    base = {n: p for n, p in model.named_parameters() if "base_layer" in n}
    assert base
    assert all(p.grad is None for p in base.values())


@pytest.mark.parametrize("reason", ["hook", "second adapter", "mixed batch"])
def test_a_base_layer_with_hooks_is_called(reason):
    """The update is then added to its output, with the same result and gradients."""
    model = randomized(wrapped())
    batch = batches(1)[0]
    expected, gradients = testing.logits(model, batch), testing.gradients(model, batch)
    calls = []
    if reason == "hook":
        for layer in testing.tuner_layers(model).values():
            layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    elif reason == "second adapter":
        model.add_adapter("zero", petl.build_config("sparse", **CYCLE))
        model.base_model.set_adapter(["zero", "default"])  # the second is added to the first
    options = {"adapter_names": ["default"] * 2} if reason == "mixed batch" else {}
    torch.testing.assert_close(testing.logits(model, batch, **options), expected, atol=2e-5, rtol=0)
    if reason == "hook":
        assert calls
    if reason != "mixed batch":
        found = testing.gradients(model, batch)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, atol=2e-5, rtol=0)


def test_values_stay_float32_and_indices_are_sorted_distinct_and_in_range():
    model = wrapped(testing.tiny_llama().bfloat16())
    for key, adapter in adapters(model).items():
        size = model.get_base_model().get_submodule(key).base_layer.weight.numel()
        found = adapter.indices.tolist()
        assert adapter.values.dtype == torch.float32
        assert adapter.indices.dtype == torch.int32
        assert found == sorted(set(found))
        assert found[0] >= 0
        assert found[-1] < size
        assert len(found) == len(adapter.values)


def test_the_random_indices_depend_on_seed_and_module_only():
    first, second, other = wrapped(), wrapped(), wrapped(init_seed=1)
    starts = [a.indices.tolist() for a in adapters(first).values()]
    torch.manual_seed(99)
    assert starts == [a.indices.tolist() for a in adapters(second).values()]
    assert starts != [a.indices.tolist() for a in adapters(other).values()]
    assert len({tuple(s) for s in starts}) == LINEARS


# The budget


def meta(kind, config):
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(scope="module")
def llama_7b():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return lambda: meta(LlamaForCausalLM, config)


@pytest.mark.parametrize(
    ("fields", "number", "trainable"),
    [({"r": 64}, 159_907_840, 159_907_744), ({"density": 0.01}, 67_384_156, 67_384_032)],
)
def test_counts_of_llama_2_7b(llama_7b, fields, number, trainable):
    base = llama_7b()
    assert sum(p.numel() for p in base.parameters()) == 6_738_415_616
    model = petl.wrap(base, "sparse", **fields)
    deltas = model.active_peft_config.num_deltas
    assert model.get_nb_trainable_parameters()[0] == sum(deltas.values()) == trainable
    sizes = {a.info.key: math.prod(a.shape) for a in adapters(model).values()}
    assert sum(sizes.values()) == 6_476_005_376
    assert deltas == {key: number * size // 6_476_005_376 for key, size in sizes.items()}
    if "r" in fields:
        assert deltas["model.layers.0.self_attn.q_proj"] == 414_269
        assert deltas["model.layers.31.mlp.down_proj"] == 1_113_347


def test_counts_of_vit_b_16():
    base = meta(ViTForImageClassification, ViTConfig(num_labels=2))
    assert sum(p.numel() for p in base.parameters()) == 85_800_194
    model = petl.wrap(base, "sparse", density=0.01)
    assert sum(model.active_peft_config.num_deltas.values()) == 857_976


def test_the_budget_counts_base_parameters_without_other_adapters():
    model = wrapped(modules_to_save=["lm_head"])
    model.add_adapter("second", petl.build_config("sparse", **CYCLE))
    assert model.peft_config["second"].num_deltas == model.peft_config["default"].num_deltas


def test_the_number_of_weights_can_be_absolute():
    model = wrapped(num_tunable_weights=5000)
    assert 5000 - LINEARS < sum(model.active_peft_config.num_deltas.values()) <= 5000


def test_num_deltas_overrides_the_rest():
    deltas = dict.fromkeys(wrapped().active_peft_config.num_deltas, 7)
    model = wrapped(num_deltas=deltas)
    assert all(len(a.values) == 7 for a in adapters(model).values())


def test_a_target_without_tunable_weights_warns_and_works():
    with pytest.warns(UserWarning, match="no tuned weights"):
        model = wrapped(num_tunable_weights=40)
    assert any(len(a.values) == 0 for a in adapters(model).values())
    step_through(model, adamw(model), [[b] for b in batches(A + 1)])


# Memory


class Bytes(TorchDispatchMode):
    """Records the bytes of new storages, and their peak."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = set(), 0, 0

    def note(self, tensors, weigh):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                size = storage.nbytes() if weigh else 0
                self.live += size
                weakref.finalize(storage, self.forget, storage._cdata, size)
        self.peak = max(self.peak, self.live)

    def forget(self, storage, size):
        self.known.discard(storage)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs), weigh=False)
        result = func(*args, **(kwargs or {}))
        self.note(result, weigh=True)
        return result


def one_linear(width, weights, **fields):
    """A model of a single square layer with `weights` tuned weights."""
    base = nn.Sequential(nn.Linear(width, width, bias=False))
    return wrapped(base, target_modules=["0"], num_tunable_weights=weights, **fields).train()


@pytest.mark.parametrize("weights", [4_000, 40_000])
def test_a_backward_with_candidates_needs_far_less_memory_than_a_dense_gradient(weights):
    width, tokens = 2048, 16
    model = one_linear(width, weights)
    petl.lifecycle(model).expect_micro_batches(1)
    loss = model(torch.randn(tokens, width)).square().sum()
    with Bytes() as counted:
        loss.backward()
    (adapter,) = adapters(model, "default").values()
    assert adapter.candidates is not None
    assert adapter.candidates.update.any()
    block, activations = 4 * BLOCK, 4 * tokens * width
    assert 4 * width**2 / 8 == 4 * BLOCK  # a row block is an eighth of the dense gradient
    assert block <= counted.peak <= block + 60 * weights + 4 * activations
    assert counted.peak < 4 * width**2 / 3
    # what remains: five tensors of the candidates, and the gradient
    assert counted.live == pytest.approx(6 * 4 * weights, abs=1000)


def test_the_map_of_tuned_weights_counts_all_adapters_of_a_module():
    model = wrapped(modules_to_save=[])
    model.add_adapter("other", petl.build_config("sparse", **CYCLE))
    model.base_model.set_adapter(["default", "other"])
    tuned, busy, *_ = petl.lifecycle(model).heat_maps()
    shape = len(tuned.rows), len(tuned.columns)
    cells = []
    for row in range(shape[0]):
        for column in range(shape[1]):
            name = f"{tuned.columns[column]}.{tuned.rows[row]}"
            (layer,) = [
                layer for key, layer in testing.tuner_layers(model).items() if key.endswith(name)
            ]
            at = torch.cat([a.indices for _, a in layer.pick(["default", "other"])]).tolist()
            inputs = [index % layer.base_layer.in_features for index in at]
            counts = sorted((inputs.count(i) for i in set(inputs)), reverse=True)
            tenth = math.ceil(layer.base_layer.in_features / 10)
            cells.append((tuned.cells[row][column], busy.cells[row][column]))
            assert cells[-1][0] == len(at)
            assert cells[-1][1] == pytest.approx(100 * sum(counts[:tenth]) / len(at))
    assert len(cells) == len(testing.tuner_layers(model))


def saved_bytes(model, x):
    """Bytes that a forward saves for backward, except its input and the frozen weight."""
    kept = {}
    given = {t.untyped_storage().data_ptr() for t in (x, model.base_model.model[0].weight)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for pointer, size in kept.items() if pointer not in given)


@pytest.mark.parametrize("weights", [100, 1000, 5000])
def test_parameters_saved_tensors_and_state_depend_on_the_tuned_weights_only(weights):
    """Bytes of each for AdamW: values, indices and two moments of 4 bytes per weight."""
    model = one_linear(128, weights)
    optimizer, lifecycle = adamw(model), petl.lifecycle(model)
    x = torch.randn(16, 128)
    for step in range(1, A + 2):  # entries were exchanged, and candidates freed
        assert saved_bytes(model, x) == 4 * weights
        model(x).square().sum().backward()
        optimizer.step()
        lifecycle.after_step(step, optimizer)
        optimizer.zero_grad()
    (values,) = trained(model)
    (adapter,) = adapters(model).values()
    assert values.nbytes == adapter.indices.nbytes == 4 * weights
    assert adapter.candidates is None
    state = [t for t in optimizer.state[values].values() if t.dim()]
    assert sum(t.nbytes for t in state) == 2 * 4 * weights
    buffers = {name: t.nbytes for name, t in model.named_buffers()}
    assert sum(buffers.values()) == 4 * weights
    assert values.grad is None
    assert model.base_model.model[0].weight.grad is None


def test_a_selection_phase_keeps_five_tensors_of_the_size_of_the_values():
    model = wrapped().train()
    step_through(model, adamw(model), [[batches(1)[0]]])
    for adapter in adapters(model).values():
        assert adapter.first is None
        kept = [t for t in vars(adapter.candidates).values() if isinstance(t, torch.Tensor)]
        assert len(kept) == 5
        assert {len(t) for t in kept} == {len(adapter.values)}


# Merging and files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_and_unmerging_is_bit_exact(dtype):
    model = randomized(wrapped(testing.tiny_llama().to(dtype)))
    batch = batches(1)[0]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = testing.logits(model, batch)
    model.merge_adapter()
    for key, adapter in adapters(model).items():
        wanted = before[f"base_model.model.{key}.base_layer.weight"].float().clone().view(-1)
        wanted[adapter.indices.long()] += adapter.values.detach()
        found = model.get_base_model().get_submodule(key).base_layer.weight
        assert torch.equal(found, wanted.to(dtype).view_as(found))
    assert torch.equal(testing.logits(model, batch), expected)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_the_file_has_the_indices_and_the_config_the_counts(tmp_path):
    model = wrapped()
    step_through(model, adamw(model), [[b] for b in batches(A + 1)])
    model.save_pretrained(tmp_path)
    loaded = petl.load(testing.tiny_llama(), tmp_path)
    assert loaded.active_peft_config.num_deltas == model.active_peft_config.num_deltas
    for a, b in zip(adapters(model).values(), adapters(loaded).values(), strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.values, b.values)
    batch = batches(1)[0]
    assert torch.equal(testing.logits(loaded, batch), testing.logits(model, batch))


# Errors


def test_a_run_without_total_step_raises_before_it_begins():
    model = wrapped(total_step=None)
    lifecycle = petl.lifecycle(model)
    with pytest.raises(InputError):
        lifecycle.attach_optimizer(adamw(model))
    with pytest.raises(InputError):
        lifecycle.after_step(1, None)


def test_unsupported_optimizers_raise():
    model, by_sm3 = wrapped(), wrapped(selection_algorithm="sm3")
    own, other = petl.lifecycle(model), petl.lifecycle(by_sm3)
    scaled = Accelerator(cpu=True).prepare(adamw(model))
    scaled.scaler = torch.amp.GradScaler("cpu")
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    for words, call in (
        ("pass the optimizer", lambda: own.after_step(1)),
        ("the values", lambda: own.after_step(1, stranger)),
        ("fp16", lambda: own.after_step(1, scaled)),
        ("fp16", lambda: own.attach_optimizer(scaled)),
        ("SparseSM3.* AdamW", lambda: other.attach_optimizer(adamw(by_sm3))),
        ("SparseSM3.* AdamW", lambda: other.after_step(1, adamw(by_sm3))),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_8_bit_state_and_sharded_values_raise_before_any_exchange():
    model = wrapped()
    optimizer = adamw(model)
    step_through(model, optimizer, [[b] for b in batches(A)], stop=A - 1)
    before = [a.indices.clone() for a in adapters(model).values()]
    for p in trained(model):
        optimizer.state[p]["state1"] = torch.zeros(p.shape, dtype=torch.uint8)
    model(**batches(1)[0]).loss.backward()
    with pytest.raises(UnsupportedError):
        petl.lifecycle(model).after_step(A, optimizer)
    assert all(
        torch.equal(a.indices, b) for a, b in zip(adapters(model).values(), before, strict=True)
    )
    adapter = next(iter(adapters(model).values()))
    adapter.values.data = adapter.values.data[:0]  # as under ZeRO-3
    with pytest.raises(UnsupportedError):
        petl.lifecycle(model).after_step(A, optimizer)
