"""What the crash tests run in processes of their own."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cache_schema import write_task
from tests.cache_schema.makers import SPECS, WANTED, create, extract, producer, single, write_single

FILE_CALLS = ("pwrite", "fsync", "ftruncate", "link", "unlink", "rename", "replace", "mkdir")


def run_and_die(path: Path, die_at: int, counter: Any = None, **options: Any) -> None:
    """The whole extraction; SIGKILL at the file operation with this number (a write dies half done)."""
    count = 0

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == die_at:
                if name == "pwrite":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)

        return call

    for name in FILE_CALLS:
        real = getattr(os, name) if name != "fsync" else lambda _: None
        setattr(os, name, counted(name, real))
    extract(path, list(SPECS), **options)
    if counter is not None:
        counter.value = count


def run_slowly(path: Path, **options: Any) -> None:
    """The whole extraction, slow enough to be killed from outside anywhere."""
    os.fsync = lambda _: None
    extract(path, list(SPECS), on_batch=lambda _: time.sleep(0.004), **options)


def race(path: Path, barrier: Any, results: Any, salt: int) -> None:
    """Open, plan and write every task, all at the same moment as the other."""
    os.fsync = lambda _: None
    barrier.wait()
    store = create(path)
    barrier.wait()
    store.extend_plan({**WANTED, f"extra{salt}": [salt]})
    barrier.wait()
    reports = []
    for task in store.pending():
        barrier.wait()
        reports.append(write_single(store, task, single(on_batch=lambda _: time.sleep(0.002))))
    barrier.wait()
    store.finalize()
    results.put([(report.shards, report.skipped) for report in reports])


SLOWED = ("fsync", "link", "rename", "replace", "unlink")
PLACES = ("start", *SLOWED, "work", "end")


def share(path: Path, seed: float, apart: bool, at: Any = None) -> None:
    """The whole extraction beside another one, slow inside every flush, link and rename, so that kills land there.

    Both processes execute the same tasks at once, or with ``apart`` in the opposite order. ``at`` (shared
    memory, so it outlives a kill) is the number in ``PLACES`` of where this process is.
    """
    rng, told = random.Random(seed), SimpleNamespace(value=0) if at is None else at

    def slowed(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            told.value = PLACES.index(name)
            time.sleep(rng.uniform(0.0, 0.002))
            result = real(*args, **kwargs)
            time.sleep(rng.uniform(0.0, 0.002))
            told.value = PLACES.index("work")
            return result

        return call

    for name in SLOWED:
        setattr(os, name, slowed(name))
    told.value = PLACES.index("work")
    stores = {name: create(path, name) for name in SPECS}
    first = stores["tokens"]
    first.extend_plan(WANTED)
    tasks = {task.shards: task for store in stores.values() for task in store.pending()}
    for _, task in sorted(tasks.items(), reverse=apart):
        write_task(stores, task, producer(list(SPECS), bad={"dog": 1}))
    first.finalize()
    told.value = PLACES.index("end")
