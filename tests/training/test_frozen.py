"""`train.cache_frozen`: runs that read the output of their frozen blocks from disk."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from training_fixtures import assert_same_course, launch, train, train_until_killed

from petl.efficiency.frozen import store
from petl.errors import InputError
from petl.training.runs.resume import identity

pytest_plugins = ["training_fixtures"]

# two epochs of seven steps, in the upper of two blocks
TOP = ["+method=lora", "method.layers_to_transform=top:1", "train.steps=14", "train.log_steps=1"]
OFF, TRUE = "train.cache_frozen=false", "train.cache_frozen=true"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of stores, empty at first."""
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frozen"


def stores(cache) -> list[Path]:
    return sorted(cache.glob("*/content"))


def losses(run):
    return [line["loss"] for line in run.metrics if "loss" in line]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["train.buckets=3"], marks=pytest.mark.thorough),
        ["train.gradient_checkpointing=reentrant"],
    ],
    ids=str,
)
def test_runs_from_one_store_are_equal_and_near_the_run_without(
    tiny, tmp_path, cache, petl_log, more
):
    common = [*tiny.steady, *TOP, *more]
    plain = train([*common, OFF], tmp_path / "plain")
    assert not cache.exists()
    first = train(common, tmp_path / "first")
    assert "blocks 0 to 0 of 2 are frozen: their output for" in petl_log.text
    assert "is computed once and kept in" in petl_log.text
    # 14 steps, and an evaluation of 20 rows before and after them
    assert "16 of 16 passes skipped the frozen blocks" in petl_log.text
    assert len(stores(cache)) == 2  # of the train and of the test rows
    written = [folder.stat().st_mtime_ns for folder in stores(cache)]
    petl_log.clear()
    second = train(common, tmp_path / "second")
    assert "is read from" in petl_log.text
    assert [folder.stat().st_mtime_ns for folder in stores(cache)] == written
    assert losses(first) == losses(second)
    assert all(torch.equal(first.adapter[name], x) for name, x in second.adapter.items())
    assert first.scores["after"] == second.scores["after"]
    assert_same_course(first, plain, atol=1e-4)
    for when in ("before", "after"):
        assert first.scores[when] == pytest.approx(plain.scores[when], abs=1e-5)


@pytest.mark.thorough
def test_validation_and_the_linear_probe_read_the_store(tiny, tmp_path, cache, petl_log):
    probe = ["train.linear_probe=true", "train.eval_steps=7"]
    train([*tiny.steady, *TOP, *probe], tmp_path / "run")
    assert "passes skipped the frozen blocks" in petl_log.text
    assert "the last that did not" not in petl_log.text
    assert len(stores(cache)) == 3


@pytest.mark.thorough
def test_a_resumed_run_reads_the_store_and_ends_at_the_same_digits(tiny, tmp_path, cache):
    common = [*tiny.steady, *TOP, "train.save_steps=4"]
    whole = train(common, tmp_path / "whole")
    for refilled in (False, True):
        run = tmp_path / f"stopped-{refilled}"
        train_until_killed(common, run, step=10)
        if refilled:
            for folder in stores(cache):
                store.shutil.rmtree(folder)
        resumed = train([*common, f"train.resume={run}"], run)
        assert losses(resumed) == losses(whole)
        assert all(torch.equal(resumed.adapter[name], x) for name, x in whole.adapter.items())


def test_packed_rows_are_rows_like_others(tiny, tmp_path, cache, petl_log):
    pack = ["data.pack=true", "train.steps=12", "train.batch_size=4", "train.save_steps=null"]
    common = [*tiny.complete, *TOP, *pack]
    plain, packed = train([*common, OFF], tmp_path / "plain"), train(common, tmp_path / "packed")
    # all but the one token with which the segmented loss tries its head; one row beforehand shows
    # whether the model starts as its base
    assert "15 of 16 passes skipped the frozen blocks" in petl_log.text
    assert stores(cache)
    assert_same_course(packed, plain, atol=1e-4)


