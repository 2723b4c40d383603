"""Run folders in, studies out. A piece that is missing is noted with the command that makes it; nothing crashes."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pipeline import registry
from pipeline.errors import ConfigError
from pipeline.ledger import FILE as LEDGER
from pipeline.overrides import TEACHER_ONLY, effective
from pipeline.printing import in_one_line
from pipeline.runs import RunFolder, free_folder
from stages.config import PipelineConfig
from stages.decode.evaluate import read_predictions
from stages.decode.metrics import Match, Prediction

DEPTH = 5  # folders below the one that was named
MATCHED = "align.uniform_weight"  # the one setting, beside the seed, that may differ within an arm of an ablation


@dataclass(frozen=True)
class Missing:
    """Something that a run lacks."""

    what: str
    command: str


@dataclass(frozen=True)
class Run:
    """One run folder, or one baseline's, as far as it goes."""

    path: Path
    name: str
    seed: int | None
    settings: Mapping[str, Any]  # those that can change a number, flattened, without the seed; for a baseline its name
    config: PipelineConfig | None  # None for a baseline
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)
    records: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    diagnostics: Mapping[str, Any] | None = field(default=None, repr=False)
    sessions: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    environment: Mapping[str, Any] | None = field(default=None, repr=False)
    missing: tuple[Missing, ...] = ()


@dataclass
class Variant:
    """Runs that differ in their seed only. ``key`` is what they share."""

    key: str
    label: str
    runs: list[Run] = field(default_factory=list)

    @property
    def config(self) -> PipelineConfig | None:
        """Of the first run; None for a baseline."""
        return self.runs[0].config

    @property
    def lambda_kd(self) -> float | None:
        """Weight of the alignment; None for a baseline."""
        return None if self.config is None else self.config.train.lambda_kd

    @property
    def diagnosed(self) -> list[Mapping[str, Any]]:
        """Diagnostics of the runs that have them."""
        return [run.diagnostics for run in self.runs if run.diagnostics is not None]


@dataclass
class Study:
    """All variants that answered the same questions."""

    title: str
    config: PipelineConfig
    match: Match
    variants: list[Variant]  # students
    baselines: list[Variant]
    differing: list[str]  # keys of the settings that are not the same in all students

    @property
    def runs(self) -> list[Run]:
        """Every student's run."""
        return [run for variant in self.variants for run in variant.runs]


