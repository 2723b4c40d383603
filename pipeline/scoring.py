"""From predictions files to result tables: the scores of one run, and runs against each other.

Neither needs a model or a feature: predictions files and annotations are enough. Whatever averages over seeds goes
through ``Answers``: ``compare``, the table of an ablation, and the report.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Int

from pipeline import provenance, registry
from pipeline.errors import ConfigError
from pipeline.predictions import PredictionsFile, predictions_file, read_own, unanswered
from pipeline.printing import in_one_line
from pipeline.provenance import different
from pipeline.runs import RunFolder
from stages.config import DataConfig
from stages.data.manifest import majority_answer
from stages.data.samples import Availability
from stages.decode.evaluate import read_predictions
from stages.decode.metrics import Match, Prediction, hits, score
from stages.decode.statistics import Interval, Paired, holm, paired, share_interval
from stages.types import Sample


def report(dataset: Any, samples: Sequence[Sample], found: Availability, split: str, write: Path) -> dict[str, Any]:
    """Scores from the predictions file alone, and how they relate to the published protocol.

    Args:
        dataset: for its rule, its published n and its other splits.
        samples: the whole split; what ``found`` lacks of it is named, and counts as wrong in the worst case.
        found: what the cache could serve.
        split: the name of the split.
        write: the predictions file.
    """
    there = {sample.sample_id for sample in found.samples}
    predictions = [p for p in read_predictions(write) if p.sample_id in there]
    train_majority = majority_answer(dataset.samples("train")) if "train" in dataset.splits else None
    published = dataset.published_n(split)
    scores = score(predictions, dataset.answer_rule, train_majority=train_majority)
    whole = max(len(samples), published or 0)  # annotations may have lost entries too
    return scores.to_json() | {
        "split": split,
        "held_out": held_out(dataset, split).to_json(),
        "missing_samples": whole - len(predictions),
        "missing_ids": [sample.sample_id for sample in samples if sample.sample_id not in there],
        "missing_videos": dict(found.missing),
        "worst_case": {"n": whole, "correct": scores.overall.correct, "top1": scores.overall.correct / whole},
        "published_n": published,
        "matches_published_n": None if published is None else published == len(predictions),
        "warnings": [*dataset.warnings, *scores.warnings],
    }


# ---------------------------------------------------------------- held out or not


@dataclass(frozen=True)
class HeldOut:
    """Whether a scored split is new to the student: what it shares with the split that trains it, or selects it.

    Sharing a video counts too: windows and questions of one video have most of their frames in common, often the label.
    """

    split: str
    samples: int  # of the split
    videos: int
    shared: Mapping[str, tuple[int, int]]  # other split -> samples and videos of this one that are in it as well
    unknown: str = ""  # why it could not be looked up

    @property
    def held_out(self) -> bool | None:
        """None where it is not known."""
        return None if self.unknown else not self.shared

    def __str__(self) -> str:
        """One sentence, to be said before any number; empty where all is well."""
        if self.unknown:
            return f"Whether the {self.split} questions are held out could not be checked: {self.unknown}"
        if not self.shared:
            return ""
        parts = []
        for other, (samples, videos) in self.shared.items():
            if samples == self.samples:
                parts.append(f"all {samples} {self.split} questions are in {other} too")
            else:
                same = f", and {samples} of its {self.samples} questions" if samples else ""
                parts.append(f"{videos} of the {self.videos} {self.split} videos are in {other} too{same}")
        return f"Not held out: {'; '.join(parts)}. Such scores measure memory, not what a method does with new videos."

    def to_json(self) -> dict[str, Any]:
        """``held_out`` is null where it is not known."""
        shared = {other: {"samples": samples, "videos": videos} for other, (samples, videos) in self.shared.items()}
        return {**asdict(self), "shared": shared, "held_out": self.held_out, "message": str(self)}


def held_out(dataset: Any, split: str) -> HeldOut:
    """What ``split`` has in common with train, and with val, where the best epoch is chosen."""

    def asked(name: str) -> tuple[set[Any], set[str]]:
        samples = dataset.samples(name)
        return {(s.video_id, s.prompt, s.frame_index.tobytes()) for s in samples}, {s.video_id for s in samples}

    windows, videos = asked(split)
    shared = {}
    for other in ("train", "val"):
        if other != split and other in dataset.splits:
            other_windows, other_videos = asked(other)
            if common := videos & other_videos:
                shared[other] = (len(windows & other_windows), len(common))
    return HeldOut(split, len(windows), len(videos), shared)


def recorded_held_out(split: str, facts: Mapping[str, Any]) -> HeldOut | None:
    """What an evaluation wrote down (``HeldOut.to_json``); None where it did not."""
    try:
        shared = {str(k): (int(v["samples"]), int(v["videos"])) for k, v in facts["shared"].items()}
        return HeldOut(split, int(facts["samples"]), int(facts["videos"]), shared, str(facts["unknown"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def held_out_of(data: DataConfig, split: str) -> HeldOut:
    """The same for the annotations that ``data`` names; ``unknown`` where they are not at hand."""
    try:
        return held_out(registry.load("dataset", data.name)(data), split)
    except (ValueError, OSError) as error:
        return HeldOut(split, 0, 0, {}, in_one_line(error))


# ---------------------------------------------------------------- seeds of one variant


Question = tuple[str, str, str, str]  # sample id, video, prompt, true answer: what makes two questions the same one


def question_of(prediction: Prediction) -> Question:
    """Predictions are of the same question where all of this is equal, not the id alone."""
    return prediction.sample_id, prediction.video_id, prediction.prompt, prediction.answer


def common_questions(runs: Sequence[Sequence[Prediction]]) -> list[Question]:
    """What every run has answered, in the order of the ids."""
    return sorted(set.intersection(*({question_of(p) for p in run} for run in runs))) if runs else []


@dataclass(frozen=True)
class Answers:
    """What the seeds of one variant say to the same questions: hits are averaged over seeds, then videos are drawn."""

    seeds: tuple[int | None, ...]
    predictions: tuple[tuple[Prediction, ...], ...]  # per seed, in the order of the questions
    hits: Int[np.ndarray, "S N"] = field(repr=False)

    @classmethod
    def of(
        cls,
        runs: Sequence[tuple[int | None, Sequence[Prediction]]],
        match: Match,
        questions: Sequence[Question] | None = None,
    ) -> Answers:
        """From (seed, predictions) of every run; to the questions that all of them share, unless others are named."""
        wanted = common_questions([predictions for _, predictions in runs]) if questions is None else questions
        tables = [{question_of(p): p for p in predictions} for _, predictions in runs]
        rows = tuple(tuple(table[question] for question in wanted) for table in tables)
        return cls(tuple(seed for seed, _ in runs), rows, np.array([hits(row, match) for row in rows], dtype=np.int64))

    @property
    def videos(self) -> list[str]:
        """The video of each question."""
        return [p.video_id for p in self.predictions[0]]

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.predictions[0])

    @property
    def correct(self) -> float:
        """Right answers per seed, on average."""
        return float(self.hits.sum() / len(self.hits))

    @property
    def top1(self) -> float:
        """The mean over seeds and questions."""
        return float(self.hits.mean())

    @property
    def per_seed(self) -> tuple[float, ...]:
        """Top-1 of every seed."""
        return tuple(self.hits.mean(axis=1).tolist())

    @property
    def seed_sd(self) -> float | None:
        """Standard deviation of top-1 over seeds."""
        return float(np.std(self.per_seed, ddof=1)) if len(self.hits) > 1 else None

    @cached_property
    def interval(self) -> Interval | None:
        """Of top-1, drawing whole videos."""
        return share_interval(self.hits.mean(axis=0), self.videos)

    def against(self, reference: Answers) -> Paired:
        """This minus ``reference``, on the same questions; paired by seed too where both have the same seeds."""
        seeds = reference.seeds
        same = None not in seeds and sorted(map(str, seeds)) == sorted(map(str, self.seeds))
        rows = [self.seeds.index(seed) for seed in seeds] if same and len(set(seeds)) == len(seeds) else None
        mine = self.hits if rows is None else self.hits[rows]
        return paired(reference.hits, mine, self.videos, same_seeds=rows is not None)


# ---------------------------------------------------------------- runs against each other


@dataclass(frozen=True)
class Answered:
    """A run folder with answers, or a baseline's."""

    folder: Path
    settings: Mapping[str, Any]
    seed: int | None
    rule: str
    file: PredictionsFile
    held_out: HeldOut

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions that its answers were given with; empty where that is not recorded."""
        return {} if self.file.provenance is None else self.file.provenance.packages


@dataclass
class Variant:
    """Runs that differ in their seed only. ``settings`` is what they have in common."""

    name: str
    settings: Mapping[str, Any]
    members: list[Answered] = field(default_factory=list)

    @property
    def runs(self) -> list[tuple[int | None, Sequence[Prediction]]]:
        """Seed and answers of each."""
        return [(member.seed, member.file.predictions) for member in self.members]

    @property
    def title(self) -> str:
        """The first folder's name, and how many seeds there are."""
        return self.name if len(self.members) == 1 else f"{self.name} ({len(self.members)} seeds)"


