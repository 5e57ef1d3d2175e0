"""The trial of widths and ranks: what it keeps of each, and that it goes on where it stopped."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from claims import page, shrink

from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic

pytest_plugins = ["export_fixtures", "training_fixtures"]
SCRIPT = Path(shrink.__file__).parents[1] / "claims.py"


@pytest.mark.thorough
def test_a_trial_counts_channels_and_goes_on_where_it_stopped(lora_run, tmp_path, monkeypatch):
    given = (lora_run.path, tmp_path / "small", 0.5, "by_block")
    found = shrink.contenders(*given)
    assert found["by_block, channels"] == 48  # half of two blocks of 48
    monkeypatch.setattr(shrink, "train", None)  # nothing is left to train
    assert shrink.contenders(*given) == found


def publish(folder: Path, *names: str) -> None:
    spec = spec_from_file_location("claims_script", SCRIPT)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    script.publish_all(folder, [*names])


def scores_of(seed: int) -> dict[str, float]:
    named = [f"{w}, {r}" for w in shrink.WIDTHS for r in ("equal ranks", "by importance")]
    named += [shrink.DENSE, *(f"{w}, not recovered" for w in shrink.WIDTHS)]
    found = {name: 0.5 + 0.01 * i + 0.001 * seed for i, name in enumerate(named)}
    return found | {f"{w}, {shrink.CHANNELS}": 480.0 for w in shrink.WIDTHS}


def test_what_was_measured_reaches_the_page_of_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "PUBLISHED", tmp_path / "published.json")
    assert "Not tried yet" in "".join(shrink.section())
    assert "[shrink](#shrink)" in page.page()
    with pytest.raises(InputError):
        publish(tmp_path, "shrink")
    found = {"0.5": {str(seed): scores_of(seed) for seed in range(3)}}
    (tmp_path / "shrink").mkdir()
    write_atomic(tmp_path / "shrink" / "shrink.json", as_json(found, in_order=True))
    publish(tmp_path, "shrink")
    text = page.page()
    assert "Not tried yet" not in text.partition("## shrink\n")[2].partition("\n## ")[0]
    assert "50 % of the MLP channels removed, 3 of 5 seeds" in text
    assert "| by_block, by importance | 480 | 53.10 % | +3.00 (+3.00 to +3.00) |" in text