def find_runs(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(root, folder) of every run and baseline at or below the paths.

    Links are not followed, so nothing outside the named folders is read.

    Raises:
        ConfigError: a path does not exist, or holds no run.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for root in paths:
        if not root.is_dir():
            raise ConfigError(f"{root} is no folder.\nTrain a run:  pipeline train-student --out {free_folder(root)}")
        here = list(_below(root, DEPTH))
        if not here:
            raise ConfigError(f"{root} holds no run.\nTrain one:  pipeline train-student --out {free_folder(root)}")
        for folder in here:
            found.setdefault(folder.resolve(), (root, folder))
    return list(found.values())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.json").is_file() or (folder / "probe.json").is_file():
        yield folder
        return
    if depth:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and entry.name not in ("checkpoints", "tensorboard"):
                yield from _below(folder / entry.name, depth - 1)


def read_studies(paths: Sequence[Path]) -> list[Study]:
    """Read every run and put those with the same questions together. Raises ConfigError."""
    found = find_runs(paths)
    runs = [_read(root, folder) for root, folder in found]
    arms = _arms({folder.parent for root, folder in found if folder != root})
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.config is not None:
            groups.setdefault(_questions(run.config), []).append(run)
    if not groups:
        raise ConfigError("only baselines are there.\nTrain a student:  pipeline train-student")
    studies = [_study(members, arms) for members in groups.values()]
    for run in (run for run in runs if run.config is None):
        for study in studies:
            if _same_questions(run, study):
                _join(study.baselines, str(run.settings["baseline"]), str(run.settings["baseline"]), run)
    return studies


def _questions(config: PipelineConfig) -> str:
    return json.dumps([config.data.name, config.data.task, config.data.annotations, config.data.prompt_style])


def _same_questions(run: Run, study: Study) -> bool:
    theirs = {(p.sample_id, p.prompt, p.answer) for p in run.predictions}
    ours = {(p.sample_id, p.prompt, p.answer) for other in study.runs for p in other.predictions}
    return bool(theirs & ours)


# ---------------------------------------------------------------- one folder


def _read(root: Path, folder: Path) -> Run:
    name = str(folder.relative_to(root)) if folder != root else root.resolve().name
    missing: list[Missing] = []

    def part(path: Path, read: Callable[[], Any], what: str, command: str, empty: Any) -> Any:
        """One file of the run; a damaged one is missing too, and says why."""
        try:
            if path.is_file():
                return read()
            missing.append(Missing(what, command))
        except (ValueError, OSError, KeyError, TypeError) as error:
            missing.append(Missing(f"{what} (damaged: {in_one_line(error)})", command))
        return empty

    quoted = shlex.quote(str(folder))
    answers = folder / "predictions.jsonl"
    if not (folder / "config.json").is_file():
        said = part(answers, lambda: read_predictions(answers), "answers", "pipeline baselines", [])
        facts = part(folder / "probe.json", lambda: _json_object(folder / "probe.json"), "its settings", "", {})
        settings = {"baseline": str(facts.get("probe", folder.name))}
        seed = facts.get("seed") if isinstance(facts.get("seed"), int) else None
        return Run(folder, name, seed, settings, None, tuple(said), missing=tuple(missing))
    run = RunFolder.open(folder)
    settings = effective(run.config)
    del settings["train.seed"]
    seed = run.config.train.seed
    records = part(run.metrics_path, run.metrics, "a training log", f"pipeline train-student --out {quoted}", [])
    said = part(answers, lambda: read_predictions(answers), "answers", f"pipeline evaluate --run {quoted}", [])
    seen = part(
        run.diagnostics,
        lambda: _json_object(run.diagnostics),
        "diagnostics of the finished student",
        f"pipeline diagnose --run {quoted}",
        None,
    )
    environment = folder / "environment.json"
    versions = part(environment, lambda: _json_object(environment), "versions", "", None)
    sessions = run.sessions() if (folder / "sessions.jsonl").is_file() else []
    return Run(
        folder, name, seed, settings, run.config, tuple(said), tuple(records), seen, tuple(sessions), versions,
        tuple(missing),
    )  # fmt: skip


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value


def _arms(outs: Iterable[Path]) -> dict[Path, str]:
    """Run folder -> arm, where the ablation around it says which runs differ in their seed only."""
    found: dict[Path, str] = {}
    for out in outs:
        try:
            rows = _json_object(out / LEDGER)["variants"]
            found |= {out / row["variant"]: f"{out}: {row['arm']}" for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no ablation, or a damaged table: then the settings alone say which runs belong together
    return found


# ---------------------------------------------------------------- together


def _study(runs: Sequence[Run], arms: Mapping[Path, str]) -> Study:
    config = cast(PipelineConfig, runs[0].config)
    variants: list[Variant] = []
    settings_of = _settings(runs, arms)
    for run in runs:
        _join(variants, json.dumps(settings_of[run.path], sort_keys=True), "", run)
    effective = [settings_of[variant.runs[0].path] for variant in variants]
    keys = sorted({key for settings in effective for key in settings})
    differing = [key for key in keys if len({json.dumps(s.get(key)) for s in effective}) > 1]
    with_kd = [s for s in effective if s["train.lambda_kd"] > 0]  # an aligned run has settings that λ = 0 lacks
    telling = [
        key
        for key in differing
        if not key.startswith(TEACHER_ONLY) or len({json.dumps(s.get(key)) for s in with_kd}) > 1
    ]
    for variant, settings in zip(variants, effective, strict=True):
        variant.label = label_of(settings, telling) if telling else variant.runs[0].name
    _tell_apart(variants)
    variants.sort(key=lambda v: cast(float, v.lambda_kd))
    rule: Match = registry.load("dataset", config.data.name).answer_rule
    return Study(_title(config), config, rule, variants, [], telling)


def _settings(runs: Sequence[Run], arms: Mapping[Path, str]) -> dict[Path, dict[str, Any]]:
    """By folder: the settings that can change a number, equal for runs of one arm.

    A matched arm takes its weight from the adaptive run of the same seed: its seeds differ in that setting too.
    """
    settings_of = {run.path: dict(run.settings) for run in runs}
    members: dict[str, list[dict[str, Any]]] = {}
    for path, settings in settings_of.items():
        if path in arms:
            members.setdefault(arms[path], []).append(settings)
    for arm in members.values():
        if len({settings.get(MATCHED) for settings in arm}) > 1:
            for settings in arm:
                settings[MATCHED] = "by seed"
    return settings_of


def _join(variants: list[Variant], key: str, label: str, run: Run) -> None:
    for variant in variants:
        if variant.key == key:
            variant.runs.append(run)
            return
    variants.append(Variant(key, label, [run]))


def _tell_apart(variants: Sequence[Variant]) -> None:
    labels = [variant.label for variant in variants]
    for variant in variants:
        if labels.count(variant.label) > 1:
            variant.label = f"{variant.label} ({variant.runs[0].name})"


def _title(config: PipelineConfig) -> str:
    where = {"lvu": "LVU", "msvd_qa": "MSVD-QA"}.get(config.data.name, f"preset {config.preset}")
    return f"{where}, task {config.data.task}" if config.data.task else where


SHORT = {
    "train.lambda_kd": "λ",
    "align.levels": "levels",
    "align.weights": "weights",
    "align.uniform_weight": "weight",
    "align.target_norm": "targets",
    "student.name": "student",
}


def label_of(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """``λ = 1, levels 8–13``: the settings that tell a variant from the others, in words."""
    parts = []
    known = list(SHORT)
    for key in sorted(keys, key=lambda key: (known.index(key) if key in SHORT else len(known), key)):
        if key in settings:
            value = levels(settings[key]) if key == "align.levels" else str(settings[key])
            name = SHORT.get(key, key.rpartition(".")[2])
            parts.append(f"{name} = {number(settings[key])}" if isinstance(settings[key], float) else f"{name} {value}")
    if settings.get("train.lambda_kd") == 0:
        parts = [part for part in parts if not part.startswith("λ")]
        return ", ".join(["λ = 0 (MA-LMM)", *parts])
    return ", ".join(parts)


def levels(values: Sequence[int]) -> str:
    """``8–13`` for a run of numbers, else ``1, 5, 9``."""
    ordered = sorted(values)
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}–{ordered[-1]}"
    return ", ".join(map(str, ordered))


def number(value: float) -> str:
    """Without trailing zeros."""
    return f"{value:g}"
