"""Drafts that are copied from the input of an encoder-decoder, by hand and in decoding."""

from collections import Counter

import pytest
import torch
from draft_fixtures import END, PAD, Oracle, Writes, prompt, tiny_pair

from petl import testing
from petl.efficiency.drafting import Costs, Root, Stats, decode, drafter, load_drafter
from petl.efficiency.drafting.costs import TYPICAL
from petl.errors import InputError

LETTERS = "_.^abcdefghijklmnopqrstuvwxyz"  # padding, the end, a special one


def ids_of(text):
    return [LETTERS.index(letter) for letter in text]


def drafted(source, answer, **fields):
    """The tokens that are drafted after an answer to an input, each letter a token."""
    guess = drafter("aggressive", model=tiny_pair("t5"), **{"most": 20, **fields})
    guess.start([PAD], None, encoder=ids_of(source))
    draft = guess.draft(Root([PAD, *ids_of(answer)]), None)
    assert draft.parents.tolist() == list(range(len(draft.tokens)))
    return "".join(LETTERS[token] for token in draft.tokens.tolist())


@pytest.mark.parametrize(
    ("source", "answer", "expected"),
    [
        # the input is drafted from its beginning on, without special tokens but the end
        ("abcd.", "", "abcd."),
        ("abcd.", "ab", "cd."),
        ("__abcd.", "a", "bcd."),
        ("abcd", "a", "bcd."),
        ("abcd.", "_a", "bcd."),  # forced tokens come before the answer
        # after another token: replaced, inserted, left out
        ("abcdef.", "abz", ""),
        ("abcdef.", "abzd", "ef."),
        ("abcdef.", "abzc", "def."),
        ("abcdef.", "abd", "ef."),
        ("abcdef.", "zabc", "def."),
        # the nearest place behind, else the last one before
        ("abcxabdyabe.", "abcqab", "dyabe."),
        ("abcxabdyabe.", "abcxabdyabeqab", "e."),
        # three tokens before two, two before one
        ("xcdabcez.", "xqabc", "ez."),
        ("fbdqabe.", "fyab", "e."),
        # a token that occurs three times tells no place, one that occurs twice does
        ("abacad.", "aza", ""),
        ("abacd.", "aza", "cd."),
        ("abacad.", "azac", "ad."),
        # nothing follows the last token
        ("abc", "abc.", ""),
        (".", "", ""),
    ],
)
def test_the_input_is_drafted_from_where_the_answer_is(source, answer, expected):
    assert drafted(source, answer) == expected


def test_fields_bound_what_is_drafted_and_by_how_many_tokens_the_place_is_found():
    assert drafted("abcdef.", "ab", most=2) == "cd"
    assert drafted("abcdef.", "abzd", shortest=2) == ""
    assert drafted("abcdef.", "abzde", shortest=2) == "f."
    assert drafted("xcdabcez.", "xqabc", longest=1) == drafted("xcdabcez.", "xqc") == "dabcez."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("abz", "def."),  # c was replaced
        ("abzd", "ef."),
        ("abzdy", "f."),
        ("abzf", "."),  # a place that is found comes first
        ("abzy", ""),  # another wrong token behind it: until the place is found
        ("abzye", "f."),
        ("z", ""),  # nothing was copied before it
    ],
)
def test_a_token_that_is_not_in_the_input_may_be_taken_for_one_that_replaces(answer, expected):
    answers = [answer[:end] for end in range(len(answer) + 1)]  # each token was a root
    guess = drafter("aggressive", model=tiny_pair("t5"), most=20, past_edits=True)
    guess.start([PAD], None, encoder=ids_of("abcdef."))
    drafts = [guess.draft(Root([PAD, *ids_of(each)]), None).tokens.tolist() for each in answers]
    assert drafts[-1] == ids_of(expected)


def test_it_finds_what_a_scan_of_the_input_finds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        source = torch.randint(3, 12, (30,), generator=generator).tolist()
        answer = torch.randint(3, 12, (40,), generator=generator).tolist()
        answer[5:20] = source[3:18]
        guess = drafter("aggressive", model=tiny_pair("t5"), most=30)
        guess.start([PAD], None, encoder=source)
        whole, copied, follows = [*source, END], 0, True
        for end in range(1, len(answer) + 1):
            known = answer[:end]
            if follows and copied < len(whole) and known[-1] == whole[copied]:
                copied += 1
            else:
                follows = False
                for n in (3, 2, 1):
                    if len(known) < n or (n == 1 and Counter(whole)[known[-1]] > 2):
                        continue
                    ends = [e for e in range(n, len(whole)) if whole[e - n : e] == known[-n:]]
                    if ends:
                        copied = min([e for e in ends if e > copied], default=ends[-1])
                        follows = True
                        break
            found = guess.draft(Root([PAD, *known]), None).tokens.tolist()
            assert found == (whole[copied : copied + 30] if follows else [])


