"""Importance of blocks: metrics against plain formulas, what counts, and what stays as it was."""

import math

import pytest
import torch
from torch import nn

import petl
from petl import testing
from petl.errors import InputError
from petl.system import collectives as distributed
from petl.training.ranks import METRICS, block_importance
from petl.training.ranks.importance import blocks_of


class Turn(nn.Module):
    """A block with a linear layer that maps x by a given function, and returns a tuple."""

    def __init__(self, turned):
        super().__init__()
        self.linear, self.turned = nn.Linear(4, 4), turned

    def forward(self, hidden_states, scale=1.0):
        return (self.turned(hidden_states), None)


class Toy(nn.Module):
    """Blocks one after the other, then a norm."""

    def __init__(self, *turns):
        super().__init__()
        self.layers = nn.ModuleList(map(Turn, turns))
        self.norm = nn.LayerNorm(4)

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(hidden_states=x)[0]
        return self.norm(x)


def quarter(x):
    return torch.stack([-x[..., 1], x[..., 0], -x[..., 3], x[..., 2]], dim=-1)


def by_hand(metric, x, y):
    """The metric of two lists of numbers, as the authors' code has it, in float64."""
    pairs = list(zip(x, y, strict=True))
    if metric == "mse":
        return sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    if metric == "mae":
        return sum(abs(a - b) for a, b in pairs) / len(pairs)
    dot = sum(a * b for a, b in pairs)
    cosine = dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return 1 - cosine if metric == "cosine" else math.acos(cosine) / math.pi


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_is_the_mean_of_the_authors_formula_over_tokens(metric):
    model = Toy(lambda x: x + 0.5, lambda x: x * torch.tensor([1.0, 2.0, -1.0, 0.5]))
    x = torch.randn(2, 5, 4)
    found = block_importance(model, [{"x": x}], metric)
    tokens = x.double().reshape(-1, 4).tolist()
    for layer, path in zip(model.layers, ("layers.0", "layers.1"), strict=True):
        turned = [layer.turned(torch.tensor(t)).tolist() for t in tokens]
        expected = [by_hand(metric, t, u) for t, u in zip(tokens, turned, strict=True)]
        assert found[path] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        tokens = turned


def test_identity_is_exactly_0_negation_1_and_a_quarter_turn_a_half():
    model = Toy(lambda x: 3 * x, lambda x: x, lambda x: -x, quarter)
    found = block_importance(model, [{"x": torch.randn(3, 7, 4)}])
    assert found["layers.1"] == 0
    assert found["layers.0"] == pytest.approx(0, abs=1e-7)  # 3 x is rounded
    assert found["layers.2"] == 1
    assert found["layers.3"] == pytest.approx(0.5, abs=1e-7)


def test_zeros_have_no_direction_and_give_no_nan():
    model = Toy(lambda x: x, lambda x: x + 1)
    found = block_importance(model, [{"x": torch.zeros(1, 2, 4)}])
    assert found == {"layers.0": 0, "layers.1": pytest.approx(0.5)}


