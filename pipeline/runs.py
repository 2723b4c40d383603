"""The run folder: everything that one training run leaves behind, in files that outlive this program.

::

    config.json          the resolved, complete configuration
    environment.json     versions and machine (no names of users or folders)
    metrics.jsonl        one record per optimiser step
    tensorboard/         the same as event files
    predictions.jsonl    written by evaluate
    diagnostics.json     written by diagnose
    sessions.jsonl       what each start cost: seconds, bytes read, and which features it read; of an ablation, a share
    checkpoints/
        step-000120/     tensors.safetensors, state.json
        latest.json      the commit: names the newest whole checkpoint
        best.json, final.json

A checkpoint is written to a hidden folder, flushed, renamed, and only then named by ``latest.json``. So a run that is
killed at any moment finds either the new checkpoint or the one before it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, naming
from pipeline.locks import is_lock
from pipeline.overrides import deciding, validate
from stages.config import PipelineConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

KEEP = 2  # newest checkpoints that stay, beside best and final
MARKERS = ("latest", "best", "final")
PACKAGES = (
    *("diff-lmm", "torch", "torchvision", "transformers", "diffusers", "open_clip_torch", "timm", "accelerate"),
    *("tokenizers", "safetensors", "zarr", "numcodecs", "numpy", "av", "dask", "distributed", "webdataset"),
    *("pydantic", "tensorboard", "bitsandbytes"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. ``skipped`` says which damaged ones were passed over to reach it."""

    step: int
    tensors: dict[str, Tensor] = field(repr=False)
    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()


