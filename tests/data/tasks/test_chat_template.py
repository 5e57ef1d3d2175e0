"""A chat template of a stranger ends, or is stopped."""

import threading
import time

import pytest
from torch.utils.data import DataLoader

from petl.data.tasks import chat_template
from petl.data.tasks.chat import encode_chat
from petl.data.tasks.chat_template import check_template, within_deadline
from petl.errors import InputError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(chat_template, "DEADLINE", 0.2)


def test_nested_loops_are_stopped_at_the_deadline(tokenizer, short):
    tokenizer.chat_template, before = NESTED, threading.active_count()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"did not end within 0\.2 seconds; use another tokenizer"):
        encode_chat(tokenizer, TALK)
    assert time.monotonic() - start < 10
    for _ in range(100):  # the loop itself ends, too
        if threading.active_count() == before:
            break
        time.sleep(0.1)
    assert threading.active_count() == before


class Chats:
    """A data set whose rows are encoded in a DataLoader worker."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return encode_chat(self.tokenizer, TALK)


def test_loops_are_stopped_in_workers_of_a_dataloader(tokenizer, short):
    tokenizer.chat_template = NESTED
    with pytest.raises(InputError, match="did not end"):
        next(iter(DataLoader(Chats(tokenizer), num_workers=1, collate_fn=list)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** 10 ** 9 }}",
        "{% set n = namespace(x=9) %}{% for i in range(50) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 'a' * messages | length }}",
        "{{ (messages | length) * 2000 }}",
    ],
)
def test_what_no_deadline_can_stop_is_refused(template):
    with pytest.raises(InputError, match="a power or a product of two values in line 1"):
        check_template(template, "it")


@pytest.mark.parametrize(
    "template",
    [
        "{{ '-' * 20 }} {{ 2 * loop.index0 }} {{ x * 0.5 }}",
        "{{ f(*messages, **options) }} {{ dict(a, *b) }}",
        "text * of ** 'x * y' {# 2 ** 3 #}{% raw %}{{ a ** b }}{% endraw %}{{ 'a ** b' }}",
        "{% generation %}{{ x }}{% endgeneration %}",
    ],
)
def test_small_factors_and_unpacked_arguments_are_allowed(template):
    check_template(template, "it")


def test_a_template_of_any_length_or_syntax_is_answered():
    with pytest.raises(InputError, match="300,000 characters; at most 262,144"):
        check_template("a" * 300_000, "it")
    with pytest.raises(InputError, match="it cannot be parsed"):
        check_template("{{ ", "it") or check_template("{{ ~", "it") or check_template("{{ ')", "it")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' | center(99999999999999999999) }}",
        "{{ messages[0] + 1 }}",
        "{% for %}",
    ],
)
def test_whatever_a_template_raises_is_one_message(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"the chat template of .* refuses 'user: Hi") as refused:
        encode_chat(tokenizer, TALK)
    assert "\n" not in str(refused.value)


def test_what_rendering_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        within_deadline(lambda: 1 / 0, "it")
    assert within_deadline(lambda: 3, "it") == 3