def test_the_last_block_is_measured_before_the_final_norm():
    model = testing.tiny_llama(2).eval()
    ids = torch.randint(5, 50, (1, 6))
    with torch.no_grad():  # the norm undone: its output is no multiple of the block's
        states = model(ids, output_hidden_states=True).hidden_states
        last = model.model.layers[1](
            states[1],
            position_embeddings=model.model.rotary_emb(states[1], torch.arange(6)[None]),
            attention_mask=None,
        )
    last = last if isinstance(last, torch.Tensor) else last[0]
    pairs = zip(states[1][0].tolist(), last[0].tolist(), strict=True)
    expected = sum(by_hand("cosine", x, y) for x, y in pairs) / 6
    found = block_importance(model, [{"input_ids": ids}], "cosine")
    assert list(found) == ["model.layers.0", "model.layers.1"]
    assert found["model.layers.1"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_neither_padding_nor_batching_changes_the_mean(family):
    model = testing.tiny_llama(2) if family == "llama" else testing.tiny_bert(2)
    rows = [torch.randint(5, 50, (length,)) for length in (3, 8, 5)]
    single = [{"input_ids": row[None]} for row in rows]
    padded = torch.stack([torch.cat([row, torch.zeros(8 - len(row)).long()]) for row in rows])
    mask = torch.tensor([[int(i < len(row)) for i in range(8)] for row in rows])
    together = [{"input_ids": padded, "attention_mask": mask}]
    expected = block_importance(model, single)
    found = block_importance(model, together)
    assert found == {path: pytest.approx(value, rel=1e-4) for path, value in expected.items()}
    without = block_importance(model, [{"input_ids": padded}])
    assert any(abs(without[path] / expected[path] - 1) > 1e-3 for path in expected)


def test_encoder_and_decoder_are_in_one_table_with_masks_of_their_own():
    model = testing.tiny_t5(2)
    rows = [(torch.randint(5, 50, (4,)), torch.randint(5, 50, (n,))) for n in (2, 4)]
    single = [{"input_ids": x[None], "labels": y[None]} for x, y in rows]
    labels = torch.stack([torch.cat([y, torch.full((4 - len(y),), -100)]) for _, y in rows])
    # as many target tokens as source tokens: lengths do not tell which mask is whose
    batch = {
        "input_ids": torch.stack([x for x, _ in rows]),
        "attention_mask": torch.ones(2, 4).long(),
        "labels": labels,
    }
    expected, found = block_importance(model, single), block_importance(model, [batch])
    assert list(found) == [f"{s}.block.{i}" for s in ("encoder", "decoder") for i in (0, 1)]
    assert found == {path: pytest.approx(value, rel=1e-4) for path, value in expected.items()}


def test_two_processes_give_the_mean_over_all_tokens(monkeypatch):
    model = testing.tiny_llama(2)
    batches = [{"input_ids": torch.randint(5, 50, (1, n))} for n in (3, 9, 4)]
    whole = block_importance(model, batches)
    sent = []
    monkeypatch.setattr(distributed, "gathered", lambda value: (sent.append(value), [value])[1])
    block_importance(model, batches[:2])
    monkeypatch.setattr(distributed, "gathered", lambda value: [*sent, value])
    found = block_importance(model, batches[2:])
    assert found == {path: pytest.approx(value, rel=1e-6) for path, value in whole.items()}


def test_nothing_is_left_behind_also_after_an_error():
    model = testing.tiny_llama(2).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def batches():
        yield {"input_ids": torch.randint(5, 50, (2, 4))}
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        block_importance(model, batches())
    block_importance(model, [{"input_ids": torch.randint(5, 50, (2, 4))}])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_peft_model_in_bfloat16_is_measured_as_it_computes():
    ids = {"input_ids": torch.randint(5, 50, (1, 8))}
    base = testing.tiny_llama(2).to(torch.bfloat16)
    plain = block_importance(base, [ids])
    model = petl.wrap(base, "lora", r=2)
    assert block_importance(model, [ids]) == plain  # B = 0
    testing.stir(model)
    found = block_importance(model, [ids])
    assert list(found) == list(plain)  # paths in the base model
    assert found != plain


def test_blocks_are_entries_of_outermost_lists_with_linear_layers():
    model = nn.Module()
    expert = nn.Module()
    expert.experts = nn.ModuleList([Turn(None), Turn(None)])
    model.layers = nn.ModuleList([expert])
    model.convolutions = nn.ModuleList([nn.Sequential(nn.Conv1d(2, 2, 1))])
    model.heads = nn.ModuleList([nn.Linear(2, 2)])
    assert list(blocks_of(model)) == ["layers.0"]
    assert list(blocks_of(testing.tiny_gpt2(2))) == ["transformer.h.0", "transformer.h.1"]


def with_others():
    model = Toy(torch.neg)
    model.others = nn.ModuleList([Turn(torch.neg)])
    return model


def shrink(x):
    return x[..., :2]


@pytest.mark.parametrize(
    ("model", "batches", "metric", "message"),
    [
        (Toy(), [], "angular", "Toy"),
        (Toy(torch.neg), [], "angular", "no batches"),
        (Toy(torch.neg), [{"x": torch.ones(1, 4)}], "angle", "'angle'"),
        (Toy(shrink), [{"x": torch.ones(1, 4)}], "mse", r"shape \[1, 4\] into \[1, 2\]"),
        (Toy(torch.log), [{"x": -torch.ones(1, 4)}], "mse", "layers.0 has mse=nan"),
        (nn.Linear(2, 2), [{"x": torch.ones(1, 2)}], "mse", "Linear"),
        (with_others(), [{"x": torch.ones(1, 4)}], "angular", r"others\.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, batches, metric, message):
    with pytest.raises(InputError, match=message):
        block_importance(model, batches, metric)
