"""Fixtures of the cache tests."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cache_schema import index, metadata
from tests.object_servers import Azurite, Moto, use, use_azure

# Time limits per example say more about the other work on the machine than about the code.
settings.register_profile("cache", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cache")


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """A flush takes milliseconds and shows nothing unless the power fails; one test checks the order of the calls."""
    real = os.fsync
    os.fsync = lambda _: None
    yield
    os.fsync = real


@pytest.fixture
def ram():
    """A folder in memory where the system has one: for tests that write many small stores."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def zarr_once():
    """What zarr makes of the same metadata is asked once: it takes most of the time of writing a small store."""
    known = {}

    def once(function):
        def call(*args, **kwargs):
            key = repr((function.__name__, args, kwargs))
            if key not in known:
                known[key] = function(*args, **kwargs)
            return known[key]

        return call

    real = metadata._made_by_zarr, index._group_files
    metadata._made_by_zarr, index._group_files = map(once, real)
    yield
    metadata._made_by_zarr, index._group_files = real


@pytest.fixture(scope="session")
def moto():
    """An object store in memory, one for all tests of a process."""
    with Moto() as server:
        yield server


@pytest.fixture
def s3(moto, monkeypatch):
    """URL of an empty prefix; the environment points at the server, and retries are quick."""
    use(monkeypatch, moto.port)
    moto.make_bucket("features")
    return f"s3://features/{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def azurite(tmp_path_factory):
    """Azure's own emulator, one for all tests of a process; skips where the npm package is absent."""
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def az(azurite, monkeypatch):
    """URL of an empty prefix in a container of Azurite."""
    use_azure(monkeypatch, azurite.port)
    azurite.make_container("features")
    return f"az://features/{secrets.token_hex(6)}"


@pytest.fixture(params=["s3", "az"])
def bucket(request):
    """URL of an empty prefix in either kind of store."""
    return request.getfixturevalue(request.param)
