"""Read image and audio files. Shapes: S samples, C channels.

Wave files are read by SciPy and all other audio files by soundfile, whatever else is installed, so
that a file gives the same samples on every machine.
"""

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from petl.errors import InputError, first_line
from petl.system.imports.extras import optional

if TYPE_CHECKING:
    from PIL.Image import Image

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # samples per second; of audio formats in use
Wave = np.ndarray  # float32 [S], in -1 to 1


def read_image(path: str | Path) -> "Image":
    """Read an image file as a PIL image in RGB, rotated by its EXIF orientation.

    Raises:
        InputError: the file cannot be read, or Pillow is not installed.
    """
    return decoded_image(path, path)


def decoded_image(
    file: str | Path | BinaryIO,
    name: str | Path,
    formats: Sequence[str] | None = None,
    max_pixels: int | None = None,
) -> "Image":
    """Decode an image as `read_image`.

    Args:
        name: for messages.
        formats: of Pillow that are read; None: all.
        max_pixels: None: 179 million, above which Pillow refuses any.

    Raises:
        InputError: it cannot be decoded, or is larger.
    """
    image_ops = optional("PIL.ImageOps", "image")
    try:
        with _opened(file, formats, max_pixels) as opened:
            return image_ops.exif_transpose(opened).convert("RGB")
    # the decoders raise many types for a damaged file
    except Exception as error:
        raise unreadable(name, "an image", error) from error


def image_size(
    file: str | Path | BinaryIO, name: str | Path, formats: Sequence[str], max_pixels: int
) -> tuple[int, int]:
    """The width and height in the header of an image, which is not decoded; see `decoded_image`.

    Raises:
        ValueError: it has no such header, or is larger.
    """
    try:
        with _opened(file, formats, max_pixels) as opened:
            return opened.size
    except Exception as error:
        raise ValueError(str(unreadable(name, "an image", error))) from error


@contextmanager
def _opened(
    file: str | Path | BinaryIO, formats: Sequence[str] | None, max_pixels: int | None
) -> Generator["Image"]:
    image = optional("PIL.Image", "image")
    with image.open(file, formats=formats) as opened:
        if max_pixels is not None and opened.width * opened.height > max_pixels:
            raise ValueError(
                f"{opened.width} x {opened.height} pixels; at most {max_pixels:,} are read"
            )
        if opened.mode[0] in "IF":  # Pillow would clip values above 255
            raise ValueError(f"pixels of mode {opened.mode} have more than 8 bits; save it with 8")
        yield opened


def gray_image(pixels: ArrayLike) -> "Image":
    """Convert rows of gray levels from 0 to 255 to a PIL image in RGB."""
    image = optional("PIL.Image", "image")
    return image.fromarray(np.asarray(pixels, dtype=np.uint8)).convert("RGB")


def read_audio(path: str | Path, sampling_rate: int, seconds: float) -> Wave:
    """Read the beginning of an audio file as one channel (the mean of all), resampled.

    Args:
        sampling_rate: samples per second of the result.
        seconds: maximum duration.

    Raises:
        InputError: the file cannot be read or is empty, or the package for its format is not
            installed.
    """
    read = read_wave if Path(path).suffix.lower() == ".wav" else read_other_audio
    try:
        own_rate, samples = read(path, seconds)
    except InputError:
        raise
    except Exception as error:  # the decoders raise many types for a damaged file
        raise unreadable(path, "audio", error) from error
    if not LOWEST_RATE <= own_rate <= HIGHEST_RATE:  # else resampling needs a filter of gigabytes
        raise InputError(
            f"{path} has {own_rate:,} samples per second, not from {LOWEST_RATE:,} to "
            f"{HIGHEST_RATE:,}: it is damaged, or needs another format"
        )
    # truncate before conversion and resampling, which would cost more
    samples = as_float(samples[: round(seconds * own_rate)])
    if not samples.size:
        raise InputError(f"{path} has no samples: remove the file")
    if not np.isfinite(samples).all():
        raise InputError(f"{path} has samples that are not finite numbers: remove the file")
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return resample(mono, own_rate, sampling_rate)


def read_wave(path: str | Path, seconds: float) -> tuple[int, np.ndarray]:
    """Sampling rate and samples, [S] or [S, C], of a wave file, all of them."""
    wavfile = optional("scipy.io.wavfile", "audio")
    with warnings.catch_warnings():
        # about chunks of metadata after the samples
        warnings.simplefilter("ignore", wavfile.WavFileWarning)
        return wavfile.read(path)


def read_other_audio(path: str | Path, seconds: float) -> tuple[int, np.ndarray]:
    """Sampling rate and samples, [S] or [S, C], of the beginning of an audio file."""
    # a compressed file of kilobytes may hold days of silence
    with optional("soundfile", "audio").SoundFile(path) as opened:
        return opened.samplerate, opened.read(round(seconds * opened.samplerate), dtype="float32")


def as_float(samples: np.ndarray) -> np.ndarray:
    """Convert samples of any dtype to float32 from -1 to 1."""
    if samples.dtype == np.uint8:  # the only unsigned format, centered at 128
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        # dividing by the magnitude of the minimum, 2^(bits - 1), keeps the result in -1 to 1
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def resample(samples: Wave, from_rate: int, to_rate: int) -> Wave:
    """Resample a wave; rates are in samples per second."""
    if from_rate == to_rate:
        return samples
    # polyphase filtering takes integer factors, as small as possible
    common = gcd(from_rate, to_rate)
    resampled = optional("scipy.signal", "audio").resample_poly(
        samples, to_rate // common, from_rate // common
    )
    return resampled.astype(np.float32)


def unreadable(path: str | Path, what: str, error: Exception) -> InputError:
    """The error for a file that cannot be read as `what`."""
    # Pillow names the path as well
    reason = first_line(error).replace(f" {str(path)!r}", "").rstrip(": ")
    return InputError(f"{path} cannot be read as {what}: {reason}")
