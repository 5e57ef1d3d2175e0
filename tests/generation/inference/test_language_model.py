"""Language models with adapters: loading, prompts, answers."""

from dataclasses import replace
from threading import Event

import pytest
import torch
from tiny_tokenizers import CHATML
from writer_fixtures import POSITIONS, PROMPTS

from petl.data.tasks import TOOLS
from petl.efficiency.drafting.aggressive import Aggressive
from petl.errors import InputError
from petl.generation.inference.language_model import message
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling
from petl.training.generation import written

pytest_plugins = ["writer_fixtures"]

SHORT = Sampling(max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=40, temperature=1.0)


def answers(model, name, sampling=SHORT, prompts=PROMPTS):
    with model.using(name):
        found = [model.answer([model.encode(text)], sampling)[0] for text in prompts]
    return [answer.text for answer in found]


@torch.no_grad()
def by_hand(model, name, text, count):
    """Greedy decoding without cache: the most likely token after all others, again and again."""
    ids = model.encode(text)
    prompt = len(ids)
    with model.using(name):
        while len(ids) < prompt + count and ids[-1] != 3:
            ids.append(int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return model.tokenizer.decode(ids[prompt:], skip_special_tokens=True)


@pytest.mark.cells(1)
@pytest.mark.parametrize("name", ["lora", "mola"])
def test_an_answer_is_what_greedy_decoding_gives(writers, name):
    model = writers.load(name)
    assert answers(model, "default") == [by_hand(model, "default", p, 12) for p in PROMPTS]
    assert answers(model, "base") == [by_hand(model, "base", p, 12) for p in PROMPTS]


@pytest.mark.thorough
def test_adapters_are_switched_by_name(writers):
    model = writers.load("lora", second="other")
    assert model.names == ["default", "second", "base"]
    alone = {name: answers(writers.load(name), "default") for name in ("lora", "other")}
    base = answers(writers.load("llama"), "base")
    assert alone["lora"] != alone["other"] != base
    for name, expected in [("second", alone["other"]), ("base", base), ("default", alone["lora"])]:
        assert answers(model, name) == expected
    with pytest.raises(InputError, match="'secnd'"), model.using("secnd"):
        pass


# Prompts


def test_a_prompt_is_a_turn_of_the_chat_template(writers):
    model = writers.load("lora")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(model.encode("Hi")) == text
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert model.tokenizer.decode(model.encode("Hi", "Be brief.")) == system + text
    given = [message("system", "No."), message("user", "Hi")]
    assert model.tokenizer.decode(model.encode(given, "Be brief.")).startswith(
        "<|im_start|>system\nNo.<|im_end|>"
    )


def test_functions_stay_before_the_system_prompt(writers):
    model = writers.load("lora")
    model.tokenizer.chat_template = "{{ tools[0].function.name }}: " + CHATML
    declared = {"role": TOOLS, "content": '[{"function": {"name": "add"}}]'}
    text = model.tokenizer.decode(model.encode([declared, message("user", "Hi")], "Be brief."))
    assert text.startswith("add: <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_a_prompt_without_template_is_plain_text(writers):
    model = writers.load("plain")
    assert not model.is_chat
    assert model.tokenizer.decode(model.encode("Hi")) == "Hi"
    with pytest.raises(InputError):
        model.encode("Hi", "Be brief.")
    assert load_language_model(writers.folder / "lora", plain=True).encode("Hi") == model.encode(
        "Hi"
    )


def test_a_text_is_not_ended_before_the_answer(writers):
    model = writers.load("plain")
    model.tokenizer.backend_tokenizer.post_processor = None
    ids = model.encode("Hi<|im_end|>")
    assert model.tokenizer.decode(ids) == "Hi"


def test_an_encoder_reads_the_prefix_and_the_whole_text(writers):
    model = writers.load("t5-lora")
    assert model.is_encoder_decoder
    assert model.tokenizer.decode(model.encode("Hi")) == "Hi"
    assert len(answers(model, "default")) == len(PROMPTS)
    assert answers(model, "default") != answers(model, "base")


# Answers


def test_drafts_begin_behind_what_a_run_puts_before_each_text(writers, monkeypatch):
    read: list[list[int]] = []
    own = Aggressive.start

    def start(self, ids, states, encoder=None):
        read.append(encoder)
        own(self, ids, states, encoder)

    monkeypatch.setattr(Aggressive, "start", start)
    model = replace(writers.load("t5-lora"), prefix="echo: ", drafting="aggressive")
    ids, tokenizer = model.encode("Hi there"), model.tokenizer
    assert tokenizer.decode(ids, skip_special_tokens=True) == "echo: Hi there"
    with model.using("default"):
        (answer,) = model.answer([ids], SHORT)
        (plain,) = replace(model, drafting="none").answer([ids], SHORT)
        written(model.model, tokenizer, [ids], 3, prefix="echo: ")
    assert answer == plain
    texts = [tokenizer.decode(each, skip_special_tokens=True).strip() for each in read]
    assert texts == ["Hi there"] * 2


def test_a_batch_gives_the_answers_of_single_prompts(writers):
    for name in ("lora", "t5-lora"):
        model = writers.load(name)
        with model.using("default"):
            batch = model.answer([model.encode(text) for text in PROMPTS], SHORT)
        assert [answer.text for answer in batch] == answers(model, "default")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["lora", "mola", "t5-lora"])
def test_prompt_lookup_gives_the_same_answers(writers, name):
    model = writers.load(name)
    lookup = Sampling(max_new_tokens=30, prompt_lookup=5)
    plain = Sampling(max_new_tokens=30)
    assert answers(model, "default", lookup) == answers(model, "default", plain)


def test_prompt_lookup_of_a_batch_is_refused(writers):
    model = writers.load("llama")
    ids = [model.encode(text) for text in PROMPTS]
    with pytest.raises(InputError):
        model.answer(ids, Sampling(prompt_lookup=3))


@pytest.mark.thorough
def test_the_pieces_of_a_stream_are_the_answer(writers):
    model = writers.load("lora")
    for seed in range(5):
        torch.manual_seed(seed)
        pieces: list[str] = []
        (answer,) = model.answer([model.encode("Hi")], SAMPLED, write=pieces.append)
        assert "".join(pieces) == answer.text


@pytest.mark.parametrize("lookup", [None, 5])
def test_an_answer_ends_before_a_stop_text(writers, lookup):
    model = writers.load("lora")
    (whole,) = answers(model, "default", Sampling(max_new_tokens=30), ["Hi"])
    word = whole[4:7]
    pieces: list[str] = []
    sampling = Sampling(max_new_tokens=30, stop=(word, "never"), prompt_lookup=lookup)
    (answer,) = model.answer([model.encode("Hi")], sampling, write=pieces.append)
    assert answer.text == "".join(pieces) == whole[: whole.index(word)]
    assert answer.finish == "stop"
    assert answer.tokens < 30


def test_an_answer_ends_at_the_end_token_and_says_so(writers):
    model = writers.load("lora")
    (answer,) = model.answer([model.encode("Hi")], SHORT)
    assert (answer.finish, answer.tokens) == ("length", 12)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([model.encode("Hi")])).logits
    vars(model)["ends"] = [3, int(logits[0, -1].argmax())]
    (answer,) = model.answer([model.encode("Hi")], SHORT)
    assert (answer.finish, answer.tokens, answer.text) == ("stop", 1, "")


