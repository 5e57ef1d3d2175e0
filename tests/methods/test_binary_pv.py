"""Steps on codes (steps=pv), against loops over single weights straight from the equations."""

import math
from itertools import product

import pytest
import torch
from binary_fixtures import LORA, MOS, logits, stir, trained, wrapped
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import petl
from petl.core.adapter_file import WEIGHTS
from petl.errors import InputError
from petl.methods.binary import quantizer_of
from petl.ops.quantize import pv_codes
from petl.testing.models import TINY_MODELS, tiny_llama

BOOKS = {  # the paper's table, ascending
    1: [-0.674490, 0.674490],
    2: [-1.265720, -0.377754, 0.377754, 1.265720],
}
SCALES = {"inner": "ia3", "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def batch():
    return TINY_MODELS["llama"].batch()


def step_of_codes(codes, target, mu, sigma, bits, fraction, trust):
    """The V step, entry by entry."""
    values = [sigma * code + mu for code in BOOKS[bits]]
    best = [min(range(2**bits), key=lambda k, t=t: abs(t - values[k])) for t in target]
    due = [i for i in range(len(codes)) if best[i] != codes[i]]
    due.sort(key=lambda i: (-abs(target[i] - values[codes[i]]), i))
    bound, moved, new = math.inf, 0.0, list(codes)
    if trust is not None:
        bound = trust**2 * sum(values[code] ** 2 for code in codes)
    for place, i in enumerate(due[: math.ceil(fraction * len(codes))]):
        moved += (values[best[i]] - values[codes[i]]) ** 2
        if place and moved > bound:
            break
        new[i] = best[i]
    return new


@pytest.mark.parametrize("trust", [None, 0.05, 0.4, 3.0])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.every_cell
def test_few_codes_change_the_farthest_of_those_that_are_due(bits, fraction, trust):
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (5, 9), generator=draw)
    # few different targets: most distances are equal, and order goes by index
    target = torch.tensor([-3.0, -0.7, -0.1, 0.41, 0.9, 2.5])[
        torch.randint(6, (5, 9), generator=draw)
    ]
    mu, sigma, before = torch.tensor(0.25), torch.tensor(0.8), codes.clone()
    new = pv_codes(codes.to(torch.uint8), target, mu, sigma, bits, fraction=fraction, trust=trust)
    given = codes.flatten().tolist(), target.flatten().tolist(), 0.25, 0.8
    assert new.flatten().tolist() == step_of_codes(*given, bits, fraction, trust)
    assert (new.dtype, new.shape) == (torch.int64, codes.shape)
    assert torch.equal(codes, before)


def test_codes_that_are_nearest_stay_however_far_their_target_is():
    codes, target = torch.tensor([0, 1, 1, 0]), torch.tensor([-9.0, 9.0, -0.1, -0.2])
    new = pv_codes(codes, target, torch.tensor(0.0), torch.tensor(1.0), 1, fraction=0.25)
    assert new.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bits": 3}, "bits=3 .*1, 2, 4, 8"),
        ({"bits": "1"}, "bits='1'"),
        *(({"fraction": wrong}, f"fraction={wrong!r}") for wrong in (0, -1, 2.0, "a")),
        *(({"trust": wrong}, f"trust={wrong!r}") for wrong in (0.0, "x")),
        ({"target": torch.zeros(5)}, r"\[5\] and codes \[4\]"),
        ({"codes": torch.tensor([0, 1, 2, 0])}, "0 to 1"),
        ({"codes": torch.tensor([0, 1, -1, 0]), "bits": 2}, "0 to 3"),
        ({"codes": torch.zeros(4)}, "float32"),
    ],
)
def test_codes_and_values_that_do_not_fit_are_refused(wrong, words):
    given = {"codes": torch.zeros(4).long(), "target": torch.zeros(4), "bits": 1}
    with pytest.raises(InputError, match=words):
        pv_codes(mu=torch.tensor(0.0), sigma=torch.tensor(1.0), **(given | wrong))


def weights_of(model, name="default"):
    return quantizer_of(model).quantized_weights[name]


def steps(model, batch, count, *, first=1, lr=1e-2, optimizer=None, parts=None):
    """Train as a loop of one's own with the lifecycle; return the optimizer."""
    life = petl.lifecycle(model.train())
    if optimizer is None:
        optimizer = life.make_optimizer([{"params": [*trained(model).values()], "lr": lr}])
    life.attach_optimizer(optimizer, first - 1)
    for step in range(first, first + count):
        for part in parts or [batch]:
            (model(**part).loss / len(parts or [batch])).backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.3}])
