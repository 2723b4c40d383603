"""Nobody without the keys gets into the processes of a command: every socket that it listens on is tried."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, Security

from tests.conftest import PROJECT
from tests.pipeline.conftest import options_of

LISTEN = "0A"


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [below for child in task.read_text().split() for below in tree(int(child))]
        except OSError:
            continue
    return found


def listening(pids: list[int]) -> set[int]:
    """TCP ports that these processes listen on, of any address."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(descriptor))
            except OSError:
                continue
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and f"socket:[{words[9]}]" in inodes:
                ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


def commands(seeded: list[str], cache: Path, folder: Path) -> dict[str, list[str]]:
    sets = options_of([*seeded, "train.max_steps=400", "train.warmup_steps=1"])
    store = ["--cache", str(cache)]
    fresh = ["--cache", str(folder / "new"), "--set", "extract.shard_frames=12", "--device", "cpu"]
    return {
        "extract": ["extract", *sets, *fresh, "--workers", "2"],
        "ablate": ["ablate", "--vary", "train.lambda_kd=0,1", *sets, *store, "--out", str(folder / "out")],
        "tour": ["tour", *sets, *store, "--out", str(folder / "out"), "--processes", "2"],
    }


@pytest.fixture(params=["extract", "ablate", "tour"])
def working(
    request: pytest.FixtureRequest, seeded: list[str], seeded_cache: Path, tmp_path: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A command that has shown progress."""
    words = [sys.executable, "-m", "pipeline.cli", *commands(seeded, seeded_cache, tmp_path)[request.param]]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    child = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    for line in child.stderr:
        if " % " in line:
            break
    assert child.poll() is None
    yield request.param, child
    child.send_signal(signal.SIGKILL)
    child.communicate()


@pytest.mark.slow
def test_no_socket_of_a_command_lets_a_stranger_in(working: tuple[str, subprocess.Popen[str]]) -> None:
    command, child = working
    ports = listening(tree(child.pid))
    assert bool(ports) == (command == "extract"), f"{command} listens on {ports}"
    for port in ports:
        for scheme, security in (("tcp", None), ("tls", Security.temporary())):
            with pytest.raises((OSError, TimeoutError)):
                Client(f"{scheme}://127.0.0.1:{port}", security=security, timeout="3s").submit(os.getpid).result(5)
        assert not answers_to_strangers(port)
    assert child.poll() in (None, 0), "the strangers disturbed it"


def answers_to_strangers(port: int) -> bytes:
    """What an HTTP client gets, in the clear and over TLS without a certificate of its own."""
    answer = b""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for wrap in (False, True):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=3) as plain:
                talk = context.wrap_socket(plain) if wrap else plain
                talk.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.2)
                answer += talk.recv(100)
        except OSError:
            continue
    return answer if b"HTTP" in answer else b""