def compare(folders: Sequence[Path], *, split: str) -> dict[str, Any]:
    """Every variant with its interval, and a paired test between any two.

    Runs with the same settings but the seed are one variant. Only samples that every run has answered count. Whether
    they are held out (``HeldOut``) is the first thing that the result says.

    Raises:
        ConfigError: fewer than two variants, a folder without answers of its own or with those of another checkpoint,
            or runs of different questions.
    """
    answered = [_answered(folder, split) for folder in folders]
    variants, match = _variants(answered), _rule(answered)
    if len(variants) < 2:
        raise ConfigError(
            "comparing needs two runs that differ in more than their seed; for one:\n"
            f"  {shlex.join(['pipeline', 'evaluate', '--run', str(folders[0])])}"
        )
    everything = [member.file.predictions for member in answered]
    _refuse_other_questions(everything)
    _refuse_other_windows(answered)
    common = common_questions(everything)
    asked = {p.sample_id for predictions in everything for p in predictions}
    answers = [Answers.of(variant.runs, match, common) for variant in variants]
    couples = list(combinations(range(len(variants)), 2))
    tests = [answers[b].against(answers[a]) for a, b in couples]
    adjusted = holm([test.p for test in tests])
    return {
        "held_out": worst([member.held_out for member in answered], split).to_json(),
        "n": len(common),
        "videos": len(set(answers[0].videos)),
        "left_out": len(asked) - len(common),
        "match": match,
        "split": split,
        "variants": [_summary(v, part) for v, part in zip(variants, answers, strict=True)],
        "differing": _differing(variants),
        "pairs": [
            {"a": variants[a].title, "b": variants[b].title, **test.to_json(), "p_holm": p}
            for (a, b), test, p in zip(couples, tests, adjusted, strict=True)
        ],
        "answers": [{"run": str(m.folder), "file": m.file.path.name, "made_from": m.file.digest} for m in answered],
        "warnings": _doubts(answered, split),
    }


