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
    with pytest.raises(InputError):
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
    with pytest.raises(InputError):
        next(iter(DataLoader(Chats(tokenizer), num_workers=1, collate_fn=list)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** 10 ** 9 }}",
        "{% set n = namespace(x=9) %}{% for i in range(50) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 'a' * messages | length }}",
        "{{ (messages | length) * 2000 }}",
        "{% filter round(20000000, 'ceil') %}3{% endfilter %}",
    ],
)
def test_what_no_deadline_can_stop_is_refused(template):
    with pytest.raises(InputError, match="line 1"):
        check_template(template, "it")


@pytest.mark.parametrize(
    "expression",
    [
        *("n * 2 * n", "n * 0 | default(n, true)", "n ** 3", "n // m", "n % m", "n // 1 | add"),
        *("n | round(20000000, 'ceil')", "n | round(precision=m)", "n | round(-20000000)"),
        *("[n] | map('round', 9999, 'ceil')", "[n] | map(name, 9)", "[n] | map('ro' ~ 'und', 9)"),
        *("[n] | map('ro\\x75nd', 9)", "[n] | map('ro' 'und', 9)", "[n] | map(*names)"),
        *("n is divisibleby m", "n is not divisibleby(m)", "[n] | select('divisibleby', m)"),
        *("'a' | center(10000000000)", "'a' | indent(m)", "messages | batch(m, 'a')"),
        *("'a'.ljust(m)", "'a'.zfill(99999)", "'a'['rjust'](m)", "('a' | attr('ljust'))(m)"),
        *("x.rfind(y)", "x.rsplit(y)", "x.rsplit('" + "a" * 1001 + "')", "x.rindex"),
        *("'a'.center(900 + 900)", "'a'.center((99999))"),
    ],
)
def test_an_argument_that_gives_the_time_of_one_instruction_is_small(expression):
    with pytest.raises(InputError, match="line 2"):
        check_template("{# #}\n{{ " + expression + " }}", "it")


@pytest.mark.parametrize(
    "expression",
    [
        *("'a' | indent", "'a' | indent(4)", "'a' | indent(width=2, first=true)", "n | round"),
        *("n | round(2, 'floor')", "(loop.index0 % 2 == 0) != n", "'%s %d' % (a, b)", "n // 2"),
        *("x.rsplit('</think>', 1)[-1]", "n is divisibleby 2", "n is divisibleby(3)"),
        *("a | map('upper') | join(', ')", "a | map(attribute='b')", "a | map(attribute=b)"),
        *("tools | tojson(indent=4)", "a | select('equalto', b)", "a | select", "f(a, round)"),
        *("round + center", "[x] | batch(2)", "{'indent': 4}", "n * 2 * 3", "2 * n + 3 * m"),
    ],
)
def test_what_templates_of_models_write_is_allowed(expression):
    check_template("{{ " + expression + " }}", "it")


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
    check_template("{{ ", "it")  # the tokenizer tells its fault
    check_template("{{ ~", "it")
    for template in ("a" * 300_000, "{{ ')"):
        with pytest.raises(InputError):
            check_template(template, "it")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].nothing.more }}",
        "{{ messages[0] + 1 }}",
        "{% for %}",
    ],
)
def test_whatever_a_template_raises_is_one_message(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(InputError) as refused:
        encode_chat(tokenizer, TALK)
    assert "\n" not in str(refused.value)


def test_what_rendering_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        within_deadline(lambda: 1 / 0, "it")
    assert within_deadline(lambda: 3, "it") == 3
