"""The bytes of tokens in log probabilities."""

import pytest
from tiny_tokenizers import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from petl.generation.serving.choice import LogProb
from petl.generation.serving.replies import CompletionReply, ReplyText, bytes_of
from petl.generation.serving.request import AnswerPart

TEXT = "a é€ 🙂\n"


def byte_fallback():
    """A tokenizer as SentencePiece's, which writes single bytes as <0xE2>."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    own = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    own.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=own)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_fallback()], ids=["bpe", "fallback"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer):
    found = [bytes_of(tokenizer, token) for token in tokenizer(TEXT)["input_ids"]]
    assert len(found) > len(TEXT)  # some are parts of characters
    assert b"".join(found) == TEXT.encode()


def test_the_space_before_a_word_belongs_to_its_token():
    words = {"<unk>": 0, "▁a": 1, "▁cat": 2, "s": 3, "▁": 4}
    own = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    # as Llama's: the space before the first word of a text is left out
    own.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    assert tokenizer.decode([1, 2, 3]) == "a cats"
    assert b"".join(bytes_of(tokenizer, token) for token in (1, 2, 3, 4)) == b" a cats "
    likely = [[LogProb(token, -1.0)] for token in (2, 3, 1)]
    reply = CompletionReply("m", tokenizer).whole([ReplyText(" cats a", 3, likely)], 1)
    found = reply["choices"][0]["logprobs"]
    assert (found["tokens"], found["text_offset"]) == ([" cat", "s", " a"], [0, 4, 5])


def test_offsets_of_a_stream_count_tokens_whose_text_is_held_back():
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.convert_tokens_to_ids(each) for each in "abcd"]
    texts = ["a", "", "bc", "d"]  # b may begin a stop text
    reply, found = CompletionReply("m", tokenizer), []
    for count, (token, text) in enumerate(zip(tokens, texts, strict=True), start=1):
        (chunk,) = reply.chunks(0, AnswerPart(text, count, [LogProb(token, -1.0)]))
        found += chunk["choices"][0]["logprobs"]["text_offset"]
    assert found == [0, 1, 2, 3]


def test_a_token_that_is_no_bytes_has_those_of_its_text():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["\ufffd"])
    assert bytes_of(tokenizer, tokenizer.convert_tokens_to_ids("\ufffd")) == "\ufffd".encode()
