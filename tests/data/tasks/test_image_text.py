"""The task on images and text: tokens, labels and pixels that belong together."""

import json

import pytest
import torch
from image_text_fixtures import KINDS, PAIRS, built, row, save_picture, write_rows
from PIL import Image

from petl.data.base import read_data
from petl.data.models.loading import load_processor
from petl.data.tasks.base import IGNORED
from petl.data.tasks.image_text.prompt import ImagePrompt, prompt_inputs
from petl.errors import InputError

SHARED = {"name": "files", "source": "files", "task": "image_text", "test_share": 0.4}


def bases_of(kind, folder):
    """The folder of a model with its processor."""
    for part in built(kind):
        part.save_pretrained(folder / kind)
    return folder / kind


def turns(*pairs):
    """A conversation of questions with answers; a question is text, or parts."""
    return {
        "messages": [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
    }


def image(name):
    return {"type": "image_url", "image_url": {"url": name}}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def mixed(tmp_path):
    """Rows of one image, of none, of three of different sizes, and of several turns."""
    for name, size in {"a": (20, 14), "b": (9, 30), "c": (40, 40)}.items():
        save_picture(tmp_path / f"{name}.png", "red", size)
    rows = [
        row("a.png", "red"),
        turns(["Hello", "Hi there"]),
        turns([[image("a.png"), text("or"), image("b.png"), image("c.png")], "neither"]),
        turns(
            ["Look", "Where?"],
            [[text("Here:"), image("b.png")], "I see"],
            [[image("c.png"), text("and this?")], "No"],
        ),
        {"messages": [{"role": "system", "content": "Be kind."}, *row("c.png", "x")["messages"]]},
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


def encoded(file, kind, **given):
    """The task, its processor, the encoded rows of a file, and the rows before."""
    data = read_data({**SHARED, "train": str(file), "test": str(file), **given})
    processor = built(kind)[1]
    return data.task, processor, [*data.task.encode(processor, data.test)], data.test


def answers(row, processor):
    """The text of each run of tokens that carry a loss."""
    runs, last = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != IGNORED:
            assert label == token
            runs = [*runs, [token]] if not last else [*runs[:-1], [*runs[-1], token]]
        last = label != IGNORED
    return [processor.decode(run) for run in runs]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_with_loss_are_the_answers_and_no_others(mixed, kind):
    _, processor, rows, sources = encoded(mixed, kind)
    assert len(rows) == 5
    found = sorted(answers(each, processor) for each in rows)
    expected = [
        [f"{m['content']}<|im_end|>" for m in each["messages"] if m["role"] == "assistant"]
        for each in sources
    ]
    assert found == sorted(expected)


@pytest.mark.cells(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_the_processor_makes_of_its_rows(mixed, kind):
    """Batches of any rows: the model's loss is that of each row alone."""
    task, processor, rows, _ = encoded(mixed, kind)
    model = built(kind)[0]
    collate = task.collate(processor, 8)
    batch = collate(rows)
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].shape[1] % 8 == 0
    for i, each in enumerate(rows):
        length = len(each["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == each["input_ids"]
        assert batch["labels"][i, :length].tolist() == each["labels"]
        assert (batch["labels"][i, length:] == IGNORED).all()
        # what transformers makes of the conversation in one call, images and all
        own = json.loads(each["images"])
        pictures = [Image.open(path).convert("RGB") for path, _ in own]
        direct = processor(text=[each["text"]], images=[pictures] if own else None)
        assert [*direct["input_ids"][0]] == each["input_ids"]
    with torch.no_grad():
        together = task.predict(task.outputs(model, batch), batch)
        alone = []
        for each in rows:
            single = task.collate(processor)([each])
            alone.append(task.predict(task.outputs(model, single), single)[0])
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert task.items(batch) == sum(task.items(task.collate(processor)([each])) for each in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_too_long_is_dropped_whole(mixed, kind, caplog):
    _, _, rows, _ = encoded(mixed, kind)
    lengths = sorted(len(each["input_ids"]) for each in rows)
    # a limit within the images of the longest
    _, _, kept, _ = encoded(mixed, kind, max_length=lengths[-1] - 1)
    assert sorted(len(each["input_ids"]) for each in kept) == lengths[:-1]
    assert "dropped 1 of 5 rows" in caplog.text
    assert f"data.max_length={lengths[-1] - 1}" in caplog.text
    data = read_data({**SHARED, "train": str(mixed), "max_length": 3})
    with pytest.raises(InputError, match=r"data\.max_length=3"):
        data.task.encode(built(kind)[1], data.train)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_decide_what_the_model_says(tmp_path, kind):
    """A fault that loses pixels, or gives them to another row, would leave the loss as it was."""
    model, processor = built(kind)
    losses = {}
    for color in ("red", "blue"):
        save_picture(tmp_path / "a.png", color)
        save_picture(tmp_path / "b.png", "green")
        file = write_rows(tmp_path / "rows.jsonl", [row("a.png", "x"), row("b.png", "x")])
        data = read_data({**SHARED, "train": str(file), "test": str(file)})
        rows = data.task.encode(processor, data.test)
        batch = data.task.collate(processor)(sorted(rows, key=lambda each: each["images"]))
        with torch.no_grad():
            losses[color] = data.task.predict(data.task.outputs(model, batch), batch)[:, 1]
    first, second = (losses["red"] - losses["blue"]).abs().tolist()
    assert first > 1e-4
    assert second < 1e-5


def test_an_image_that_changes_after_encoding_is_refused(mixed):
    task, processor, rows, _ = encoded(mixed, "llava")
    save_picture(mixed.parent / "a.png", "blue", (20, 14))
    with pytest.raises(InputError):
        task.collate(processor)(rows)


@pytest.mark.parametrize("words", ["<image>", "an <image> of mine"])
def test_a_text_with_the_mark_of_an_image_is_refused(tmp_path, words):
    file = write_rows(tmp_path / "rows.jsonl", [turns([words, "Yes"])] * 2)
    data = read_data({**SHARED, "train": str(file)})
    with pytest.raises(InputError, match="<image>"):
        data.task.encode(built("llava")[1], data.train)


def test_an_image_of_extreme_proportions_is_refused_in_words(tmp_path):
    save_picture(tmp_path / "a.png", "red", (3000, 4))
    file = write_rows(tmp_path / "rows.jsonl", [row("a.png", "red")] * 2)
    data = read_data({**SHARED, "train": str(file)})
    with pytest.raises(InputError, match=r"Which color.*Qwen2_5_VLProcessor"):
        data.task.encode(built("qwen2_5_vl")[1], data.train)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_a_batch_are_answered_as_alone(mixed, kind):
    task, processor, _, sources = encoded(mixed, kind)
    model = built(kind)[0]
    columns = {name: list(sources[name]) for name in ("messages", "images")}
    columns["messages"] = [messages[:-1] for messages in columns["messages"]]
    prompts = task.prompts(processor, columns)
    assert all(isinstance(each, ImagePrompt) for each in prompts)

    def logits(some):
        inputs = prompt_inputs(some)
        ids = inputs["input_ids"][inputs["attention_mask"].bool()].tolist()
        assert ids == [token for each in some for token in each]
        made = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return made.logits[0]

    alone = torch.cat([logits([each]) for each in prompts])
    torch.testing.assert_close(logits(prompts), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PAIRS)
def test_an_encoder_reads_the_question_and_a_decoder_the_answer(tmp_path, kind):
    """The model's own loss for what its processor makes of a question with an image."""
    for name, size in {"a": (20, 14), "b": (9, 30)}.items():
        save_picture(tmp_path / f"{name}.png", "red", size)
    save_picture(tmp_path / "c.png", "blue")
    asked = ["Which color?", "And what is this?", "Which?"]
    answers = ["red", "no idea", "blue"]
    rows = [
        turns([[image(f"{name}.png"), text(words)], answer])
        for name, words, answer in zip("abc", asked, answers, strict=True)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = read_data({**SHARED, "train": str(file), "test": str(file), "generate": 4})
    model, folder = built(kind)[0], bases_of(kind, tmp_path)
    model_settings = {"name": kind, "source": "path", "path": str(folder)}
    processor = load_processor(model_settings, data.task)
    rows = list(data.task.encode(processor, data.test))
    batch = data.task.collate(processor, 8)(rows)
    assert batch["input_ids"].shape[1] % 8 == batch["labels"].shape[1] % 8 == 0
    with torch.no_grad():
        found = data.task.predict(data.task.outputs(model, batch), batch)
    plain = built(kind)[1]
    mark = "" if kind == "florence2" else plain.image_token
    for each, (count, loss) in zip(rows, found.tolist(), strict=True):
        place = answers.index(each["_answer"])
        labels = plain.tokenizer(answers[place], return_tensors="pt")["input_ids"]
        inputs = plain(
            text=[mark + asked[place]],
            images=[[Image.open(tmp_path / f"{'abc'[place]}.png").convert("RGB")]],
            return_tensors="pt",
        )
        with torch.no_grad():
            expected = model(**inputs, labels=labels).loss.item()
        assert count == labels.numel()
        assert loss / count == pytest.approx(expected, rel=1e-4)
        assert [*data.task.prompt(processor, each)] == inputs["input_ids"][0].tolist()
    assert data.task.items(batch) == sum(len(each["labels"]) for each in rows)
    assert data.task.count(batch) == sum(data.task.lengths(data.task.encode(processor, data.test)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (turns(["Hello", "Hi"]), "0 images, and the model reads one"),
        (turns([[image("a.png"), text("or"), image("a.png")], "no"]), "2 images"),
        (turns([[image("a.png"), text("What?")], "x"], ["And?", "y"]), "one question of the user"),
    ],
)
def test_what_a_question_to_an_encoder_cannot_be_is_said(tmp_path, given, said):
    save_picture(tmp_path / "a.png", "red")
    file = write_rows(tmp_path / "rows.jsonl", [given] * 3)
    data = read_data({**SHARED, "train": str(file)})
    settings = {"source": "path", "path": str(bases_of("florence2", tmp_path)), "name": "florence2"}
    with pytest.raises(InputError, match=said):
        data.task.encode(load_processor(settings, data.task), data.train)
