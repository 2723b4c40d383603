"""200 kills with -9 at random moments, two extractions at a time on one store (fault cases 1 and 6).

    python -m tests.bench.kill200 [KILLS]

Prints one JSON line. The same with 25 kills is a test: tests/cache_schema/test_crash.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.cache_schema.test_crash import storm


def main() -> None:
    """See the module's text."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        print(json.dumps(storm(Path(folder), kills)))


if __name__ == "__main__":
    main()
