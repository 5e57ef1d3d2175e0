"""The picture of an answer: each token has its source, and each a box."""

import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from draft_picture import COPIED, MODEL, RECYCLED, Piece, answer, svg

from petl.efficiency.drafting import Stats
from petl.generation.inference.sampling import Sampling

pytest_plugins = ["writer_fixtures"]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_tokens_of_an_answer_are_those_of_generate_and_each_pass_ends_with_the_models(writers):
    model = writers.load("lora")
    pieces, stats = answer(model, "a b a b a b", 40)
    with model.using("default"):
        (plain,) = model.answer([model.encode("a b a b a b")], Sampling(max_new_tokens=40))
    assert "".join(piece.text for piece in pieces).rstrip("\ufffd") in plain.text
    sources = [piece.source for piece in pieces]
    assert {COPIED, RECYCLED} & {*sources}
    if len(pieces) == stats.tokens:  # no character of several tokens
        assert sources.count(MODEL) == stats.passes + 1
        assert len(sources) - sources.count(MODEL) == stats.accepted


def test_each_token_has_a_box_of_its_source_and_lines_end_where_the_text_does():
    pieces = [Piece("A <b>", MODEL), Piece(" c\n", COPIED), Piece("d" * 90, RECYCLED)]
    pieces += [Piece(" e" * 20, MODEL)]
    root = ElementTree.fromstring(svg(pieces, Stats(tokens=4, passes=1, drafted=5, accepted=2)))
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("height") == "22"]
    assert [box.get("class") for box in boxes] == [MODEL, COPIED, RECYCLED, MODEL]
    # the third begins a line after the line break, and the fourth one since it does not fit
    rows = [int(box.get("y")) for box in boxes]
    assert rows[0] == rows[1] < rows[2] < rows[3]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "A <b>" in texts
    assert "4 tokens in 2 passes, that over the prompt included; 2 of 5 drafts were right" in texts
