"""The doctor's verdicts on real stores, good and bad; and nothing that is said or written holds a credential."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest

from cache_schema.objects import ObjectPath, locate
from pipeline import doctor
from pipeline.printing import parse_size, size
from tests.object_servers import KEY, SECRET, FaultProxy, Moto, use
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


def no_conditions(_method: str, _path: str, _headers: dict[str, str]) -> dict[str, None]:
    """A store that does not know conditions, as clones of S3 are."""
    return {"if-none-match": None, "if-match": None}


def no_suffixes(_method: str, _path: str, headers: dict[str, str]) -> dict[str, str] | None:
    """A store that takes the last n bytes for the first n."""
    asked = headers.get("range", "")
    return {"range": f"bytes=0-{asked.removeprefix('bytes=-')}"} if asked.startswith("bytes=-") else None


def no_metadata(_method: str, _path: str, headers: dict[str, str]) -> dict[str, None]:
    """A store that forgets what is said of an object."""
    return {name: None for name in headers if name.startswith("x-amz-meta-")}


def test_this_machine_is_well_and_every_line_says_what_was_found() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert list(checks) == ["python", "torch", "decoder", "cache format", "disk"]
    import torch

    assert torch.__version__ in checks["torch"]["detail"]
    assert "free at" in checks["disk"]["detail"]


def test_a_package_that_is_not_there_exits_with_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    result = run("doctor")
    assert result.exit_code == 5
    assert "error: this machine lacks something:\n  decoder: import of av halted" in result.stderr


def test_a_store_that_can_hold_a_cache_is_left_as_it_was(s3: str) -> None:
    result = run("doctor", "--store", s3, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"] is True
    assert sum(check["name"].startswith("store: ") for check in json.loads(result.stdout)["checks"]) == 8
    place = locate(s3)
    assert isinstance(place, ObjectPath)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "lacking"),
    [
        # A read compares the entity tag itself, so that one needs nothing of the store.
        (no_conditions, {"create only", "exchange of one version", "large shards"}),
        (no_suffixes, {"suffix ranges"}),
        (no_metadata, {"write id"}),
    ],
)
def test_a_store_that_lacks_something_is_refused_with_5(
    s3: str, moto: Moto, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], lacking: set[str]
) -> None:
    with FaultProxy(moto.port, fault) as proxy:
        use(monkeypatch, proxy.port)
        result = run("doctor", "--store", s3, "--json")
    assert result.exit_code == 5
    checks = json.loads(result.stdout)["checks"]
    assert {check["name"].removeprefix("store: ") for check in checks if not check["ok"]} == lacking
    assert f"error: {s3} cannot hold a cache:" in result.stderr
    for name in lacking:
        assert f"  store: {name}: " in result.stderr


def test_a_store_that_is_away_is_an_error_with_5(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 1, max_retries=0)
    result = run("doctor", "--store", s3, "--json")
    assert result.exit_code == 5
    assert "no connection" in json.loads(result.stdout.splitlines()[-1])["error"]


def test_a_folder_needs_no_probe_and_a_wrong_url_is_usage(tmp_path: Path) -> None:
    assert doctor.examine(str(tmp_path))["checks"][-1]["name"] == "store"
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


def test_copies_of_a_folder_are_refused(tmp_path: Path) -> None:
    result = run("extract-clip", "--cache", str(tmp_path), "--cache-local", str(tmp_path / "copies"), "--dry-run")
    assert result.exit_code == 2
    assert "is a folder here" in result.stderr


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
def test_the_whole_pipeline_runs_on_an_object_store_and_never_shows_a_credential(
    moto: Moto, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ["--cache", f"{s3}/mine", "--cache-local", "copies", "--cache-local-budget", "10MB", "--device", "cpu"]
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
    pipeline("doctor", "--store", s3)
    with FaultProxy(moto.port, lambda *_: 403) as proxy:
        use(monkeypatch, proxy.port)
        pipeline("extract-clip", *cache, "--debug", code=5)
        pipeline("doctor", "--store", s3, "--debug", "--json", code=5)
    use(monkeypatch, moto.port)
    pipeline("extract-clip", "--cache", f"s3://{KEY}:{SECRET}@features/x", "--debug", code=2)
    pipeline("doctor", "--debug", "--store", f"s3://features/x?key={SECRET}", code=2)
    store = locate(s3)
    assert isinstance(store, ObjectPath)
    written = everything_written(tmp_path, store)
    assert {"doctor/mine/zarr.json", str(tmp_path / "run/config.json")} <= written.keys()
    assert any(name.startswith("doctor/mine/tokens/c/") for name in written)
    for canary in (SECRET, KEY):
        assert not [text for text in said if canary in text]
        assert not [name for name, data in written.items() if canary in name or canary.encode() in data]
