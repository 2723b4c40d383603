"""From predictions files to result tables: the scores of one run, and runs against each other.

Neither needs a model or a feature: predictions files and annotations are enough.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline import registry
from pipeline.errors import ConfigError
from pipeline.overrides import effective
from pipeline.runs import RunFolder
from stages.data.manifest import majority_answer
from stages.data.samples import Availability
from stages.decode.evaluate import read_predictions
from stages.decode.metrics import Match, Prediction, hits, score
from stages.decode.statistics import holm, paired, share_interval
from stages.types import Sample


def report(dataset: Any, samples: Sequence[Sample], found: Availability, split: str, write: Path) -> dict[str, Any]:
    """Scores from the predictions file alone, and how they relate to the published protocol.

    Args:
        dataset: for its rule, its published n and its training set.
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
        "missing_samples": whole - len(predictions),
        "missing_ids": [sample.sample_id for sample in samples if sample.sample_id not in there],
        "missing_videos": dict(found.missing),
        "worst_case": {"n": whole, "correct": scores.overall.correct, "top1": scores.overall.correct / whole},
        "published_n": published,
        "matches_published_n": None if published is None else published == len(predictions),
        "warnings": [*dataset.warnings, *scores.warnings],
    }


# ---------------------------------------------------------------- runs against each other


@dataclass
class Variant:
    """Runs that differ in their seed only. ``settings`` is what they have in common."""

    name: str
    settings: Mapping[str, Any]
    seeds: list[int | None] = field(default_factory=list)
    answers: list[dict[str, Prediction]] = field(default_factory=list)  # per seed, by sample id

    @property
    def title(self) -> str:
        """The first folder's name, and how many seeds there are."""
        return self.name if len(self.seeds) == 1 else f"{self.name} ({len(self.seeds)} seeds)"


def compare(folders: Sequence[Path], *, split: str) -> dict[str, Any]:
    """Every variant with its interval, and a paired test between any two.

    Runs with the same settings but the seed are one variant. Only samples that every run has answered count.

    Raises:
        ConfigError: fewer than two variants, a folder without predictions, or runs of different questions.
    """
    variants, match, answered = _variants(folders, split)
    if len(variants) < 2:
        raise ConfigError(
            "comparing needs two runs that differ in more than their seed; for one:\n"
            f"  {shlex.join(['pipeline', 'evaluate', '--run', str(folders[0])])}"
        )
    everything = [answers for variant in variants for answers in variant.answers]
    common = sorted(set.intersection(*(set(answers) for answers in everything)))
    _refuse_other_questions(everything, common)
    videos = [everything[0][key].video_id for key in common]
    table = {v.title: np.array([hits([a[key] for key in common], match) for a in v.answers]) for v in variants}
    couples = list(combinations(variants, 2))
    tests = [paired(*_rows(a, b, table), videos, same_seeds=_same_seeds(a, b)) for a, b in couples]
    adjusted = holm([test.p for test in tests])
    return {
        "n": len(common),
        "videos": len(set(videos)),
        "left_out": len(answered) - len(common),
        "match": match,
        "split": split,
        "variants": [_summary(v, table[v.title], videos) for v in variants],
        "differing": _differing(variants),
        "pairs": [
            {"a": a.title, "b": b.title, **test.to_json(), "p_holm": p}
            for (a, b), test, p in zip(couples, tests, adjusted, strict=True)
        ],
        "warnings": [],
    }


def _variants(folders: Sequence[Path], split: str) -> tuple[list[Variant], Match, set[str]]:
    variants: list[Variant] = []
    rules: dict[str, Path] = {}
    answered: set[str] = set()
    for folder in folders:
        settings, seed, rule = _facts(folder)
        rules.setdefault(rule, folder)
        variant = next((v for v in variants if v.settings == settings), None)
        if variant is None:
            variants.append(variant := Variant(_free_name(folder, variants), settings))
        if seed in variant.seeds:
            raise ConfigError(f"{folder} has the settings and the seed of {variant.name}; give it once")
        predictions = {p.sample_id: p for p in _predictions(folder, split)}
        answered |= predictions.keys()
        variant.seeds.append(seed)
        variant.answers.append(predictions)
    if len(rules) > 1:
        told = ", ".join(f"{rule} in {folder}" for rule, folder in rules.items())
        raise ConfigError(f"these runs are scored by different rules ({told}), so they are of different datasets")
    rule = next(iter(rules))
    if rule not in get_args(Match):
        raise ConfigError(f"{folders[0]} names no rule for right answers, but {rule!r}")
    return variants, rule, answered  # type: ignore[return-value]