@pytest.mark.thorough
def test_two_processes_read_one_store(tiny, tmp_path, cache):
    common = [*tiny.steady, *TOP, "train.save_steps=null"]
    one = train(common, tmp_path / "one")
    ran = launch([*common, f"train.run={tmp_path}/two"], tmp_path, processes=2)
    assert ran.returncode == 0, ran.stderr
    assert "14 steps" in ran.stderr
    assert "passes skipped the frozen blocks" in ran.stderr
    assert "the last that did not" not in ran.stderr
    assert len(stores(cache)) == 2
    for folder in stores(cache):
        store.shutil.rmtree(folder)
    ran = launch([*common, f"train.run={tmp_path}/again"], tmp_path, processes=2)  # they fill it
    assert ran.returncode == 0, ran.stderr
    assert len(stores(cache)) == 2
    two, again = (type(one)(tmp_path / name) for name in ("two", "again"))
    assert losses(two) == losses(again)
    assert_same_course(two, one, atol=1e-4)


@pytest.mark.thorough
def test_auto_leaves_a_model_with_dropout_as_it_is(tiny, tmp_path, cache, petl_log):
    common = [*tiny.classify, *TOP]
    auto, plain = train(common, tmp_path / "auto"), train([*common, OFF], tmp_path / "plain")
    kept = "is not kept: dropout is on below block 1: embeddings.dropout (0.1) and "
    assert kept in petl_log.text
    assert losses(auto) == losses(plain)
    assert not stores(cache)
    without = train([*common, TRUE], tmp_path / "true")
    assert "train.cache_frozen=true leaves out the dropout below block 1" in petl_log.text
    assert losses(without) != losses(plain)
    assert stores(cache)


@pytest.mark.thorough
def test_runs_without_a_use_for_it_do_not_fill_a_store(tiny, tmp_path, cache, petl_log):
    train([*tiny.steady, *TOP, "train.steps=4"], tmp_path / "short")
    assert "reads its examples 0.57 times, and computing them costs as much" in petl_log.text
    petl_log.clear()
    train([*tiny.steady, "+method=lora"], tmp_path / "all")
    assert "frozen blocks" not in petl_log.text  # the usual case needs no line
    assert not stores(cache)


@pytest.mark.thorough
def test_a_small_disk_is_an_error_only_if_the_store_was_asked_for(
    tiny, tmp_path, cache, petl_log, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
    monkeypatch.setattr(store, "MARGIN", 10**9)
    train([*tiny.steady, *TOP], tmp_path / "auto")
    assert "is not kept: the outputs of the frozen blocks need 0 MB" in petl_log.text
    with pytest.raises(InputError):
        train([*tiny.steady, *TOP, TRUE], tmp_path / "true")
    with monkeypatch.context() as roomy:
        roomy.setattr(store, "MARGIN", 0)
        train([*tiny.steady, *TOP], tmp_path / "kept")
    petl_log.clear()
    train([*tiny.steady, *TOP], tmp_path / "again")  # what is there needs no space
    assert "read from" in petl_log.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.layers_to_transform=null"], "block 0"),
        (["+loss=density"], "loss"),
        (["data.streaming=true", "train.linear_probe=false"], "stream"),
    ],
)
def test_asked_for_where_it_cannot_be_is_an_error(tiny, tmp_path, words, message):
    with pytest.raises(InputError, match=f"train.cache_frozen=true is not possible: .*{message}"):
        train([*tiny.steady, *TOP, TRUE, *words], tmp_path / "run")


def test_a_store_that_only_rounds_makes_no_other_run():
    before = {"train": {"lr": 1e-3}}
    for value in ("auto", False):
        assert identity({"train": {"lr": 1e-3, "cache_frozen": value}}) == identity(before)
    assert identity({"train": {"lr": 1e-3, "cache_frozen": True}}) != identity(before)
