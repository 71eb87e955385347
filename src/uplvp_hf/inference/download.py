"""Downloads images from http and https addresses, with limits on time, bytes and redirects; refuses other files."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx

from uplvp_hf.data import ImageError
from uplvp_hf.models.images import bytes_size

SCHEMES = ("http://", "https://")
_HEADERS = {"User-Agent": "uplvp_hf", "Accept": "image/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Limits:
    """Of one download: bytes of the file, seconds for connecting and for every pause between two pieces, seconds in
    all, redirects."""

    max_bytes: int = 100_000_000
    pause: float = 10.0
    seconds: float = 120.0
    redirects: int = 5


LIMITS = Limits()


def is_url(text: str) -> bool:
    """Whether `text` is meant as an address of http or https."""
    return text.lower().startswith(SCHEMES)


def fetch_image(url: str, limits: Limits = LIMITS) -> bytes:
    """The content of an image file.

    Raises ImageError, naming the address, for another scheme than http or https, also after a redirect; when the server
    cannot be reached, is too slow, redirects too often or answers with an error; for more bytes than the limit; and
    when what came is no image (its head is looked at; it is not decoded here).
    """
    if not is_url(url):
        raise ImageError("is not an address of http or https", file=url, remedy="Name files by their path.")
    try:
        content, kind = _download(url, limits)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"cannot be fetched: {_reason(error, limits)}", file=url) from error
    try:
        bytes_size(content, url)
    except ImageError as error:
        raise ImageError(f"is not an image: the server sent {len(content)} bytes of {kind}", file=url) from error
    return content


def _download(url: str, limits: Limits) -> tuple[bytes, str]:
    """Content, and the type that the server gives it."""
    end = time.monotonic() + limits.seconds
    content = bytearray()
    with (
        httpx.Client(follow_redirects=True, max_redirects=limits.redirects, timeout=limits.pause) as client,
        client.stream("GET", url, headers=_HEADERS) as answer,
    ):
        if answer.status_code != 200:
            raise ImageError(
                f"cannot be fetched: the server answers {answer.status_code} {answer.reason_phrase}".rstrip(), file=url
            )
        for piece in answer.iter_bytes():  # what comes counts, not what the server announces
            content += piece
            if len(content) > limits.max_bytes:
                raise ImageError(f"has more than {limits.max_bytes} bytes", file=url, remedy="Raise the limit.")
            if time.monotonic() > end:
                raise ImageError(f"cannot be fetched: not there after {limits.seconds:g} s", file=url)
        return bytes(content), answer.headers.get("content-type", "an unnamed type")


def _reason(error: Exception, limits: Limits) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"the server was silent for {limits.pause:g} s"
    if isinstance(error, httpx.TooManyRedirects):
        return f"more than {limits.redirects} redirects"
    if isinstance(error, httpx.UnsupportedProtocol):
        return "it leads to an address that is not http or https"
    return f"{type(error).__name__}: {error}"