def _facts(folder: Path) -> tuple[dict[str, Any], int | None, str]:
    """Settings without the seed, the seed, and the rule for right answers."""
    if (folder / "probe.json").is_file():
        facts = json.loads((folder / "probe.json").read_text())
        return {"baseline": facts.get("probe")}, facts.get("seed"), str(facts.get("match"))
    config = RunFolder.open(folder).config
    settings = effective(config)
    seed = settings.pop("train.seed")
    return settings, seed, registry.load("dataset", config.data.name).answer_rule


def predictions_file(folder: Path, split: str) -> Path:
    """Where the answers to a split are kept in a run folder."""
    return folder / ("predictions.jsonl" if split == "test" else f"predictions-{split}.jsonl")


def _predictions(folder: Path, split: str) -> list[Prediction]:
    path = predictions_file(folder, split)
    if not path.is_file():
        command = ["pipeline", "evaluate", "--run", str(folder), "--split", split]
        if (folder / "probe.json").is_file():
            command = ["pipeline", "baselines", "--out", str(folder.parent), "--probe", folder.name, "--split", split]
        raise ConfigError(f"{path} is not there.\nMake it:  {shlex.join(command)}")
    return read_predictions(path)


def _free_name(folder: Path, variants: Sequence[Variant]) -> str:
    """The folder's own name, or its whole path where another variant has that name."""
    name = folder.resolve().name
    return str(folder) if any(v.name == name for v in variants) else name


def _refuse_other_questions(everything: Sequence[Mapping[str, Prediction]], common: Sequence[str]) -> None:
    if not common:
        raise ConfigError("these runs have no sample in common: they are of different datasets or splits")
    for key in common:
        asked = {(a[key].video_id, a[key].prompt, a[key].answer) for a in everything}
        if len(asked) > 1:
            raise ConfigError(f"sample {key!r} is another question, or has another answer, in some of these runs")


def _same_seeds(a: Variant, b: Variant) -> bool:
    return None not in a.seeds and set(a.seeds) == set(b.seeds)


def _rows(a: Variant, b: Variant, table: Mapping[str, Any]) -> tuple[Any, Any]:
    """The hits of both, rows in the order of a's seeds where the seeds are the same."""
    order = [b.seeds.index(seed) for seed in a.seeds] if _same_seeds(a, b) else list(range(len(b.seeds)))
    return table[a.title], table[b.title][order]


def _summary(variant: Variant, rows: Any, videos: Sequence[str]) -> dict[str, Any]:
    interval = share_interval(rows.mean(axis=0), videos)
    per_seed = rows.mean(axis=1)
    return {
        "name": variant.title,
        "seeds": variant.seeds,
        "correct": float(rows.sum() / len(rows)),  # per seed, on average
        "top1": float(rows.mean()),
        "interval": None if interval is None else interval.to_json()["interval"],
        "per_seed": per_seed.tolist(),
        "seed_sd": float(per_seed.std(ddof=1)) if len(rows) > 1 else None,
    }


def _differing(variants: Sequence[Variant]) -> dict[str, list[Any]]:
    """Setting -> its value per variant, for every setting that is not the same in all trained ones that have it."""
    trained = [v for v in variants if "baseline" not in v.settings]
    keys = sorted({key for v in trained for key in v.settings})
    values = {key: [v.settings.get(key) for v in variants] for key in keys}

    def told(key: str) -> set[str]:
        return {json.dumps(v.settings[key]) for v in trained if key in v.settings}

    return {key: row for key, row in values.items() if len(told(key)) > 1}
