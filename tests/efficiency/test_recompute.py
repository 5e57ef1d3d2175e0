"""`petl.recompute_mlp`: bit-exact results, with half of the saved activations of MLPs."""

import copy
from dataclasses import replace

import pytest
import torch
from bench.counters import count
from bench.shapes import LLAMA, MINILM, Bench

import petl

SMALL = {"hidden": 64, "heads": 4, "ff": 96, "layers": 2, "vocabulary": 200}
SMALL |= {"rows": 2, "length": 16}
SHAPES = {
    "gated": replace(LLAMA, **SMALL, kv_heads=2),
    "plain": replace(MINILM, **SMALL, kv_heads=4),
}
TARGETS = {"target_modules": "block-linear"}


def wrapped(shape, method="lora", **fields):
    bench = Bench(shape)
    torch.manual_seed(0)
    model = petl.wrap(bench.twin(), method, task_type=shape.task_type, **TARGETS, **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    petl.fuse_lora(model)
    return bench, model.train()


def step(bench, model):
    torch.manual_seed(1)  # of dropout
    loss = bench.step(model)()
    return loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def same(one, other):
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("form", SHAPES)
def test_an_mlp_saves_only_the_inputs_of_its_activation(form):
    bench, model = wrapped(SHAPES[form])
    shape = bench.shape
    before = count(bench.step(model), model, bench.batch.values()).kept
    petl.recompute_mlp(model)
    after = count(bench.step(model), model, bench.batch.values()).kept
    spared = {"gated": 2, "plain": 1}[form]
    assert before - after == 4 * spared * shape.ff * shape.layers * shape.tokens


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_saves_no_more_and_gives_the_same(form, reentrant):
    bench, model = wrapped(SHAPES[form])
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plain = step(bench, model)

    def held():
        """Return the bytes alive after the forward pass alone."""
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**bench.batch).loss
        kept = sum(t.untyped_storage().nbytes() for t in sizes.values())
        loss.backward()
        return kept

    before = held()
    petl.recompute_mlp(model)
    assert held() <= before
    assert same(step(bench, model), plain)


@pytest.mark.parametrize("form", SHAPES)
def test_two_adapters_autocast_and_pefts_layers_work(form):
    bench, model = wrapped(SHAPES[form], lora_dropout=0.3)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(bench, model.train())
        petl.recompute_mlp(model)
        assert same(step(bench, model), plain)


def test_an_activation_with_a_hook_is_called():
    bench, model = wrapped(SHAPES["gated"])
    petl.recompute_mlp(model)
    seen = []
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn.register_forward_hook(lambda m, args, out: seen.append(out))
    step(bench, model)
    assert seen
    assert all(out.requires_grad for out in seen)
