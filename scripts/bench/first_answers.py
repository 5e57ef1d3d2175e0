"""Short answers of a new process, with drafts: speed over plain `generate`, prompt by prompt.

    PYTHONPATH=scripts python -m bench.first_answers --prompts 3 --tokens 24

SmolLM2-135M in float32, and prompts of four kinds: word problems, and passages of Hamlet to
continue, to copy and to explain. Processor time of one thread, its prompt included, plain decoding
and drafts in turn; nothing is measured or packed before the first answer.
"""

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.draft_prompts import KINDS, Prompts, pretrained
from petl.core.types import CausalModel
from petl.efficiency.drafting import Stats, decode, drafter
from petl.ops.packed import packed_weights


class Answer(NamedTuple):
    """One prompt, answered in both ways.

    Attributes:
        plain, drafted: processor seconds.
        passes: with drafts, after that over the prompt.
        packing: seconds of packing weights in it.
        equal: True if both answers have the same tokens.
    """

    kind: str
    plain: float
    drafted: float
    passes: int
    packing: float
    equal: bool


def measure(model: CausalModel, prompts: Prompts, tokens: int, name: str) -> Iterator[Answer]:
    """Answer the prompts in turn, kind by kind.

    Args:
        model: a decoder.
        prompts: as many of each kind.
        tokens: of an answer.
        name: of the drafter, which goes on from prompt to prompt.
    """
    clock, guess, copies = time.process_time, drafter(name, model=model), packed_weights(model)
    common = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    common |= {"pad_token_id": 0, "use_cache": True}
    for number in range(len(prompts.of(KINDS[0]))):
        for kind in KINDS:
            ids, stats = torch.tensor([prompts.of(kind)[number]]), Stats()
            own = {"custom_generate": decode, "drafter": guess, "stats": stats, "clock": clock}
            answers, seconds, before = [], [], copies.seconds
            for more in ({}, own):
                began = clock()
                answers.append(
                    model.generate(ids, attention_mask=torch.ones_like(ids), **common, **more)
                )
                seconds.append(clock() - began)
            packing = copies.seconds - before
            yield Answer(kind, *seconds, stats.passes, packing, torch.equal(*answers))


def main() -> None:
    """Print a line for each answer, and the speed of all."""
    parser = argparse.ArgumentParser(description="Short answers of a new process with drafts.")
    parser.add_argument("--prompts", type=int, default=3, help="of each kind")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--drafter", default="free")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, prompts = pretrained("smollm2", given.prompts, torch.float32)
    model.eval()
    ids = torch.tensor([[5]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)
    found = []
    for each in measure(model, prompts, given.tokens, given.drafter):
        found.append(each)
        print(
            f"{each.kind}: {each.plain:.2f} s plain, {each.drafted:.2f} s with drafts in "
            f"{each.passes} passes, {each.packing:.2f} s of it packing; speed "
            f"{each.plain / each.drafted:.2f}{'' if each.equal else ', ANOTHER ANSWER'}"
        )
    speeds = [each.plain / each.drafted for each in found]
    total = sum(each.plain for each in found) / sum(each.drafted for each in found)
    print(f"all: speed {total:.2f}, {min(speeds):.2f} to {max(speeds):.2f}")


if __name__ == "__main__":
    main()
