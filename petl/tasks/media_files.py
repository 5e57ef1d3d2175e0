"""Picture and sound files as arrays. Shapes: S samples, C channels.

A wave file is read by SciPy and any other sound file by soundfile, whichever is installed besides:
the same file then gives the same samples everywhere.
"""

import warnings
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from petl.errors import InputError, first_line
from petl.imports.extras import optional

Wave = np.ndarray  # float32 [S], in -1 to 1


def picture(path: str | Path) -> Any:
    """The image in a file, as a PIL image in RGB, turned as its camera noted.

    Raises:
        InputError: it cannot be read, or pillow is not installed.
    """
    image, turned = optional("PIL.Image", "image"), optional("PIL.ImageOps", "image")
    try:
        with image.open(path) as opened:
            if opened.mode[0] in "IF":  # Pillow would cut what is above 255
                raise ValueError("its pixels have more than 8 bits; save it with 8")
            return turned.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: PIL's for a broken PNG
        raise unreadable(path, "an image", error) from error


def grey(pixels: Any) -> Any:
    """Rows of grey values from 0 to 255, as a PIL image in RGB."""
    image = optional("PIL.Image", "image")
    return image.fromarray(np.asarray(pixels, dtype=np.uint8)).convert("RGB")


def wave(path: str | Path, rate: int, seconds: float) -> Wave:
    """The beginning of a sound file, all channels in one, at `rate` samples a second.

    Args:
        seconds: how much of it at most.

    Raises:
        InputError: it cannot be read or is empty, or a package for its kind is not installed.
    """
    read = read_wave if Path(path).suffix.lower() == ".wav" else read_sound
    try:
        own_rate, samples = read(path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: soundfile's
        raise unreadable(path, "a sound", error) from error
    samples = as_float(samples[: round(seconds * own_rate)])
    if not len(samples):
        raise InputError(f"{path} holds no sound: leave it out")
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return resample(mono, own_rate, rate)


def read_wave(path: str | Path) -> tuple[int, np.ndarray]:
    """Rate and samples, [S] or [S, C], of a wave file."""
    wavfile = optional("scipy.io.wavfile", "audio")
    with warnings.catch_warnings():
        # notes that a program put behind the samples
        warnings.simplefilter("ignore", wavfile.WavFileWarning)
        return wavfile.read(path)


def read_sound(path: str | Path) -> tuple[int, np.ndarray]:
    """Rate and samples, [S] or [S, C], of a sound file of any other kind."""
    samples, rate = optional("soundfile", "audio").read(path, dtype="float32")
    return rate, samples


def as_float(samples: np.ndarray) -> np.ndarray:
    """Samples as float32 from -1 to 1, whatever numbers the file has."""
    if samples.dtype == np.uint8:  # the only kind without a sign
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def resample(samples: Wave, own: int, wanted: int) -> Wave:
    """A wave of `own` samples a second at `wanted` samples a second."""
    if own == wanted:
        return samples
    common = gcd(own, wanted)
    resampled = optional("scipy.signal", "audio").resample_poly(
        samples, wanted // common, own // common
    )
    return resampled.astype(np.float32)


def unreadable(path: str | Path, what: str, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as {what}: {first_line(error)}")
