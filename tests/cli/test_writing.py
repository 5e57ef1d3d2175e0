"""`petl generate` and `petl chat`: what they print and write, and what they refuse."""

import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from petl.cli import chat_commands, main
from petl.errors import UNPRINTABLE, InputError
from petl.generation.inference.chat import ChatSession
from petl.generation.inference.language_model import LanguageModel
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling
from petl.system.files import disk

pytest_plugins = ["writer_fixtures"]

TEN = ["--max-new-tokens", "10"]
LLAMA = ["--engine", "llama.cpp"]
SAMPLED = ["--max-new-tokens", "60", "--temperature", "1", "--seed", "1"]


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command with lines of input: exit status, standard output, standard error."""

    def call(*words, lines=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        status = main.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


def answer(model, text, name="default", **settings):
    settings = {"max_new_tokens": 10, **settings}
    with model.using(name):
        return model.answer([model.encode(text)], Sampling(**settings))[0].text


def escaped(text):
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# petl generate


def test_generate_prints_the_answer_with_control_characters_escaped(command, writers):
    status, out, err = command("generate", writers.folder / "lora", "--prompt", "Hi", *SAMPLED)
    assert status == 0
    assert UNPRINTABLE.search(out) is None
    assert "\\x" in out  # a random model writes control characters
    assert "the answer was cut after 60 tokens, see --max-new-tokens" in err
    _, again, _ = command("generate", writers.folder / "lora", "--prompt", "Hi", *SAMPLED)
    assert again == out
    _, other, _ = command(
        "generate", writers.folder / "lora", "--prompt", "Hi", *SAMPLED, "--seed", "2"
    )
    assert other != out


def test_generate_and_chat_answer_with_json_of_a_schema(command, writers, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": [{"a": 1}, [True]]}))
    words = (writers.folder / "lora", "--json-schema", schema)
    _, out, _ = command("generate", *words, "--prompt", "Hi")
    assert json.loads(out) in ({"a": 1}, [True])
    _, chat, _ = command("chat", *words, lines=["Hi"])
    assert out.strip() in chat
    schema.write_text(json.dumps({"type": "foo"}))
    status, _, err = command("generate", *words, "--prompt", "Hi")
    assert (status, "Invalid type: foo" in err) == (2, True)


@pytest.mark.thorough
def test_generate_prints_answers_of_adapters_and_base_side_by_side(command, writers):
    lora = writers.folder / "lora"
    more = ["--adapter", f"second={writers.folder / 'other'}", "--base", *TEN]
    _, out, _ = command("generate", lora, "--prompt", "Hi", *more)
    model = writers.load("lora", second="other")
    titles = [f"default: {lora}", f"second: {writers.folder / 'other'}", "base: llama"]
    answers = (escaped(answer(model, "Hi", name)) for name in model.names)
    expected = (f"[{title}]\n{text}\n\n" for title, text in zip(titles, answers, strict=True))
    assert out == "".join(expected)


def test_generate_reads_the_prompt_from_standard_input(command, writers):
    model = writers.load("lora")
    words = ["generate", writers.folder / "lora", "--prompt", "-", "--system", "Be brief.", *TEN]
    _, out, _ = command(*words, lines=["Hi"])
    ids = model.encode("Hi\n", "Be brief.")
    (expected,) = model.answer([ids], Sampling(max_new_tokens=10))
    assert out == f"{escaped(expected.text)}\n"


@pytest.mark.thorough
def test_generate_writes_rows_with_answers(command, writers, tmp_path):
    rows = [{"prompt": "Hi", "id": 1}, {"prompt": "a b a b a b a b", "id": 2}]
    file, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["generate", writers.folder / "lora", "--file", file, *TEN]
    status, printed, _ = command(*words)
    assert status == 0
    model = writers.load("lora")
    expected = [{**row, "generated": answer(model, row["prompt"])} for row in rows]
    assert [json.loads(line) for line in printed.splitlines()] == expected
    status, printed, err = command(*words, "--out", out, "--base", "--prompt-lookup", "3")
    assert (status, printed) == (0, "")
    assert f"4 answers in {out}" in err
    for row, line in zip(rows, out.read_text().splitlines(), strict=True):
        base = answer(model, row["prompt"], "base")
        given = {**row, "generated": answer(model, row["prompt"]), "generated_base": base}
        assert json.loads(line) == given


def test_generate_checks_all_prompts_before_the_first_answer(command, writers, tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [*["Hi"] * 200, "a" * 300]
    file.write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in texts))
    words = ["generate", writers.folder / "lora", "--file", file, *TEN]
    status, printed, err = command(*words)
    assert (status, printed) == (2, "")
    assert "prompt 201: a prompt has 3" in err


@pytest.mark.thorough
def test_generate_prints_the_same_answer_with_drafts_and_what_they_saved(command, writers):
    words = ["generate", writers.folder / "lora", "--prompt", "a b a b a", *SAMPLED]
    status, plain, err = command(*words, "--drafter", "none", "--stats")
    assert status == 0
    assert re.search(r"\d+ tokens of 1 answers in \d+\.\d s", err)
    for drafting in ([], ["--drafter", "free"]):
        status, out, err = command(*words, *drafting, "--stats", "--check")
        assert (status, out) == (0, plain)
        assert re.search(r"\d+ tokens in \d+ passes after the prompts: \d\.\d\d tokens a pass", err)
        assert "logits with drafts differ by at most" in err
        assert "tokens of an answer are at most 0.0e+00 below the best" in err
        assert "Every token is the one the model chose for exactly the text before it." in err


def test_generate_refuses_several_prompts_at_a_time_with_drafts(command, writers):
    words = ["generate", writers.folder / "lora", "--prompt", "Hi", "--batch-size", "4"]
    for more in (["--drafter", "free"], ["--stats"], ["--prompt-lookup", "3"]):
        status, out, err = command(*words, *more)
        assert (status, out) == (2, "")
        assert f"--batch-size=4 with {more[0]}" in err
        assert "is for one prompt at a time: leave out one of them" in err


def test_generate_refuses_a_drafter_that_is_not_there(command, writers, tmp_path):
    words = ["generate", writers.folder / "lora", "--prompt", "Hi", "--drafter", tmp_path]
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert "has no drafter_config.json: give the folder of a drafter" in err


def test_generate_never_writes_through_a_link(command, writers, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "secret")
    out = ["--out", tmp_path / "out.jsonl"]
    command("generate", writers.folder / "llama", "--prompt", "Hi", *TEN, *out)
    assert (tmp_path / "secret").read_text() == "secret"
    assert not (tmp_path / "out.jsonl").is_symlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Hi", "--file", __file__], "not allowed with argument"),
        ([], "one of the arguments --prompt --file is required"),
        (["--prompt", "Hi", "--temperature", "-1"], "'-1' is not a number from 0 to 100"),
        (["--prompt", "Hi", "--adapter", "runs/a"], "'runs/a' is not NAME=RUN"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_loaded(
    command, writers, words, message, capsys
):
    with pytest.raises(SystemExit):
        command("generate", writers.folder / "lora", *words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prompt", "Hi", "--out", "answers.txt"],
            "--out=answers.txt is not in a supported",
        ),
        (["--prompt", "Hi", "--stop", ""], "stop=[''] has an empty text"),
        (["--prompt", "Hi", *["--adapter", "a=other"] * 2], "--adapter names 'a' twice"),
        (["--prompt", "Hi", "--drafter", "lookup", *LLAMA], "--drafter=lookup is for --engine"),
        (["--prompt", "Hi", "--weights", "q8_0"], "--weights=q8_0 is for --engine llama.cpp"),
        (["--prompt", "Hi", "--adapter", "base=other", *LLAMA], "the adapter name 'base' is taken"),
    ],
)
def test_a_wrong_value_is_one_line(command, writers, words, message, monkeypatch):
    monkeypatch.chdir(writers.folder)
    status, _, err = command("generate", "lora", *words)
    assert status == 2
    assert f"error: {message}" in err
    assert len(err.splitlines()) == 1


def test_generate_never_replaces_the_file_of_prompts(command, writers, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Hi"}\n')
    status, _, err = command("generate", writers.folder / "lora", "--file", file, "--out", file)
    assert status == 2
    assert f"--out={file} is the file that is read" in err
    assert file.read_text() == '{"prompt": "Hi"}\n'


def test_a_full_disk_is_named(command, writers, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "create", lambda _: Path("/dev/full").open("wb"))  # noqa: SIM115
    given = ("generate", writers.folder / "lora", "--prompt", "Hi", *TEN)
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        status, _, err = command(*given, "--out", tmp_path / name)
        assert status == 1
        assert f"cannot write {tmp_path / name}: No space left" in err.splitlines()[-1]


# petl chat


def replies(out):
    """What follows each prompt in the output of a chat, its two first lines left out."""
    return out.split("\n", 2)[2].split("> ")[1:]


def test_chat_answers_with_the_turns_before(command, writers):
    words = ["chat", writers.folder / "lora", *TEN]
    status, out, _ = command(*words, lines=["Hi", "", "And?"])
    assert status == 0
    model = writers.load("lora")
    first = answer(model, "Hi")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
    ]
    assert out.startswith(f"llama with adapter default ({writers.folder / 'lora'}) (chat template)")
    assert replies(out)[:3] == [f"{escaped(first)}\n", "", f"{escaped(answer(model, turns))}\n"]


def test_chat_switches_adapters_by_name(command, writers):
    words = ["chat", writers.folder / "lora", "--adapter", f"second={writers.folder / 'other'}"]
    lines = ["Hi", "/adapter second", "/retry", "/adapter base", "/retry", "/adapter third"]
    _, out, err = command(*words, *TEN, "--base", lines=[*lines, "/adapter"])
    model = writers.load("lora", second="other")
    base, second = (escaped(answer(model, "Hi", name)) for name in ("base", "second"))
    assert base != second
    found = replies(out)
    assert [found[0], found[2], found[4]] == [f"{base}\n", f"{second}\n", f"{base}\n"]
    assert found[1] == f"adapter second ({writers.folder / 'other'}) answers\n"
    assert "no adapter 'third'; available: base, default, second" in err
    assert [line.split()[0] for line in found[6].splitlines()] == ["adapter", *model.names]
    assert found[6].splitlines()[3].endswith("answers")


def test_chat_commands_change_prompt_and_sampling(command, writers):
    lines = ["/system Be brief.", "Hi", "/reset", "/system -", "/set max_new_tokens 4", "Hi"]
    lines += ["/reset", "/set top_k 2.5", "/set heat 3", "/sett", "//x", "/help", "/exit", "never"]
    status, out, err = command("chat", writers.folder / "lora", *TEN, lines=lines)
    assert status == 0
    model, found = writers.load("lora"), replies(out)
    (briefed,) = model.answer([model.encode("Hi", "Be brief.")], Sampling(max_new_tokens=10))
    assert found[0] == "system prompt: Be brief.\n"
    assert found[1] == f"{escaped(briefed.text)}\n"
    assert found[3] == "no system prompt of your own\n"
    assert found[5] == f"{escaped(answer(model, 'Hi', max_new_tokens=4))}\n"
    assert found[10] == f"{escaped(answer(model, '/x', max_new_tokens=4))}\n"
    for message in ("top_k=2.5 is not a number", "no setting 'heat'", "did you mean '/set'"):
        assert message in err
    assert "/adapter [NAME]" in found[11]
    assert len(found) == 13  # the last line was not read


def test_a_retry_that_fails_keeps_the_turns(monkeypatch):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chat = ChatSession(SimpleNamespace(), Sampling(), "default", turns=[*turns])

    def refusing(chat, text):
        raise InputError("no base model beside an adapter")

    monkeypatch.setattr(chat_commands, "answer", refusing)
    with pytest.raises(InputError):
        chat_commands.retry(chat, "")
    assert chat.turns == turns
    with pytest.raises(InputError, match=r"~nobody-here/x\.jsonl"):
        chat_commands.save(chat, "~nobody-here/x.jsonl")


def test_a_line_that_ends_with_a_backslash_goes_on(command, writers):
    _, out, _ = command("chat", writers.folder / "lora", *TEN, lines=["Hi\\", "you"])
    assert replies(out)[0] == f"  {escaped(answer(writers.load('lora'), 'Hi' + chr(10) + 'you'))}\n"


def test_a_saved_chat_is_a_row_to_train_on(command, writers, tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = [
        "/save x.txt",
        f"/save {file}",
        "Hi",
        f"/save {file}",
        "/reset",
        "Yes",
        f"/save {file}",
    ]
    _, out, err = command("chat", writers.folder / "lora", *TEN, "--system", "Brief.", lines=lines)
    assert " ".join(out.split()).count("1 of 1 answers were") == err.count("the answer was cut") > 0
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    roles = ["system", "user", "assistant"]
    assert [[turn["role"] for turn in row] for row in rows] == [roles, roles]
    assert [row[1]["content"] for row in rows] == ["Hi", "Yes"]
    assert "'x.txt' is not the name of a .jsonl file" in err
    assert f"there is nothing to save in {file} yet" in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(command, writers, monkeypatch):
    original, interrupted = LanguageModel.answer, []

    def answer_and_press(self, prompts, sampling, *, write=None, stop=None):
        def press(piece):
            write(piece)
            if not interrupted:
                interrupted.append(piece)
                os.kill(os.getpid(), signal.SIGINT)

        return original(self, prompts, sampling, write=press, stop=stop)

    monkeypatch.setattr(LanguageModel, "answer", answer_and_press)
    before = signal.getsignal(signal.SIGINT)
    words = ["chat", writers.folder / "lora", "--max-new-tokens", "200", "--temperature", "1"]
    status, out, _ = command(*words, lines=["Hi", "/set max_new_tokens 5", "And?"])
    assert status == 0
    assert signal.getsignal(signal.SIGINT) is before
    found = replies(out)
    assert found[0].endswith(" [stopped]\n")
    assert len(found) == 4  # the chat went on, to the end of the input
    assert not found[2].endswith("[stopped]\n")


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(command, writers, monkeypatch):
    lines = iter([KeyboardInterrupt, "Hi"])

    def read(prompt):
        line = next(lines, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    status, out, _ = command("chat", writers.folder / "lora", *TEN)
    assert status == 0
    assert out.endswith(f"\n{escaped(answer(writers.load('lora'), 'Hi'))}\n\n")


def test_chat_refuses_what_does_not_fit_and_goes_on(command, writers):
    status, out, err = command(
        "chat", writers.folder / "lora", *TEN, lines=["a" * 300, "/retry", "Hi"]
    )
    assert status == 0
    assert "and llama has 256 positions" in err
    assert "there is no question yet" in err
    assert replies(out)[2] == f"{escaped(answer(writers.load('lora'), 'Hi'))}\n"


def test_a_model_without_template_continues_each_text_by_itself(command, writers):
    words = ["chat", writers.folder / "plain", *TEN]
    _, out, err = command(*words, lines=["Hi", "/system Be brief.", "Hi"])
    expected = f"{escaped(answer(load_language_model(writers.folder / 'plain'), 'Hi', 'base'))}\n"
    assert "(plain text: each text is continued by itself)" in out
    assert [replies(out)[0], replies(out)[2]] == [expected, expected]
    assert "plain reads plain text, without a system prompt" in err


def test_retry_repeats_a_text_without_template_until_it_is_forgotten(command, writers):
    lines = ["/retry", "Hi", "/retry", "/retry", "/reset", "/retry"]
    _, out, err = command("chat", writers.folder / "plain", *TEN, lines=lines)
    expected = f"{escaped(answer(load_language_model(writers.folder / 'plain'), 'Hi', 'base'))}\n"
    assert replies(out)[1:4] == [expected] * 3
    assert err.count("there is no question yet to answer with base") == 2


def test_a_prompt_or_question_that_is_not_utf_8_is_refused(command, writers):
    run, wrong = writers.folder / "lora", "caf\udce9"  # as Python reads the byte 0xe9
    for words in (["--prompt", wrong], ["--prompt", "-"]):
        status, _, err = command("generate", run, *words, *TEN, lines=[wrong])
        assert status == 2
        assert "error: the text is not UTF-8" in err
    status, _, err = command("chat", run, *TEN, lines=[wrong, "/exit"])
    assert status == 0
    assert err.count("the text is not UTF-8") == 1
