"""Answers about images: from Python, files, the command line and the chat."""

import json

import pytest
from image_text_fixtures import SOME_KINDS, row, save_picture, write_rows
from PIL import Image

from petl.cli.chat_commands import handle
from petl.cli.main import main
from petl.errors import InputError, printable
from petl.generation.inference.chat import ChatSession
from petl.generation.inference.language_model import BASE, message
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.prompts import answered, read_prompts
from petl.generation.inference.sampling import Sampling

pytest_plugins = ["image_text_fixtures", "writer_fixtures"]
SHORT = Sampling(max_new_tokens=6)
QUESTION = "Which color?"


@pytest.fixture(scope="module")
def writer(adapters):
    """A loaded model with the adapters `one` and `two`, by kind."""
    loaded = {}

    def load(kind):
        if kind not in loaded:
            folder = adapters[kind]
            loaded[kind] = load_language_model(folder / "one", {"two": str(folder / "two")})
        return loaded[kind]

    return load


def direct(model, path, question):
    """What transformers itself answers to a question about an image."""
    processor = model.processor
    parts = [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    made = model.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=3)
    new = made[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_answers_are_those_of_transformers_and_depend_on_the_image(writer, tmp_path, kind):
    model = writer(kind)
    found = set()
    for color in ("red", "blue"):
        file = save_picture(tmp_path / f"{color}.png", color)
        for name in ("default", "two", BASE):
            chat = ChatSession(model, SHORT, name)
            chat.show(str(file))
            answer = chat.ask(QUESTION, lambda text: None).text
            with model.using(name):
                assert answer == direct(model, file, QUESTION)
            found.add(answer)
    assert len(found) > 3


def test_turns_keep_their_images_and_a_retry_asks_about_them_again(writer, tmp_path, capsys):
    model = writer("qwen2_5_vl")
    red, blue = (str(save_picture(tmp_path / f"{c}.png", c)) for c in ("red", "blue"))
    chat = ChatSession(model, SHORT, "default")
    for line in (f"/image {red}", QUESTION, f"/image {blue}", "And this?", "Sure?"):
        handle(chat, line)
    assert chat.images == [red, blue]
    assert not chat.waiting
    last = chat.turns[-1]["content"]
    handle(chat, "/retry")
    assert chat.images == [red, blue]
    assert chat.turns[-1]["content"] == last
    # a chat in one call has the same answer
    handle(chat, f"/save {tmp_path / 'chat.jsonl'}")
    saved = json.loads((tmp_path / "chat.jsonl").read_text())
    saved["messages"][-1]["content"] = "?"
    file = write_rows(tmp_path / "again.jsonl", [saved])
    (only,) = read_prompts(str(file), model)
    with model.using("default"):
        assert model.answer([model.encode(only.prompt)], SHORT)[0].text == last
    handle(chat, "/reset")
    assert not chat.images
    (tmp_path / "text.png").write_text("no image")
    for name in ("nowhere.png", str(tmp_path / "text.png")):
        with pytest.raises(InputError, match=name):
            handle(chat, f"/image {name}")
    assert not chat.waiting


def test_files_are_answered_in_batches_as_alone(writer, chats):
    model = writer("llava")
    questions = [*read_prompts(str(chats), model)]
    found = [
        {name: each.text for name, each in answers.items()}
        for _, answers in answered(model, questions, SHORT, names=["default"], batch_size=5)
    ]
    with model.using("default"):
        alone = [model.answer([model.encode(q.prompt)], SHORT)[0].text for q in questions]
    assert [each["default"] for each in found] == alone
    assert len({*alone}) > 1


def test_the_command_takes_an_image_and_refuses_what_cannot_be(adapters, chats, tmp_path, capsys):
    file = str(save_picture(tmp_path / "a.png", "red"))
    run = str(adapters["llava"] / "one")
    words = ["generate", run, "--max-new-tokens", "6", "--prompt", QUESTION]
    assert main([*words, "--image", file]) == 0
    answer = capsys.readouterr().out.rstrip("\n")
    model = load_language_model(run)
    assert answer == printable(direct(model, file, QUESTION))
    assert main(["generate", run, "--file", str(chats), "--image", file]) == 2
    assert "--file" in capsys.readouterr().err


def test_a_model_of_texts_refuses_images(tmp_path, writers):
    model = writers.load("lora")
    chat = ChatSession(model, SHORT, "default")
    with pytest.raises(InputError):
        chat.show("a.png")
    save_picture(tmp_path / "a.png", "red")
    file = write_rows(tmp_path / "rows.jsonl", [row("a.png", "red")])
    with pytest.raises(InputError):
        [*read_prompts(str(file), model)]


def test_a_merged_or_plain_model_reads_images(bases, tmp_path):
    model = load_language_model(bases["smolvlm"])
    chat = ChatSession(model, SHORT, BASE)
    file = save_picture(tmp_path / "a.png", "red")
    chat.show(str(file))
    assert chat.ask(QUESTION, lambda text: None).text == direct(model, file, QUESTION)


def test_messages_begin_with_their_images():
    parts = json.loads(message("user", "What?", 2)["more"])["parts"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]
