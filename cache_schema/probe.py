"""What an object store must be able to do before a cache is put there, tried on the store itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cache_schema import objects
from cache_schema.connections import ObjectChanged, StoreUnavailable
from cache_schema.objects import ObjectPath


@dataclass(frozen=True)
class Probe:
    """One thing that was tried. ``detail`` says what a store without it would do to a cache."""

    name: str
    ok: bool
    detail: str


def probe(store: ObjectPath) -> list[Probe]:
    """Try everything that a cache relies on, under a key of its own that is removed again.

    Raises:
        StoreUnavailable: the store is away, refuses, or has no such bucket, so nothing can be tried.
    """
    folder = store / f".doctor-{secrets.token_hex(8)}"
    one, large = folder / "one", folder / "large"
    content = secrets.token_bytes(1000)
    tried = [
        ("create only", "two writers of one shard would overwrite each other", lambda: _create_only(one, content)),
        ("write id", "a commit whose answer is lost would count as somebody else's", lambda: _write_id(one, content)),
        ("ranges", "frames would be wrong", lambda: _ranges(one, content)),
        ("suffix ranges", "no Zarr reader finds the index at the end of a shard", lambda: _suffix(one, content)),
        ("reads of one version", "a shard that is replaced could be read half and half", lambda: _pinned(one)),
        ("exchange of one version", "growth of an array by two writers could be lost", lambda: _exchange(one)),
        ("large shards", "a shard above 32 MiB would not be committed, or twice", lambda: _large(large)),
        ("listing", "interrupted uploads would not be swept", lambda: _listing(folder, one, large)),
        ("deleting", "nothing could be cleaned up, and what was tried here stays", lambda: _deleting(one)),
    ]
    try:
        one.create(content)  # a store that is away or refuses is no store that lacks something
        return [_try(name, without, attempt) for name, without, attempt in tried]
    finally:
        for file in (one, large):
            with contextlib.suppress(StoreUnavailable):
                file.delete()


def _try(name: str, without: str, attempt: Callable[[], str]) -> Probe:
    try:
        wrong = attempt()
    except StoreUnavailable as error:
        if error.refused:
            raise
        wrong = f"it answers {error.status}" if error.status else "it gives an answer that does not fit the question"
    except FileNotFoundError:
        wrong = "an object that was just written is not found"
    return Probe(name, not wrong, f"{wrong}: {without}" if wrong else "")


def _create_only(file: ObjectPath, content: bytes) -> str:
    if file.create(b"another") is not None or bytes(file.fetch([(0, len(content))])[0]) != content:
        file.exchange(content, file.head()[1])  # for the next probes
        return "a second put of the same key was accepted"
    return ""


def _write_id(file: ObjectPath, content: bytes) -> str:
    attributes = file._get({"range": (0, len(content))})[3]
    return "" if objects.WRITE_ID in attributes else "metadata of an object does not come back"


def _ranges(file: ObjectPath, content: bytes) -> str:
    spans = [(0, 1), (3, 700), (999, 1000), (990, 2000)]
    got = [bytes(data) for data in file.fetch(spans)]
    return "" if got == [content[start:stop] for start, stop in spans] else "other bytes come than were asked for"


def _suffix(file: ObjectPath, content: bytes) -> str:
    for count in (1, 20, len(content), 5 * len(content)):
        tail = file.tail(count)
        if bytes(tail.data) != content[-count:] or tail.size != len(content):
            return f"the last {count} bytes are not what comes"
    return ""


def _pinned(file: ObjectPath) -> str:
    e_tag = file.head()[1]
    if not e_tag:
        return "objects have no entity tag"
    file.pinned(e_tag).fetch([(0, 10)])
    try:
        file.pinned('"00000000000000000000000000000000"').fetch([(0, 10)])
    except ObjectChanged:
        return ""
    return "another version came than was asked for"


def _exchange(file: ObjectPath) -> str:
    e_tag = file.head()[1]
    if file.exchange(b"second", e_tag) is None:
        return "a put with the right entity tag is refused"
    if file.exchange(b"third", e_tag) is not None or bytes(file.fetch([(0, 100)])[0]) != b"second":
        return "a put with an old entity tag is accepted"
    return ""


def _large(file: ObjectPath) -> str:
    size = objects.SINGLE_PUT + 1
    with tempfile.TemporaryDirectory(dir=file.scratch()) as folder:
        source = Path(folder) / "upload"
        with source.open("wb") as sparse:
            os.truncate(sparse.fileno(), size)
        if file.create(source) is None:
            return "an upload in parts, committed by a copy, was refused"
        if file.head()[0] != size:
            return "an upload in parts came out with another size"
        # Another content, or the two could not be told apart (the copy drops the write id).
        with source.open("r+b") as other:
            other.write(b"other")
            other.seek(-5, os.SEEK_END)
            other.write(b"other")
        return "" if file.create(source) is None else "a second copy to the same key was accepted"


def _listing(folder: ObjectPath, *files: ObjectPath) -> str:
    names = {entry.name for entry in folder.iterdir()}
    return "" if names >= {file.name for file in files} else "what was just written is not listed"


def _deleting(file: ObjectPath) -> str:
    file.delete()
    return "what was deleted is still there" if file.is_file() else ""