def test_as_many_are_drafted_as_were_right_and_as_a_pass_costs():
    text = [3 + i for i in range(80)]
    right = drafter("aggressive", model=tiny_pair("t5"))
    wrong = drafter("aggressive", model=tiny_pair("t5"))
    right.costs, wrong.costs = (Costs({1: 1.0, 2: 1.6, 64: 4.0}) for _ in range(2))
    counts = []
    for _ in range(3):
        right.start([PAD], None, encoder=text)
        roots = (Root([PAD, *text[:end]]) for end in range(1, 60))
        counts += [len(right.draft(root, None).tokens) for root in roots]
    assert counts[0] < max(counts) == 63
    for i in range(60):  # a token of the input, then one that is not
        wrong.start([PAD], None, encoder=text[:40])
        counts = [len(wrong.draft(Root([PAD, 3 + i % 30, *[90] * n]), None).tokens) for n in (0, 1)]
    assert counts == [0, 0]


def test_another_place_than_the_start_needs_another_budget():
    guess = drafter("aggressive", model=tiny_pair("t5"), most=9)
    guess.start([PAD], None, encoder=ids_of("abcdef."))
    assert guess.draft(Root([PAD, *ids_of("a")]), 2).tokens.tolist() == ids_of("bc")


# In decoding


def test_replaced_tokens_take_a_pass_each_in_free():
    model = tiny_pair("t5")
    source = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:40].add(20).tolist()
    text = [5 if i in (4, 13, 27) else token for i, token in enumerate(source)]
    fields = {"most": 63, "nodes": 1}
    stats, _ = written(model, [*source, END], [*text, END], drafter("free", model=model, **fields))
    assert stats.passes <= 1 + 3 + 1
    fields["past_edits"] = False
    stats, _ = written(model, [*source, END], [*text, END], drafter("free", model=model, **fields))
    assert stats.passes > 1 + 3 + 1


def written(model, source, text, name="aggressive", **more):
    """Passes of an answer that is forced on a model, and the answer."""
    stats, ids = Stats(), torch.tensor([source])
    common = {"logits_processor": [Writes(text)], "max_new_tokens": len(text), "do_sample": False}
    common |= {"use_cache": True}
    plain = model.generate(ids, **common)
    given = {"custom_generate": decode, "stats": stats, "drafter": name, "switch": False}
    given |= {"costs": TYPICAL, **more}  # not those that this machine has while others use it
    assert torch.equal(model.generate(ids, **common, **given), plain)
    return stats, plain


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_copy_takes_two_passes_and_each_edit_three_more_at_most(family):
    model = tiny_pair(family)
    source = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:40].add(20).tolist()
    guess = drafter("aggressive", model=model, most=63)
    stats, plain = written(model, [*source, END], [*source, END], guess)
    assert plain[0].tolist() == [PAD, *source, END]
    assert stats.passes <= 2
    for edits in ({9: [5]}, {9: [5], 21: []}, {3: [5, 6], 15: [], 30: [7]}):
        text = [new for i, token in enumerate(source) for new in edits.get(i, [token])]
        stats, _ = written(model, [*source, END], [*text, END], guess)
        assert stats.passes <= 1 + 3 * len(edits) + 1
        assert stats.accepted > len(text) - 5 * len(edits)


def test_an_unrelated_input_drafts_hardly_anything():
    model = tiny_pair("t5")
    stats, _ = written(model, [*range(3, 40), END], [*range(50, 90), END])
    assert (stats.drafted, stats.passes) == (0, 40)
    # the same words in another order: each guess is wrong, and the switch rests the drafter
    backwards = [*range(3, 40)][::-1]
    counts = [written(model, [*range(3, 40), END], backwards, switch=on)[0] for on in (True, False)]
    assert {(stats.passes, stats.accepted) for stats in counts} == {(36, 0)}
    assert 0 < counts[0].drafted < counts[1].drafted


# What it reads, and refusals


def decoded(model, guess="aggressive", **inputs):
    more = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    return model.generate(**inputs, **more, custom_generate=decode, drafter=guess)


