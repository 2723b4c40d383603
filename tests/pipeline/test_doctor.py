"""The doctor's verdicts on real stores, good and bad; and nothing that is said or written holds a credential."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_plus

import obstore
import pytest

from cache_schema.connections import forget_connections
from cache_schema.objects import ObjectPath, locate
from pipeline import doctor
from pipeline.printing import parse_size, size
from tests.conftest import PROJECT
from tests.object_servers import (
    ACCOUNT,
    ACCOUNT_KEY,
    KEY,
    SECRET,
    Azurite,
    FaultProxy,
    Moto,
    azure_sas,
    use,
    use_azure,
)
from tests.pipeline.test_cli import run


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as server:
        yield server


@pytest.fixture
def s3(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, moto.port)
    moto.make_bucket("features")
    return "s3://features/doctor"


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def az(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    use_azure(monkeypatch, azurite.port)
    azurite.make_container("features")
    return "az://features/doctor"


def no_conditions(_method: str, _path: str, _headers: dict[str, str]) -> dict[str, None]:
    """A store that does not know conditions, as clones of S3 are."""
    return {"if-none-match": None, "if-match": None}


def no_suffixes(_method: str, _path: str, headers: dict[str, str]) -> dict[str, str] | None:
    """A store that takes the last n bytes for the first n."""
    asked = headers.get("range", "")
    return {"range": f"bytes=0-{asked.removeprefix('bytes=-')}"} if asked.startswith("bytes=-") else None


def no_metadata(_method: str, _path: str, headers: dict[str, str]) -> dict[str, None]:
    """A store that forgets what is said of an object."""
    return {name: None for name in headers if name.startswith(("x-amz-meta-", "x-ms-meta-"))}


def no_deletes(method: str, path: str, _headers: dict[str, str]) -> int | None:
    """A store that removes nothing."""
    return 501 if method == "DELETE" or path.endswith("?delete") else None


def test_this_machine_is_well_and_every_line_says_what_was_found() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert list(checks) == ["python", "torch", "decoder", "cache format", "disk", "signals"]
    import torch

    assert torch.__version__ in checks["torch"]["detail"]
    assert re.search(r"free, /.+ \(.+ at /.*\)", checks["disk"]["detail"])
    assert checks["signals"]["detail"].startswith("SIGTERM, SIGUSR1, SIGUSR2, SIGHUP: finish the step or shard")


def test_signals_that_nohup_ignores_are_named() -> None:
    command = [sys.executable, "-m", "pipeline.cli", "doctor", "--json"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    ignoring = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    done = subprocess.run(command, env=environment, preexec_fn=ignoring, capture_output=True, text=True)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "ignored here, as nohup asks: SIGHUP" in checks["signals"]["detail"]


def test_a_package_that_is_not_there_exits_with_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    result = run("doctor")
    assert result.exit_code == 5
    assert "error: this machine lacks something:\n  decoder: import of av halted" in result.stderr


@pytest.mark.parametrize("kind", ["s3", "az"])
def test_a_store_that_can_hold_a_cache_is_left_as_it_was(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(kind)
    result = run("doctor", "--store", url, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"] is True
    assert sum(check["name"].startswith("store: ") for check in json.loads(result.stdout)["checks"]) == 9
    place = locate(url)
    assert isinstance(place, ObjectPath)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "fault", "lacking"),
    [
        # A read compares the entity tag itself, so that one needs nothing of the store.
        ("s3", no_conditions, {"create only", "exchange of one version", "large shards"}),
        ("s3", no_suffixes, {"suffix ranges"}),
        ("s3", no_metadata, {"write id"}),
        ("s3", no_deletes, {"deleting"}),
        ("az", no_conditions, {"create only", "exchange of one version", "large shards"}),
        ("az", no_metadata, {"write id"}),
    ],
)
def test_a_store_that_lacks_something_is_refused_with_5(
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., Any],
    lacking: set[str],
) -> None:
    url = request.getfixturevalue(kind)
    with FaultProxy(request.getfixturevalue({"s3": "moto", "az": "azurite"}[kind]).port, fault) as proxy:
        if kind == "s3":
            use(monkeypatch, proxy.port)
        else:
            use_azure(monkeypatch, proxy.port, sas=azure_sas())  # whose headers can be taken away: they are not signed
        result = run("doctor", "--store", url, "--json")
    assert result.exit_code == 5
    checks = json.loads(result.stdout)["checks"]
    found = {check["name"].removeprefix("store: ") for check in checks if not check["ok"]}
    if kind == "az":
        found.discard("deleting")  # Azurite 3.35 answers 500 to a delete that is signed in this way
    assert found == lacking
    assert f"error: {url} cannot hold a cache:" in result.stderr
    for name in lacking:
        assert f"  store: {name}: " in result.stderr


def test_a_store_that_is_away_is_an_error_with_5(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 1, max_retries=0)
    result = run("doctor", "--store", s3, "--json")
    assert result.exit_code == 5
    assert "no connection" in json.loads(result.stdout.splitlines()[-1])["error"]


def probed(folder: Path) -> dict[str, Any]:
    return {c["name"].removeprefix("store: "): c for c in doctor.examine(str(folder))["checks"]}


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    result = run("doctor", "--store", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    checks = probed(tmp_path)
    for name in ("rename", "fsync", "hard links", "locks"):
        assert checks[name] == {"name": f"store: {name}", "ok": True, "detail": "as it must be"}
    assert {"file system", "O_DIRECT", "space"} <= checks.keys()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_links_says_what_that_costs_and_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what FAT and some network disks answer

    monkeypatch.setattr(os, "link", link)
    checks = probed(tmp_path)
    assert "two that extract may do one twice" in checks["hard links"]["detail"]
    assert all(check["ok"] for check in checks.values())


def test_a_disk_whose_locks_do_nothing_says_what_that_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.folder_probe.fcntl.flock", lambda *_: None)  # as an NFS mount with local_lock=none
    assert "two processes hold one lock" in probed(tmp_path)["locks"]["detail"]


def test_a_network_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"proc /proc proc rw 0 0\n/dev/a / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw,vers=4.2 0 0\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **k: mounts if str(p) == "/proc/self/mounts" else read(p, **k))
    assert probed(tmp_path)["file system"]["detail"] == (
        f"nfs4 at {tmp_path}; a network disk: copies of features on a local disk train faster"
    )


def test_a_read_only_folder_exits_with_5_and_a_full_one_with_75(small_disk: Callable[..., Path]) -> None:
    folder = small_disk("64k")
    with suppress(OSError):
        (folder / "full").write_bytes(bytes(1 << 20))
    full = run("doctor", "--store", str(folder))
    assert (full.exit_code, "no space left" in full.stderr) == (75, True), full.output
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    shut = run("doctor", "--store", str(folder))
    assert (shut.exit_code, str(folder) in shut.stderr) == (5, True), shut.output


def test_a_folder_that_is_not_there_and_a_wrong_url_are_usage(tmp_path: Path) -> None:
    assert run("doctor", "--store", str(tmp_path / "none")).exit_code == 2
    assert run("doctor", "--store", "ftp://x/y").exit_code == 2


@pytest.mark.parametrize(
    ("text", "count"), [("50GB", 50 * 10**9), ("1.5 TB", 15 * 10**11), ("800 kB", 800_000), ("7 bytes", 7)]
)
def test_sizes_are_read_as_they_are_shown(text: str, count: int) -> None:
    assert parse_size(text) == count
    assert parse_size(size(count)) == count


def test_sizes_are_read_as_people_type_them() -> None:
    sizes = {"4096": 4096, "7B": 7, "1.5 MB": 1_500_000, "2GiB": 2 << 30, "3k": 3000, "3 KB": 3000}
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "many", "-5GB", "0GB", "8XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


# ---------------------------------------------------------------- nothing holds a credential


def everything_written(folder: Path, store: ObjectPath) -> dict[str, bytes]:
    """Files below the folder by path, and objects of the bucket by key, names included."""
    written = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for entry in obstore.list(store._store()).collect():
        result = obstore.get(store._store(), entry["path"])
        written[entry["path"]] = bytes(result.bytes()) + repr(result.attributes).encode()
    return written


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["s3", "az"])
def test_the_whole_pipeline_runs_on_an_object_store_and_never_shows_a_credential(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue(kind)
    server = request.getfixturevalue({"s3": "moto", "az": "azurite"}[kind])
    point_at = {"s3": use, "az": use_azure}[kind]
    canaries = [SECRET, ACCOUNT_KEY, KEY if kind == "s3" else ACCOUNT]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ["--cache", f"{url}/mine", "--device", "cpu"]
    said: list[str] = []

    def pipeline(*words: str, code: int = 0) -> None:
        done = run(*words)
        said.append(done.output)
        assert done.exit_code == code, done.output

    pipeline("synth", "--out", "cache/miniature/world", "--videos", "6")
    pipeline("extract-clip", *cache)
    pipeline("extract-teacher", *cache)
    pipeline("train-student", *cache, "--out", "run", "--set", "train.epochs=1", "--set", "train.select=last")
    pipeline("evaluate", "--run", "run", *cache, "--json")
    pipeline("doctor", "--store", url)
    with FaultProxy(server.port, lambda *_: 403) as proxy:
        point_at(monkeypatch, proxy.port)
        pipeline("extract-clip", *cache, "--debug", code=5)
        pipeline("doctor", "--store", url, "--debug", "--json", code=5)
        if kind == "az":
            use_azure(monkeypatch, proxy.port, sas=azure_sas())
            canaries.append(parse_qs(azure_sas())["sig"][0])
            pipeline("extract-clip", *cache, "--debug", code=5)
            monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{proxy.port}/a?{azure_sas()}")
            forget_connections()
            pipeline("doctor", "--store", url, "--debug", "--json", code=5)
    point_at(monkeypatch, server.port)
    pipeline("extract-clip", "--cache", f"{kind}://{KEY}:{SECRET}@features/x", "--debug", code=2)
    pipeline("doctor", "--debug", "--store", f"{kind}://features/x?key={SECRET}", code=2)
    store = locate(url)
    assert isinstance(store, ObjectPath)
    written = everything_written(tmp_path, store)
    assert {"doctor/mine/zarr.json", str(tmp_path / "run/config.json")} <= written.keys()
    assert any(name.startswith("doctor/mine/tokens/c.") for name in written)
    for canary in [*canaries, *map(quote_plus, canaries)]:
        assert not [text for text in said if canary in text]
        assert not [name for name, data in written.items() if canary in name or canary.encode() in data]