def test_only_what_is_not_coded_decays(batch, decay):
    model = stir(wrapped(**LORA, steps="pv", exclude_params=["lora_B"]))
    parameters = trained(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    group = {"params": [*parameters.values()], "lr": 0.1, **decay}
    optimizer = petl.lifecycle(model).make_optimizer([group])
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    factor = 1 - 0.1 * decay.get("weight_decay", 0.01)  # that of AdamW
    for name, parameter in parameters.items():
        left = factor if "lora_B" in name else 1.0
        torch.testing.assert_close(parameter.detach(), left * before[name])
    stats = {id(w.stats) for w in weights_of(model)}
    rates = {g["lr"] for g in optimizer.param_groups if {*map(id, g["params"])} & stats}
    assert rates == {0.1}


def test_gradients_reach_mean_deviation_and_buffer():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5))
    model = petl.wrap(
        base, "binary", inner="lora", r=2, lora_alpha=6, target_modules=["0"], bits=2, steps="pv"
    )
    x, direction = torch.randn(7, 6), torch.randn(7, 5)
    (model(x) * direction).sum().backward()
    A, B = weights_of(model)
    codes = [torch.tensor(BOOKS[2])[w.codes.long()] for w in (A, B)]
    values = [w.stats[1] * c + w.stats[0] for w, c in zip((A, B), codes, strict=True)]
    expected = 3 * values[1].T @ direction.T @ x, 3 * direction.T @ x @ values[0].T
    for w, c, G in zip((A, B), codes, expected, strict=True):
        torch.testing.assert_close(w.weight.grad, G, atol=1e-5, rtol=1e-4)
        both = torch.stack([G.sum(), (G * c).sum()])
        torch.testing.assert_close(w.stats.grad, both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [LORA, {**MOS, "bits": 4}, {"r": 4}, SCALES])
def test_the_first_forward_is_that_of_straight_through(batch, fields):
    coded = wrapped(**fields, steps="pv")
    assert torch.equal(logits(coded, batch), logits(wrapped(**fields), batch))
    for w in weights_of(coded):
        assert torch.equal(w.weight, w.read())


def test_without_memory_a_step_rounds_where_plain_descent_goes(batch):
    model = wrapped(**LORA, steps="pv", pv_fraction=1.0, pv_decay=1.0)
    before = [w.read().detach().clone() for w in weights_of(model)]
    rate = 40.0
    optimizer = torch.optim.SGD([w.weight for w in weights_of(model)], lr=rate)
    model.train()(**batch).loss.backward()
    gradients = [w.weight.grad.clone() for w in weights_of(model)]
    optimizer.step()
    petl.lifecycle(model).after_step(1, optimizer)
    changed = 0
    for w, old, G in zip(weights_of(model), before, gradients, strict=True):
        mu, sigma = w.stats.tolist()
        goal = (old - rate * G - mu) / sigma
        nearest = (goal.unsqueeze(-1) - torch.tensor(BOOKS[1])).abs().argmin(-1)
        assert torch.equal(w.codes.long(), nearest)
        assert torch.equal(w.weight, w.read())
        changed += int((w.read() != old).sum())
    assert changed > 0


def test_a_step_changes_at_most_its_fraction_and_logs_what_it_did(batch):
    model = wrapped(**LORA, steps="pv", pv_fraction=0.03, pv_lr_ratio=7.0, bits=2)
    life, optimizer, seen = petl.lifecycle(model), None, 0
    for step in range(1, 5):
        before = [w.codes.clone() for w in weights_of(model)]
        optimizer = steps(model, batch, 1, first=step, optimizer=optimizer)
        changed = [
            int((w.codes != old).sum()) for w, old in zip(weights_of(model), before, strict=True)
        ]
        sizes = [old.numel() for old in before]
        assert all(n <= math.ceil(0.03 * N) for n, N in zip(changed, sizes, strict=True))
        logged = life.metrics()
        assert logged["codes_changed"] == pytest.approx(sum(changed) / sum(sizes))
        seen += sum(changed)
    apart = sum(float((w.weight - w.read()).detach().square().sum()) for w in weights_of(model))
    norm = sum(float(w.read().detach().square().sum()) for w in weights_of(model))
    assert logged["distance"] == pytest.approx(math.sqrt(apart / norm), rel=1e-4)
    assert seen > 0
    rates = {group["lr"]: group for group in optimizer.param_groups}
    buffers = rates.pop(7e-2)
    assert buffers["betas"] == (0.0, 0.95)
    assert {id(p) for p in buffers["params"]} == {id(w.weight) for w in weights_of(model)}
    assert [id(p) for p in rates[1e-2]["params"]] == [id(w.stats) for w in weights_of(model)]