class RunFolder:
    """One run on disk. Use ``create`` to start or resume, ``open`` to read."""

    def __init__(self, path: Path, config: PipelineConfig) -> None:
        self.path, self.config = path, config

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints and their markers."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line and optimiser step."""
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        """Where evaluate writes what the model said."""
        return self.path / "predictions.jsonl"

    @property
    def diagnostics(self) -> Path:
        """Where diagnose writes what it saw."""
        return self.path / "diagnostics.json"

    @classmethod
    def create(cls, path: Path, config: PipelineConfig, *, out: Path | None = None) -> RunFolder:
        """Make the folder, or open the one that an earlier start of the same run made.

        Args:
            path: the folder.
            config: of the run.
            out: what was given as ``--out`` where that is another folder: an ablation keeps its runs below it.

        Raises:
            ConfigError: the folder holds a run with another configuration (the differing keys are listed), or files
                that are not a run.
        """
        if (path / "config.json").exists():
            run = cls.open(path)
            _refuse_other_config(run, config, out or path)
        else:
            _refuse_foreign_files(path, out or path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            write_json(path / "config.json", config.model_dump(mode="json"))
        run.checkpoints.mkdir(exist_ok=True)
        run._note_environment()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run. Raises ConfigError when there is none, or its config.json is of another version."""
        config_path = path / "config.json"
        if not config_path.is_file():
            raise ConfigError(
                f"{path} holds no run (no config.json).\nTrain one:  pipeline train-student --out {free_folder(path)}"
            )
        try:
            return cls(path, validate(json.loads(config_path.read_text())))
        except ValueError as error:
            raise ConfigError(f"{config_path} cannot be used by this version of diff-lmm:\n{error}") from error

    # ------------------------------------------------------------ metrics

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record. Numbers that are not finite become null, so that every line is JSON."""
        _append(self.metrics_path, record)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records."""
        return _read_lines(self.metrics_path)

    def note_session(self, record: Mapping[str, Any]) -> None:
        """Append what one start of a command did and cost. Unlike metrics this is never rewound: lost work cost too."""
        _append(self.path / "sessions.jsonl", record)

    def sessions(self) -> list[dict[str, Any]]:
        """All whole records, oldest first."""
        return _read_lines(self.path / "sessions.jsonl")

    def rewind(self, step: int) -> None:
        """Forget records after ``step``: a resumed run makes them again."""
        kept = [record for record in self.metrics() if record.get("step", 0) <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        _write_text(self.metrics_path, text)

    def board(self, *, first_step: int = 0) -> SummaryWriter:
        """TensorBoard event files beside the metrics; what an earlier start wrote after ``first_step`` is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self.path / "tensorboard")
        return SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, mark: tuple[str, ...] = ()
    ) -> Path:
        """Write a checkpoint and make it the latest one; older ones beyond KEEP go, unless best or final.

        Args:
            step: optimiser steps done.
            tensors: everything that is numbers: weights, optimiser moments, generator states (uint8).
            state: everything else, as JSON (finite numbers only).
            mark: of "best" and "final", those that from now on mean this checkpoint.
        """
        target = self.checkpoints / f"step-{step:06}"
        temp = self.checkpoints / f".{target.name}.tmp"
        shutil.rmtree(temp, ignore_errors=True)
        try:
            self._write_checkpoint(temp, step, tensors, state)
        except OSError:
            shutil.rmtree(temp, ignore_errors=True)  # a full disk: give back what was taken
            raise
        if target.exists():  # the same step again, or a folder that no marker ever named
            shutil.rmtree(target)
        os.rename(temp, target)
        _flush_folder(self.checkpoints)
        for name in (*mark, "latest"):
            write_json(self.checkpoints / f"{name}.json", {"folder": target.name, "step": step})
        self._prune()
        return target

    def load_latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None where the run has none. Damaged ones are passed over, and it says so."""
        latest = self._marked("latest")
        folders = sorted(self.checkpoints.glob("step-*"), key=_step_of, reverse=True)
        if latest is not None:
            # A folder beyond the marker was being committed when the run was killed.
            folders = [folder for folder in folders if _step_of(folder) <= _step_of(latest)]
        skipped: list[str] = []
        for folder in folders:
            try:
                checkpoint = read_checkpoint(folder)
            except ValueError as error:
                skipped.append(str(error))
                log.warning("%s; going back to an older checkpoint", error)
                continue
            return Checkpoint(checkpoint.step, checkpoint.tensors, checkpoint.state, folder, tuple(skipped))
        if skipped:
            log.warning("no whole checkpoint in %s; starting from the beginning", self.checkpoints)
        return None

    def load_checkpoint(self, name: str = "") -> Checkpoint:
        """A checkpoint by name: "latest", "best", "final", or a folder such as "step-000120".

        Without a name: the best, else the final, else the latest. Raises ConfigError, naming what there is.
        """
        folder = self.checkpoints / name if name and name not in MARKERS else None
        for marker in (name,) if name else ("best", "final", "latest"):
            folder = folder or self._marked(marker)
        if folder is None or not folder.is_dir() or folder.parent != self.checkpoints:
            there = [marker for marker in MARKERS if self._marked(marker)]
            there += sorted(found.name for found in self.checkpoints.glob("step-*"))
            hint = (
                f"there are: {', '.join(there)}"
                if there
                else f"train first:  pipeline train-student --out {quote(str(self.path))}"
            )
            raise ConfigError(f"{self.path} has no checkpoint {name or 'yet'}; {hint}")
        return read_checkpoint(folder)

    def step_at(self, marker: str) -> int:
        """Optimiser steps behind "latest", "best" or "final"; 0 where there is no such checkpoint."""
        folder = self._marked(marker)
        return _step_of(folder) if folder is not None else 0

    def _write_checkpoint(
        self, folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        file = folder / "tensors.safetensors"
        with naming(file):
            save_file(_own_memory(tensors), file)
        facts = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _flush(file)
        write_json(folder / "state.json", {"step": step, "state": dict(state), "tensors": facts})
        _flush_folder(folder)
        if self.metrics_path.exists():  # what a resumed run keeps must not be newer than what the disk has
            _flush(self.metrics_path)

    def _marked(self, marker: str) -> Path | None:
        try:
            folder = json.loads((self.checkpoints / f"{marker}.json").read_text())["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self.checkpoints / str(folder)

    def _prune(self) -> None:
        named = {folder for marker in MARKERS if (folder := self._marked(marker)) is not None}
        newest = sorted(self.checkpoints.glob("step-*"), key=_step_of, reverse=True)
        latest = self._marked("latest")
        abandoned = [folder for folder in newest if latest is not None and _step_of(folder) > _step_of(latest)]
        kept = [folder for folder in newest if folder not in abandoned][:KEEP]
        for folder in newest:
            if folder not in kept and (folder in abandoned or folder not in named):
                shutil.rmtree(folder)

    def _note_environment(self) -> None:
        path, now = self.path / "environment.json", environment()
        if not path.exists():
            write_json(path, now)
            return
        before = json.loads(path.read_text())["packages"]
        changed = [name for name, version in now["packages"].items() if before.get(name) != version]
        if changed:
            log.warning(
                "this run was started with other versions of %s; numbers may differ from an uninterrupted run",
                ", ".join(f"{name} ({before.get(name)} then, {now['packages'][name]} now)" for name in changed),
            )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder and check it. Raises ValueError, saying what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "tensors.safetensors"
    try:
        record = json.loads((folder / "state.json").read_text())
        step, state, facts = int(record["step"]), dict(record["state"]), record["tensors"]
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"tensors.safetensors has {file.stat().st_size} of {facts['bytes']} bytes")
        if _sha256(file) != facts["sha256"]:
            raise ValueError("tensors.safetensors has another checksum than state.json says")
        return Checkpoint(step, load_file(file), state, folder)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder.name} is damaged: {error}") from error


def environment() -> dict[str, Any]:
    """Versions and machine: what a reader needs to judge or repeat a run, and nothing about its user."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": _gpu(),
        "commit": _commit(),
    }


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # a run that computes has imported it; reading a folder must not
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else None


