"""The ring over an object store: whole batches from range requests, and an error that names what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_schema import CacheCorrupt, FeatureStore, calibrate
from cache_schema.objects import locate
from stages.data.samples import CachedSamples, Request
from tests.cache_schema import makers
from tests.cache_schema import test_quantize as quantize
from tests.cache_schema.conftest import moto, s3
from tests.data.test_loader import SAMPLES, readers_alive, sample

__all__ = ["moto", "s3"]  # fixtures
ORDER = [Request([i % 5, (i * 3 + 1) % 5], [i, i + 1]) for i in range(7)]


def test_the_ring_gives_the_batches_that_a_local_store_gives(s3: str, tmp_path: Path) -> None:
    names = ["tokens", "pooled/layer8"]
    here = makers.extract(tmp_path / "store", names)
    makers.extract(locate(s3), names)
    there = {name: FeatureStore.open(locate(s3), name) for name in names}
    ahead = CachedSamples(SAMPLES, there["tokens"], there["pooled/layer8"]).batches(ORDER)
    simple = CachedSamples(SAMPLES, here["tokens"], here["pooled/layer8"])
    for request, batch in zip(ORDER, ahead, strict=True):
        expected = simple.batch(request.positions, request.draws)
        assert torch.equal(batch.f, expected.f)
        assert batch.y_star is not None
        assert torch.equal(batch.y_star, expected.y_star)
    assert readers_alive() == []


def test_int8_comes_as_it_lies_there(s3: str, tmp_path: Path) -> None:
    scale = calibrate(quantize.tokens(200))
    here, there = quantize.make(tmp_path, scale), quantize.make(locate(s3), scale)  # type: ignore[arg-type]
    samples = [sample("s0", "a", [0, 2, 4]), sample("s1", "b", [5, 5, 1])]
    order = [Request([0, 1], [0, 0]), Request([1], [0])]
    for request, batch in zip(order, CachedSamples(samples, there).batches(order), strict=True):
        assert torch.equal(batch.f, CachedSamples(samples, here).batch(request.positions).f)


def test_a_damaged_object_is_named_at_its_batch(s3: str) -> None:
    store = makers.extract(locate(s3))["tokens"]
    file = store.layout.info.shard_file(0)
    data = file.read_bytes(1 << 20)
    file.write(bytes([data[0] ^ 1]) + data[1:])
    batches = CachedSamples(SAMPLES, FeatureStore.open(locate(s3), "tokens")).batches([Request([0], [0])])
    with pytest.raises(CacheCorrupt, match="'ant'"):
        next(batches)
    assert readers_alive() == []
