"""What lies in a store and is no part of it: partial files of dead processes, and files of nobody.

Finding writes nothing. What a living process may still need is never removed, and neither is a file whose origin is
unknown unless the caller says so: it may be somebody's notes, or a shard whose plan was lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_schema import files, metadata
from cache_schema.objects import ObjectPath, StorePath
from cache_schema.planfile import is_generation
from cache_schema.shard import is_shard
from cache_schema.store import FeatureStore


@dataclass(frozen=True)
class Orphan:
    """One file or folder. ``why`` says whose it is, ``dead`` that nobody can need it any more."""

    path: StorePath
    kind: str  # "partial", "unplanned", "shards" (features whose zarr.json or plan is gone: never removed)
    why: str
    dead: bool
    bytes: int


def find(store: StorePath, *, dead_hosts: Collection[str] = frozenset()) -> list[Orphan]:
    """All of them, sorted by path. Of an object store, what lies inside a shard's own prefix is not looked at.

    Args:
        dead_hosts: machines that are known to be gone, so that what their processes left counts as dead. Whether a
            process of another machine lives cannot be known from here.
    """
    found = _look(store, dead_hosts)
    strangers = {orphan.path for orphan in found if orphan.kind != "partial"}
    if not strangers:
        return found
    # Made by somebody after the plan was read and before the folder was: that is planned when all is read again.
    return [orphan for orphan in _look(store, dead_hosts) if orphan.kind == "partial" or orphan.path in strangers]


def _look(store: StorePath, dead_hosts: Collection[str]) -> list[Orphan]:
    found: list[Orphan] = []
    modalities, shard_frames = metadata.list_modalities(store), metadata.read_group(store)
    folders = {store, store / "plan", *(store / part for modality in modalities for part in metadata.path_to(modality))}
    for folder in folders:
        for path, host, dead in files.partials(folder):
            why = f"a writer on {host} that is gone" if dead or host in dead_hosts else f"a writer on {host}"
            found.append(Orphan(path, "partial", why, dead or host in dead_hosts, _size(path)))
    known = {orphan.path for orphan in found}
    for path in _strangers(store, modalities):
        if path in known:
            continue
        if any(is_shard(file, shard_frames) for file in files.files_below(path)):
            why = "features whose zarr.json or plan is gone; restore it, or extract again"
            found.append(Orphan(path, "shards", why, False, _size(path)))
        else:
            found.append(Orphan(path, "unplanned", "neither in the plan nor part of the format", False, _size(path)))
    return sorted(found, key=lambda orphan: str(orphan.path))


def remove(orphan: Orphan) -> None:
    """Remove one, folders with what is in them. One that went by itself meanwhile is no error.

    Raises:
        ValueError: it holds features.
    """
    if orphan.kind == "shards":
        raise ValueError(f"{orphan.path} holds {orphan.why}")
    files.remove(orphan.path)


def _strangers(store: StorePath, modalities: Collection[str]) -> Iterator[StorePath]:
    roots = {modality.partition("/")[0] for modality in modalities}
    yield from _except(store, {"zarr.json", "plan", "videos", *roots}.__contains__)
    yield from _except(store / "plan", lambda name: name == "zarr.json" or is_generation(name))
    for modality in modalities:
        for parent in metadata.path_to(modality)[:-1]:
            inside = {m.removeprefix(f"{parent}/").partition("/")[0] for m in modalities if m.startswith(f"{parent}/")}
            yield from _except(store / parent, {"zarr.json", *inside}.__contains__)
        opened = FeatureStore.open(store, modality)
        array, shards = opened.layout.info.folder, opened.plan.num_shards
        yield from _except(array, {"zarr.json", *map(opened.layout.info.shard_name, range(shards))}.__contains__)


def _except(folder: StorePath, expected: Callable[[str], bool]) -> Iterator[StorePath]:
    if isinstance(folder, ObjectPath) or not folder.is_symlink():
        yield from (folder / name for name in sorted(files.names_in(folder)) if not expected(name))


def _size(path: StorePath) -> int:
    """Bytes of a file, or of all files in a folder. What goes away meanwhile counts as nothing."""
    if isinstance(path, ObjectPath):
        try:
            return path.head()[0]
        except FileNotFoundError:
            return sum(_size(entry) for entry in path.iterdir())
    total = 0
    for place, _, names in os.walk(path):
        total += sum(_size(Path(place) / name) for name in names)
    try:
        return total or path.lstat().st_size
    except FileNotFoundError:
        return total
