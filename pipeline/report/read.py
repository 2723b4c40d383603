"""Run folders in, studies out. What is missing is noted with the command that makes it, what is damaged is left out."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from pipeline import registry
from pipeline.errors import ConfigError
from pipeline.ledger import FILE as LEDGER
from pipeline.overrides import TEACHER_ONLY
from pipeline.predictions import read_own, unanswered
from pipeline.printing import in_one_line
from pipeline.provenance import variant_settings
from pipeline.report import files
from pipeline.report.files import DAMAGED
from pipeline.runs import RunFolder, free_folder
from pipeline.scoring import HeldOut, Question, question_of, recorded_held_out
from stages.config import PipelineConfig
from stages.data.lvu import tasks_of
from stages.decode.evaluate import read_predictions
from stages.decode.metrics import Match, Prediction

DRAWN = re.compile(r"w[0-9]+s[0-9]+v[0-9]{5,}")  # ids of the small world (``VideoSpec.video_id``)
DEPTH = 5  # folders below the one that was named
LeaveOut = Callable[[Path, str], None]  # told about everything that cannot be read, and why
Subject = Literal["lvu", "msvd_qa", "world", "other"]
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
    note: str = ""  # of a baseline: where it could not be fitted
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # modality -> what was read
    held_out: HeldOut | None = None  # as the evaluation wrote it down
    made_from: str = ""  # digest of the provenance of its answers


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
    """All variants that answered the same questions.

    ``subject`` decides what stands beside them: the paper's datasets, the small world that the miniature draws, or
    anybody's videos, which nothing has been published about. ``task`` is None where there are open questions.
    """

    title: str
    subject: Subject
    task: str | None
    config: PipelineConfig
    match: Match
    variants: list[Variant]  # students
    baselines: list[Variant]
    differing: list[str]  # keys of the settings that are not the same in all students

    @property
    def runs(self) -> list[Run]:
        """Every student's run."""
        return [run for variant in self.variants for run in variant.runs]


def find_runs(paths: Sequence[Path], leave_out: LeaveOut = lambda *_: None) -> list[tuple[Path, Path]]:
    """(root, folder) of every run and baseline at or below the paths.

    Links are not followed, so nothing outside the named folders is read.

    Raises:
        ConfigError: no path holds a run.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    empty: list[tuple[Path, str]] = []
    for root in paths:
        below = list(_below(root, DEPTH, leave_out)) if root.is_dir() else []
        if not below:
            empty.append((root, "it holds no run" if root.is_dir() else "it is not a directory"))
        for folder in below:
            found.setdefault(folder.resolve(), (root, folder))
    if not found:
        root, reason = empty[0]
        raise ConfigError(f"{root}: {reason}.\nTrain one:  pipeline train-student --out {free_folder(root)}")
    for root, reason in empty:
        leave_out(root, reason)
    return list(found.values())


def _below(folder: Path, depth: int, leave_out: LeaveOut) -> Iterator[Path]:
    try:
        if (folder / "config.json").is_file() or (folder / "probe.json").is_file():
            yield folder
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if depth else []
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        leave_out(folder, in_one_line(error))
        return
    for name in below:
        if name not in ("checkpoints", "tensorboard"):
            yield from _below(folder / name, depth - 1, leave_out)


def read_studies(paths: Sequence[Path], leave_out: LeaveOut = lambda *_: None) -> list[Study]:
    """Read every run and put those with the same questions together.

    Raises:
        ConfigError: no run of a student can be read.
    """
    found = find_runs(paths, leave_out)
    reasons: list[str] = []

    def note(path: Path, reason: str) -> None:
        reasons.append(f"  {path}: {reason}")
        leave_out(path, reason)

    runs = [run for root, folder in found if (run := _read(root, folder, note)) is not None]
    students = [run for run in runs if run.config is not None]
    if not students:
        why = "\n".join(["no run can be read:", *reasons]) if reasons else "only baselines are there."
        raise ConfigError(f"{why}\nTrain a student:  pipeline train-student")
    arms = _arms({folder.parent for root, folder in found if folder != root})
    studies = [_study(members, arms) for members in _by_questions(students)]
    for run in (run for run in runs if run.config is None):
        homes = [study for study in studies if _asked([run]) & _asked(study.runs)]
        for study in homes:
            kind = str(run.settings["baseline"])
            _join(study.baselines, kind, "majority of train" if kind == "majority" else kind, run)
        if not homes and run.predictions:
            leave_out(run.path, "no run here has answered the questions of this baseline")
    return studies


def _by_questions(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that have answered some question in common; one without answers goes where its settings ask the same."""
    groups: list[tuple[set[tuple[object, ...]], list[Run]]] = []
    for run in sorted(runs, key=lambda run: not run.predictions):
        config = cast(PipelineConfig, run.config)
        data = config.data
        keys: set[tuple[object, ...]] = {(data.name, question) for question in _asked([run])}
        keys.add((data.name, "settings", data.task, data.annotations, data.prompt_style))
        asked = {key for key in keys if key[1] != "settings"} or keys
        group = next((group for group in groups if group[0] & asked), None)
        if group is None:
            groups.append((keys, [run]))
        else:
            group[0].update(keys)
            group[1].append(run)
    order = {id(run): number for number, run in enumerate(runs)}
    members = [sorted(group, key=lambda run: order[id(run)]) for _, group in groups]
    return sorted(members, key=lambda group: order[id(group[0])])


def _asked(runs: Iterable[Run]) -> set[Question]:
    return {question_of(p) for run in runs for p in run.predictions}


# ---------------------------------------------------------------- one folder


