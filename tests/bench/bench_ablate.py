"""K variants on one pass against K runs alone: ``python -m tests.bench.bench_ablate [--json] [--variants 1,2,4,8]``.

Both sides are given the same cache and leave the same run folders, with predictions. Each side of each K is a process
of its own, so that its peak memory can be read; the sides take turns, and medians are reported. Imports do not count.
``alone`` runs in one process too, so what a fresh ``train-student`` needs to start is not held against it.

It also asks what decides the design (D60, D61): whether the language model or the students would gain from being run as
one batch, whether the numbers stay bit-equal then, and where the time of a pass goes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LAMBDAS = ("1", "0.1", "0.5", "2", "5", "10", "0.2", "0.3")  # all with a teacher: nobody reads less than the others
SEEDED = (
    *("clip.weights=seed:0", "teacher.weights=seed:0", "student.init=seed:0"),
    *("decode.llm=seed:0", "decode.llm_config=stages/miniature/llm"),
)


def main() -> None:
    """Run all sides and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="1,2,4,8")
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", nargs=4, metavar=("NAME", "K", "WORK", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        name, count, work, out = asked.side
        print(json.dumps(SIDES[name](int(count), Path(work), Path(out), asked.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _prepare(work, asked.videos)
        found = _measure(work, [int(k) for k in asked.variants.split(",")], asked.steps, asked.repeats)
        found["shares"] = _child("shares", 8, work, work / "shares", asked.steps)
        found["batched"] = _child("batched", 8, work, work / "batched", asked.steps)
    if not asked.json:
        for count, row in found["by_k"].items():
            print(f"K = {count}: ", "  ".join(f"{key} {value}" for key, value in row["ratio"].items()))
    print(json.dumps(found))


def _config(work: Path, steps: int, *sets: str) -> Any:
    from pipeline import presets
    from pipeline.overrides import apply

    world = [f"data.videos={work}/world/videos", f"data.annotations={work}/world/lvu", "data.task=scene"]
    return apply(presets.miniature(), [*world, *SEEDED, f"train.max_steps={steps}", *sets])


def _prepare(work: Path, videos: int) -> None:
    from pipeline import compose
    from stages.miniature.world import write_world

    write_world(work / "world", videos=videos, seed=5)
    options = {"workers": 0, "retry_failed": False, "splits": [], "device": "cpu", "dry_run": False}
    compose.extract(_config(work, 1), which="both", cache=work / "features", progress=_silent, **options)


def _measure(work: Path, counts: list[int], steps: int, repeats: int) -> dict[str, Any]:
    by_k: dict[str, Any] = {}
    for count in counts:
        sides: dict[str, list[dict[str, Any]]] = {"alone": [], "together": []}
        for repeat in range(repeats):
            for name in sorted(sides, reverse=bool(repeat % 2)):
                sides[name].append(_child(name, count, work, work / f"{name}-{count}-{repeat}", steps))
        median = {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in sides.items()
        }
        ratio = {key: round(value / median["together"][key], 3) for key, value in median["alone"].items()}
        by_k[str(count)] = {**median, "ratio": ratio}
    return {"by_k": by_k, "steps": steps, "repeats": repeats}


def _child(name: str, count: int, work: Path, out: Path, steps: int) -> dict[str, Any]:
    side = ["--side", name, str(count), str(work), str(out), "--steps", str(steps)]
    done = subprocess.run([sys.executable, "-m", "tests.bench.bench_ablate", *side], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------- one side, in a process of its own


@contextlib.contextmanager
def _counted() -> Iterator[dict[str, Any]]:
    """Wall and CPU seconds, bytes that the stores give out, language models loaded, growth of peak memory."""
    from cache_schema.store import FeatureStore
    from pipeline import training

    found: dict[str, Any] = {"bytes": 0, "llm_loads": 0}
    read, build = FeatureStore.read_stored, training.build_decoder

    def counted_read(self: Any, *args: Any, **options: Any) -> Any:
        rows = read(self, *args, **options)
        found["bytes"] += rows.nbytes
        return rows

    def counted_build(*args: Any) -> Any:
        found["llm_loads"] += 1
        return build(*args)

    FeatureStore.read_stored, training.build_decoder = counted_read, counted_build  # type: ignore[method-assign]
    before, started, cpu = _peak(), time.monotonic(), time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        yield found
    found |= {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu, "memory": _peak() - before}
    FeatureStore.read_stored, training.build_decoder = read, build  # type: ignore[method-assign]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _alone(count: int, work: Path, out: Path, steps: int) -> dict[str, Any]:
    from pipeline import compose

    common: dict[str, Any] = {"cache": work / "features", "device": "cpu", "dry_run": False, "progress": _silent}
    with _counted() as found:
        for value in LAMBDAS[:count]:
            compose.train(_config(work, steps, f"train.lambda_kd={value}"), out=out / value, **common)
            compose.evaluate(out / value, split="test", checkpoint=None, **common)
    return found


def _together(count: int, work: Path, out: Path, steps: int) -> dict[str, Any]:
    from pipeline.ablate import ablate
    from pipeline.variants import make_variants

    variants, _ = make_variants(_config(work, steps), vary=[f"train.lambda_kd={','.join(LAMBDAS[:count])}"])
    with _counted() as found:
        ablate(variants, cache=work / "features", out=out, device="cpu", memory=None, dry_run=False, progress=_silent)
    return found


def _shares(count: int, work: Path, out: Path, steps: int) -> dict[str, Any]:
    """CPU seconds of the parts of a pass: reading, the language model forward, the optimiser, the rest of the steps."""
    from pipeline import compose, training
    from stages.data.samples import CachedSamples
    from stages.decode.llm import CausalLM
    from stages.train.loop import Trainer

    seconds: dict[str, float] = {}

    def timed(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return inner(*args, **options)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.process_time() - started

        setattr(owner, name, outer)

    timed(CachedSamples, "batch", "read")
    timed(CausalLM, "loss_sum", "llm_forward")
    timed(Trainer, "accumulate", "students")
    timed(Trainer, "finish", "optimizer")
    timed(training, "build_decoder", "llm_load")
    timed(compose, "evaluate", "evaluate")
    total = _together(count, work, out, steps)["cpu"]
    seconds["students"] -= seconds["llm_forward"]
    return {name: round(value / total, 4) for name, value in seconds.items()} | {"cpu": total}


def _batched(count: int, work: Path, _out: Path, steps: int) -> dict[str, Any]:
    """What one batch would gain over turns, for the language model and for a block of the students, and its price."""
    import torch

    from pipeline import inputs, training
    from stages.data.samples import CachedSamples

    config = _config(work, steps)
    stores = inputs.open_stores(config, work / "features", aligned=True)
    dataset = inputs.load_dataset(config)
    data = CachedSamples(dataset.samples("train"), *stores)
    batch = data.batch(range(min(len(data), config.train.batch_size)))
    decoder: Any = training.build_decoder(config, "cpu")
    size, width = config.student.num_queries, decoder.width
    prefixes = torch.randn(count, len(batch.samples), size, width, generator=torch.Generator().manual_seed(0))

    def turns() -> tuple[torch.Tensor, torch.Tensor]:
        losses, grads = [], []
        for prefix in prefixes:
            own = prefix.clone().requires_grad_()
            loss = decoder.loss_per_sample(own, batch.prompts, batch.answers)
            loss.sum().backward()
            losses.append(loss.detach())
            grads.append(own.grad)
        return torch.stack(losses), torch.stack(grads)

    def at_once() -> tuple[torch.Tensor, torch.Tensor]:
        own = prefixes.flatten(0, 1).clone().requires_grad_()
        loss = decoder.loss_per_sample(own, batch.prompts * count, batch.answers * count)
        loss.sum().backward()
        assert own.grad is not None
        return loss.detach().view(count, -1), own.grad.view_as(prefixes)

    student = config.student
    shape = (student.hidden_size, student.intermediate_size)
    rows = len(batch.samples) * config.data.num_frames * size
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(count, *shape, generator=generator) / 8
    down = torch.randn(count, *shape[::-1], generator=generator) / 8
    x = torch.randn(count, rows, shape[0], generator=generator)
    gelu = torch.nn.functional.gelu

    def block_turns() -> tuple[torch.Tensor, ...]:
        return (torch.stack([gelu(x[k] @ up[k]) @ down[k] for k in range(count)]),)

    def block_at_once() -> tuple[torch.Tensor, ...]:
        run = torch.vmap(lambda x, up, down: gelu(x @ up) @ down)
        return (run(x, up, down),)

    return {"llm": _compare(turns, at_once), "student_block_vmapped": _compare(block_turns, block_at_once)}


def _compare(turns: Callable[[], tuple[Any, ...]], at_once: Callable[[], tuple[Any, ...]]) -> dict[str, Any]:
    """CPU time of turns over that of one batch (above 1: the batch is quicker), and how far the numbers are apart."""
    import torch

    seconds: dict[str, list[float]] = {"turns": [], "at_once": []}
    results: dict[str, tuple[Any, ...]] = {}
    for _ in range(5):
        for name, run in (("turns", turns), ("at_once", at_once)):
            started = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - started)
    pairs = list(zip(results["turns"], results["at_once"], strict=True))
    return {
        "speedup_of_one_batch": round(statistics.median(seconds["turns"]) / statistics.median(seconds["at_once"]), 3),
        "bit_equal": all(torch.equal(a, b) for a, b in pairs),
        "share_of_numbers_that_differ": max(float((a != b).float().mean()) for a, b in pairs),
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def _silent(_done: int, _total: int, _what: str = "") -> None:
    pass


SIDES = {"alone": _alone, "together": _together, "shares": _shares, "batched": _batched}


if __name__ == "__main__":
    main()
