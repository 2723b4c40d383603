"""Does the diffusion teacher help here? Paired runs on the miniature: ``python -m tests.bench.verdicts --help``.

Every run is one line of ``OUT/runs.jsonl``: arm, seed, accuracy on val and (unless ``--tune``) on test, right or wrong
per test sample, and R² of the pair's place from the student's own hidden states. Runs that are there are not run again,
so a long series can be stopped at any time. ``--table`` prints every arm beside the first one: the difference in
accuracy over paired seeds, with a video-clustered interval and test.

An arm is a name of ``ARMS`` and any number of settings: ``kd1:train.lr=2e-3``. Settings are chosen on val with seeds
that no comparison uses (``--tune``, 100 and up).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import overrides, presets
from pipeline.inputs import load_dataset, open_stores
from pipeline.progress import Progress
from pipeline.training import build_trainer
from stages.config import PipelineConfig
from stages.data.samples import Batch, CachedSamples, few
from stages.decode.metrics import is_correct
from stages.decode.statistics import paired
from stages.train.loop import Trainer, make_schedule, module_weights
from stages.train.probes import ridge_r2
from tests.bench.bench_layout import where

# One beam: the answers of the small world are one token, so a wider search finds the same ones at five times the cost.
TASK = (
    "data.task=spot",
    "data.num_frames=3",
    "train.max_samples=256",
    "decode.num_beams=1",
    "decode.num_return=1",
    "train.max_steps=400",
)


Shown = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True)
class Arm:
    """Settings over the preset, and what is done to the targets."""

    sets: tuple[str, ...]
    control: str = ""  # shuffled: targets of another video; constant: their mean; order: frames in random order
    unlabelled: bool = False  # the alignment sees every training video, L_ce the labelled ones
    before: int = 0  # steps of alignment alone, before as many of L_ce alone as ever
    time_code: float = 0.0  # standard deviation of what PE starts from (``half_circle``) instead of zero


ARMS = {
    "ce": Arm(("train.lambda_kd=0",)),
    **{f"kd{value:g}": Arm((f"train.lambda_kd={value}",)) for value in (0.03, 0.1, 0.3, 1.0, 3.0)},
    "center": Arm(("align.target_norm=center",)),
    "whiten": Arm(("align.target_norm=whiten",)),
    "grid2": Arm(("teacher.grid=2",)),
    "grid4": Arm(("teacher.grid=4",)),
    "grid4-center": Arm(("teacher.grid=4", "align.target_norm=center")),
    "shuffled": Arm((), control="shuffled"),
    "constant": Arm((), control="constant"),
    "order": Arm(("train.lambda_kd=0",), control="order"),
    "time-code": Arm(("train.lambda_kd=0",), time_code=0.5),
    "time-code-weak": Arm(("train.lambda_kd=0",), time_code=0.25),
    "no-banks": Arm(("train.lambda_kd=0", "student.name=no_memory")),
    "unlabelled": Arm((), unlabelled=True),
    "unlabelled-shuffled": Arm((), control="shuffled", unlabelled=True),
    "unlabelled-center": Arm(("align.target_norm=center",), unlabelled=True),
    "unlabelled-grid4-center": Arm(("teacher.grid=4", "align.target_norm=center"), unlabelled=True),
    "before": Arm((), before=150),
    "before-center": Arm(("align.target_norm=center",), before=150),
    "before-grid4-center": Arm(("teacher.grid=4", "align.target_norm=center"), before=150),
    "uniform": Arm(("align.weights=uniform", "align.uniform_weight=1.0")),
}


class Remembered(CachedSamples):
    """Samples whose features are read once and kept."""

    def __init__(self, samples: Any, tokens: Any, pooled: Any = None) -> None:
        super().__init__(samples, tokens, pooled)
        parts = [super(Remembered, self).batch([i]) for i in range(len(samples))]
        self._f = torch.cat([part.f for part in parts])
        targets = [part.y_star for part in parts if part.y_star is not None]
        self._y = torch.cat(targets) if targets else None

    def batch(self, positions: Sequence[int], draws: Sequence[int] | None = None) -> Batch:
        assert draws is None or all(len(self.samples[i].draws) == 1 for i in positions), "windows have one choice"
        rows = list(positions)
        chosen = tuple(self.samples[i] for i in rows)
        return Batch(chosen, self._f[rows], None if self._y is None else self._y[rows])

    def in_random_order(self, seed: int) -> Remembered:
        """The same samples with the frames of each in an order of its own."""
        other = copy.copy(self)
        rng = np.random.default_rng(seed)
        orders = torch.from_numpy(np.stack([rng.permutation(self._f.shape[1]) for _ in range(len(self))]))
        other._f = torch.stack([f[order] for f, order in zip(self._f, orders, strict=True)])
        return other

    def changed(self, control: str, mean: Tensor | None) -> None:
        """Replace the targets by those of another video, or by their mean."""
        assert self._y is not None
        if control == "shuffled":
            self._y = self._y.roll(len(self) // 2 + 1, dims=0)
        elif control == "constant":
            assert mean is not None
            self._y = mean.view(1, 1, *self._y.shape[2:]).expand_as(self._y).clone()


@dataclass
class Lab:
    """Everything that runs share: features by teacher grid, read once."""

    cache: Path
    sets: tuple[str, ...]
    start: Path | None = None  # a checkpoint of ``train-student`` whose student every run begins with

    def __post_init__(self) -> None:
        self._data: dict[tuple[str, ...], dict[str, Remembered]] = {}

    def data(self, config: PipelineConfig) -> dict[str, Remembered]:
        """The three splits with the targets that this configuration names."""
        aligned = config.train.lambda_kd > 0  # without, no teacher need have seen the videos
        teacher = (str(config.teacher.grid), str(config.teacher.layer)) if aligned else ()
        key = (config.data.task, str(config.data.num_frames), str(config.data.stride_s), *teacher)
        if key not in self._data:
            dataset = load_dataset(config)
            stores = open_stores(config, self.cache, aligned=aligned)
            self._data[key] = {
                split: Remembered(dataset.samples(split), *(stores if split == "train" else stores[:1]))
                for split in dataset.splits
            }
        return self._data[key]

    def run(
        self, arm: Arm, extra: Sequence[str], seed: int, *, tune: bool, weights: Path | None, progress: Shown
    ) -> dict[str, Any]:
        """One run from start to score. ``weights``: the trained student is kept there, or taken from there."""
        config = overrides.apply(presets.miniature(), [*self.sets, *arm.sets, *extra, f"train.seed={seed}"])
        splits = self.data(config)
        everything = splits["train"]
        chosen = few(everything.samples, config.train.max_samples, seed)
        whole = len(chosen) == len(everything)
        train = copy.copy(everything) if whole else Remembered(chosen, everything.tokens, everything.pooled)
        if arm.control == "order":
            train = train.in_random_order(seed)
            splits = {name: part.in_random_order(seed + 1) for name, part in splits.items()}
        elif arm.control:
            mean = everything.target_moments()[0]
            train.changed(arm.control, mean)
            if arm.unlabelled:  # the alignment reads these, and the next run what the store holds
                everything = copy.copy(everything)
                everything.changed(arm.control, mean)
        started = time.process_time()
        trainer = build_trainer(config, train, "cpu")
        if self.start is not None:
            trainer.student.load_state_dict(module_weights("student", load_file(self.start)))
        if arm.time_code:
            with torch.no_grad():
                trainer.student.image_pe.weight[: config.data.num_frames] = arm.time_code * half_circle(
                    config.data.num_frames, trainer.student.image_pe.embedding_dim
                )
        if weights is not None and weights.exists():
            trainer.student.load_state_dict(load_file(weights))
        else:
            trainer.student.train()
            _train(trainer, train, everything, arm, config, progress)
            if weights is not None:
                weights.parent.mkdir(parents=True, exist_ok=True)
                save_file(trainer.student.state_dict(), weights)
        seconds = time.process_time() - started
        trainer.student.eval()
        result: dict[str, Any] = {"cpu_seconds": round(seconds, 1)}
        if tune:
            result["val"] = _right(trainer, splits["val"]).mean()
        else:
            right = _right(trainer, splits["test"])
            result |= {"test": right.mean(), "n": len(right), "right": "".join(map(str, right.astype(int)))}
            result["r2_place"] = _place_r2(trainer, splits, config)
        result["train"] = _right(trainer, train).mean()
        return result


def half_circle(length: int, width: int) -> Float[Tensor, "T C"]:
    """A code per frame, on half a circle through two fixed random directions: neighbours are alike, ends opposite."""
    one, two = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    angle = torch.linspace(0, torch.pi, length)[:, None]
    code: Tensor = torch.cos(angle) * one + torch.sin(angle) * two
    return code


def _train(
    trainer: Trainer, train: Remembered, everything: Remembered, arm: Arm, config: PipelineConfig, progress: Shown
) -> None:
    if arm.before:
        schedule = make_schedule(config.train.model_copy(update={"max_steps": arm.before}), len(train))
        for step in range(arm.before):
            _apart(trainer, None, everything, step, schedule)
            progress(step + 1, arm.before)
        trainer.alignment, held = None, trainer.alignment
        schedule = make_schedule(config.train, len(train))
        for step in range(schedule.total_steps):
            trainer.step(train, step, schedule)
            progress(step + 1, schedule.total_steps)
        trainer.alignment = held
        return
    schedule = make_schedule(config.train, len(train))
    for step in range(schedule.total_steps):
        if arm.unlabelled:
            _apart(trainer, train, everything, step, schedule)
        else:
            trainer.step(train, step, schedule)
        progress(step + 1, schedule.total_steps)


def _apart(trainer: Trainer, train: Remembered | None, everything: Remembered, step: int, schedule: Any) -> None:
    """A step whose L_kd is on other samples than its L_ce (of which there may be none)."""
    cfg, alignment = trainer.cfg, trainer.alignment
    assert alignment is not None
    rng = np.random.default_rng([cfg.seed, step, 7])
    for group in trainer.optimizer.param_groups:
        group["lr"] = schedule.lr(step)
    trainer.optimizer.zero_grad(set_to_none=True)
    batch = everything.batch(rng.choice(len(everything), cfg.batch_size, replace=False).tolist())
    out = trainer.student(batch.f, batch.prompts, levels=trainer.align_cfg.levels, frames="all")
    assert batch.y_star is not None
    (cfg.lambda_kd * alignment(out.hidden, batch.y_star).total).backward()
    if train is not None:
        batch = train.batch(rng.choice(len(train), cfg.batch_size, replace=False).tolist())
        nll, count = trainer.decoder.loss_sum(
            trainer.student(batch.f, batch.prompts).prefix, batch.prompts, batch.answers
        )
        (nll / count).backward()
    trainer.optimizer.step()


@torch.no_grad()
def _right(trainer: Trainer, data: Remembered) -> Float[np.ndarray, " n"]:
    """1 where the best beam is the answer."""
    found = []
    for first in range(0, len(data), 256):
        batch = data.batch(range(first, min(first + 256, len(data))))
        beams = trainer.decoder.generate(trainer.student(batch.f, batch.prompts).prefix, batch.prompts)
        found += [
            is_correct(said[0], sample.answer, "exact") for said, sample in zip(beams, batch.samples, strict=True)
        ]
    return np.array(found, dtype=float)


@torch.no_grad()
def _place_r2(trainer: Trainer, splits: Mapping[str, Remembered], config: PipelineConfig) -> dict[str, float]:
    """R² of the pair's centre in the last frame from the mean query state of two levels there."""
    xs: dict[int, list[np.ndarray]] = {8: [], 13: []}
    ys = []
    for split in ("train", "val", "test"):
        data = splits[split]
        rows = range(min(len(data), 500))
        states: dict[int, list[Tensor]] = {u: [] for u in xs}
        for first in range(0, len(rows), 256):
            batch = data.batch(rows[first : first + 256])
            hidden = trainer.student(batch.f, batch.prompts, levels=tuple(xs), frames="last").hidden
            for u in xs:
                states[u].append(hidden[u][:, -1].flatten(1))
        for u, parts in states.items():
            xs[u].append(torch.cat(parts).double().numpy())
        ys.append(
            np.array(
                [where(s.video_id, int(s.frame_index[-1]), fps=config.data.fps)[:2] for s in data.samples[: len(rows)]]
            )
        )
    return {f"level{u}": round(float(ridge_r2(*zip(x, ys, strict=True)).mean()), 4) for u, x in xs.items()}


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arms", nargs="*", default=[], help=f"any of {', '.join(ARMS)}, each with key=value settings after ':'"
    )
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--set", nargs="*", default=list(TASK), dest="sets")
    parser.add_argument("--cache", type=Path, default=Path("cache/miniature/features"))
    parser.add_argument("--out", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--tune", action="store_true", help="score on val only")
    parser.add_argument(
        "--keep", action="store_true", help="keep trained students in OUT/kept: what --tune trained, test can score"
    )
    parser.add_argument("--start", type=Path, help="begin with the student of RUN/checkpoints/STEP/tensors.safetensors")
    parser.add_argument("--table", action="store_true", help="run nothing; the arms beside the first one, as Markdown")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "runs.jsonl"
    if asked.table:
        print(table(runs(path), asked.arms, asked.sets))
        return
    first, _, last = asked.seeds.partition("-")
    lab = Lab(asked.cache, tuple(asked.sets), asked.start)
    for seed in range(int(first), int(last or first) + 1):
        for name in asked.arms:
            key = {"sets": asked.sets, "arm": name, "seed": seed, "tune": asked.tune}
            key |= {"start": str(asked.start)} if asked.start else {}
            if key in [{k: run.get(k) for k in key} for run in runs(path)]:
                continue
            kind, _, extra = name.partition(":")
            digest = hashlib.sha256(json.dumps([asked.sets, name, str(asked.start)]).encode()).hexdigest()[:8]
            weights = asked.out / "kept" / f"{kind}-{digest}-{seed}.safetensors" if asked.keep else None
            sets = extra.split(",") if extra else []
            with Progress() as progress:
                shown = partial(progress, what=f"{name}, seed {seed}")
                result = key | lab.run(ARMS[kind], sets, seed, tune=asked.tune, weights=weights, progress=shown)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps({k: v for k, v in result.items() if k not in ("right", "sets")}), flush=True)


