"""The run folder: everything that one training run leaves behind, in files that outlive this program.

::

    config.json          the resolved, complete configuration
    provenance/          what the run learned from, and what its answers were made from (provenance.py)
    environment.json     versions and machine (no names of users or folders)
    metrics.jsonl        one record per optimiser step
    tensorboard/         the same as event files
    predictions.jsonl    the run's own answers to test, written by evaluate; others are predictions-….jsonl
    diagnostics.json     written by diagnose
    sessions.jsonl       what each start cost: seconds and bytes read; of an ablation, a share
    checkpoints/
        step-000120/     tensors.safetensors, state.json
        latest.json      the commit: names the newest whole checkpoint
        best.json, final.json

A checkpoint is written to a hidden folder, flushed, renamed, and only then named by ``latest.json``. So a run that is
killed at any moment finds either the new checkpoint or the one before it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, naming
from pipeline.locks import is_lock
from pipeline.overrides import PLACES, deciding, validate
from stages.config import PipelineConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from pipeline.provenance import AnswersProvenance, RunProvenance

log = logging.getLogger(__name__)

KEEP = 2  # newest checkpoints that stay, beside best and final
MARKERS = ("latest", "best", "final")
PACKAGES = (
    *("diff-lmm", "torch", "torchvision", "transformers", "diffusers", "open_clip_torch", "timm", "accelerate"),
    *("tokenizers", "safetensors", "zarr", "numcodecs", "numpy", "av", "dask", "distributed", "webdataset"),
    *("scipy", "pydantic", "tensorboard", "bitsandbytes"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        step: optimiser steps done.
        tensors: weights and optimiser moments.
        state: everything else.
        path: its folder.
        run: digest of the provenance of the run that made it; None where that was not recorded.
        sha256: of its tensors.
        skipped: which damaged ones were passed over to reach it.
    """

    step: int
    tensors: dict[str, Tensor] = field(repr=False)
    state: dict[str, Any]
    path: Path
    run: str | None
    sha256: str
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
        """The run's own answers to test (predictions.py)."""
        return self.path / "predictions.jsonl"

    @property
    def diagnostics(self) -> Path:
        """Where diagnose writes what it saw."""
        return self.path / "diagnostics.json"

    @classmethod
    def create(
        cls, path: Path, config: PipelineConfig, *, provenance: RunProvenance | None = None, out: Path | None = None
    ) -> RunFolder:
        """Make the folder, or open the one that an earlier start of the same run made.

        Args:
            path: the folder.
            config: of the run.
            provenance: what the run learns from.
            out: what was given as ``--out`` where that is another folder: an ablation keeps its runs below it.

        Raises:
            ConfigError: the folder holds a run with another configuration (the differing keys are listed), one that
                learned from other questions, features or frozen models (what differs is listed), or files that are not
                a run.
        """
        if (path / "config.json").exists():
            run = cls.open(path)
            _refuse_other_config(run, config, out or path)
            if provenance is not None:
                _refuse_other_provenance(run, provenance, out or path)
                run = run._moved_to(config, provenance)
        else:
            _refuse_foreign_files(path, out or path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            if provenance is not None:  # before the configuration, which makes the folder a run
                run.provenance_folder.mkdir(exist_ok=True)
                write_json(run.provenance_folder / "run.json", provenance.to_json())
            write_json(path / "config.json", config.model_dump(mode="json"))
        run.checkpoints.mkdir(exist_ok=True)
        run._note_environment()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run.

        Raises:
            ConfigError: there is none, its config.json is of another version, or was changed since the run started.
        """
        config_path = path / "config.json"
        if not config_path.is_file():
            raise ConfigError(
                f"{path} holds no run (no config.json).\nTrain one:  pipeline train-student --out {free_folder(path)}"
            )
        try:
            run = cls(path, validate(json.loads(config_path.read_text())))
        except ValueError as error:
            raise ConfigError(f"{config_path} cannot be used by this version of diff-lmm:\n{error}") from error
        run._refuse_changed_config()
        return run

    # ------------------------------------------------------------ provenance

    @property
    def provenance_folder(self) -> Path:
        """What the run and its answers were made from."""
        return self.path / "provenance"

    @functools.cached_property
    def provenance(self) -> RunProvenance | None:
        """What the run learned from; None where that is not recorded. Raises ConfigError when the record is damaged."""
        from pipeline.provenance import RunProvenance

        path = self.provenance_folder / "run.json"
        if not path.is_file():
            return None
        try:
            return RunProvenance.from_json(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(
                f"{path} cannot be trusted: {error}.\n"
                f"Train again in another folder:  pipeline train-student --out {free_folder(self.path)}"
            ) from error

    @property
    def home(self) -> Path:
        """The folder that relative paths of the configuration start from."""
        from pipeline.provenance import locate_from

        return Path() if self.provenance is None else Path(locate_from(self.path, self.provenance.started_in))

    @property
    def located_config(self) -> PipelineConfig:
        """The configuration with its paths as seen from the working folder."""
        from pipeline.provenance import located

        return located(self.config, self.home)

    @property
    def cache(self) -> str:
        """The feature store that the run read. Raises ConfigError where nobody has recorded it."""
        from pipeline.provenance import locate_from

        if self.provenance is None:
            raise ConfigError(f"{self.path} does not say which cache it read; name it:  --cache PATH")
        return locate_from(self.path, self.provenance.cache)

    def keep_answers_provenance(self, facts: AnswersProvenance) -> None:
        """Write down what a predictions file is made from, before its first line."""
        self.provenance_folder.mkdir(exist_ok=True)
        write_json(self.provenance_folder / f"answers-{facts.digest}.json", facts.to_json())

    def answers_provenance(self, digest: str) -> AnswersProvenance | None:
        """What the predictions whose lines name this digest were made from; None where that is not recorded."""
        from pipeline.provenance import AnswersProvenance

        path = self.provenance_folder / f"answers-{digest}.json"
        if not re.fullmatch("[0-9a-f]{16}", digest) or not path.is_file():
            return None
        try:
            found = AnswersProvenance.from_json(json.loads(path.read_text()))
        except ValueError:
            return None
        return found if found.digest == digest else None

    def _moved_to(self, config: PipelineConfig, provenance: RunProvenance) -> RunFolder:
        """The same run with the places of ``config``, and of its cache, as they are now."""
        assert self.provenance is not None
        values, now = self.config.model_dump(mode="json"), config.model_dump(mode="json")
        for key in PLACES:
            section, name = key.split(".")
            values[section][name] = now[section][name]
        places = (provenance.cache, provenance.started_in)
        if places == (self.provenance.cache, self.provenance.started_in) and values == self.config.model_dump(
            mode="json"
        ):
            return self
        write_json(self.provenance_folder / "run.json", provenance.to_json())
        write_json(self.path / "config.json", values)
        return RunFolder(self.path, validate(values))

    def _refuse_changed_config(self) -> None:
        if self.provenance is None:
            return
        from pipeline.provenance import different

        now, then = deciding(self.config), self.provenance.settings
        both = (now.keys() - set(PLACES)) & then.keys()  # a setting of another version alone was changed by nobody
        changed = different({key: now[key] for key in both}, {key: then[key] for key in both})
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(
                f"{self.path / 'config.json'} was changed after the run had started:\n{lines}\n"
                f"Put it back, or train in another folder:  pipeline train-student --out {free_folder(self.path)}"
            )

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
        folders = sorted(self.checkpoints.glob("step-*"), key=step_of, reverse=True)
        if latest is not None:
            # A folder beyond the marker was being committed when the run was killed.
            folders = [folder for folder in folders if step_of(folder) <= step_of(latest)]
        skipped: list[str] = []
        for folder in folders:
            try:
                checkpoint = read_checkpoint(folder)
            except ValueError as error:
                skipped.append(str(error))
                log.warning("%s; going back to an older checkpoint", error)
                continue
            self._refuse_foreign(checkpoint)
            return replace(checkpoint, skipped=tuple(skipped))
        if skipped:
            log.warning("no whole checkpoint in %s; starting from the beginning", self.checkpoints)
        return None

    def load_checkpoint(self, name: str = "") -> Checkpoint:
        """A checkpoint by name: "latest", "best", "final", or a folder such as "step-000120".

        Without a name: the best, else the final, else the latest. Raises ConfigError, naming what there is.
        """
        checkpoint = read_checkpoint(self.checkpoint_folder(name))
        self._refuse_foreign(checkpoint)
        return checkpoint

    def checkpoint_folder(self, name: str = "") -> Path:
        """Where the checkpoint of that name is. Raises ConfigError, naming what there is."""
        folder = self._named_checkpoint(name)
        if folder is None or not folder.is_dir() or folder.parent != self.checkpoints:
            there = [marker for marker in MARKERS if self._marked(marker)]
            there += sorted(found.name for found in self.checkpoints.glob("step-*"))
            hint = (
                f"there are: {', '.join(there)}"
                if there
                else f"train first:  pipeline train-student --out {quote(str(self.path))}"
            )
            raise ConfigError(f"{self.path} has no checkpoint {name or 'yet'}; {hint}")
        return folder

    def _refuse_foreign(self, checkpoint: Checkpoint) -> None:
        if self.provenance is not None and checkpoint.run != self.provenance.digest:
            raise ConfigError(
                f"{checkpoint.path} is a checkpoint of another run ({checkpoint.run}, not {self.provenance.digest}).\n"
                f"Take it away, then train on:  pipeline train-student --out {quote(str(self.path))}"
            )

    def tensors_sha256(self, name: str = "") -> str | None:
        """Of a checkpoint's tensors, as its state.json says; None where there is no such checkpoint. Names as above."""
        folder = self._named_checkpoint(name)
        try:
            return str(json.loads(((folder or self.path) / "state.json").read_text())["tensors"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _named_checkpoint(self, name: str) -> Path | None:
        folder = self.checkpoints / name if name and name not in MARKERS else None
        for marker in (name,) if name else ("best", "final", "latest"):
            folder = folder or self._marked(marker)
        return folder

    def step_at(self, marker: str) -> int:
        """Optimiser steps behind "latest", "best" or "final"; 0 where there is no such checkpoint."""
        folder = self._marked(marker)
        return step_of(folder) if folder is not None else 0

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
        run = None if self.provenance is None else self.provenance.digest
        write_json(folder / "state.json", {"step": step, "run": run, "state": dict(state), "tensors": facts})
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
        newest = sorted(self.checkpoints.glob("step-*"), key=step_of, reverse=True)
        latest = self._marked("latest")
        abandoned = [folder for folder in newest if latest is not None and step_of(folder) > step_of(latest)]
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
        return Checkpoint(step, load_file(file), state, folder, record.get("run"), str(facts["sha256"]))
    # A file that cannot be read now, by a failing disk or for want of descriptors, is no damage: it may be whole.
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError, SafetensorError) as error:
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
    keys = [key for key in now if run.provenance is None or key not in PLACES]
    changed = [f"  {key}: {before[key]!r} there, {now[key]!r} now" for key in keys if before[key] != now[key]]
    if changed:
        raise ConfigError(
            f"{run.path} holds a run with another configuration:\n" + "\n".join(changed) + "\n"
            f"Keep both:       --out {free_folder(out)}\n"
            "Or go on there:  give the same --preset and --set as before"
        )


def _refuse_other_provenance(run: RunFolder, provenance: RunProvenance, out: Path) -> None:
    """A run goes on only from what it began with: the content of questions, features and frozen models."""
    if run.provenance is None:
        changed = ["nothing is recorded of what it learned from"]
    else:
        changed = provenance.differences(run.provenance)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"{run.path} holds a run that learned from something else:\n{lines}\n"
            f"Keep both:       --out {free_folder(out)}\n"
            f"Or go on there:  {'not possible' if run.provenance is None else 'put back what it learned from'}"
        )


def _refuse_foreign_files(path: Path, out: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file.\nName a folder:  --out {free_folder(out)}")
    allowed = {
        "extract.json",
        "extract-clip.json",
        "extract-teacher.json",
        "checkpoints",
        "provenance",
        ".config.json.tmp",
    }
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


def step_of(folder: Path) -> int:
    """Optimiser steps behind a checkpoint folder; -1 for any other folder."""
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
