"""The reader of JSON and YAML files: what it accepts, and that it refuses everything else."""

import json
import math
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nonsense import answered
from omegaconf import OmegaConf

from petl.errors import InputError
from petl.system.files.read import (
    parse_json,
    parse_yaml,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
)

# what petl can write: text without characters that YAML and UTF-8 do not have
words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=12)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
settings_ = st.dictionaries(st.sampled_from(["a", "b", "1", "x.y"]), values, max_size=4)


def is_interpolated(value):
    return "${" in repr(value) or "???" in repr(value)


def as_text(value):
    return json.dumps(value, sort_keys=True)  # NaN equals NaN


@given(values)
def test_json_that_petl_writes_is_read_as_it_was(value):
    assert as_text(parse_json(json.dumps(value))) == as_text(value)


@given(settings_.filter(lambda value: not is_interpolated(value)))
def test_a_configuration_is_read_as_omegaconf_wrote_it(value):
    text = OmegaConf.to_yaml(OmegaConf.create(value))
    assert as_text(parse_yaml(text)) == as_text(OmegaConf.to_container(OmegaConf.create(text)))


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-16-le")))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(content)
    for reader in (read_json, read_json_lines, read_yaml, read_text):
        answered(reader, file)


pieces = st.sampled_from(
    [*"[]{},:\"'\n -?|>&*!%@#~", "a", "1", "1:2", "\\u", "${", "<<", "---", "\t", "nan", "1e9", "é"]
)


def error_of(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


@given(st.lists(pieces, max_size=25).map("".join))
def test_any_text_is_parsed_or_refused_in_one_line(text):
    for parse in (parse_json, parse_yaml):
        error = error_of(parse, text)
        assert "\n" not in error


MANY_KEYS = ", ".join(f'"k{i}": 1' for i in (*range(20_000), 0))  # the first is repeated


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "more than 32 levels"),
        ("[" * 40 + "]" * 40, "more than 32 levels"),
        ("[" * 33 + "1.5" + "]" * 33, "more than 32 levels"),
        ('{"a":' * 33 + "1.5" + "}" * 33, "more than 32 levels"),
        ("9" * 5000, "an integer of 5,000 digits"),
        ("9" * 30, "more than 64 bits"),
        (f"{{{MANY_KEYS}}}", '"k0" is given twice'),
        ('"\\ud800"', "not valid Unicode"),
        ('{"\\ud800": 1.5}', "not valid Unicode"),
    ],
)
def test_json_without_bounds_is_refused(tmp_path, text, reason):
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        read_json(file)
    assert reason in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("value", ["1.5", "true", "[]", '"é"'])
def test_json_is_read_up_to_the_bound_of_its_depth(tmp_path, value):
    file = tmp_path / "scores.json"
    file.write_text('{"a":[' * 16 + value + "]}" * 16)
    found = read_json(file)
    for _ in range(16):
        ((found,),) = found.values()
    assert found == json.loads(value)


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 9))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "has the alias *a0"),
        ("- " * 100 + "a", "more than 32 levels"),
        ("[" * 100_000, "exceeded maximum nesting depth"),  # the C parser's own bound
        (f"{{{MANY_KEYS}}}", '"k0" is given twice'),
        ("a: " + "9" * 5000, "an integer of 5,000 digits"),
        ("a: 0x" + "f" * 17, "more than 64 bits"),
    ],
)
def test_yaml_without_bounds_is_refused(tmp_path, text, reason):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(InputError) as refused:
        read_yaml(file)
    assert reason in str(refused.value)
    assert str(file) in str(refused.value)
    assert time.monotonic() - start < 5


def test_yaml_is_data(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    text = "a: ${oc.env:TOKEN}\nb: 1e-3\nc: 2024-01-01\nd: 1:30\ne: .nan\nf: yes\n<<: 1\n"
    assert as_text(parse_yaml(text)) == as_text(
        {"a": "${oc.env:TOKEN}", "b": 1e-3, "c": "2024-01-01", "d": "1:30", "e": math.nan}
        | {"f": True, "<<": 1}
    )


def test_only_regular_files_of_bounded_size_in_utf_8_are_read(tmp_path, monkeypatch):
    for content, reason in ((b"\xff\xfea", "byte 0 (0xff) is not UTF-8"), (b"a" * 9, "9 bytes")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError) as refused:
            read_text(tmp_path / "file", limit=8)
        assert reason in str(refused.value) or "more than 8 bytes" in str(refused.value)
    for name in ("folder", "pipe"):
        (tmp_path / name).mkdir() if name == "folder" else os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="regular"):
            read_text(tmp_path / name)


def test_the_last_line_of_a_log_may_be_incomplete(tmp_path):
    file = tmp_path / "log"
    for text, expected in (
        ('{"a": 1}\n{"a": 2}\n{"a', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ("", []),
    ):
        file.write_text(text)
        assert read_json_lines(file) == expected
    file.write_text('{"a": 1}\n{"a\n{"a": 3}\n')
    with pytest.raises(InputError, match="log, line 2"):
        read_json_lines(file)
