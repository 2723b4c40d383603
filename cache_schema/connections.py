"""Connections to object stores: made from the environment, asked several at a time, and their errors put in our words.

obstore signs, sends and retries (bounded, with jitter; a refusal is never retried). Of its error texts only the status,
the error code and the kind are taken: a server may echo signed requests or key ids in what it says.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

GETS_IN_FLIGHT = 16  # requests of this process at a time
RETRY: dict[str, Any] = {
    "max_retries": 10,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15), "base": 2},
}
TIMEOUTS = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=5),
}
_KINDS = {"Connect": "no connection", "Timeout": "no answer in time", "Request": "the connection broke"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
}  # the library reads them all, the last one where AZURE_STORAGE_USE_EMULATOR is on
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_SERVICE_ACCOUNT (a file) or GOOGLE_SERVICE_ACCOUNT_KEY (its text)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY",
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Place(Protocol):
    """What an error says of an object: ``str`` is its URL, ``root`` that of the store."""

    @property
    def scheme(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    @property
    def root(self) -> str: ...


class StoreUnavailable(OSError):
    """An object store did not do what was asked: it is away, refuses, or lacks something.

    Attributes:
        status: HTTP status of the last answer; 0 when there was none.
        refused: asking again cannot help (401, 403, no such bucket).
    """

    def __init__(self, message: str, *, status: int = 0, refused: bool = False) -> None:
        super().__init__(message)
        self.status, self.refused = status, refused


class ObjectChanged(StoreUnavailable):
    """The object was replaced since its entity tag was read."""

    def __init__(self, file: object) -> None:
        super().__init__(f"{file} was replaced while it was read. The same command reads the new one.")


@functools.lru_cache(maxsize=8)
def connect(scheme: str, bucket: str) -> Any:
    """The library's store of one bucket; credentials come from the environment and stay in there."""
    from obstore import store
    from obstore.exceptions import BaseError

    client: Any = {**TIMEOUTS, **_plain_http(scheme)}
    options: dict[str, Any] = {"client_options": client, "retry_config": RETRY}
    try:
        if scheme == "gs":
            return store.GCSStore(bucket, **options)
        if scheme == "az":
            return store.AzureStore(bucket, **options)
        return store.S3Store(bucket, config={"copy_if_not_exists": "multipart"}, **options)
    except BaseError:
        raise StoreUnavailable(
            f"{scheme}:// cannot be used with what the environment holds: a variable is missing, is not well formed, "
            f"or names a file that is not there.\nThe usual ones are {_CREDENTIALS[scheme]}.",
            refused=True,
        ) from None


def forget_connections() -> None:
    """Read the environment anew at the next request."""
    connect.cache_clear()


def _plain_http(scheme: str) -> dict[str, bool]:
    """Whether endpoints may be http:// — only on this machine, unless e.g. AWS_ALLOW_HTTP says otherwise."""
    allow, plain = f"{_ENDPOINTS[scheme][0].partition('_')[0]}_ALLOW_HTTP", False
    for name in _ENDPOINTS[scheme]:
        endpoint = urlsplit(os.environ.get(name, ""))
        if endpoint.username or endpoint.password or endpoint.query or endpoint.fragment:
            raise StoreUnavailable(
                f"{name} holds a user name, password or option (not repeated here). Give credentials as "
                f"{_CREDENTIALS[scheme]}.",
                refused=True,
            )
        if endpoint.scheme == "http" and endpoint.hostname not in _LOOPBACK and not _is_on(allow):
            raise StoreUnavailable(
                f"{name} is plain http to {endpoint.hostname}: everything would travel unprotected.\n"
                f"Use https://, or allow it with:\n  export {allow}=true",
                refused=True,
            )
        plain = plain or endpoint.scheme == "http"
    return {"allow_http": True} if plain else {}


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "on", "yes", "y")


# --- several requests at a time


def concurrently(ask: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """The answers in the order of the items. On the first error the rest is not begun, and the error goes on."""
    todo = list(items)
    if len(todo) < 2:
        return [ask(item) for item in todo]
    futures: list[Future[Answer]] = [_threads().submit(ask, item) for item in todo]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


@functools.lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(GETS_IN_FLIGHT, "object-store")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of its parent's threads


# --- errors


def answer(place: Place, doing: str, request: Callable[[], Answer]) -> Answer:
    """The answer. Errors of the library become ours, but for those that are answers: a condition, nothing like it."""
    from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError

    try:
        return request()
    except (AlreadyExistsError, PreconditionError, NotSupportedError, StoreUnavailable, ObjectChanged):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            raise _failure(place, doing, error) from None
        raise FileNotFoundError(errno.ENOENT, "There is no such object", str(place)) from None
    except (BaseError, OSError) as error:
        raise _failure(place, doing, error) from None


def _failure(place: Place, doing: str, error: Exception) -> StoreUnavailable:
    """The error in our own words: of the library's text only the status, S3's error code and the kind are taken."""
    text = str(error)
    status = int(match[1]) if (match := re.search(r"status code: (\d{3})", text)) else 0
    if "NotPartial" in text:
        status = 200  # the whole object instead of the range
    code = match[1] if (match := re.search(r"<Code>([A-Za-z]{1,60})</Code>", text)) else ""
    kind = match[1] if (match := re.search(r"\bkind: (Connect|Timeout|Request)\b", text)) else ""
    said = " ".join(filter(None, [str(status or ""), code or _KINDS.get(kind, "")])) or "no valid answer"
    refused = status in (401, 403) or code == "NoSuchBucket" or "ContainerNotFound" in text
    if re.search(r"token request|169\.254\.169\.254|[Mm]issing.*credential", text):
        what, refused = f"no credentials for {place.scheme}:// were found in the environment", True
    elif code == "NoSuchBucket" or "ContainerNotFound" in text:
        what = f"there is no bucket {place.bucket!r}, or it is not yours"
    elif refused:
        what = f"the store refused it ({said}): the credentials in the environment do not allow this"
    else:
        what = f"the store failed ({said}) and went on failing. What is committed is kept; the same command resumes"
    check = f"pipeline doctor --store {shlex.quote(place.root)}"
    return StoreUnavailable(
        f"{place}: {doing} it: {what}.\nSee what works with:\n  {check}", status=status, refused=refused
    )
