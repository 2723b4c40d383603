"""One writer a folder: runs, ablations, baselines and tours are written by one process at a time (D75).

``FOLDER/.lock`` names its holder: host, boot, namespace of process numbers, process and its start. It appears by a hard
link, which one process alone gets, also where a network disk has no locks. The holder touches it every BEAT_S seconds.

* On the same boot and in the same namespace the system says whether the holder lives: a dead one's lock is taken over
  at once.
* Anywhere else (another node, another container of the same name) a newcomer watches the file. If it is touched, the
  holder lives. If it is not for WATCH_S seconds on the newcomer's own clock, the holder is dead. No two clocks are
  compared.

Whoever takes over from the holder with token X links ``.lock.X``, which again one process alone gets, and then puts its
own record in the place of ``.lock``. A holder that slept through WATCH_S (a suspended job) finds that record when it
wakes up, and leaves without writing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipeline.errors import INTERRUPTED, naming

FILE = ".lock"  # everything beside it that belongs to it begins like it
BEAT_S = 10.0
WATCH_S = 60.0  # six beats: longer than a network disk usually hangs
POLL_S = 0.5
MAX_BYTES = 4096
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
UNREADABLE = "unreadable"  # the token of a record that is half written or damaged

P = ParamSpec("P")
T = TypeVar("T")
_held: set[Path] = set()  # resolved folders that this process holds


class FolderBusy(Exception):
    """Another living process writes to the folder. The message names it, and what to type."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, as its lock file says."""

    token: str = UNREADABLE
    host: str = ""
    boot: str = ""
    namespace: str = ""
    pid: int = 0
    started: int = 0  # in ticks since boot: tells a process from a later one of the same number
    since: str = ""
    job: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        """A record of this process under a new token."""
        since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        job = os.environ.get("SLURM_JOB_ID", "")
        started = _status_of(os.getpid())[1]
        return cls(secrets.token_hex(8), *_machine(), os.getpid(), started, since, job if job.isdigit() else "")

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """What a lock file says; anybody may have written it."""
        try:
            values = json.loads(data)
            holder = cls(**values)
        except (ValueError, TypeError):
            return cls()
        right = all(type(getattr(holder, f.name)) is type(f.default) for f in fields(cls))
        return holder if right and re.fullmatch(r"[0-9a-f]{16}", holder.token) else cls()

    def is_of_this_machine(self) -> bool:
        """Whether the numbers of its processes mean here what they mean there."""
        return bool(self.boot) and (self.boot, self.namespace) == _machine()[1:]

    def is_alive(self) -> bool:
        """Whether the process runs, for a holder of this machine."""
        state, started = _status_of(self.pid)
        return state not in ("", "Z", "X") and started == self.started

    def __str__(self) -> str:
        where = f"{self.host}, this machine" if self.is_of_this_machine() else self.host
        return f"process {self.pid} on {where}{f' (SLURM job {self.job})' if self.job else ''}, since {self.since}"


def _machine() -> tuple[str, str, str]:
    """Host name, boot and namespace of process numbers. The last two tell machines and containers of one name apart."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


def _status_of(pid: int) -> tuple[str, int]:
    """State letter and start of a process; ("", 0) where there is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return words[0], int(words[19])


def one_writer(name: str, *, create: bool = True) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that writes to the folder in its argument ``name`` holds that folder while it runs.

    With ``create=False`` a folder that is not there is left to the function, which refuses it. Dry runs write nothing.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            given = signature.bind(*args, **kwargs).arguments
            folder = given[name]
            if given.get("dry_run") or not (folder.is_dir() or (create and not folder.exists())):
                return function(*args, **kwargs)
            with writing(folder):
                return function(*args, **kwargs)

        return call

    return decorate


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if need be, against every other process. A process that holds it already goes on.

    Raises FolderBusy while another one lives, after up to WATCH_S seconds where that one is not of this machine.
    """
    with naming(folder):
        resolved = folder.resolve()
        if resolved in _held:
            yield
            return
        is_new = not folder.exists()
        lock = _Lock(folder)
        lock.acquire()
        _held.add(resolved)
        try:
            with lock.beating():
                yield
        finally:
            _held.discard(resolved)
            lock.release()
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty: the rule
                    folder.rmdir()


def replace_text(path: Path, text: str) -> None:
    """Replace a file as a whole. Of several that do so at once the last one stays; readers see one whole text."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            temp.write_text(text, encoding="utf-8")
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)


