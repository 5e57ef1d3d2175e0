"""Images of URLs that a setting allows: downloaded once, within bounds, and then files."""

import hashlib
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from petl.errors import first_line, shown
from petl.system.files.disk import write_atomic
from petl.system.files.paths import cache_folder
from petl.system.values import Rule

SCHEMES = ("https://", "http://")
SECONDS = 30.0  # for an answer to begin, and between its parts
FOLDER = "images"  # in the cache


class _NoRedirects(HTTPRedirectHandler):
    """Follows no redirect: it may lead to an address that no setting allows."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """None: the answer is an error."""
        return


def is_prefix(text: str) -> bool:
    """Return True for the beginning of URLs, with the whole name of a host."""
    # without the slash behind it, the name of another host could go on
    host, slash, _ = text.partition("://")[2].partition("/")
    return text.lower().startswith(SCHEMES) and bool(host and slash) and "@" not in host


PREFIXES = Rule(
    "a list of beginnings of URLs, such as https://example.org/photos/",
    lambda given: all(map(is_prefix, given)),
)


def downloaded(url: str, prefixes: Sequence[str], most: int) -> Path:
    """The file of a URL in the cache, which is downloaded if it is not there.

    Args:
        prefixes: one of which it must begin with.
        most: bytes that it may have.

    Raises:
        ValueError: it is not allowed, cannot be downloaded, or is too large.
    """
    if not any(url.startswith(prefix) for prefix in prefixes):
        allowed = f", which allows {', '.join(prefixes)}" if prefixes else ""
        raise ValueError(
            f"has the image {shown(url)}: URLs are fetched only where data.image_urls names their "
            f"beginning{allowed}; or download it, and give its path"
        )
    file = cache_folder() / FOLDER / hashlib.sha256(url.encode()).hexdigest()
    if file.is_file():
        return file
    try:
        with build_opener(_NoRedirects).open(url, timeout=SECONDS) as answer:
            content = answer.read(most + 1)
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise ValueError(
            f"has the image {shown(url)}, which cannot be downloaded: {first_line(error)}"
        ) from error
    if len(content) > most:
        raise ValueError(f"has the image {shown(url)} with more than {most:,} bytes")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, content)
    return file