def table(done: Sequence[Mapping[str, Any]], arms: Sequence[str], sets: Sequence[str]) -> str:
    """Markdown: accuracy per arm, and its difference to the first arm over the seeds that both have."""
    config = overrides.apply(presets.miniature(), list(sets))
    videos = [sample.video_id for sample in load_dataset(config).samples("test")]
    found: dict[str, dict[int, Mapping[str, Any]]] = {arm: {} for arm in arms}
    for run in done:
        if run["arm"] in found and run["sets"] == list(sets) and not run["tune"] and not run.get("start"):
            found[run["arm"]][run["seed"]] = run
    lines = [
        "| arm | seeds | test top-1 (sd over seeds) | difference (95 %, videos and seeds) | p videos | p seeds "
        "| R² of place, level 8 / 13 | train |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, by_seed in found.items():
        seeds = sorted(set(by_seed) & set(found[arms[0]]))
        if not seeds:
            continue
        ours, first = (
            np.array([list(map(int, runs_of[s]["right"])) for s in seeds]) for runs_of in (by_seed, found[arms[0]])
        )
        share = 100 * ours.mean(axis=1)
        cells = [arm, str(len(seeds)), f"{share.mean():.1f} ({share.std(ddof=1) if len(seeds) > 1 else 0:.1f})"]
        if arm == arms[0]:
            cells += ["", "", ""]
        else:
            pair = paired(first, ours, videos, same_seeds=True)
            low, high = pair.both or (pair.interval.low, pair.interval.high) if pair.interval else (0.0, 0.0)
            cells += [f"{100 * pair.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", f"{pair.p:.3g}"]
            cells.append("" if pair.seed_p is None else f"{pair.seed_p:.3g}")
        r2 = [np.mean([by_seed[s]["r2_place"][level] for s in seeds]) for level in ("level8", "level13")]
        cells += [f"{r2[0]:.2f} / {r2[1]:.2f}", f"{100 * np.mean([by_seed[s]['train'] for s in seeds]):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs(path: Path) -> list[dict[str, Any]]:
    """All finished runs."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