@pytest.mark.parametrize("lookup", [None, 5])
def test_an_end_token_that_is_not_special_is_not_written(writers, lookup):
    model = writers.load("lora")
    with torch.no_grad(), model.using("default"):
        ids = model.model.generate(torch.tensor([model.encode("Hi")]), max_new_tokens=12)
    end = int(ids[0, -1])
    vars(model)["ends"] = [3, end]
    pieces: list[str] = []
    sampling = Sampling(max_new_tokens=12, prompt_lookup=lookup)
    (answer,) = model.answer([model.encode("Hi")], sampling, write=pieces.append)
    assert answer.finish == "stop"
    assert model.tokenizer.decode([end], skip_special_tokens=True)
    assert "".join(pieces) == answer.text


def test_padding_behind_a_stop_text_is_not_counted(writers):
    model = writers.load("lora")
    (whole,) = answers(model, "default", Sampling(max_new_tokens=30), ["Hi"])
    sampling = Sampling(max_new_tokens=30, stop=(whole[4:7],))
    with model.using("default"):
        (alone,) = model.answer([model.encode("Hi")], sampling)
        both = model.answer([model.encode("Hi"), model.encode("a b a b a")], sampling)
    assert both[0] == alone
    assert alone.tokens < both[1].tokens


def test_the_end_token_of_the_template_ends_an_answer(writers):
    model = writers.load("lora")
    model.tokenizer.eos_token = "<s>"  # as of a base model that was trained on a chat template
    model.base.generation_config.eos_token_id = 1
    assert model.ends == [1, 3]


def test_an_event_ends_an_answer(writers):
    model = writers.load("lora")
    stop = Event()
    (answer,) = model.answer(
        [model.encode("Hi")], SAMPLED, write=lambda piece: stop.set(), stop=stop
    )
    assert answer.finish == "interrupted"
    assert 0 < answer.tokens < 40


def test_the_answer_stays_within_the_models_positions(writers):
    model = writers.load("lora")
    prompt = model.encode("a" * 200)
    (answer,) = model.answer([prompt], Sampling(max_new_tokens=100))
    assert answer.tokens == POSITIONS - len(prompt)
    # which does not cut the answer to a shorter prompt beside it
    few = Sampling(max_new_tokens=answer.tokens + 5)
    both = model.answer([prompt, model.encode("a")], few)
    assert both == [model.answer([each], few)[0] for each in (prompt, model.encode("a"))]
    with pytest.raises(InputError):
        model.answer([model.encode("a" * 300)], SHORT)
    with pytest.raises(InputError):
        model.answer([[]], SHORT)