def test_micro_batches_are_one_step(batch):
    whole, parts = (wrapped(**LORA, steps="pv", pv_fraction=0.2) for _ in range(2))
    # plain descent: Adam's first step takes the sign of a rounding error too
    for model, micro in ((whole, None), (parts, [batch, batch])):
        before = [w.codes.clone() for w in weights_of(model)]
        optimizer = torch.optim.SGD(trained(model).values(), lr=20.0)
        steps(model, batch, 1, optimizer=optimizer, parts=micro)
        changed = [(w.codes != c).sum() for w, c in zip(weights_of(model), before, strict=True)]
        assert sum(changed) > 0
    for one, two in zip(weights_of(whole), weights_of(parts), strict=True):
        assert torch.equal(one.codes, two.codes)
        torch.testing.assert_close(one.weight, two.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    "fields",
    [LORA, {**MOS, "bits": 2}, SCALES],
    ids=["lora", "mos", "dicts"],
)
def test_files_have_codes_and_statistics_and_load_into_both_kinds(batch, tmp_path, fields):
    model = wrapped(**fields, steps="pv", pv_fraction=0.1)
    steps(model, batch, 2)
    out = logits(model.eval(), batch)
    for form in ("packed", "stacked"):
        model.peft_config["default"].save_format = form
        model.save_pretrained(tmp_path / form)
        loaded = petl.load(tiny_llama(), tmp_path / form, adapter_name="other")
        assert torch.equal(logits(loaded, batch), out)
        loaded.save_pretrained(tmp_path / "again")
        first, again = (
            load_file(folder / WEIGHTS)
            for folder in (tmp_path / form, tmp_path / "again" / "other")
        )
        assert {k: t.tolist() for k, t in again.items()} == {
            k: t.tolist() for k, t in first.items()
        }
    plain = wrapped(**fields)
    plain.save_pretrained(tmp_path / "plain")
    sizes = [
        {name: (t.dtype, t.shape) for name, t in load_file(tmp_path / f / WEIGHTS).items()}
        for f in ("plain", "packed")
    ]
    assert sizes[0] == sizes[1]
    config = tmp_path / "packed" / "adapter_config.json"
    config.write_text(config.read_text().replace('"pv"', '"straight_through"'))
    assert torch.equal(logits(petl.load(tiny_llama(), tmp_path / "packed"), batch), out)
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(config.read_text().replace('"straight_through"', '"pv"'))
    with pytest.warns(UserWarning, match="start anew"):
        trains = petl.load(tiny_llama(), tmp_path / "plain", is_trainable=True)
    assert torch.equal(logits(trains, batch), logits(plain, batch))
    for w in weights_of(trains):
        assert torch.equal(w.weight, w.read())


def test_latent_weights_of_straight_through_are_where_codes_start(batch, tmp_path):
    plain = wrapped(**LORA, save_format="latent")
    plain.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"straight_through"', '"pv"'))
    coded = wrapped(**LORA, steps="pv")
    coded.load_adapter(tmp_path, "second", is_trainable=True)
    coded.set_adapter("second")
    assert torch.equal(logits(coded, batch), logits(plain, batch))


def test_resumed_training_equals_a_straight_run(batch, tmp_path):
    fields = {**LORA, "steps": "pv", "pv_fraction": 0.1, "pv_trust": 0.2, "pv_decay": 0.1}
    straight = wrapped(**fields)
    steps(straight, batch, 5)
    model = wrapped(**fields)
    optimizer = steps(model, batch, 2)
    with petl.lifecycle(model).resumable():
        model.save_pretrained(tmp_path)
    resumed = petl.load(tiny_llama(), tmp_path, is_trainable=True)
    own = petl.lifecycle(resumed).make_optimizer(
        [{"params": [*trained(resumed).values()], "lr": 1e-2}]
    )
    own.load_state_dict(optimizer.state_dict())
    steps(resumed, batch, 3, first=3, optimizer=own)
    state = straight.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in resumed.state_dict().items())
    assert any(int((w.weight != w.read()).sum()) for w in weights_of(straight))


