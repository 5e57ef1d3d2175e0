"""Short answers of a new process: a line for each prompt of each kind."""

import torch
from bench.draft_prompts import KINDS, tiny
from bench.first_answers import measure


def test_each_prompt_is_answered_in_both_ways():
    model, prompts = tiny("llama", 2, torch.float32)
    found = [*measure(model, prompts, 6, "free")]
    assert [each.kind for each in found] == [*KINDS, *KINDS]
    assert all(each.equal and each.plain > 0 and each.drafted > 0 for each in found)
    assert all(1 <= each.passes <= 5 for each in found)
