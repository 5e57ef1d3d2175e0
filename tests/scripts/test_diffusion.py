"""The study of SCEdit on digits; its images are random here."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusion
from diffusion import NOISES, Digits, adapted, error, noise_schedule
from rate_study import count


class Answer:
    def __init__(self, sample):
        self.sample = sample


class KnowsTheImages(nn.Module):
    """Finds the noise in images of zeros, and returns a share of it."""

    def __init__(self, share):
        super().__init__()
        self.share, self.times = share, []

    def forward(self, noisy, times):
        self.times += times.tolist()
        kept = noise_schedule().alphas_cumprod[times]
        return Answer(self.share * noisy / (1 - kept).sqrt().view(-1, 1, 1, 1))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    diffusion.pretrain(folder, torch.rand(4, 1, 16, 16), 1, 2)
    return folder


def test_the_error_is_that_of_the_predicted_noise():
    images = torch.zeros(250, 1, 16, 16)
    assert error(KnowsTheImages(1.0), images) == pytest.approx(0, abs=1e-9)
    half = KnowsTheImages(0.5)
    assert error(half, images) == pytest.approx(0.25, rel=0.02)  # of noise with variance 1
    assert sorted(half.times) == sorted(list(range(0, 1000, 4)) * NOISES)


def test_the_noise_of_the_error_is_always_the_same():
    images = torch.rand(3, 1, 16, 16)
    values = [error(KnowsTheImages(0.5), images) for _ in range(2)]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", diffusion.LORA)
def test_lora_gets_the_largest_rank_within_the_parameters_of_scedit(pretrained, name):
    lora = adapted(pretrained, name)
    budget = count(adapted(pretrained, "scedit"))
    r = lora.peft_config["default"].r
    assert count(lora) <= budget < count(lora) * (r + 1) / r
    targets = {path.split(".lora_A")[0] for path, _ in lora.named_parameters() if "lora_A" in path}
    assert all(path.endswith(tuple(diffusion.LORA[name])) for path in targets)


def test_the_command_pretrains_once_and_compares(tmp_path, monkeypatch, capsys):
    images = torch.rand(8, 1, 16, 16)
    digits = Digits(images, images, images[:2], images[:3])
    monkeypatch.setattr(diffusion, "read_digits", lambda: digits)
    words = [
        str(tmp_path),
        "--steps=1",
        "--pretraining=1",
        "--batch=2",
        "--seeds=0",
        "--rates=0.01",
    ]
    arguments = diffusion.parser().parse_args(words)
    diffusion.measure(arguments)
    first = capsys.readouterr().out
    assert all(f"| {name} | " in first for name in ("scedit", *diffusion.LORA))
    diffusion.measure(arguments)
    again = capsys.readouterr().out
    assert "pretrained" in first
    assert "pretrained" not in again
    assert again.partition("| method")[2] == first.partition("| method")[2]
