"""Kill an extraction with -9 at random moments until it was killed N times, then let it finish.

    python -m tests.extract.kill_loop CONFIG.json STORE N

Each attempt is a fork of this process, which has everything imported and has computed nothing. The moment of a kill is
drawn from the time that a whole extraction takes. A store that was finished early is deleted, so that the rest of the
kills hit work; the last extraction always starts from what a killed one left.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import stages.extract.clip  # noqa: F401 - imported here once, not in every fork
from stages.config import PipelineConfig
from stages.extract.run import Job, extract
from tests.extract.conftest import BUILDERS, wanted


def attempt(job: Job, delay: float | None) -> bool:
    """Run the extraction in a fork; True when it was killed after ``delay`` seconds, False when it finished first."""
    child = os.fork()
    if child == 0:
        try:
            extract(job, wanted(Path(job.config.data.videos)))
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = None if delay is None else time.monotonic() + delay
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if not os.WIFEXITED(status) or os.WEXITSTATUS(status):
                raise SystemExit(f"the extraction failed by itself: status {status}")
            return False
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)


def main() -> None:
    """See the module's text."""
    config, store, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    job = Job(PipelineConfig.model_validate_json(config.read_text()), (BUILDERS["clip"],), store, "cpu")
    started = time.monotonic()
    attempt(job, None)
    whole = time.monotonic() - started
    shutil.rmtree(store)
    rng, done, restarts = random.Random(0), 0, 0
    while done < kills:
        if attempt(job, rng.uniform(0.0, 1.2 * whole)):
            done += 1
        elif done < kills:
            shutil.rmtree(store)
            restarts += 1
    attempt(job, None)
    print(json.dumps({"kills": done, "finished_early": restarts, "seconds_of_a_whole_run": round(whole, 2)}))


if __name__ == "__main__":
    main()
