"""From predictions files to result tables: one run, baselines, and runs against each other.

A predictions file is all that is needed: no model, no features, no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.data.manifest import majority_answer
from stages.data.samples import Availability
from stages.decode.evaluate import read_predictions
from stages.decode.metrics import score


def report(dataset: Any, found: Availability, split: str, write: Path) -> dict[str, Any]:
    """Scores from the predictions file alone, and how they relate to the published protocol."""
    wanted = {sample.sample_id for sample in found.samples}
    predictions = [p for p in read_predictions(write) if p.sample_id in wanted]
    train_majority = majority_answer(dataset.samples("train")) if "train" in dataset.splits else None
    published = dataset.published_n(split)
    return score(predictions, dataset.answer_rule, train_majority=train_majority).to_json() | {
        "split": split,
        "missing_samples": found.dropped,
        "published_n": published,
        "matches_published_n": None if published is None else published == len(predictions),
        "warnings": list(dataset.warnings),
    }
