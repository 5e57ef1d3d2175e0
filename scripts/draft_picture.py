"""Draw which tokens of an answer were drafted: copied, recycled, or chosen by the model alone.

    python scripts/draft_picture.py RUN --prompt TEXT --out docs/assets/drafts.svg

RUN is what `petl generate` takes. The answer is greedy. Each box is a token; a pass of the model
gives the tokens up to the next gray box, that included.
"""

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from petl.cli.arguments import COUNT, file_to_write
from petl.efficiency.drafting import Stats, decode
from petl.efficiency.drafting.free import Free
from petl.generation.inference.language_model import LanguageModel
from petl.generation.inference.loading import load_language_model
from petl.training import program as app

MODEL, COPIED, RECYCLED = "model", "copied", "recycled"
LABELS = {
    MODEL: "chosen by the model alone",
    COPIED: "copied by lookup",
    RECYCLED: "guessed by recycling",
}
WIDTH, MARGIN, LINE = 860, 20, 27  # pixels
CHARACTER = 8.43  # width of a character of the font below, pixels
STYLE = """\
.figure{background:#fff;border-radius:8px;--ink:#24292f;--soft:#656d76;--model:#eaeef2;
--copied:#b6e3ff;--recycled:#ffdfb6;font-size:14px;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
[data-md-color-scheme=default] .figure{background:none}
[data-md-color-scheme=slate] .figure{background:none;--ink:#e6edf3;--soft:#a3abb5;
--model:#2a303a;--copied:#0c4a7d;--recycled:#6b4410}
.figure text{fill:var(--ink);white-space:pre}
.figure .soft{fill:var(--soft);font-family:system-ui,sans-serif}
.figure .model{fill:var(--model)}.figure .copied{fill:var(--copied)}
.figure .recycled{fill:var(--recycled)}"""


class Piece(NamedTuple):
    """A token of an answer: its text, and who guessed it."""

    text: str
    source: str


class Watched(Free):
    """The drafter `free`, with the source of each token of the answer.

    Attributes:
        sources: of the tokens so far; the first is of the pass over the prompt.
    """

    def start(self, ids: Sequence[int], states: Any) -> None:
        """Begin an answer."""
        super().start(ids, states)
        self.sources = [MODEL]

    def observe(self, seen: Any) -> None:
        """Note the accepted drafts of a pass, and the token that the model added."""
        super().observe(seen)
        self.sources += [COPIED if node <= self.copied else RECYCLED for node in seen.path[1:]]
        self.sources.append(MODEL)


def answer(language: LanguageModel, prompt: str, tokens: int) -> tuple[list[Piece], Stats]:
    """Answer a prompt, and return the tokens with their sources, and the counts."""
    import torch

    model: Any = language.model
    drafter, stats = Watched(language.base), Stats()
    ids = torch.tensor([language.encode(prompt)], device=language.base.device)
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=language.ends,
        pad_token_id=language.ends[0],
        custom_generate=decode,
        drafter=drafter,
        stats=stats,
        switch=False,
    )[0, ids.shape[1] :].tolist()
    pieces, before = [], ""
    for i, source in enumerate(drafter.sources[: len(found)]):
        text = str(language.tokenizer.decode(found[: i + 1], skip_special_tokens=True))
        # a character of several tokens is in the last of them
        if not text.endswith("\ufffd"):
            pieces.append(Piece(text[len(before) :], source))
            before = text
    return pieces, stats


def svg(pieces: Sequence[Piece], stats: Stats) -> str:
    """Return the picture of an answer."""
    boxes, texts, x, y = [], [], float(MARGIN), 3 * LINE + MARGIN
    for text, source in pieces:
        shown = text.replace("\n", "⏎") if text.strip("\n") == "" else text.replace("\n", " ")
        width = len(shown) * CHARACTER
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        if shown:
            boxes.append(
                f'<rect class="{source}" x="{x:.1f}" y="{y - 16}" width="{width - 1:.1f}" '
                'height="22" rx="3"/>'
            )
            texts.append(f'<text x="{x:.1f}" y="{y}">{escape(shown)}</text>')
            x += width
        if "\n" in text:
            x, y = float(MARGIN), y + LINE
    label = (
        f"{stats.tokens} tokens in {stats.passes + 1} passes, that over the prompt included; "
        f"{stats.accepted} of {stats.drafted} drafts were right"
    )
    legend, place = [], float(MARGIN)
    for source, meaning in LABELS.items():
        count = sum(piece.source == source for piece in pieces)
        legend.append(
            f'<rect class="{source}" x="{place:.0f}" y="{MARGIN - 6}" width="16" height="16" '
            f'rx="3"/><text class="soft" x="{place + 22:.0f}" y="{MARGIN + 7}">{meaning}: '
            f"{count}</text>"
        )
        place += 265
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {WIDTH} '
            f'{y + MARGIN}" role="img" aria-label="An answer, its tokens colored by who guessed '
            f'them: {label}">',
            f"<style>\n{STYLE}\n</style>",
            *legend,
            f'<text class="soft" x="{MARGIN}" y="{MARGIN + 34}">{label}</text>',
            *boxes,
            *texts,
            "</svg>\n",
        ]
    )


def main() -> int:
    """Run the command; return its exit status."""
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("run", metavar="RUN")
    command.add_argument("--prompt", metavar="TEXT", required=True)
    command.add_argument("--tokens", metavar="N", type=COUNT, default=160)
    command.add_argument("--out", metavar="FILE", type=file_to_write, required=True)
    arguments = command.parse_args()

    def work() -> None:
        language = load_language_model(arguments.run, {})
        pieces, stats = answer(language, arguments.prompt, arguments.tokens)
        Path(arguments.out).write_text(svg(pieces, stats), encoding="utf-8")

    return app.reported(work)


if __name__ == "__main__":
    sys.exit(main())
