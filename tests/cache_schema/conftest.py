"""Fixtures of the cache tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

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
