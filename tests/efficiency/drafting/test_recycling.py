"""Token recycling: the table, the tree, what is accepted, and the saved form."""

import json
import math
from itertools import pairwise

import pytest
import torch
from draft_fixtures import PAD, VOCABULARY, prompt
from safetensors.torch import load_file, save_file

from petl import testing
from petl.efficiency.drafting import PassOutput, Root, Stats, answers, decode, drafter, load_drafter
from petl.efficiency.drafting.recycling import most_likely
from petl.errors import InputError


@pytest.fixture(scope="module")
def model():
    return testing.tiny_llama()


def seen(tokens, parents, logits, path):
    return PassOutput(torch.tensor(tokens), torch.tensor(parents).long(), logits, None, path)


# The table


def by_hand(row, k):
    """The k tokens of largest logit, the lower one of equal ones first."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))[:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_likely_tokens_with_ties(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(5, (20, 50), generator=generator).to(dtype)  # many ties
    logits = torch.cat([logits, torch.randn(20, 50, generator=generator).to(dtype)])
    expected = [by_hand(row, 8) for row in logits.tolist()]
    assert most_likely(logits, 8).tolist() == expected
    assert most_likely(logits[:, :8], 8).tolist() == [by_hand(r, 8) for r in logits[:, :8].tolist()]


def test_the_table_equals_a_simulation_by_a_dictionary(model):
    recycling, rows = drafter("recycling", model=model, k=3), {}
    ids = [5, 6, 5, 7, 5, 6, 8]
    recycling.start(ids, None)
    for token, follower in pairwise(ids):
        rows[token] = [follower, *(t for t in rows.get(token, []) if t != follower)][:3]
    generator = torch.Generator().manual_seed(0)
    # nodes with equal tokens, accepted and rejected
    passes = [
        ([5, 6, 6, 9, 5], [0, 0, 1, 2], [0, 2]),
        ([9, 9, 9], [0, 1], [0]),
        ([8, 7, 8, 7, 8], [0, 1, 2, 3], [0, 1, 2]),
        ([5, 6, 6], [0, 0], [0, 1]),
    ]
    for tokens, parents, path in passes:
        logits = torch.randint(9, (len(tokens), VOCABULARY), generator=generator).float()
        recycling.draft(Root([1, tokens[0]]), None)
        recycling.observe(seen(tokens, parents, logits, path))
        for node in [*(n for n in range(len(tokens)) if n not in path), *path]:
            rows[tokens[node]] = by_hand(logits[node].tolist(), 3)
    for token in range(VOCABULARY):
        row = rows.get(token, [])
        assert recycling.table[token].tolist() == row + [-1] * (3 - len(row))


# The tree

TEMPLATE = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 2)]


def test_the_tree_follows_table_and_template(model):
    recycling = drafter("recycling", model=model, k=3, template=TEMPLATE)
    recycling.table[5] = torch.tensor([6, 7, 8])
    recycling.table[6] = torch.tensor([9, 5, -1])
    recycling.table[9] = torch.tensor([5, 6, 7])
    draft = recycling.draft(Root([1, 5]), None)
    # the row of 7 is unknown: (1, 0) is left out, and all below it
    assert draft.tokens.tolist() == [6, 7, 9, 5, 5]
    assert draft.parents.tolist() == [0, 0, 1, 1, 3]
    assert recycling.draft(Root([1, 5]), 3).tokens.tolist() == [6, 7, 9]
    assert recycling.draft(Root([1, 50]), None).tokens.tolist() == []


def test_order_3_puts_what_followed_two_tokens_first(model):
    fields = {"k": 3, "order": 3, "template": [(0,), (1,), (0, 0)]}
    recycling = drafter("recycling", model=model, **fields)
    recycling.start([5, 6, 7, 5, 6, 8, 5, 6, 8, 4, 6, 9, 5, 6], None)
    draft = recycling.draft(Root([5, 6]), None)
    # after 5, 6: 8 twice and 7 once; after 6 alone the last one was 9; then after 6, 8: 5, 4
    assert draft.tokens.tolist()[:2] == [8, 7]
    assert draft.tokens.tolist()[2] in (4, 5)
    few = drafter("recycling", model=model, **fields, entries=1)
    few.start([5, 6, 7, 1, 2], None)
    assert len(few.pairs) == 1


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_true_table_is_accepted_to_its_depth(depth):
    model, ids, stats = testing.tiny_llama(), prompt(0), Stats()
    settings = {"max_new_tokens": 20, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    # a penalty, so that no token occurs twice and the table can hold the continuation
    settings |= {"no_repeat_ngram_size": 1}
    plain = model.generate(ids, **settings)
    template = [(0,) * n for n in range(1, depth + 1)]
    recycling = drafter("recycling", model=model, template=template, prompt=False)
    text = plain[0].tolist()
    assert len(set(text)) == len(text)

    def fill(right):
        for token, follower in pairwise(text):
            recycling.table[token, 0] = follower if right else (follower + 1) % VOCABULARY

    recycling.observe = lambda seen: None  # the table stays
    for right, passes in [(True, math.ceil(19 / (depth + 1))), (False, 19)]:
        fill(right)
        stats = Stats()
        more = {"custom_generate": decode, "drafter": recycling, "stats": stats}
        assert torch.equal(model.generate(ids, **settings, **more), plain)
        assert stats.passes == passes


def test_rank_frequencies_are_the_fractions_of_tokens_found_in_the_row(model):
    recycling = drafter("recycling", model=model, k=4, nodes=3, prompt=False)
    ids, ranks = [1, 5], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        recycling.draft(Root(ids), None)
        row = recycling.table[ids[-1]].tolist()
        logits = torch.randn(1, VOCABULARY, generator=generator)
        recycling.observe(seen([ids[-1]], [], logits, [0]))
        rank = int(torch.randint(6, (1,), generator=generator))
        token = row[rank] if rank < 4 and row[rank] >= 0 else 90
        ranks.append(row.index(token) if token in row else None)
        ids.append(token)
    recycling.draft(Root(ids), None)
    weights = [0.99**age for age in range(600)]
    found = sum(w for w, r in zip(weights, reversed(ranks), strict=True) if r is not None)
    # the assumed ones have the weight 10 * 0.99 ** 600
    assert sum(recycling.frequencies.table()[0]) == pytest.approx(found / sum(weights), abs=2e-3)


# Between prompts, and files


def test_without_keep_the_drafts_depend_on_the_prompt_only(model):
    settings = {"max_new_tokens": 30, "pad_token_id": PAD, "use_cache": True, "do_sample": False}
    plain = model.generate(prompt(4), **settings)[0].tolist()
    ids, drafts = [*plain[-8:], plain[-8]], []  # its last token occurs in it, and in the answer
    for keep in (False, True):
        recycling = drafter("recycling", model=model, nodes=7, keep=keep)
        for _ in range(2):
            recycling.start(ids, None)
            drafts.append(recycling.draft(Root(ids), None).tokens.tolist())
            model.generate(prompt(4), custom_generate=decode, drafter=recycling, **settings)
    assert drafts[0] == drafts[1] == drafts[2] != []
    assert drafts[2] != drafts[3]


@pytest.mark.parametrize("name", ["recycling", "free"])
def test_a_table_is_filled_from_answers(name, model):
    prompts = [prompt(i)[0].tolist() for i in range(4)]
    made = answers(model, prompts, tokens=20, batch_size=1, pad_token_id=PAD)
    filled = drafter(name, model=model, k=4, prompt=False)
    filled.fill(made, model)
    filled = getattr(filled, "recycling", filled)
    # each token of an answer but the last has the likeliest ones after its last occurrence, and a
    # true token that its row has by then is a hit at depth 0, or deeper behind other hits
    expected, hits, depth, deepest = {}, [], 0, 6
    for i in range(4):
        ids, states = made.ids[made.row(i)].tolist(), made.states[made.row(i)].float()
        depth, pending = 0, {}
        for place in range(made.starts[i], len(ids) - 1):
            # a round takes the rows of the table as it was before it
            is_hit = ids[place + 1] in expected.get(ids[place], [])
            hits.append((depth, is_hit))
            with torch.no_grad():
                pending[ids[place]] = model.lm_head(states[place]).topk(4).indices.tolist()
            depth = depth + 1 if is_hit and depth + 1 < deepest else 0
            if depth == 0:
                expected |= pending
                pending = {}
        expected |= pending
    assert {t: row for t, row in enumerate(filled.table.tolist()) if row[0] >= 0} == expected
    # frequencies: a prior of 10 rounds, and then each round weighs 0.99 of the next
    count, total = sum((0.474, 0.083, 0.039, 0.022)) * 10, 10.0
    for _, is_hit in (each for each in hits if each[0] == 0):
        count, total = 0.99 * count + is_hit, 0.99 * total + 1
    assert sum(filled.frequencies.table()[0]) == pytest.approx(count / total)


@pytest.mark.parametrize("name", ["recycling", "free"])
def test_a_saved_drafter_drafts_the_same(name, model, tmp_path):
    guess = drafter(name, model=model, nodes=7)
    settings = {"max_new_tokens": 30, "pad_token_id": PAD, "use_cache": True}
    model.generate(prompt(5), custom_generate=decode, drafter=guess, **settings)
    guess.save(tmp_path)
    again = load_drafter(tmp_path, model)
    assert type(again) is type(guess)
    for root in ([1, 5], [7, 8], prompt(5)[0].tolist()):
        drafts = []
        for each in (guess, again):
            each.start(root, None)
            drafts.append(each.draft(Root(root), None))
        assert torch.equal(drafts[0].tokens, drafts[1].tokens)
        assert torch.equal(drafts[0].parents, drafts[1].parents)


@pytest.mark.parametrize("name", ["recycling", "free"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": "8"}, "k='8'"),
        ({"depth": 10**9}, "depth=1000000000"),
        ({"table": "/home"}, "table .*'/home'"),
        ({"table": 3}, "table .* 3"),
    ],
)
def test_fields_of_a_folder_are_checked(name, fields, message, model, tmp_path):
    drafter(name, model=model).save(tmp_path)
    file = tmp_path / "drafter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"fields": config["fields"] | fields}))
    with pytest.raises(InputError, match=message):
        load_drafter(tmp_path, model)


def test_a_table_from_outside_of_the_folder_is_refused(model, tmp_path):
    drafter("recycling", model=model).save(tmp_path / "own")
    weights = tmp_path / "own" / "drafter_model.safetensors"
    weights.rename(tmp_path / "table")
    weights.symlink_to(tmp_path / "table")
    with pytest.raises(InputError, match=r"link to .*table"):
        load_drafter(tmp_path / "own", model)


def test_what_does_not_fit_the_model_is_refused(model, tmp_path):
    drafter("recycling", model=model).save(tmp_path)
    other = testing.tiny_llama(vocabulary=90)
    with pytest.raises(InputError, match=r"96 .*LlamaForCausalLM .*90"):
        load_drafter(tmp_path, other)
    file = tmp_path / "drafter_model.safetensors"
    table = load_file(file)["table"]
    table[3, 2] = VOCABULARY
    save_file({"table": table}, file)
    with pytest.raises(InputError, match="-1 to 96"):
        load_drafter(tmp_path, model)
