"""Draft heads: their formulas as loops, what they cost, and that decoding stays what it was."""

import math
from itertools import product
from operator import mul

import pytest
import torch
from draft_fixtures import DECODERS, PAD, VOCABULARY, prompt
from torch.nn.functional import silu

import petl
from petl import testing
from petl.efficiency.drafting import Costs, Root, Stats, answers, decode, drafter, fit
from petl.errors import UnsupportedError

KINDS = ("recurrent", "sequential", "parallel")
PLAIN = {"max_new_tokens": 24, "pad_token_id": PAD, "use_cache": True}


@pytest.fixture(scope="module")
def model():
    return testing.tiny_llama()


@pytest.fixture(scope="module")
def written(model):
    return answers(model, [prompt(i)[0].tolist() for i in range(12)], tokens=20)


def randomized(guess, seed=0):
    """The drafter with random weights in all places."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in guess.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return guess


def random_inputs(count, i):
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(count, 64, generator=generator)
    return h, torch.randint(VOCABULARY, (count, i), generator=generator)


# Check 1: formulas, counts, start


def block_by_hand(state, prefix, z):
    """A residual block: rows of weights one after the other."""
    z = z.tolist()
    found = []
    for o in range(64):
        lin = sum(map(mul, state[f"{prefix}.lin_weight"][o].tolist(), z))
        lin += float(state[f"{prefix}.lin_bias"][o])
        kept = z[o]
        if f"{prefix}.res_weight" in state:
            kept = sum(map(mul, state[f"{prefix}.res_weight"][o].tolist(), z))
            kept += float(state[f"{prefix}.res_bias"][o])
        found.append(kept + lin / (1 + math.exp(-lin)))
    return torch.tensor(found)


def logits_by_hand(guess, model, h, after):
    """Logits of one position, [D], from the equations."""
    state, table = guess.state_dict(), model.get_input_embeddings().weight.detach()
    if guess.kind == "recurrent":
        s = h
        for token in after.tolist():
            z = torch.cat([s, state["scale"] * table[token]])
            inner = silu(state["cell.in_weight"] @ z + state["cell.in_bias"])
            s = s + state["cell.out_weight"] @ inner + state["cell.out_bias"]
        mean = sum(float(v) ** 2 for v in s) / 64
        y = torch.tensor([*map(mul, state["cell.norm"].tolist(), s.tolist())])
        y = y / (mean + 1e-6) ** 0.5
    else:
        z = h if guess.kind == "parallel" else torch.cat([h, *(table[t] for t in after.tolist())])
        y = block_by_hand(state, f"blocks.{len(after) - 1}.0", z)
        for layer in range(1, guess.fields["layers"]):
            y = block_by_hand(state, f"blocks.{len(after) - 1}.{layer}", y)
    rows = model.get_output_embeddings().weight.detach()
    return torch.stack([rows[token] @ y for token in state["vocab"].tolist()])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "layers"), [("recurrent", 1), ("sequential", 1), ("sequential", 2), ("parallel", 2)]
)
def test_logits_are_those_of_the_equations(model, kind, layers):
    guess = randomized(drafter("hydra", model=model, kind=kind, layers=layers, draft_vocab=20))
    for i in (1, 2, 3):
        h, after = random_inputs(2, i)
        found = guess.head_logits(h, after)
        assert found.shape == (2, 20)
        for row in range(2):
            expected = logits_by_hand(guess, model, h[row], after[row])
            assert torch.allclose(found[row], expected, atol=2e-4)


def count(guess):
    return sum(p.numel() for p in guess.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_as_many_as_the_equations_have(model, kind):
    H, K = 64, 3
    expected = {
        "parallel": K * (H * H + H),
        "sequential": sum(2 * (i + 1) * H * H + 2 * H for i in range(1, K + 1)),
        "recurrent": 4 * H * H + 2 * H + 2 * H * H + H + H,
    }
    guess = drafter("hydra", model=model, kind=kind)
    assert count(guess) == expected[kind]
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in guess.parameters()}
    if kind != "recurrent":
        more = drafter("hydra", model=model, kind=kind, layers=3)
        assert count(more) - count(guess) == K * 2 * (H * H + H)
    whole = drafter("hydra", model=model, kind=kind, own_head=True, draft_vocab=30)
    assert count(whole) - count(guess) == K * 30 * H


def test_counts_of_smollm2_are_those_of_the_method():
    from petl.efficiency.drafting.heads import Cell, DraftHead

    H = 576
    assert count(Cell(H)) == 1_992_960
    assert sum(count(DraftHead(H, i)) for i in (1, 2, 3)) == 5_975_424
    assert sum(count(DraftHead(H, 0)) for _ in range(3)) == 997_056


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_state_is_normalized_in_half_precision(dtype):
    from petl.efficiency.drafting.heads import Cell

    state = torch.ones(2, 64)
    state[0, 3] = 300.0  # its square is above the largest number of float16
    expected = state / state.square().mean(-1, keepdim=True).sqrt()
    found = Cell(64).to(dtype).output(state.to(dtype)).float()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_begin_with_the_models_own_guess(model, kind, prefix):
    guess = drafter("hydra", model=model, kind=kind, prefix=prefix, layers=1, draft_vocab=30)
    h, after = random_inputs(5, 3)
    read = h if not prefix else guess.reader.whole(h)
    assert torch.allclose(read, h)
    expected = model.lm_head(h)[:, :30]
    if kind == "recurrent":
        expected = expected / h.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    for i in (1, 2, 3):
        assert torch.allclose(guess.head_logits(read, after[:, :i]), expected, atol=1e-5)


def test_the_start_depends_on_the_seed_alone(model):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = drafter("hydra", model=model, prefix=True).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (drafter("hydra", model=model, prefix=True, seed=s).state_dict() for s in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["cell.in_weight"], other["cell.in_weight"])


def test_an_adapted_head_is_read_with_its_adapter():
    adapted = petl.wrap(testing.tiny_llama(), "lora", target_modules=["lm_head", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    guess = drafter("hydra", model=adapted, kind="sequential", draft_vocab=30)
    h, after = random_inputs(5, 2)
    found = guess.head_logits(h, after)
    base = adapted.get_base_model()
    assert torch.allclose(found, base.lm_head(h)[:, :30], atol=1e-5)
    plain = base.lm_head.get_base_layer()(h)[:, :30]
    assert not torch.allclose(found, plain, atol=1e-2)
    # the second token's embedding, adapter included
    guess.blocks[1][0].res_weight.data[:, 128:] = torch.eye(64)
    expected = base.lm_head(h + base.model.embed_tokens(after[:, 1]))[:, :30]
    found = guess.head_logits(h, after)
    assert torch.allclose(found, expected, atol=1e-4)
    found.sum().backward()
    assert all(p.grad is None for p in adapted.parameters())
    with pytest.raises(UnsupportedError):
        drafter("hydra", model=adapted, own_head=True)


# Check 2: gradients, and one seed


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_heads_and_nothing_of_the_model(model, written, kind, target):
    guess = randomized(drafter("hydra", model=model, kind=kind, own_head=True, prefix=True))
    guess.loss(written, target=target).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in guess.parameters())
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_the_loss_is_that_of_a_loop(model, written):
    guess = randomized(drafter("hydra", model=model, draft_vocab=40))
    table = {token: i for i, token in enumerate(guess.vocab.tolist())}
    for target in ("hard", "soft"):
        total = 0.0
        for i in (1, 2, 3):
            errors = []
            for row in range(len(written)):
                ids, states = (
                    written.ids[written.row(row)],
                    written.states[written.row(row)].float(),
                )
                for t in range(written.starts[row] - 1, len(ids) - 1 - i):
                    true = int(ids[t + 1 + i])
                    if true not in table:
                        continue
                    logits = guess.head_logits(states[t][None], ids[None, t + 1 : t + 1 + i])[0]
                    right = torch.zeros(40)
                    right[table[true]] = 1
                    if target == "soft":
                        rows = model.lm_head.weight[guess.vocab.long()]
                        right = (rows @ states[t + i]).softmax(-1)
                    errors.append(float(-(right * logits.log_softmax(-1)).sum()))
            total += 0.8 ** (i - 1) * sum(errors) / len(errors)
        assert float(guess.loss(written, target=target)) == pytest.approx(total, rel=1e-4)


def test_training_lowers_the_loss_and_leaves_the_model_alone(model, written, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = []
    for run in ("first", "second"):
        guess = drafter("hydra", model=model, draft_vocab=40)
        start = fit(guess, written, epochs=0)
        assert fit(guess, written, epochs=5, lr=5e-3, batch=32) < start
        guess.save(tmp_path / run)
        files.append((tmp_path / run / "drafter_model.safetensors").read_bytes())
        torch.manual_seed(9)
    assert files[0] == files[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_draft_vocabulary_and_the_scale_come_from_the_answers(model, written, kind):
    guess = drafter("hydra", model=model, kind=kind, draft_vocab=70)
    assert guess.vocab.tolist() == [*range(70)]
    fit(guess, written, epochs=0)
    counts = [0] * VOCABULARY
    for row in range(len(written)):
        for token in written.ids[written.row(row)][written.starts[row] :].tolist():
            counts[token] += 1
    seen = sorted((t for t in range(VOCABULARY) if counts[t]), key=lambda t: (-counts[t], t))
    rest = [t for t in range(VOCABULARY) if not counts[t]]
    assert guess.vocab.tolist() == (seen + rest)[:70]
    assert guess.vocab.dtype == torch.int32
    if kind == "recurrent":
        table = model.get_input_embeddings().weight.double()
        ratio = written.states.double().square().mean().sqrt() / table.square().mean().sqrt()
        assert float(guess.scale) == pytest.approx(ratio.item(), rel=1e-4)


# Check 3: a chain of an answer that is known by heart


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["recurrent", "sequential"])
def test_an_answer_known_by_heart_is_accepted_in_chains(kind):
    model, ids = testing.tiny_llama(), prompt(1)
    model.lm_head.weight.data *= 8  # apart from one another, so that all tokens are learned
    plain = model.generate(ids, **PLAIN)
    known = answers(model, [ids[0].tolist()], tokens=24, pad_token_id=PAD)
    assert torch.equal(known.ids, plain[0])
    guess = drafter("hydra", model=model, kind=kind, template=[(0,), (0, 0), (0, 0, 0)])
    assert fit(guess, known, epochs=200, lr=1e-2) < 0.05
    stats = Stats()
    found = model.generate(ids, **PLAIN, custom_generate=decode, drafter=guess, stats=stats)
    assert torch.equal(found, plain)
    assert stats.passes == math.ceil(23 / 4)


# Check 5: the tree

TEMPLATE = [(0,), (1,), (0, 0), (0, 2), (1, 0), (2,), (0, 2, 1), (1, 0, 0)]


@torch.no_grad()
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_is_that_of_its_paths_alone(model, kind, prefix):
    guess = randomized(drafter("hydra", model=model, kind=kind, template=TEMPLATE, prefix=prefix))
    text = prompt(2)[0].tolist()
    states = model.model(torch.tensor([text])).last_hidden_state[0]
    guess.start(text[:-1], states[:-1])
    draft = guess.draft(Root(text, states[-2]), None)
    h = states[-2][None] if not prefix else guess.reader.whole(states[:-1])[-1:]
    expected = set()
    for path in TEMPLATE:
        after, tokens = [text[-1]], []
        for rank in path:
            logits = guess.head_logits(h, torch.tensor([after]))[0]
            token = int(guess.vocab[logits.argsort(descending=True)[rank]])
            after.append(token)
            tokens.append(token)
        expected.add(tuple(tokens))
    paths = [()]
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        paths.append((*paths[parent], token))
    assert set(paths[1:]) == expected
    assert len(paths) == len(TEMPLATE) + 1
    few = guess.draft(Root(text, states[-2]), 3)
    assert few.tokens.tolist()[:2] == draft.tokens.tolist()[:2]
    assert len(few.tokens) == 3
    assert len(guess.draft(Root(text, states[-2]), 0).tokens) == 0


def test_the_tree_is_planned_from_counted_ranks(model, written):
    guess = drafter("hydra", model=model)
    fit(guess, written, epochs=3, lr=5e-3)
    # of twelve answers the tenth was held out
    held, right, total = 9, [[0] * 8 for _ in range(3)], [0, 0, 0]
    ids, states = written.ids[written.row(held)], written.states[written.row(held)].float()
    for i in (1, 2, 3):
        for t in range(written.starts[held] - 1, len(ids) - 1 - i):
            logits = guess.head_logits(states[t][None], ids[None, t + 1 : t + 1 + i])[0]
            order = guess.vocab[logits.argsort(descending=True)].tolist()
            total[i - 1] += 1
            if order.index(int(ids[t + 1 + i])) < 8:
                right[i - 1][order.index(int(ids[t + 1 + i]))] += 1
    table = guess.frequencies.table()
    for i in range(3):
        assert table[i] == pytest.approx([n / total[i] for n in right[i]], abs=1e-5)


def test_ranks_are_counted_while_decoding(model):
    guess = drafter("hydra", model=model, template=[(0,), (1,), (0, 0)])
    h = torch.randn(64, generator=torch.Generator().manual_seed(1))
    first = guess.draft(Root([4, 5], h), None)
    top = guess.guesses[0][0].tolist()
    assert first.tokens.tolist()[:2] == top[:2]
    before = guess.frequencies.table()
    # the second rank was right, of which no child was drafted: one depth is counted
    guess.draft(Root([4, 5, top[1], 7], h), None)
    after = guess.frequencies.table()
    total = 10 * 0.99 + 1
    assert after[0][1] == pytest.approx((before[0][1] * 10 * 0.99 + 1) / total)
    assert after[0][0] == pytest.approx(before[0][0] * 10 * 0.99 / total)
    assert after[1:] == before[1:]


def test_heads_that_are_never_right_draft_once_in_a_while_only(model):
    guess = drafter("hydra", model=model)
    guess.costs = Costs({1: 1.0, 2: 1.6})
    h = torch.randn(64, generator=torch.Generator().manual_seed(1))
    text, counts = [4, 5], []
    for _ in range(400):
        counts.append(len(guess.draft(Root(text, h), None).tokens))
        top = guess.guesses[0][0].tolist() if guess.guesses else []
        text = [*text, next(t for t in range(VOCABULARY) if t not in top)]
    assert sorted(counts[-8:]) == [0] * 7 + [1]


# Check 6: the answer is that of plain decoding

DRAFTERS = {
    "recurrent": {},
    "sequential": {"kind": "sequential", "layers": 2},
    "parallel": {"kind": "parallel", "draft_vocab": 30},
    "own head": {"own_head": True, "template": TEMPLATE},
    "prefix": {"prefix": True, "template": TEMPLATE},
}
# each drafter once, sampled or not, each model at least once
QUICK = {("llama", fields) for fields in ("recurrent", "own head", "prefix")}
QUICK |= {("gpt2", "sequential"), ("gpt2", "prefix"), ("qwen", "parallel")}


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("family", "fields", "sampled"),
    [
        pytest.param(*cell, number % 2 == 0, marks=[] if cell in QUICK else pytest.mark.thorough)
        for number, cell in enumerate(product(DECODERS, DRAFTERS))
    ],
)
def test_the_answer_is_that_of_plain_decoding(family, fields, sampled):
    model, ids = DECODERS[family](), prompt(1)
    if family == "gpt2" and fields == "prefix":
        with pytest.raises(UnsupportedError):
            drafter("hydra", model=model, prefix=True)
        return
    settings = {**PLAIN, "do_sample": sampled, "max_new_tokens": 30}
    known = answers(model, [ids[0].tolist()], tokens=30, pad_token_id=PAD)
    guess = drafter("hydra", model=model, **DRAFTERS[fields])
    torch.manual_seed(3)
    plain = model.generate(ids, **settings)
    for train in (lambda: randomized(guess), lambda: fit(guess, known, epochs=12, lr=1e-2)):
        train()
        torch.manual_seed(3)
        found = model.generate(ids, **settings, custom_generate=decode, drafter=guess)
        assert torch.equal(found, plain)


@pytest.mark.thorough
def test_a_prefix_reads_on_after_rounds_without_drafts(model):
    ids = prompt(1)
    guess = randomized(drafter("hydra", model=model, prefix=True, template=TEMPLATE))
    # the clock says that drafting is slow: it rests for 128 tokens, then begins again
    ticks = iter(range(10**6))
    model.config.max_position_embeddings = 512
    settings = {**PLAIN, "max_new_tokens": 280}
    plain = model.generate(ids, **settings)
    more = {"costs": Costs({1: 1e-9}), "clock": lambda: float(next(ticks))}
    stats = Stats()
    found = model.generate(
        ids, **settings, custom_generate=decode, drafter=guess, stats=stats, **more
    )
    assert torch.equal(found, plain)
    assert 0 < stats.drafted < stats.passes * len(TEMPLATE)
    assert guess.reader.known > 6 + 128


# Refusals
