"""Images of conversations: files and data URLs, which are read within bounds.

An `ImageSource` is the path of a file, a data URL with the content of one, or a PIL image.
"""

import base64
import binascii
import hashlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch

from petl.data.tasks.media_files import decoded_image, image_size
from petl.errors import InputError, shown
from petl.system.files.disk import sha256

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 2**26  # 64 MiB of a file; assumption: no camera writes larger ones
MAX_PIXELS = 2**26  # 67 million, which take 200 MB in memory; likewise
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others run programs, or are rare
DATA = "data:"
NOISE = (48, 64)  # height and width of a random picture: any processor resizes it
ImageSource = Union[str, "Image"]


def name_of(source: str) -> str:
    """The name of an image in messages: its path, or the beginning of its data URL."""
    return source if not is_data(source) else f"{source[:40]}... ({len(source):,} characters)"


def is_data(source: str) -> bool:
    """Return True for a data URL."""
    return source[: len(DATA)].lower() == DATA


def noise_image(draw: torch.Generator) -> str:
    """A data URL of a picture of random colors."""
    from PIL import Image

    pixels = torch.randint(256, (*NOISE, 3), generator=draw, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(content := BytesIO(), "png")
    return f"{DATA}image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def bytes_of(source: str, most: int = MAX_BYTES) -> bytes:
    """The content of a data URL.

    Args:
        most: bytes that it may have.

    Raises:
        ValueError: it is not base64, or too long; the message is without the name of the image.
    """
    header, _, content = source.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError(f"is {shown(header)}, not a data URL like data:image/png;base64,...")
    if len(content) * 3 // 4 > most:
        raise ValueError(f"has more than {most:,} bytes")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"is not base64 ({error})") from error


def checked(source: str) -> str:
    """The SHA-256 of an image's content, hexadecimal, after a look at its header.

    Raises:
        ValueError: it is no image of one of FORMATS, or too large.
    """
    try:
        if is_data(source):
            content = bytes_of(source)
            image_size(BytesIO(content), name_of(source), FORMATS, MAX_PIXELS)
            return hashlib.sha256(content).hexdigest()
        size = Path(source).stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"has {size:,} bytes; at most {MAX_BYTES:,} are read")
        image_size(source, source, FORMATS, MAX_PIXELS)
        return sha256(Path(source))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error


def image_of(
    source: ImageSource, digest: str | None = None, *, max_pixels: int = MAX_PIXELS
) -> "Image":
    """Decode an image, in RGB and upright.

    Args:
        digest: the result of `checked` before; None: it was not called.
        max_pixels: that it may have.

    Raises:
        InputError: it is damaged or too large, or has changed since.
    """
    if not isinstance(source, str):
        return source
    name = name_of(source)
    try:
        # the whole content at once: a file may be replaced while it is decoded
        content = bytes_of(source) if is_data(source) else Path(source).read_bytes()
    except (ValueError, OSError) as error:
        raise InputError(f"image {name} {error}") from error
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise InputError(
            f"image {name} has changed since its example was encoded: start the run again"
        )
    return decoded_image(BytesIO(content), name, FORMATS, max_pixels)
