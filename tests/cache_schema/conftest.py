"""Fixtures of the cache tests."""

from __future__ import annotations

import os
import secrets

import pytest
from hypothesis import HealthCheck, settings

from tests.object_servers import Moto, use

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
