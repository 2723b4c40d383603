"""Object stores: a key that stands where a path would stand, and the few requests that a cache makes.

Only what every store does alike is used: ranged reads pinned to an entity tag, puts on a condition, a copy on a
condition, and listings as a hint.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from cache_schema.connections import ObjectChanged, StoreUnavailable, answer, concurrently, connect

SINGLE_PUT = 32 << 20  # a larger shard goes up in parts under another key, and is committed by a copy
PART, PARTS_IN_FLIGHT = 8 << 20, 8  # of an upload: 64 MiB of memory
RANGE = 8 << 20  # bytes of one GET
MAX_SHARD_OBJECT = 5 * 10**9  # frames of one shard; S3 copies at most 5 GiB in one request
LOOKS = 20  # at an object that is replaced again and again while its end is read in two requests
ATTEMPTS = 3  # at one commit whose answers are lost, on top of the library's retries of one request
# The end of a shard: index (at most 16 MiB) and trailer; its checksum covers the footer, and that all the frames.
_COMPARED = 17 << 20
WRITE_ID = "writeid"  # letters only: Azure allows no hyphen in the name of metadata
_URL = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)$", re.DOTALL)
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,221}$")
_NAME = re.compile(r"^[A-Za-z0-9._=+,() -]{1,255}$")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ObjectPath:
    """``scheme://bucket/key``, with the part of a Path's interface that the cache needs. Holds no credentials.

    ``e_tag`` pins it: a read of another version raises ``ObjectChanged``. ``root`` is the store's URL, for messages.
    """

    scheme: str
    bucket: str
    key: str
    root: str = field(compare=False, repr=False)
    e_tag: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return replace(self, key="/".join(part for part in (self.key, name) if part), e_tag="")

    def joinpath(self, *names: str) -> ObjectPath:
        """This key with further parts."""
        return self / "/".join(names)

    @property
    def parent(self) -> ObjectPath:
        """The key without its last part."""
        return replace(self, key=self.key.rpartition("/")[0], e_tag="")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def pinned(self, e_tag: str) -> ObjectPath:
        """This object in this version."""
        return replace(self, e_tag=e_tag)

    @property
    def remove_command(self) -> str:
        """What a user types to remove it."""
        if self.scheme == "az":
            return shlex.join(["az", "storage", "blob", "delete", "--container", self.bucket, "--name", self.key])
        return shlex.join([*(["aws", "s3"] if self.scheme == "s3" else ["gcloud", "storage"]), "rm", str(self)])

    # --- looking

    def head(self) -> tuple[int, str]:
        """Size and entity tag. Raises FileNotFoundError, StoreUnavailable."""
        import obstore

        meta = self._ask("looking at", lambda: obstore.head(self._store(), self.key))
        return meta["size"], meta["e_tag"] or ""

    def modified(self) -> float:
        """When it was written, by the store's clock: seconds since 1970. Raises FileNotFoundError, StoreUnavailable."""
        import obstore

        return self._ask("looking at", lambda: obstore.head(self._store(), self.key))["last_modified"].timestamp()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.head()
        except FileNotFoundError:
            return False
        return True

    exists = is_file

    def is_dir(self) -> bool:
        """Whether there is an object below this key."""
        return next(self.iterdir(), None) is not None

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies one step below, sorted. A listing may be stale: nothing is concluded from what it lacks."""
        import obstore

        prefix = f"{self.key}/" if self.key else ""
        found = self._ask("listing", lambda: obstore.list_with_delimiter(self._store(), prefix))
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        yield from (self / key.rstrip("/").rpartition("/")[2] for key in sorted(keys))

    def folders(self) -> Iterator[ObjectPath]:
        """The prefixes one step below."""
        import obstore

        prefix = f"{self.key}/" if self.key else ""
        found = self._ask("listing", lambda: obstore.list_with_delimiter(self._store(), prefix))
        yield from (self / key.rstrip("/").rpartition("/")[2] for key in sorted(found["common_prefixes"]))

    def files_below(self) -> Iterator[ObjectPath]:
        """Every object below this key, as far as a listing knows them."""
        import obstore

        prefix = f"{self.key}/" if self.key else ""
        found = self._ask("listing", lambda: obstore.list(self._store(), prefix).collect())
        yield from (replace(self, key=entry["path"], e_tag="") for entry in found)

    # --- reading

    def read_bytes(self, limit: int) -> bytes:
        """The whole object, at most ``limit`` + 1 bytes of it. Raises FileNotFoundError, StoreUnavailable."""
        return bytes(self.tail(limit + 1).data)

    def tail(self, count: int) -> Tail:
        """The last ``count`` bytes, and what version they are of. Raises FileNotFoundError, StoreUnavailable."""
        if self.e_tag:
            return _tail(self, self.e_tag, count)
        data, size, e_tag, _ = self._end(count)
        return Tail(self.pinned(e_tag), size, data)

    def fetch(self, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of these (start, stop) spans, several GETs at a time; a span beyond the end comes out short."""

        def get(span: tuple[int, int]) -> memoryview:
            return memoryview(self._get({"range": span})[0])

        return concurrently(get, spans)

    def download(self, descriptor: int, size: int) -> None:
        """Write the first ``size`` bytes into a file. Raises StoreUnavailable when there are fewer."""

        def part(start: int) -> None:
            data = self._get({"range": (start, min(start + RANGE, size))})[0]
            if len(data) != min(RANGE, size - start):
                raise StoreUnavailable(f"{self}: the store gave {len(data)} bytes at {start}, fewer than there are")
            os.pwrite(descriptor, data, start)

        concurrently(part, range(0, size, RANGE))

    def snapshot(self) -> int:
        """Descriptor of the whole object in a nameless local file, for those who read a shard from end to end."""
        size, e_tag = self.head()
        if self.e_tag not in ("", e_tag):
            raise ObjectChanged(self)
        return os.dup(_snapshot(self.pinned(e_tag), e_tag, size).fileno())

    def scratch(self) -> Path:
        """The local folder where shards lie before they are uploaded, below TMPDIR."""
        folder = Path(tempfile.gettempdir()) / f"diff-lmm-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StoreUnavailable(
                f"{folder} belongs to somebody else. Choose another place:\n  export TMPDIR=/a/folder"
            )
        return folder

    def _end(self, count: int) -> tuple[Any, int, str, Mapping[str, str]]:
        from obstore.exceptions import NotSupportedError

        try:
            return self._get({"range": {"suffix": count}})
        except NotSupportedError:  # Azure: the size first, then a plain range
            pass
        except StoreUnavailable as failure:
            if failure.status not in (200, 416) or self.head()[0]:
                raise  # only an empty object has no range
        for attempt in range(LOOKS):
            size, e_tag = self.head()
            if self.e_tag not in ("", e_tag):
                raise ObjectChanged(self)
            if not size:
                return b"", 0, e_tag, {}
            try:
                return self.pinned(e_tag)._get({"range": (max(0, size - count), size)})
            except ObjectChanged:  # between the two requests: look again, unless this very version was asked for
                if self.e_tag or attempt + 1 == LOOKS:
                    raise
        raise AssertionError("unreachable")

    def _get(self, options: Mapping[str, Any]) -> tuple[Any, int, str, Mapping[str, str]]:
        """Bytes, size of the object, entity tag, attributes."""
        import obstore

        def get() -> tuple[Any, int, str, Mapping[str, str]]:
            condition = {"if_match": self.e_tag} if self.e_tag else {}
            asked: Any = {**options, **condition}
            result = obstore.get(self._store(), self.key, options=asked)
            meta = result.meta
            return result.bytes(), meta["size"], meta["e_tag"] or "", result.attributes

        got = self._ask("reading", get)
        if self.e_tag and got[2] != self.e_tag:
            raise ObjectChanged(self)  # a store that ignores If-Match
        return got

    # --- writing

    def create(self, source: bytes | Path) -> str | None:
        """Make the object unless it exists. Its entity tag when this call made it; None when somebody else did.

        The answer may be lost although the write was done, and the library's retry then meets our own object. So
        every write carries an id, and whoever is refused reads back whose object it is.
        """
        return self._commit(source, "")

    def exchange(self, source: bytes | Path, e_tag: str) -> str | None:
        """Put another content in the place of the version ``e_tag``; None when that is not the version any more.

        Beyond 32 MiB a store has no such condition: the version is looked at, then the copy is made.
        """
        return self._commit(source, e_tag)

    def write(self, data: bytes) -> None:
        """Make or replace a small object."""
        import obstore

        self._ask("writing", lambda: obstore.put(self._store(), self.key, data, use_multipart=False))

    def delete(self) -> None:
        """Remove the object; it is no error when there is none."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._ask("deleting", lambda: obstore.delete(self._store(), self.key))

    def _commit(self, source: bytes | Path, expected: str) -> str | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        store, write_id = self._store(), secrets.token_hex(16)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        # Azure takes 5000 MiB in one put, and may go on copying after it has said that a copy was made.
        in_parts = size > SINGLE_PUT and self.scheme != "az"
        large = self.parent / source.name if isinstance(source, Path) and in_parts else None

        def put() -> str:
            body = source if isinstance(source, bytes) else _content(source)
            mode: Any = self._version(expected) if expected else "create"
            options: Any = {"mode": mode, "use_multipart": False, "attributes": {WRITE_ID: write_id}}
            return obstore.put(store, self.key, body, **options)["e_tag"] or ""

        def copy() -> str:
            if expected and self.head()[1] != expected:
                raise PreconditionError
            obstore.copy(store, large.key, self.key, overwrite=bool(expected))  # type: ignore[union-attr]
            return self.head()[1]

        try:
            if large is not None:
                large._upload(source, write_id)  # type: ignore[arg-type]
            failure: Exception = AssertionError("unreachable")
            for _ in range(ATTEMPTS):
                try:
                    return answer(self, "committing", put if large is None else copy)
                except (AlreadyExistsError, PreconditionError, StoreUnavailable, FileNotFoundError) as error:
                    failure = error  # 404: the upload of a copy whose answer was lost is not there any more
                if getattr(failure, "refused", False):
                    raise failure
                there, ours = self._what_is_there(write_id, source, size)
                if ours:
                    return there
                if there != expected:  # both are empty when nothing is there
                    return None
            if not isinstance(failure, StoreUnavailable):
                failure = StoreUnavailable(f"{self} changes too often to be committed. The same command resumes.")
            raise failure from None
        finally:
            if large is not None:
                with contextlib.suppress(StoreUnavailable):  # swept later
                    large.delete()

    def _version(self, e_tag: str) -> dict[str, str]:
        """What a put is conditioned on; Google does not compare entity tags, it wants the generation."""
        import obstore
        from obstore.exceptions import PreconditionError

        if self.scheme != "gs":
            return {"e_tag": e_tag}
        now = obstore.head(self._store(), self.key)
        if now["e_tag"] != e_tag:
            raise PreconditionError
        return {"e_tag": e_tag, "version": now["version"] or ""}

    def _upload(self, source: Path, write_id: str) -> None:
        import obstore

        options: dict[str, Any] = {"chunk_size": PART, "max_concurrency": PARTS_IN_FLIGHT, "use_multipart": True}
        attributes: Any = {WRITE_ID: write_id}
        self._ask("uploading", lambda: obstore.put(self._store(), self.key, source, attributes=attributes, **options))

    def _what_is_there(self, write_id: str, source: bytes | Path, size: int) -> tuple[str, bool]:
        """Entity tag ("" when nothing is there) and whether we wrote it.

        S3 drops the write id in a conditional copy: there, size and end decide.
        """
        try:
            now = replace(self, e_tag="")
            there, e_tag = now.head()
            if not there:
                return e_tag, False  # nothing that is written here is empty
            data, _, e_tag, attributes = now.pinned(e_tag)._get({"range": (max(0, there - _COMPARED), there)})
        except FileNotFoundError:
            return "", False
        if WRITE_ID in attributes:
            return e_tag, attributes[WRITE_ID] == write_id
        if there != size:
            return e_tag, False
        if isinstance(source, bytes):
            return e_tag, bytes(data) == source[-_COMPARED:]
        with source.open("rb") as file:
            file.seek(max(0, size - _COMPARED))
            return e_tag, bytes(data) == file.read()

    # --- asking

    def _store(self) -> Any:
        return connect(self.scheme, self.bucket)

    def _ask(self, doing: str, request: Callable[[], Answer]) -> Answer:
        """The answer; a missing object is a bare FileNotFoundError, another version ObjectChanged."""
        from obstore.exceptions import PreconditionError

        try:
            return answer(self, doing, request)
        except PreconditionError:
            raise ObjectChanged(self) from None


@dataclass(frozen=True)
class Tail:
    """The end of one version of an object. ``file`` is pinned to it."""

    file: ObjectPath
    size: int
    data: Any = field(repr=False)

    def read(self, count: int, offset: int) -> bytes:
        """Bytes from ``offset`` on, out of what is here or with one more GET."""
        first = self.size - len(self.data)
        if offset >= first:
            return bytes(memoryview(self.data)[offset - first : offset - first + count])
        return bytes(self.file.fetch([(offset, offset + count)])[0]) if count else b""


def _content(file: Path) -> bytes | mmap.mmap:
    """All of a file; of a large one a map, which takes no memory of its own.

    The library keeps it while it sends. A disk that fails under a map ends the process, and the same command resumes.
    """
    if file.stat().st_size <= SINGLE_PUT:
        return file.read_bytes()
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


StorePath = Path | ObjectPath


def locate(store: str | os.PathLike[str] | ObjectPath) -> StorePath:
    """A folder, or ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``.

    Raises:
        ValueError: another kind of URL, or one with credentials or options in it; what it holds is not repeated.
    """
    if isinstance(store, ObjectPath):
        return store
    match = _URL.match(os.fspath(store))
    if match is None:
        return Path(store)
    scheme, rest = match["scheme"].lower(), match["rest"].rstrip("/")
    if scheme not in ("s3", "gs", "az"):
        raise ValueError(
            "a cache is a folder, or a URL s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
        )
    if set("@?#") & set(rest):  # anywhere: a secret key may hold a slash
        raise ValueError(
            f"the {scheme}:// URL of the cache holds a user name, password or option (not repeated here).\n"
            "Give credentials in the environment (AWS_ACCESS_KEY_ID, …) and the URL as  scheme://bucket/prefix"
        )
    bucket, _, key = rest.partition("/")
    names = key.split("/") if key else []
    if not _BUCKET.fullmatch(bucket) or any(not _NAME.fullmatch(name) or set(name) == {"."} for name in names):
        raise ValueError(
            "not a usable cache URL: a bucket of letters, digits and .-_, then names without control characters or "
            "doubled slashes.\nExample:  s3://bucket/lvu/features"
        )
    return ObjectPath(scheme, bucket, key, root=f"{scheme}://{rest}")


@functools.lru_cache(maxsize=16)
def _tail(file: ObjectPath, e_tag: str, count: int) -> Tail:
    # A shard's footer is asked for once per video in it, and a pinned one cannot change.
    assert file.e_tag == e_tag  # an argument because it is no part of what makes two keys equal
    data, size, _, _ = file._end(count)
    return Tail(file, size, data)


@functools.lru_cache(maxsize=1)
def _snapshot(file: ObjectPath, e_tag: str, size: int) -> IO[bytes]:
    # The last one is kept: whoever copies the videos of a shard one by one would download it for each.
    assert file.e_tag == e_tag  # as in _tail
    temporary = tempfile.TemporaryFile(dir=file.scratch())  # noqa: SIM115
    file.download(temporary.fileno(), size)
    return temporary