def _commit() -> str | None:
    """The git commit of this source tree, where it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def free_folder(wanted: Path, ending: str = "") -> str:
    """What to type as ``--out``: ``wanted`` where it is absent or empty, else a free name like it with ``ending``."""
    named = wanted if wanted.name.strip(".") else wanted.resolve()  # "." and ".." have no name to add to
    others = (named.with_name(f"{named.name}{ending}{number}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
    free = (path for path in (wanted, *others) if not path.exists() or (path.is_dir() and not any(path.iterdir())))
    return quote(str(next(free)))


def _refuse_other_config(run: RunFolder, config: PipelineConfig, out: Path) -> None:
    before, now = deciding(run.config), deciding(config)
    changed = [f"  {key}: {before[key]!r} there, {now[key]!r} now" for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(
            f"{run.path} holds a run with another configuration:\n" + "\n".join(changed) + "\n"
            f"Keep both:       --out {free_folder(out)}\n"
            "Or go on there:  give the same --preset and --set as before"
        )


def _refuse_foreign_files(path: Path, out: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file.\nName a folder:  --out {free_folder(out)}")
    allowed = {"extract.json", "extract-clip.json", "extract-teacher.json", "checkpoints", ".config.json.tmp"}
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    foreign = sorted(name for name in entries if name not in allowed and not is_lock(name))
    if foreign:
        raise ConfigError(
            f"{path} holds other files ({', '.join(foreign[:3])}) and no run.\n"
            f"Name a folder of its own:  --out {free_folder(out)}"
        )


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none sharing memory with another (safetensors refuses that)."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").contiguous()
        pointer = flat.untyped_storage().data_ptr()
        own[name] = flat.clone() if pointer in seen and flat.numel() else flat
        seen.add(pointer)
    return own


def _step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _append(path: Path, record: Mapping[str, Any]) -> None:
    _cut_half_line(path)
    with naming(path), path.open("a") as file:
        file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *lines, _half = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_half_line(path: Path) -> None:
    """Remove the end of a file after its last line break: what a killed process had begun to write."""
    if not path.exists() or not (size := path.stat().st_size):
        return
    with path.open("r+b") as file:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file as a whole: readers see the old text or the new."""
    _write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old text or the new."""
    temp = path.with_name(f".{path.name}.tmp")
    with naming(path):
        temp.write_text(text)
        _flush(temp)
        os.replace(temp, path)
    _flush_folder(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_flush_folder = _flush  # the same call: a folder is opened and flushed like a file
