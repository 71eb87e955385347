"""What went wrong between here and the Hub, in one sentence, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..models.errors import UserError

_AGAIN = "Run the same command again; large files that arrived whole are not sent twice."


class HubError(UserError, OSError):
    """A request to the Hub failed. The message says what happened and what to do; `__cause__` is the client's error."""


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """For calls of `huggingface_hub`: turns refusals of the Hub and errors of the connection into `HubError`.

    ValueErrors, such as for a card whose metadata cannot be read, stay as they are.
    """
    try:
        yield
    except Exception as error:
        cause = next((link for link in _chain(error) if isinstance(link, (HfHubHTTPError, httpx.TransportError))), None)
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise  # of the client, about what it was given: its sentence is the clear one
        if isinstance(error, OfflineModeIsEnabled):
            text = "HF_HUB_OFFLINE is set, so nothing was sent. Unset it to reach the Hub."
        elif isinstance(cause, HfHubHTTPError):
            text = _refused(cause, repo_id)
        elif cause is not None:
            what = str(cause).strip() or type(cause).__name__
            text = f"the connection to {constants.ENDPOINT} failed ({what}). {_AGAIN}"
        else:
            raise
        raise HubError(text) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refused(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = (error.server_message or "").strip()
    told = f"{constants.ENDPOINT} answered {status}" + (f" ({said})" if said else "")
    if status == 401:
        known = "does not accept the token" if get_token() else "wants a token, and none is set"
        return f"{told}: it {known}. Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
    if status == 403:
        return f"{told}: this token may not write to {repo_id}. Use one with write access to {repo_id.split('/')[0]}."
    if status == 404:
        return f"{told}: {repo_id} or its branch is not there. Check the name, and that the token may see it."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"{told}: too many requests. Wait{f' {wait} seconds' if wait else ' some minutes'}. {_AGAIN}"
    if status >= 500:
        return f"{told}: a fault on its side. Wait a little. {_AGAIN}"
    return told if said else f"{told}. {' '.join(str(error).split())}"
