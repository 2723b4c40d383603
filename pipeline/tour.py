"""The miniature's study in one command: a coarse and a fine task, with and without the diffusion teacher.

Every part is an ordinary run: ``OUT/<task>/baselines`` and ``OUT/<task>/<arm>`` are what ``baselines``,
``train-student`` and ``evaluate`` would have left there, so each resumes, and the other commands can look at it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cache_schema.objects import StorePath
from pipeline.overrides import apply
from pipeline.progress import OnProgress
from stages.config import PipelineConfig

TASKS = {  # five of the nine frames of a window are enough for these two
    "scene": ("data.num_frames=5", "train.max_steps=100"),
    "spot": ("data.num_frames=5", "train.max_samples=256"),
}
ARMS = {"MA-LMM (λ = 0)": "train.lambda_kd=0", "Diff-LMM (λ = 1)": "train.lambda_kd=1"}
BASELINES = {
    "majority class": "majority",
    "probe on pooled CLIP": "clip_mean",
    "probe on pooled teacher": "teacher_mean",
}


@dataclass(frozen=True)
class Job:
    """One line of the table for one task."""

    task: str
    row: str
    config: PipelineConfig
    cache: StorePath
    out: Path


def tour(
    config: PipelineConfig, *, cache: StorePath, out: Path, processes: int, progress: OnProgress
) -> dict[str, Any]:
    """Run every arm of every task and return the table: task -> row -> scores."""
    jobs = []
    for task, sets in TASKS.items():
        ours = apply(config, [f"data.task={task}", *sets])
        jobs += [Job(task, row, ours, cache, out / task / "baselines") for row in BASELINES]
        jobs += [
            Job(task, row, apply(ours, [arm]), cache, out / task / arm.replace("train.lambda_kd=", "lambda-"))
            for row, arm in ARMS.items()
        ]
    jobs.sort(key=lambda job: job.row in BASELINES)  # the long ones first
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        waiting: list[tuple[Job, Future[dict[str, Any]]]] = [(job, pool.submit(_run, job)) for job in jobs]
        table: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
        for number, (job, future) in enumerate(waiting):
            progress(number, len(jobs), f"{job.task}: {job.row}")
            table[job.task][job.row] = future.result()
        progress(len(jobs), len(jobs), "")
    rows = (*BASELINES, *ARMS)
    return {
        "table": {task: {row: found[row] for row in rows} for task, found in table.items()},
        "seed": config.train.seed,
        "runs": {task: str(out / task) for task in TASKS},
    }


def _run(job: Job) -> dict[str, Any]:
    """One job in a process of its own, on one thread: small models do not get faster on two."""
    import torch

    from pipeline import baselines, compose

    torch.set_num_threads(1)
    if job.row in BASELINES:
        name = BASELINES[job.row]
        found = baselines.baselines(
            job.config, cache=job.cache, out=job.out / name, split="test", names=[name], dry_run=False, progress=_silent
        )
        return _numbers(found["baselines"][name])
    common = {"cache": job.cache, "out": job.out, "device": "cpu", "dry_run": False, "progress": _silent}
    compose.train(job.config, **common)  # type: ignore[arg-type]
    return _numbers(compose.evaluate(None, split="test", checkpoint=None, **common))  # type: ignore[arg-type]


def _numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("n", "correct", "top1", "videos", "by_video")}


def _silent(done: int, total: int, what: str) -> None:
    pass


def processes_here() -> int:
    """As many as the cores that this process may use."""
    return len(os.sched_getaffinity(0))
