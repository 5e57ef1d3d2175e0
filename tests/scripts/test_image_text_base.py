"""The script that pretrains a small base for images and text: it goes on where it was."""

import image_text_base
import pytest
import torch
from safetensors.torch import load_file

from petl.generation.inference.language_model import message
from petl.generation.inference.loading import load_language_model
from petl.generation.inference.sampling import Sampling


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(image_text_base, "SAVED", 2)


def pretrained(folder, steps):
    image_text_base.main([str(folder), "--steps", str(steps), "--batch-size", "4"])
    return load_file(folder / "model.safetensors")


@pytest.mark.thorough
def test_a_pretraining_that_goes_on_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    # the rate depends on the number of steps: a run that is stopped has that of the whole
    straight = pretrained(tmp_path / "straight", 4)

    class Stopped(BaseException):
        """In place of Ctrl-C."""

    made = image_text_base.batch

    def stop(processor, seed, size):
        if seed == 3:
            raise Stopped
        return made(processor, seed, size)

    with monkeypatch.context() as patch:
        patch.setattr(image_text_base, "batch", stop)
        with pytest.raises(Stopped):
            pretrained(tmp_path / "stopped", 4)
    resumed = pretrained(tmp_path / "stopped", 4)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    # a model that petl reads
    model = load_language_model(tmp_path / "straight")
    (answer,) = model.answer([model.encode([message("user", "Hi")])], Sampling(max_new_tokens=2))
    assert answer.tokens
