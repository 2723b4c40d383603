"""A store of a million videos opens at once and in little memory (case 51)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema.plan import Plan, Segment
from cache_schema.plan_columns import pack
from tests.cache_schema.makers import create

COUNT, PER_SHARD = 1_000_000, 10
OPEN = """
import json, sys, time
from cache_schema import FeatureStore
def memory(name):  # of this process alone: ru_maxrss would begin with what the parent had
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
before, began, clock = memory("VmRSS"), time.process_time(), time.monotonic()
store = FeatureStore.open(sys.argv[1], "tokens")
row = int(store.plan.find("v0777777", [3])[0])
spent = {"processor": time.process_time() - began, "clock": time.monotonic() - clock, "kept": memory("VmRSS") - before}
print(json.dumps({**spent, "peak": memory("VmHWM") - before, "row": row, "shards": store.plan.num_shards}))
"""


@pytest.mark.slow
def test_51_a_store_of_a_million_videos_opens_in_less_than_a_second_and_bounded_memory(tmp_path):
    create(tmp_path, shard_frames=PER_SHARD * 4)
    segments = tuple(Segment(f"v{number:07}", (0, 1, 2, 3), number * 4) for number in range(COUNT))
    (tmp_path / "plan/000000.npz").write_bytes(pack(Plan.empty(PER_SHARD * 4), segments))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        # Dask leaves what it tells its workers' malloc in the environment of this process.
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
    )
    found = json.loads(done.stdout)
    print(found)
    assert (found["row"], found["shards"]) == (777_777 * 4 + 3, COUNT // PER_SHARD)
    assert found["processor"] < 1  # what the clock says depends on the other work on the machine
    assert found["kept"] < 200 << 20
    assert found["peak"] < 300 << 20
