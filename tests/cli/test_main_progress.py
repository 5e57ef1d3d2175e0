"""What commands show while they compute: each pass has a bar, or a line."""

import shutil

import pytest

from petl.cli import main
from petl.system import progress

pytest_plugins = ["training_fixtures", "export_fixtures"]
LOADING = ["loading model path", "loading the adapter"]
COMPARED = ["outputs of the adapted model", "outputs of the model without adapter"]
COMMANDS = {
    "predict RUN TEXTS --out OUT": [*LOADING, "predicting TEXTS", "predicting the next 20 rows"],
    "merge RUN OUT": [
        *(*LOADING, *COMPARED, "merging the adapter", "outputs of the merged model"),
        *("writing the merged model", LOADING[0], "outputs of the written model"),
    ],
    "prune RUN OUT --drop 0.5 --q auto": [
        *(*LOADING, "measuring outputs of layers", *LOADING, *COMPARED),
    ],
    "combine RUN COPY --out OUT --level update --method ties": [
        *("combining the updates", "factoring updates"),
    ],
    "compare RUN COPY --answers": ["comparing answers"],
}


@pytest.fixture
def passes(monkeypatch):
    """What the passes do that are shown, in order."""
    seen, enter = [], progress.Pass.__enter__

    def entered(self):
        seen.append(self.what)
        return enter(self)

    monkeypatch.setattr(progress.Pass, "__enter__", entered)
    return seen


@pytest.mark.cells(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_each_pass_of_a_command_is_shown(command, lora_run, tiny, tmp_path, passes):
    out = tmp_path / ("out.jsonl" if command.startswith("predict") else "out")
    copy = tmp_path / "copy"
    if "COPY" in command:
        shutil.copytree(lora_run.path, copy)
    texts = tiny.folder / "test.csv"
    places = {"RUN": lora_run.path, "COPY": copy, "TEXTS": texts, "OUT": out}
    assert main.main([str(places.get(word, word)) for word in command.split()]) == 0
    shown = iter(passes)
    for expected in COMMANDS[command]:
        what = expected.replace("TEXTS", str(texts))
        assert what in shown, f"{what} is not in {passes}"  # in this order
