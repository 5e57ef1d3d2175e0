"""The one rule of commands that write: nothing of the user, of a run or of an adapter is lost."""

import hashlib
import shutil

import pytest
from training_fixtures import train

from petl.cli import main
from petl.errors import InputError
from petl.system.files.outputs import check_output, check_output_file
from petl.training.runs.resume import choose_checkpoint, take_job
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    train([*tiny.steady, "train.steps=2", "+method=lora"], folder)
    return folder


def content(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def status_of(*words):
    try:
        return main.main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code


COMMANDS = {
    "eval": ("eval", "RUN", "--out", "OUT"),
    "merge": ("merge", "RUN", "OUT"),
    "export": ("export", "RUN", "OUT", "--lora"),
    "compress": ("compress", "RUN", "OUT"),
    "prune": ("prune", "RUN", "OUT", "--drop", "0.5", "--q", "dare"),
    "combine": ("combine", "RUN", "RUN", "--out", "OUT"),
    "squeeze": ("squeeze", "RUN", "--share", "0.5", "--out", "OUT"),
    "compare": ("compare", "RUN", "--out", "OUT"),
    "pull": ("pull", "ada/verbs", "OUT"),
    "study": ("study", "OUT", "--methods", "lora"),
}
PLACES = {
    "the run itself": "RUN",
    "the adapter": "RUN/adapter",
    "inside of the adapter": "RUN/adapter/x",
    "deep inside of the adapter": "RUN/adapter/x/y",
    "inside of a checkpoint": "RUN/checkpoints/step-000002/x",
    "beside the checkpoints": "RUN/checkpoints/x",
    "deep beside the checkpoints": "RUN/checkpoints/x/y",
    "a folder of somebody": "THEIRS",
    "results of another evaluation": "RESULTS",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_folder_that_holds_anything_else_is_written(run, tmp_path, command, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/index.html").write_text("a site")
    (tmp_path / "results").mkdir()
    for name in ("scores.json", "predictions.jsonl"):
        (tmp_path / "results" / name).write_text("{}")
    assert (copy / "checkpoints/step-000002/manifest.json").is_file()
    before = content(tmp_path)
    for what, place in PLACES.items():
        for name in ("copy", "theirs", "results"):
            place = place.replace("RUN" if name == "copy" else name.upper(), str(tmp_path / name))
        words = [{"RUN": str(copy), "OUT": place}.get(word, word) for word in COMMANDS[command]]
        assert status_of(*words) == 2, what
        assert place in capsys.readouterr().err, what
        assert content(tmp_path) == before, what


def test_a_new_folder_in_a_run_is_written_but_never_its_checkpoints(tmp_path):
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    check_output(tmp_path / "merged")
    for check, place in (
        (check_output, "checkpoints"),
        (check_output_file, "checkpoints/rows.jsonl"),
        (check_output, "merged/../checkpoints/x"),
    ):
        with pytest.raises(InputError, match="checkpoints"):
            check(tmp_path / place)


@pytest.mark.parametrize("place", PLACES.values())
def test_no_run_is_begun_in_a_folder_that_holds_anything_else(run, tiny, tmp_path, place):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for name in ("THEIRS", "RESULTS"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text("{}")
    before = content(tmp_path)
    place = place.replace("RUN", str(copy)) if "RUN" in place else tmp_path / place
    settings = [*tiny.steady, "train.steps=2", "+method=lora", "train.lr=0.03"]
    with pytest.raises(InputError, match=str(place)):
        train(settings, place)
    if "/adapter" in str(place):
        with pytest.raises(InputError):
            choose_checkpoint(TrainConfig(output=str(place)), {})
        with pytest.raises(InputError):
            take_job(str(place), {})
    assert content(tmp_path) == before


def test_the_folder_of_the_recovery_is_nobody_elses(run, tmp_path, capsys):
    place = tmp_path / "small.train"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    assert status_of("shrink", run, tmp_path / "small") == 2
    assert f"{place} already exists" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    "words",
    [
        ("eval", "RUN"),
        ("eval", "RUN", "--out", "RUN/eval-mine"),
        ("compare", "RUN", "--out", "OUT"),
        ("squeeze", "RUN", "--share", "0.5", "--rows", "8", "--generations", "1", "--out", "OUT"),
    ],
)
def test_a_command_writes_its_own_place_again_unless_it_holds_more(run, tmp_path, words):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    places = {"RUN": copy, "OUT": tmp_path / "page"}
    words = [str(places.get(w, w)).replace("RUN/", f"{copy}/") for w in words]
    place = tmp_path / "page" if words[0] in ("compare", "squeeze") else copy / "eval-test"
    place = copy / "eval-mine" if "--out" in words and words[0] == "eval" else place
    assert [status_of(*words) for _ in range(2)] == [0, 0]
    (place / "notes.txt").write_text("mine")
    before = content(tmp_path)
    assert status_of(*words) == 2
    assert content(tmp_path) == before


def test_a_named_file_is_replaced_but_never_one_of_a_run(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (tmp_path / "new.csv").write_text("text\nhello\n")
    (tmp_path / "out.jsonl").write_text("old")
    predict = ("predict", copy, tmp_path / "new.csv", "--out")
    (copy / "eval-test").mkdir()
    shutil.copy(copy / "scores.json", copy / "eval-test")
    before = content(copy)
    named = ("metrics.jsonl", "predictions.jsonl", "adapter/new.jsonl", "eval-test/scores.json")
    for name in named:
        assert status_of(*predict, copy / name) == 2
        assert status_of("batch-sizes", "--output", copy / name) == 2
        assert f"{copy / name} is " in capsys.readouterr().err.splitlines()[-1]
    assert content(copy) == before
    assert status_of(*predict, tmp_path / "out.jsonl") == 0
    assert "old" not in (tmp_path / "out.jsonl").read_text()
    assert status_of(*predict, copy / "predicted.jsonl") == 0


def test_random_inputs_need_no_tokenizer(run, tiny, tmp_path, capsys):
    """The adapter alone, on a base without tokenizer: what is written is compared nevertheless."""
    base = tiny.folder / "steady"
    shutil.copytree(base, tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    shutil.copytree(run / "adapter", tmp_path / "alone")
    config = tmp_path / "alone/adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "base")))
    assert str(tmp_path / "base") in config.read_text()
    alone = tmp_path / "alone"
    for words in (("compress",), ("prune", "--drop", "0.5", "--q", "dare")):
        status = status_of(words[0], alone, tmp_path / words[0], *words[1:])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert "changes them by" in out
