"""Two or more ways to do one thing, measured beside each other: interleaved, medians, wall and processor time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, by the wall clock and of the processor (all threads of this process)."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` measured. A speed is relative to the floor: 1.0 as fast, 2.0 twice as fast."""

    timings: Mapping[str, Timing]
    speed: Mapping[str, float]  # by the wall clock
    speed_cpu: Mapping[str, float]
    rounds: Mapping[str, tuple[list[float], list[float]]] = field(repr=False)  # wall and processor seconds of each

    def against(self, floor: str) -> Comparison:
        """The same rounds with another way as the floor."""
        wall, cpu = self.rounds[floor]
        return Comparison(
            self.timings,
            {name: _ratio(wall, times) for name, (times, _) in self.rounds.items()},
            {name: _ratio(cpu, times) for name, (_, times) in self.rounds.items()},
            self.rounds,
        )


def compare(
    ways: Mapping[str, Callable[[int], object]],
    *,
    floor: str,
    rounds: int,
    calls: int = 1,
    before: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> Comparison:
    """Run every way in every round, in a new random order, and take the median of the rounds' ratios to the floor.

    Args:
        ways: name -> function of a running number (to choose what is read).
        floor: the way that the others are divided by.
        rounds: after one round that is not counted.
        calls: calls timed together.
        before: run before every measurement, outside the clock (drop a cache).
    """
    rng, names = random.Random(seed), list(ways)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in rng.sample(names, len(names)):
            before()
            way, first = ways[name], number * calls
            cpu_start, start = time.process_time(), time.perf_counter()
            for call in range(first, first + calls):
                way(call)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if number:
                wall[name].append(seconds / calls)
                cpu[name].append(cpu_seconds / calls)
    timings = {name: Timing(statistics.median(wall[name]), statistics.median(cpu[name])) for name in names}
    return Comparison(timings, {}, {}, {name: (wall[name], cpu[name]) for name in names}).against(floor)


def _ratio(floor: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(floor, other, strict=True) if b > 0)