def is_lock(name: str) -> bool:
    """Whether a file of this name in a folder is a lock, or what a killed process left of one."""
    return name.startswith(FILE)


class _Lock:
    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.holder = folder, folder / FILE, Holder.this_process()
        self.record = json.dumps(asdict(self.holder)).encode()
        self.dead: list[str] = []  # tokens of those whose place this one takes

    def acquire(self) -> None:
        while True:
            with contextlib.suppress(FileNotFoundError):  # the folder was removed at this moment, being empty
                self.folder.mkdir(parents=True, exist_ok=True)
                new = self.folder / f"{FILE}.{self.holder.token}.new"
                try:
                    new.write_bytes(self.record)
                    if self._try(new):
                        return
                finally:
                    new.unlink(missing_ok=True)

    def _try(self, new: Path) -> bool:
        """Become the holder, or the successor of a dead one. False where everything changed meanwhile: try again."""
        self.dead, place = [], self.file
        while not _link(new, place):
            dead = self._dead_holder(place)
            if dead is None:
                return False
            self.dead.append(dead.token)
            place = self._successor(dead.token)
        if place == self.file:
            return True
        if self._look(self.file)[0].token in self.dead:
            os.replace(new, self.file)
            return True
        place.unlink(missing_ok=True)  # the right to a place that somebody else had taken and left
        return False

    def _successor(self, token: str) -> Path:
        return self.folder / f"{FILE}.{token}"

    def _look(self, place: Path) -> tuple[Holder, int]:
        """Who is named there, and when that was touched. Opening asks a network disk anew."""
        try:
            with place.open("rb") as file:
                return Holder.parse(file.read(MAX_BYTES)), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return Holder(token=""), 0

    def _dead_holder(self, place: Path) -> Holder | None:
        """The dead holder named there; None where it has just given up. Raises FolderBusy for a living one."""
        first = holder, _ = self._look(place)
        if holder.is_of_this_machine():
            if holder.is_alive():
                raise FolderBusy(self._advice(holder))
            return holder
        if holder.token:
            asked = f"{self.folder} is held by {holder}; watching up to {WATCH_S:g} s whether that process is alive"
            print(asked, file=sys.stderr)
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            now = self._look(place)
            if not now[0].token:
                return None
            if now != first:
                raise FolderBusy(self._advice(now[0]))
            time.sleep(POLL_S)
        return holder

    def _advice(self, holder: Holder) -> str:
        lines = [f"{self.folder} is being written by {holder}.", "Once that has ended, the same command goes on."]
        stop = ""
        if holder.is_of_this_machine():
            stop = f"kill -USR1 {holder.pid}"
        elif holder.job:
            stop = f"scancel --signal=USR1 {holder.job}"
        return "\n".join([*lines, *([f"Have it save and stop:  {stop}"] if stop else [])])

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Touch the file in a thread of its own, and leave the process where it names somebody else."""
        end = threading.Event()

        def beat() -> None:
            while not end.wait(BEAT_S):
                if os.getpid() == self.holder.pid:
                    self.touch()

        thread = threading.Thread(target=beat, name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def touch(self) -> None:
        """Say that the holder lives. Ends this process where it is not the holder any more."""
        try:
            holder, _ = self._look(self.file)
            if holder.token == self.holder.token:
                os.utime(self.file)
                return
        except OSError:  # a network disk that is away for a moment
            return
        gone = f"{holder} has it" if holder.token else "the lock was removed"
        text = f"error: {self.folder} is not this process's any more ({gone}); leaving without writing there.\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(INTERRUPTED)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if os.getpid() == self.holder.pid and self._look(self.file)[0].token == self.holder.token:
                self.file.unlink()
                for token in self.dead:
                    self._successor(token).unlink(missing_ok=True)


def _link(new: Path, place: Path) -> bool:
    """Give a finished record its name unless the name is taken. True when this call did it."""
    try:
        os.link(new, place)
    except FileExistsError:
        return (
            os.path.exists(new) and os.stat(new).st_nlink > 1
        )  # the answer to our own success was lost, and asked again
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create(place, new.read_bytes())
    return True


def _create(place: Path, record: bytes) -> bool:
    """The same where there are no hard links; for a moment the record is empty."""
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, record)
    finally:
        os.close(descriptor)
    return True
