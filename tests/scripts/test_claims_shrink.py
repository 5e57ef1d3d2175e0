"""The trial of widths and ranks: what it keeps of each, and that it goes on where it stopped."""

import pytest
from claims import shrink

pytest_plugins = ["export_fixtures", "training_fixtures"]


@pytest.mark.thorough
def test_a_trial_counts_channels_and_goes_on_where_it_stopped(lora_run, tmp_path, monkeypatch):
    given = (lora_run.path, tmp_path / "small", 0.5, "by_block")
    found = shrink.contenders(*given)
    assert found["by_block, channels"] == 48  # half of two blocks of 48
    monkeypatch.setattr(shrink, "train", None)  # nothing is left to train
    assert shrink.contenders(*given) == found
