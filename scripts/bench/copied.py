"""Answers of an encoder-decoder with drafts, relative to plain `generate`: how much is copied.

    taskset -c 1 python scripts/bench/copied.py

A T5 of the size of t5-small with random weights is made to write given texts of 64 random tokens:
its input, the input with a fifth of the tokens replaced, and other tokens. Processor time of one
thread, plain decoding and each drafter in turn, row by row.
"""

import time

import torch
from transformers import LogitsProcessor, T5Config, T5ForConditionalGeneration

from petl.efficiency.drafting import Stats, decode, drafter

TOKENS, ROWS, NAMES = 64, 4, ("aggressive", "free")
REPLACED = {"copy": 0.0, "20 % edits": 0.2, "unrelated": 1.0}
SIZES = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


class Writes(LogitsProcessor):
    """Lets a model write one text, behind the token with which its decoder begins."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of which one is not -inf."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.text[input_ids.shape[1] - 1]] = 0
        return forced


def main() -> None:
    """Print the speed of each drafter over plain decoding, and its tokens a pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = T5Config(**SIZES, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = T5ForConditionalGeneration(config).eval()
    clock, guesses = time.process_time, {name: drafter(name, model=model) for name in NAMES}
    for kind, share in REPLACED.items():
        seconds, stats = dict.fromkeys(("plain", *NAMES), 0.0), {name: Stats() for name in NAMES}
        equal = True
        for _ in range(ROWS):
            source, other = torch.randint(5, 32000, (2, TOKENS))
            text = torch.where(torch.rand(TOKENS) < share, other, source)
            ids, written = torch.tensor([[*source, 1]]), [*text.tolist(), 1]
            common = {"max_new_tokens": len(written), "do_sample": False, "use_cache": True}
            answers = []
            for name in seconds:
                own = {"custom_generate": decode, "drafter": guesses.get(name), "clock": clock}
                more = {} if name == "plain" else {**own, "stats": stats[name]}
                began = clock()
                made = model.generate(ids, logits_processor=[Writes(written)], **common, **more)
                seconds[name] += clock() - began
                answers.append(made)
            equal &= all(torch.equal(each, answers[0]) for each in answers)
        speeds = (
            f"{name} {seconds['plain'] / seconds[name]:.2f} ({stats[name].tokens_per_pass:.1f})"
            for name in NAMES
        )
        print(f"{kind}: speed (tokens a pass) {', '.join(speeds)}; equal: {equal}", flush=True)


if __name__ == "__main__":
    main()