def _answered(folder: Path, split: str) -> Answered:
    """Raises ConfigError where the folder's answers are not there, or not those that the run would give."""
    if not predictions_file(folder, split).is_file():
        command = ["pipeline", "evaluate", "--run", str(folder), "--split", split]
        if (folder / "probe.json").is_file():
            command = ["pipeline", "baselines", "--out", str(folder.parent), "--probe", folder.name, "--split", split]
        elif not (folder / "config.json").is_file():
            RunFolder.open(folder)  # says that it is no run
        raise ConfigError(f"{predictions_file(folder, split)} is not there.\nMake it:  {shlex.join(command)}")
    if (folder / "probe.json").is_file():
        facts = json.loads((folder / "probe.json").read_text())
        path = predictions_file(folder, split)
        predictions = read_predictions(path)
        file = PredictionsFile(path, predictions, None, predictions[0].run if predictions else "")
        data = DataConfig.model_validate(facts["data"]) if "data" in facts else None
        held = HeldOut(split, 0, 0, {}, "nobody wrote it down") if data is None else held_out_of(data, split)
        return Answered(
            folder, {"baseline": facts.get("probe")}, facts.get("seed"), str(facts.get("match")), file, held
        )
    run = RunFolder.open(folder)
    file = read_own(run, split)
    if file.problems:
        raise ConfigError("\n".join(f"{folder}: {problem}" for problem in file.problems))
    recorded = None if file.provenance is None else recorded_held_out(split, file.provenance.held_out)
    held = held_out_of(run.located_config.data, split) if recorded is None else recorded
    rule = registry.load("dataset", run.config.data.name).answer_rule
    return Answered(folder, provenance.variant_settings(run), run.config.train.seed, rule, file, held)


