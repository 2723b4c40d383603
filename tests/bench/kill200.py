"""200 kills with -9 at random moments, two extractions at a time on one store (fault cases 1 and 6).

    python -m tests.bench.kill200 [KILLS] [--seed N] [--folder DIR]

Prints one JSON line: how many kills, where they landed (inside fsync, link, rename, …), how many hit two executions of
the same tasks, and how many stores were resumed to the end, each byte-equal to one that was never interrupted. It stops
with an error at the first damage. The same with 25 kills is a test: tests/cache_schema/test_crash.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from tests.cache_schema.test_crash import storm


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser.add_argument("--folder", default=memory, help="where the stores are made (default: in memory, if it can be)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        counts = storm(Path(folder), options.kills, options.seed)
    print(json.dumps({**counts, "seed": options.seed, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