def _read(root: Path, folder: Path, leave_out: LeaveOut) -> Run | None:
    """None where it cannot be told what the folder is."""
    name = str(folder.relative_to(root)) if folder != root else root.resolve().name
    missing: list[Missing] = []

    def part(path: Path, read: Callable[[], Any], what: str, command: str, empty: Any) -> Any:
        """One file of the run; a damaged one is missing too, and says why."""
        try:
            if path.is_file():
                return read()
            missing.append(Missing(what, command))
        except DAMAGED as error:
            reason = files.why(error)
            missing.append(Missing(f"{what} (damaged: {reason})", command))
            leave_out(path, reason)
        return empty

    quoted = shlex.quote(str(folder))
    answers, environment = folder / "predictions.jsonl", folder / "environment.json"
    if not (folder / "config.json").is_file():
        again = f"pipeline baselines --out {shlex.quote(str(folder.parent))} --probe {shlex.quote(folder.name)}"
        predictions = part(answers, lambda: read_predictions(answers), "answers", again, [])
        facts = part(
            folder / "probe.json", lambda: files.read(folder / "probe.json", files.Probe), "its settings", again, {}
        )
        settings = {"baseline": facts.get("probe", folder.name)}
        unfit = facts.get("not_fitted", {}).values()
        note = "; ".join(dict.fromkeys(task["reason"] for task in unfit))
        if note:
            count = sum(task["samples"] for task in unfit)
            note = f"not fitted to {count} questions, where it gives the most frequent training answer ({note})"
        seed = facts.get("seed")
        return Run(folder, name, seed, settings, None, tuple(predictions), missing=tuple(missing), note=note)
    try:
        run = RunFolder.open(folder)
        registry.load("dataset", run.config.data.name)
    except DAMAGED as error:
        leave_out(folder, in_one_line(error))
        return None
    own = part(run.predictions, lambda: read_own(run, "test"), "answers", f"pipeline evaluate --run {quoted}", None)
    if own is not None and own.problems:
        missing.append(Missing(f"answers ({own.problems[0].partition(';')[0]})", f"pipeline evaluate --run {quoted}"))
        leave_out(own.path, "; ".join(own.problems))
        own = None
    if own is not None and (count := unanswered(own)):
        missing.append(Missing(f"answers to {count} questions", f"pipeline evaluate --run {quoted}"))
        leave_out(own.path, f"{count} questions of the split have no answer; shown are the others")
    facts = None if own is None else own.provenance
    diagnostics = part(
        run.diagnostics,
        lambda: files.read(run.diagnostics, files.Diagnostics),
        "diagnostics of the finished student",
        f"pipeline diagnose --run {quoted}",
        None,
    )
    if diagnostics is not None and run.provenance and diagnostics["made_from"]["checkpoint"] != run.tensors_sha256():
        reason = "it is of another checkpoint than the run stands for"
        missing.append(Missing(f"diagnostics ({reason})", f"pipeline diagnose --run {quoted}"))
        leave_out(run.diagnostics, reason)
        diagnostics = None
    sessions = folder / "sessions.jsonl"
    return Run(
        folder,
        name,
        run.config.train.seed,
        variant_settings(run),
        run.located_config,
        records=part(
            run.metrics_path,
            lambda: files.records(run.metrics()),
            "a training log",
            f"pipeline train-student --out {quoted}",
            (),
        ),
        predictions=() if own is None else tuple(own.predictions),
        diagnostics=diagnostics,
        environment=part(environment, lambda: files.read(environment, files.Environment), "versions", "", None),
        sessions=part(sessions, lambda: files.sessions(run.sessions()), "what it cost", "", ())
        if sessions.exists()
        else (),
        missing=tuple(missing),
        features={} if run.provenance is None else run.provenance.features,
        held_out=None if facts is None else recorded_held_out("test", facts.held_out),
        made_from="" if own is None else own.digest,
    )


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
        except DAMAGED:
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
    subject, task = _subject(config, runs)
    return Study(_title(config, subject, task), subject, task, config, rule, variants, [], telling)


def _subject(config: PipelineConfig, runs: Sequence[Run]) -> tuple[Subject, str | None]:
    """What a study is about: from its dataset and its answers; where nothing is answered, from the annotations."""
    answers = [p for run in runs for p in run.predictions]
    if config.data.name in ("lvu", "msvd_qa"):
        return cast(Subject, config.data.name), config.data.task if config.data.name == "lvu" else None
    layout, videos = "", {p.video_id for p in answers}
    if answers:
        layout = "lvu" if {p.group for p in answers} <= set(tasks_of(config.data)) else "qa"
    else:
        try:
            dataset = registry.load("dataset", config.data.name)(config.data)
            layout, videos = dataset.layout, {s.video_id for split in dataset.splits for s in dataset.samples(split)}
        except DAMAGED:
            layout = ""
    subject: Subject = "world" if videos and all(map(DRAWN.fullmatch, videos)) else "other"
    return subject, config.data.task if layout == "lvu" else None


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


def _title(config: PipelineConfig, subject: Subject, task: str | None) -> str:
    """Names, not paths: a page is mailed around, and a URL may hold a key."""
    if subject == "msvd_qa":
        return "MSVD-QA"
    if subject == "other":
        where = f"Videos in “{_name(config.data.videos)}”"
        return f"{where}, task {task}" if task else f"{where}, questions of “{_name(config.data.annotations)}”"
    where = "LVU" if subject == "lvu" else "Small world"
    return f"{where}, task {task}" if task else f"{where}, open questions"


def _name(place: str) -> str:
    return Path(urlsplit(place).path if "://" in place else place).name or "?"


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
        malmm = settings.get("student.name", "malmm") == "malmm"
        return ", ".join(["λ = 0 (MA-LMM)" if malmm else "λ = 0", *(p for p in parts if p != "student malmm")])
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
