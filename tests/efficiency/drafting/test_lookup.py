"""Drafts that are copied from the text so far."""

import torch
from torch import nn

from petl.efficiency.drafting import Costs, Root, drafter, load_drafter


def drafted(text, **fields):
    """The tokens that are drafted after a text, each letter a token."""
    lookup = drafter("lookup", **{"length": 9, **fields})
    ids = [ord(letter) for letter in text]
    lookup.start(ids[:2], None)
    draft = lookup.draft(Root(ids), None)
    assert draft.parents.tolist() == list(range(len(draft.tokens)))
    return "".join(map(chr, draft.tokens.tolist()))


def test_it_copies_what_followed_the_last_occurrence():
    assert drafted("abcdab") == "cdab"
    assert drafted("abcabdab") == "dab"  # the most recent one
    assert drafted("abcdxzcdyabcd") == "xzcdyabcd"  # bcd comes before cd, which is more recent
    assert drafted("abcdab", length=2) == "cd"


def test_it_copies_nothing_after_unseen_tokens():
    assert drafted("abcdef") == ""
    assert drafted("abcdxb") == ""  # one token is less than min_ngram=2
    assert drafted("abcdxb", min_ngram=1) == "cdxb"
    assert drafted("a") == ""
    assert drafted("", min_ngram=1) == ""


def test_a_new_prompt_forgets_the_text_before():
    lookup = drafter("lookup", length=3)
    lookup.start([1, 2, 3, 4], None)
    assert lookup.draft(Root([1, 2, 3, 4, 1, 2]), None).tokens.tolist() == [3, 4, 1]
    lookup.start([5, 1, 2], None)
    assert lookup.draft(Root([5, 1, 2]), None).tokens.tolist() == []


def test_it_finds_what_a_scan_of_the_text_finds():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(4, (200,), generator=generator).tolist()
    lookup = drafter("lookup", length=4)
    lookup.start(text[:10], None)
    for end in range(10, 200):
        ids = text[:end]
        expected = []
        for n in (3, 2):
            starts = [i for i in range(end - n) if ids[i : i + n] == ids[-n:]]
            if starts:
                expected = ids[starts[-1] + n : starts[-1] + n + 4]
                break
        assert lookup.draft(Root(ids), None).tokens.tolist() == expected


def test_the_length_follows_what_was_right_and_what_a_pass_costs():
    # each token of the period was seen before: copies are always right
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 30
    right, wrong = drafter("lookup"), drafter("lookup")
    right.costs = wrong.costs = Costs({1: 1.0, 8: 1.5, 16: 3.0})
    for end in range(20, 200):
        found = right.draft(Root(text[:end]), None).tokens.tolist()
    assert len(found) >= 7
    # copies that are never right: after 1, 2 a new token each time
    ids = [1, 2]
    for new in range(3, 90):
        wrong.draft(Root(ids), None)
        ids += [new, 1, 2]
    wrong.costs = Costs({1: 1.0, 2: 1.6})
    assert len(wrong.draft(Root(ids), None).tokens) == 0


def test_it_is_saved_with_its_fields_and_frequencies(tmp_path):
    lookup = drafter("lookup", min_ngram=1, length=5)
    lookup.frequencies.add(0, 0)
    lookup.save(tmp_path / "drafter")

    class Model(nn.Module):
        class config:
            @staticmethod
            def get_text_config():
                return type("Config", (), {"vocab_size": 7})

    again = load_drafter(tmp_path / "drafter", Model())
    assert (again.min_ngram, again.max_ngram, again.length) == (1, 3, 5)
    found, saved = (torch.tensor(each.frequencies.table()) for each in (again, lookup))
    assert torch.allclose(found, saved)