class Reads(Oracle):
    """Keeps the encoder's tokens, and guesses nothing right."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0), 3)
        self.needs = drafter("aggressive", model=tiny_pair("t5")).needs

    def start(self, ids, states, encoder=None):
        self.began = (list(ids), encoder)


def test_it_reads_the_ids_of_the_encoder_without_padding():
    model, ids, guess = tiny_pair("t5"), prompt(3), Reads()
    decoded(model, guess, input_ids=ids)
    assert guess.began == ([PAD], ids[0].tolist())
    padded = torch.cat([ids, torch.full((1, 2), PAD)], 1)
    decoded(model, guess, input_ids=padded, attention_mask=(padded != PAD).long())
    assert guess.began[1] == ids[0].tolist()
    # ids that are named come before those that the encoder gets
    decoded(model, guess, input_ids=ids, encoder_input_ids=ids[:, 2:])
    assert guess.began[1] == ids[0, 2:].tolist()
    decoded(model, guess, input_ids=ids, encoder_input_ids=ids[0, 1:].tolist())
    assert guess.began[1] == ids[0, 1:].tolist()
    # embeddings and outputs of an encoder have none
    states = model.encoder(ids)
    decoded(model, guess, encoder_outputs=states)
    assert guess.began[1] is None
    decoded(model, guess, encoder_outputs=states, encoder_input_ids=ids)
    assert guess.began[1] == ids[0].tolist()


def test_a_call_without_ids_is_refused_with_the_argument_to_give():
    model, ids = tiny_pair("bart"), prompt(4)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(ids)}
    outputs = {"encoder_outputs": model.get_encoder()(ids)}
    for inputs in (embeddings, outputs):
        with pytest.raises(InputError):
            decoded(model, **inputs)
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True)
        found = decoded(model, **inputs, encoder_input_ids=ids)
        assert torch.equal(found, plain)
        assert torch.equal(decoded(model, "free", **inputs), plain)


@pytest.mark.parametrize(
    "ids",
    [
        torch.ones(2, 5, dtype=torch.long),
        torch.ones(1, 5),
        torch.ones(5, dtype=torch.long),
        torch.ones(1, 5, dtype=torch.bool),
        torch.ones(1, 5, dtype=torch.complex64),
        [1.0],
        [True],
        [[1]],
        7,
    ],
)
def test_ids_of_another_shape_or_kind_are_refused(ids):
    with pytest.raises(InputError, match="encoder_input_ids"):
        decoded(tiny_pair("t5"), input_ids=prompt(), encoder_input_ids=ids)


def test_ids_of_an_encoder_are_refused_for_a_decoder():
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        decoded(testing.tiny_llama(), None, input_ids=prompt(), encoder_input_ids=prompt())


def test_tokens_of_another_vocabulary_are_not_drafted_and_this_is_said_once(recwarn):
    sizes = {"decoder_vocab_size": 60, "share_encoder_decoder_embeddings": False}
    sizes |= {"tie_word_embeddings": False}
    pair, ids = tiny_pair("marian", **sizes), prompt(5) % 50
    model = tiny_pair("t5", vocab_size=60)
    states = {"encoder_outputs": model.encoder(ids), "encoder_input_ids": ids + 40}
    for own, inputs in ((pair, {"input_ids": ids}), (model, states)):
        rest = {name: each for name, each in inputs.items() if name != "encoder_input_ids"}
        plain = own.generate(**rest, max_new_tokens=8, do_sample=False, use_cache=True)
        recwarn.clear()
        for name in ("aggressive", "lookup", "free"):
            assert torch.equal(decoded(own, name, **inputs), plain)
        assert len([w for w in recwarn if "is not copied: its tokens" in str(w.message)]) == 1


@pytest.mark.parametrize("ids", [[5, -100, 6], torch.tensor([[5, -5, 6]]), [-1], [2**70], [96]])
def test_ids_outside_the_vocabulary_are_not_drafted_and_this_is_said_once(ids, recwarn):
    model, given = tiny_pair("t5"), prompt(3)
    plain = model.generate(given, max_new_tokens=8, do_sample=False, use_cache=True)
    for name in ("aggressive", "free"):
        found = decoded(model, name, input_ids=given, encoder_input_ids=ids)
        assert torch.equal(found, plain)
    assert len([w for w in recwarn if "the decoder's vocabulary of 96" in str(w.message)]) == 1


def test_free_copies_the_input_first_and_takes_the_fields_of_what_copies():
    free = drafter("free", model=tiny_pair("t5"), most=4, nodes=7)
    free.start([PAD], None, encoder=ids_of("abcdef."))
    assert free.draft(Root([PAD, *ids_of("a")]), None).tokens.tolist()[:4] == ids_of("bcde")


@pytest.mark.parametrize("name", ["aggressive", "free"])
def test_it_is_saved_with_its_fields_and_frequencies(name, tmp_path):
    model = tiny_pair("t5")
    first = drafter(name, model=model, most=5, longest=4, shortest=2)
    own = first if name == "aggressive" else first.copier
    own.frequencies.add(0, None)
    first.save(tmp_path)
    again = load_drafter(tmp_path, model)
    saved = again if name == "aggressive" else again.copier
    assert (saved.most, saved.longest, saved.shortest) == (5, 4, 2)
    if name == "aggressive":
        tables = (torch.tensor(each.frequencies.table()) for each in (own, saved))
        assert torch.allclose(*tables)
    with pytest.raises(InputError):
        load_drafter(tmp_path, tiny_pair("t5", vocab_size=100))