def test_adapters_with_other_bits_and_steps_train_apart(batch):
    pattern = {"model.model.layers.0.self_attn.q_proj.lora_A.weight": 4}
    model = wrapped(**LORA, steps="pv", bits_pattern=pattern)
    assert sorted(w.bits for w in weights_of(model)) == [1] * 11 + [4]
    model.add_adapter("second", petl.build_config("binary", **LORA, bits=2, steps="pv"))
    model.add_adapter("third", petl.build_config("binary", **LORA))
    first = [w.codes.clone() for w in weights_of(model)]
    model.set_adapter("second")
    before = [w.codes.clone() for w in weights_of(model, "second")]
    steps(model, batch, 2)
    assert all(torch.equal(w.codes, c) for w, c in zip(weights_of(model), first, strict=True))
    after = [w.codes for w in weights_of(model, "second")]
    assert sum(int((a != b).sum()) for a, b in zip(after, before, strict=True)) > 0
    model.set_adapter("default")
    steps(model, batch, 1)
    assert any(not torch.equal(w.codes, c) for w, c in zip(weights_of(model), first, strict=True))
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]


def test_tensors_beside_a_dict_of_peft_train_and_go_with_their_adapter(batch):
    model = wrapped(**SCALES, steps="pv", pv_fraction=0.1)
    model.add_adapter("second", petl.build_config("binary", **SCALES, steps="pv"))
    assert all(w.stats.requires_grad for w in weights_of(model))
    assert not any(w.stats.requires_grad for w in weights_of(model, "second"))
    model.set_adapter("second")
    assert all(w.stats.requires_grad for w in weights_of(model, "second"))
    model.delete_adapter("default")
    assert not [name for name in model.state_dict() if "default" in name]
    steps(model, batch, 1)


def test_a_toy_quadratic_reaches_the_best_of_all_codes():
    """|W - goal|^2 over 8 weights of 1 bit, by the steps of a P and a V step in turn."""
    torch.manual_seed(3)
    goal = torch.randn(8)
    best = min(
        float((goal - fit(torch.tensor(codes), goal)).square().sum())
        for codes in product([0, 1], repeat=8)
    )
    base = nn.Linear(4, 4, bias=False)
    model = petl.wrap(
        nn.Sequential(base),
        "binary",
        inner="lora",
        r=2,
        target_modules=["0"],
        steps="pv",
        pv_decay=1.0,
        pv_fraction=0.2,
        exclude_params=["lora_B"],
    )
    (w,) = weights_of(model)
    life = petl.lifecycle(model)
    optimizer = torch.optim.SGD(
        [{"params": [w.weight], "lr": 0.5}, {"params": [w.stats], "lr": 0.05}]
    )
    for step in range(1, 200):
        model.train()
        with torch.enable_grad():
            value = w.read()
            loss = (value.flatten() - goal).square().sum()
        loss.backward()
        optimizer.step()
        life.after_step(step, optimizer)
        optimizer.zero_grad()
    assert float((w.read().detach().flatten() - goal).square().sum()) == pytest.approx(
        best, rel=1e-3
    )


def fit(codes, goal):
    """The values `sigma c + mu` nearest to the goal, with sigma at least 0."""
    signs = torch.tensor(BOOKS[1])[codes]
    apart = signs - signs.mean()
    sigma = (apart @ goal / apart.square().sum().clamp(min=1e-9)).clamp(min=0)
    return sigma * apart + goal.mean()


def test_a_deviation_stays_above_zero(batch):
    model = wrapped(**LORA, steps="pv")
    with torch.no_grad():
        for w in weights_of(model):
            w.stats[1] = -0.3
    petl.lifecycle(model).after_step(1)
    assert all(0 < w.stats[1] <= 1e-8 for w in weights_of(model))


def test_a_loop_without_the_callback_raises_before_the_third_forward(batch, tmp_path):
    rows = [{key: t[i] for key, t in batch.items()} for i in range(4)]

    def run(callbacks):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=9, report_to=[], use_cpu=True
        )
        model = wrapped(**LORA, steps="pv")
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        return trainer.state.global_step

    with pytest.raises(InputError):
        run([])
    assert run([petl.Callback()]) == 4
