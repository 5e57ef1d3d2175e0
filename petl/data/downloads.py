"""Images of URLs that a setting allows: downloaded once, within bounds, and then files."""

import hashlib
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from petl.errors import InputError, first_line, shown
from petl.system.files.disk import write_atomic
from petl.system.files.paths import cache_folder

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


def check_prefixes(prefixes: Sequence[str]) -> None:
    """Raise InputError unless each is the beginning of URLs, with the whole name of a host."""
    for prefix in prefixes:
        host = prefix.partition("://")[2].partition("/")
        # without the slash, the name of another host could go on behind it
        if not prefix.lower().startswith(SCHEMES) or not host[0] or not host[1] or "@" in host[0]:
            raise InputError(
                f"data.image_urls has {shown(prefix)}, which is no beginning of URLs, such as "
                "https://example.org/photos/"
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
