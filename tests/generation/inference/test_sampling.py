"""Settings of sampling, stop texts, and the text of an answer while it is written."""

from threading import Event

import torch
from tiny_tokenizers import byte_tokenizer
from transformers import GenerationConfig

from petl.generation.inference.sampling import (
    AnswerText,
    Sampling,
    StopEvent,
    StopTexts,
    TextStream,
    before_stop,
)

GREEDY = GenerationConfig()
SAMPLED = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7)


def test_the_models_generation_config_holds_unless_settings_are_given():
    assert Sampling().arguments(GREEDY)["do_sample"] is False
    assert Sampling().arguments(GREEDY)["max_new_tokens"] == 512
    assert Sampling().arguments(SAMPLED) == {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 7,
        "num_beams": 1,
    }
    given = Sampling(temperature=0.0, max_new_tokens=3).arguments(SAMPLED)
    assert (given["do_sample"], given["max_new_tokens"]) == (False, 3)
    given = Sampling(top_k=5, repetition_penalty=1.2, prompt_lookup=4).arguments(GREEDY)
    assert given["do_sample"] is True
    assert (given["top_k"], given["repetition_penalty"]) == (5, 1.2)
    assert given["prompt_lookup_num_tokens"] == 4


def test_all_tokens_are_sampled_from_unless_model_or_settings_cut():
    assert Sampling(temperature=1.0).arguments(GREEDY)["top_k"] == 0
    assert Sampling(temperature=1.0).arguments(GenerationConfig(top_k=20))["top_k"] == 20
    assert Sampling(top_k=5).arguments(GenerationConfig(top_k=20))["top_k"] == 5


def streamed(text: str, *stop: str) -> list[str]:
    written: list[str] = []
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, written.append, stop, ends=[7])
    stream.put(torch.tensor([[5, 6]]))  # the prompt
    for token in [*tokenizer(text)["input_ids"], 7]:
        stream.put(torch.tensor([token]))
    stream.end()
    return written


def test_a_stop_text_never_appears_while_streaming():
    assert "".join(streamed("Hello, world END more", "rld")) == "Hello, wo"
    assert "".join(streamed("a END b", "END", "zzz")) == "a "
    assert "".join(streamed("a ENT b", "END")) == "a ENT b"
    assert "".join(streamed("a EN", "END")) == "a EN"
    assert streamed("one") == ["o", "n", "e"]


def test_rows_stop_at_texts_that_several_tokens_spell():
    tokenizer = byte_tokenizer()
    rows = ["END abcEND", "END abcENd", "xyzENDyyyy"]
    ids = torch.tensor([tokenizer(row)["input_ids"] for row in rows])
    criterion = StopTexts(tokenizer, ["END"], prompt_length=3)
    # the prompt has the text as well; the third row has it in the middle of a pass of many tokens
    assert criterion(ids[:, :7], None).tolist() == [False, False, True]
    assert criterion(ids, None).tolist() == [True, False, True]


def test_an_event_stops_all_rows():
    event = Event()
    criterion = StopEvent(event)
    assert criterion(torch.zeros(2, 3), None).tolist() == [False, False]
    event.set()
    assert criterion(torch.zeros(2, 3), None).tolist() == [True, True]


class Words:
    """A tokenizer that writes a space in front of each word but the first, as SentencePiece."""

    def decode(self, ids, skip_special_tokens):
        return " ".join("abcd"[i] for i in ids)


def test_a_word_is_decoded_behind_the_one_before_it():
    answer = AnswerText(Words(), ())
    assert [answer.add(token)[0] for token in (0, 1, 2, 3)] == ["a", " b", " c", " d"]


def test_a_text_ends_before_the_first_of_several_stop_texts():
    assert before_stop("one. two! three", ["!", "."]) == "one"


def test_nothing_is_written_behind_a_stop_text():
    written = list[str]()
    stream = TextStream(Words(), written.append, ["b"])
    stream.put(torch.tensor([0]))  # the prompt
    stream.put(torch.tensor([0, 1, 2, 3]))
    stream.end()
    assert "".join(written) == "a "
