"""Claims: several extractors share a store's tasks; what a dead one held goes on elsewhere (fault cases 6 and 7)."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from cache_schema import claims, files, orphans
from cache_schema.objects import locate
from tests.cache_schema.makers import create, extract, tree


@pytest.fixture
def folder(tmp_path):
    return create(tmp_path / "cache.zarr").layout.info.folder


def claim_of(folder, shard=0, **holder):
    """A claim of somebody else."""
    file = claims.claim_file(folder, shard)
    file.write_text(json.dumps({"host": files.HOST, "pid": os.getpid(), "started": 0, "token": "x", **holder}))
    return file


def test_a_task_is_claimed_once_and_free_again_after_it(folder):
    with claims.take(folder, 3) as claim:
        assert claims.take(folder, 3) is None
        with claims.take(folder, 4):
            assert [path.name for path, _ in claims.found(folder)] == [".shard-3.claim", ".shard-4.claim"]
        assert json.loads(claim.file.read_bytes())["pid"] == os.getpid()
    assert claims.found(folder) == []
    assert claims.take(folder, 3) is not None


def test_the_claim_of_a_process_that_is_gone_is_taken_over_at_once_and_logged(folder, caplog):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    claim_of(folder, pid=dead.pid)
    with caplog.at_level(logging.WARNING), claims.take(folder, 0):
        assert f'"pid": {dead.pid}' in caplog.text
        assert "gone" in caplog.text
    assert claims.found(folder) == []


def test_the_claim_of_a_living_process_holds_and_that_of_an_earlier_one_with_its_number_does_not(folder):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        claim_of(folder, pid=other.pid, started=claims._started(other.pid))
        assert claims.take(folder, 0) is None
        claim_of(folder, pid=other.pid, started=claims._started(other.pid) - 1)
        with claims.take(folder, 0) as claim:
            assert claim is not None
        other.communicate(b"\n")


@pytest.mark.parametrize("content", [b"", b"{", b'{"host": "elsewhere", "pid": 1}', b"x" * 10_000])
def test_a_claim_that_cannot_be_judged_holds_until_its_lease_is_over(folder, content, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    file = claims.claim_file(folder, 0)
    file.write_bytes(content)
    assert claims.take(folder, 0) is None
    now[0] += claims.LEASE_S - 1
    os.utime(file, (5, 5))  # its holder moved: the lease begins anew
    assert claims.take(folder, 0) is None
    now[0] += claims.LEASE_S - 1
    assert claims.take(folder, 0) is None
    now[0] += 1
    with claims.take(folder, 0) as claim:
        assert claim is not None


@pytest.mark.parametrize("year", [0, 4_000_000_000])
def test_48_no_clock_of_another_machine_decides_when_a_lease_is_over(folder, year):
    file = claim_of(folder, host="elsewhere")
    os.utime(file, (year, year))
    assert claims.take(folder, 0, lease_s=30) is None
    assert claims.take(folder, 0, lease_s=30) is None


def test_07_the_claim_of_a_dead_host_is_taken_over_when_its_lease_is_over_and_that_is_logged(
    folder, monkeypatch, caplog
):
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    claim_of(folder, host="node-7", pid=12)
    assert claims.take(folder, 0) is None
    now[0] += claims.LEASE_S
    with caplog.at_level(logging.WARNING), claims.take(folder, 0) as claim:
        assert claims.holder_of(claim.file)["host"] == files.HOST
    assert "shard 0" in caplog.text
    assert '"host": "node-7"' in caplog.text


def test_a_claim_that_was_taken_over_is_left_to_its_new_holder(folder):
    with claims.take(folder, 0) as claim:
        claim_of(folder, host="elsewhere")
    assert claims.holder_of(claim.file)["host"] == "elsewhere"


def test_progress_keeps_a_claim_fresh(folder, monkeypatch):
    with claims.take(folder, 0) as claim:
        os.utime(claim.file, (1, 1))
        claim.touch()
        assert claim.file.stat().st_mtime == 1  # not at every batch
        monkeypatch.setattr(claims, "TOUCH_S", -1)
        claim.touch()
        assert claim.file.stat().st_mtime > 1


def test_opening_for_writing_sweeps_claims_of_the_dead_and_no_others(tmp_path, folder):
    mine, elsewhere = claim_of(folder, 1), claim_of(folder, 2, host="elsewhere")
    with claims.take(folder, 3) as held:
        create(tmp_path / "cache.zarr")
        assert [file.exists() for file in (mine, elsewhere, held.file)] == [False, True, True]


def test_claims_are_never_trusted_two_holders_of_one_task_write_one_store(tmp_path, monkeypatch):
    extract(tmp_path / "a")
    monkeypatch.setattr(claims, "take", lambda folder, shard: claims.Claim(claims.claim_file(folder, shard), b""))
    inner = []

    def a_second_extraction_of_everything(_):
        if not inner:
            inner.append(1)
            inner.append(extract(tmp_path / "b"))

    extract(tmp_path / "b", on_batch=a_second_extraction_of_everything)
    assert len(inner) == 2
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("kind", ["s3", "az"])
def test_claims_in_an_object_store_are_held_kept_fresh_taken_over_and_swept(kind, request, monkeypatch):
    url = request.getfixturevalue(kind)
    now = [1e9]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(claims, "TOUCH_S", -1)
    folder = create(locate(url)).layout.info.folder
    claim = claims.take(folder, 3)
    assert claims.take(folder, 3) is None
    monkeypatch.setattr(files, "HOST", "elsewhere")  # seen from another machine: it cannot know the process
    assert claims.take(folder, 3) is None
    now[0] += claims.LEASE_S - 1
    claim.touch()
    assert claims.take(folder, 3) is None
    now[0] += claims.LEASE_S - 1
    assert claims.take(folder, 3) is None
    now[0] += 1
    other = claims.take(folder, 3)
    claim.give_up()
    assert claims.holder_of(claim.file)["host"] == "elsewhere"
    claim.touch()
    other.give_up()
    assert claims.found(folder) == []
    claims.claim_file(folder, 4).write(files.canonical_json({"host": "elsewhere", "pid": os.getpid(), "started": 0}))
    assert [(o.path.name, o.dead) for o in orphans.find(locate(url))] == [(".shard-4.claim", True)]
    create(locate(url))
    assert claims.found(folder) == []


def test_claims_show_among_the_orphans_with_their_host(tmp_path, folder):
    store = tmp_path / "cache.zarr"
    claim_of(folder, 1)
    claim_of(folder, 2, host="node-7")
    assert [(o.path.name, o.kind, o.dead) for o in orphans.find(store)] == [
        (".shard-1.claim", "claim", True),
        (".shard-2.claim", "claim", False),
    ]
    assert [o.dead for o in orphans.find(store, dead_hosts={"node-7"})] == [True, True]
