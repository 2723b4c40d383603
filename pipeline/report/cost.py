"""Time, bytes and operations of a study, and what it would have taken without the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.read import Run, Study


@dataclass(frozen=True)
class Cost:
    """Sums over the runs of a study; None where nothing was recorded or counted."""

    runs: int
    seconds: float | None  # of training, on the clock
    cpu_seconds: float | None
    bytes_read: float | None
    training: float | None  # operations of student and LLM
    encoding_once: float | None  # operations of the encoders, each distinct frame once
    encoding_each_time: float | None  # the same, whenever a frame is needed
    how: str
    features: tuple[tuple[str, Mapping[str, Any]], ...]  # modality -> fingerprint of what was read
    mixed: bool  # the runs did not all read the same features

    @property
    def ratio(self) -> float | None:
        """Operations without the cache over operations with it."""
        if self.training is None or self.encoding_once is None or self.encoding_each_time is None:
            return None
        return (self.training + self.encoding_each_time) / (self.training + self.encoding_once)


def cost_of(study: Study, distinct_frames: int | None) -> Cost:
    """Add up. ``distinct_frames``: of the training videos, as the dataset counts them; None where that is unknown."""
    sessions = [s for run in study.runs for s in run.sessions if s.get("command") in ("train-student", "ablate")]
    features: dict[str, Mapping[str, Any]] = {}
    mixed = False
    for run in study.runs:
        for modality, facts in run.features.items():
            mixed |= features.setdefault(modality, facts) != facts
    known = [(run, run.diagnostics["operations"]) for run in study.runs if run.diagnostics is not None]
    counted = [(run, ops) for run, ops in known if ops.get("training_sample") is not None]
    training = once = each = None
    if counted and len(counted) == len(study.runs):
        training = sum(ops["training_sample"] * _samples(run) for run, ops in counted)
        if all(_frame(run, ops) is not None for run, ops in counted):
            each = sum((_frame(run, ops) or 0) * _samples(run) * _frames(run) for run, ops in counted)
            if distinct_frames is not None:  # encoded once for all runs: both encoders if any run needs the teacher
                once = max(_frame(run, ops) or 0 for run, ops in counted) * distinct_frames
    return Cost(
        runs=len(study.runs),
        seconds=_sum(sessions, "seconds"),
        cpu_seconds=_sum(sessions, "cpu_seconds"),
        bytes_read=_sum(sessions, "bytes_read"),
        training=training,
        encoding_once=once,
        encoding_each_time=each,
        how=(
            "Operations are counted by torch’s FlopCounterMode on the real modules (2 per multiply-add; matrix "
            "products, convolutions and attention only): one training sample forward and back, one frame per encoder. "
            "With the cache every distinct training frame is encoded once for all runs; without it, whenever a sample "
            "is trained on. Teacher frames count for runs with λ > 0 only. Seconds are those of the machine that "
            "trained, other work on it included; students of one ablation share the time and the bytes of their pass."
        ),
        features=tuple(sorted(features.items())),
        mixed=mixed,
    )


def _sum(sessions: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [float(s[key]) for s in sessions if isinstance(s.get(key), int | float)]
    return sum(values) if values else None


def _samples(run: Run) -> int:
    """Samples that were trained on: steps times batch size, at most."""
    assert run.config is not None
    steps = max((int(record.get("step", 0)) for record in run.records), default=0)
    return steps * run.config.train.batch_size


def _frames(run: Run) -> int:
    assert run.config is not None
    return run.config.data.num_frames


def _frame(run: Run, operations: Mapping[str, Any]) -> float | None:
    """Operations of encoding one frame for this run."""
    assert run.config is not None
    parts = [operations.get("encoder_frame")]
    if run.config.train.lambda_kd > 0:
        parts.append(operations.get("teacher_frame"))
    known = [float(part) for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
