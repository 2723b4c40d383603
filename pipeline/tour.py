"""The miniature's study in one command: a coarse and a fine task, with and without the diffusion teacher.

Every part is an ordinary run: ``OUT/<task>/baselines`` and ``OUT/<task>/<arm>`` are what ``baselines``,
``train-student`` and ``evaluate`` would have left there, so each resumes, and the other commands can look at it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

from cache_schema.objects import StorePath
from pipeline import presets
from pipeline.errors import ConfigError, Interrupted, raising_on_signals
from pipeline.locks import one_writer
from pipeline.overrides import apply
from pipeline.progress import OnProgress
from stages.config import PipelineConfig

TASKS = {  # three of the nine frames of a window are enough for these two
    "scene": ("data.num_frames=3", "train.max_steps=100"),
    "spot": ("data.num_frames=3", "train.max_samples=256", "train.max_steps=400"),  # 250 are too few for some seeds
}
ARMS = {"MA-LMM (λ = 0)": "train.lambda_kd=0", "Diff-LMM (λ = 1)": "train.lambda_kd=1"}
BASELINES = {
    "majority class": "majority",
    "probe on pooled CLIP": "clip_mean",
    "probe on pooled teacher": "teacher_mean",
}
LOOK_S = 1.0  # between two looks at the run folders
_heard: list[str] = []  # the signal that ended this process of the pool


@dataclass(frozen=True)
class Job:
    """One line of the table for one task."""

    task: str
    row: str
    config: PipelineConfig
    cache: StorePath
    out: Path


@one_writer("out")
def tour(sets: Sequence[str], *, cache: StorePath, out: Path, processes: int, progress: OnProgress) -> dict[str, Any]:
    """Run every arm of every task and return the table: task -> row -> scores.

    Args:
        sets: what the user has changed, as typed; a task's own settings give way to it.
        processes: runs at a time.
    """
    jobs = []
    for task, own in TASKS.items():
        ours = apply(presets.miniature(), [*own, *sets, f"data.task={task}"])
        jobs += [Job(task, row, ours, cache, out / task / "baselines") for row in BASELINES]
        jobs += [
            Job(task, row, apply(ours, [arm]), cache, out / task / arm.replace("train.lambda_kd=", "lambda-"))
            for row, arm in ARMS.items()
        ]
    jobs.sort(key=lambda job: job.row in BASELINES)  # the long ones first
    found = _in_processes(jobs, processes, progress)
    rows = (*BASELINES, *ARMS)
    return {
        "table": {task: {row: found[task, row][0] for row in rows} for task in TASKS},
        "seed": jobs[0].config.train.seed,
        "runs": {task: str(out / task) for task in TASKS},
        "jobs": len(jobs),
        "done_before": sum(was_done for _, was_done in found.values()),
    }


Found = tuple[dict[str, Any], bool]  # the scores of a job, and whether an earlier start had done all of it


def _in_processes(jobs: Sequence[Job], processes: int, progress: OnProgress) -> dict[tuple[str, str], Found]:
    """What every job found, by task and row. Where one fails, or this is interrupted, the others are ended too."""
    before = set(active_children())
    pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn"), initializer=_begin)
    try:
        asked = {pool.submit(_run, job): job for job in jobs}
        found: dict[tuple[str, str], Found] = {}
        waiting = set(asked)
        while waiting:
            progress(len(found), len(jobs), _steps([asked[future] for future in waiting]))
            done, waiting = wait(waiting, LOOK_S, FIRST_COMPLETED)
            found |= {(asked[future].task, asked[future].row): future.result() for future in done}
        progress(len(jobs), len(jobs), "")
        return found
    except BaseException:
        for child in set(active_children()) - before:
            child.terminate()  # they finish their step and save
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _steps(unfinished: Sequence[Job]) -> str:
    """How far the students are that train now: one record of metrics.jsonl is one step."""
    told = []
    for job in sorted(unfinished, key=lambda job: str(job.out)):
        records = job.out / "metrics.jsonl"
        if job.row in ARMS and records.is_file():
            done = records.read_bytes().count(b"\n")
            told.append(f"{job.task} λ={job.config.train.lambda_kd:g} step {done}")
    return ", ".join(told)


def _begin() -> None:
    """One thread, since small models do not get faster on two; and nobody goes on where the parent was killed."""
    import torch

    torch.set_num_threads(1)

    def leave_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # a run folder changes only by renames, so leaving at once is safe

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _run(job: Job) -> Found:
    """One job, in a process of the pool, which hears signals as a command does, and takes no job after one."""
    if _heard:
        raise Interrupted(_heard[0])
    try:
        with raising_on_signals():
            return _find(job)
    except Interrupted as signal:
        _heard.append(str(signal))
        raise


def _find(job: Job) -> Found:
    from pipeline import baselines, compose

    if job.row in BASELINES:
        name = BASELINES[job.row]
        fitted = baselines.baselines(
            job.config, cache=job.cache, out=job.out / name, split="test", names=[name], dry_run=False, progress=_silent
        )
        if name in fitted["refused"]:
            raise ConfigError(f"{job.task}: {fitted['refused'][name]}")
        return _numbers(fitted["baselines"][name]), not fitted["fitted"]
    common: dict[str, Any] = {"cache": job.cache, "device": "cpu", "dry_run": False, "progress": _silent}
    trained = compose.train(job.config, out=job.out, **common)
    scored = compose.evaluate(job.out, split="test", checkpoint=None, **common)
    return _numbers(scored), trained["first_step"] == trained["steps"] and scored["resumed"] == scored["n"]


def _numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("n", "correct", "top1", "videos", "by_video")}


def _silent(done: int, total: int, what: str) -> None:
    pass


def processes_here() -> int:
    """As many as the cores that this process may use."""
    return len(os.sched_getaffinity(0))