def _variants(answered: Sequence[Answered]) -> list[Variant]:
    variants: list[Variant] = []
    for member in answered:
        variant = next((v for v in variants if v.settings == member.settings), None)
        if variant is None:
            variants.append(variant := Variant(_free_name(member.folder, variants), member.settings))
        if member.seed in [other.seed for other in variant.members]:
            raise ConfigError(f"{member.folder} has the settings and the seed of {variant.name}; give it once")
        variant.members.append(member)
    return variants


def _rule(answered: Sequence[Answered]) -> Match:
    rules = {member.rule: member.folder for member in reversed(answered)}
    if len(rules) > 1:
        listed = ", ".join(f"{rule} in {folder}" for rule, folder in rules.items())
        raise ConfigError(f"these runs are scored by different rules ({listed}), so they are of different datasets")
    rule = answered[0].rule
    if rule not in get_args(Match):
        raise ConfigError(f"{answered[0].folder} names no rule for right answers, but {rule!r}")
    return rule  # type: ignore[return-value]


def _refuse_other_windows(answered: Sequence[Answered]) -> None:
    """The same words about other frames are another question; a file of answers knows by digest which frames."""
    known: dict[str, tuple[str, Path]] = {}
    for member in answered:
        samples = {} if member.file.provenance is None else member.file.provenance.questions.samples
        for key, digest in samples.items():
            before = known.setdefault(key, (digest, member.folder))
            if before[0] != digest:
                raise ConfigError(f"sample {key!r} is about other frames in {member.folder} than in {before[1]}")


def _doubts(answered: Sequence[Answered], split: str) -> list[str]:
    """What a reader should know of the answers: unfinished ones, and those of other versions."""
    doubts = [
        f"{member.folder}: {count} questions of the split have no answer; answer them:  "
        f"pipeline evaluate --run {shlex.quote(str(member.folder))} --split {split}"
        for member in answered
        if (count := unanswered(member.file))
    ]
    first = next((member for member in answered if member.packages), None)
    for member in answered:
        if first is not None and member.packages and (lines := different(member.packages, first.packages)):
            doubts.append(f"{member.folder} answered with other versions than {first.folder}: {', '.join(lines)}")
    return doubts


def worst(found: Iterable[HeldOut], split: str) -> HeldOut:
    """Of several runs' splits the one that speaks most against a comparison: shared, else unknown, else held out."""
    none = HeldOut(split, 0, 0, {}, "no run folder names its annotations")
    return min(found, key=lambda part: (part.held_out is not False, not part.unknown), default=none)


def _free_name(folder: Path, variants: Sequence[Variant]) -> str:
    """The folder's own name, or its whole path where another variant has that name."""
    name = folder.resolve().name
    return str(folder) if any(v.name == name for v in variants) else name


def _refuse_other_questions(everything: Sequence[Sequence[Prediction]]) -> None:
    ids = set.intersection(*({p.sample_id for p in run} for run in everything))
    if not ids:
        raise ConfigError("these runs have no sample in common: they are of different datasets or splits")
    questions: dict[str, set[Question]] = {}
    for run in everything:
        for prediction in run:
            questions.setdefault(prediction.sample_id, set()).add(question_of(prediction))
    other = sorted(key for key in ids if len(questions[key]) > 1)
    if other:
        raise ConfigError(
            f"{len(other)} of {len(ids)} samples, such as {other[0]!r}, are another question, or have another answer, "
            "in some of these runs"
        )


def _summary(variant: Variant, answers: Answers) -> dict[str, Any]:
    interval = answers.interval
    return {
        "name": variant.title,
        "seeds": list(answers.seeds),
        "correct": answers.correct,
        "top1": answers.top1,
        "interval": None if interval is None else interval.to_json()["interval"],
        "per_seed": list(answers.per_seed),
        "seed_sd": answers.seed_sd,
    }


def _differing(variants: Sequence[Variant]) -> dict[str, list[Any]]:
    """Setting -> its value per variant, for every setting that is not the same in all trained ones that have it."""
    trained = [v for v in variants if "baseline" not in v.settings]
    keys = sorted({key for v in trained for key in v.settings})
    values = {key: [v.settings.get(key) for v in variants] for key in keys}

    def distinct(key: str) -> set[str]:
        return {json.dumps(v.settings[key]) for v in trained if key in v.settings}

    return {key: row for key, row in values.items() if len(distinct(key)) > 1}
