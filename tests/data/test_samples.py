"""From the cache to batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache_schema.errors import CacheMissing
from stages.data.samples import CachedSamples, available
from stages.types import Sample
from tests.cache_schema import makers

MODALITIES = ("tokens", "pooled/layer8")


def sample(name: str, video: str, *draws: list[int]) -> Sample:
    return Sample(name, video, np.array(draws), f"what is in {video} ?", "friend", "test")


SAMPLES = [
    sample("s0", "ant", [0, 3, 9], [3, 6, 9]),
    sample("s1", "elk", [1, 1, 6], [0, 2, 4]),
    sample("s2", "bee", [1, 5, 9], [9, 9, 9]),
]


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, makers.FeatureStore]:
    """Both modalities of five videos."""
    return makers.extract(tmp_path / "store", MODALITIES)


def test_a_batch_holds_the_frames_of_the_chosen_draw(stores: dict[str, makers.FeatureStore]) -> None:
    data = CachedSamples(SAMPLES, *stores.values())
    batch = data.batch([1, 0], [1, 2])  # draw 2 of two is draw 0 again
    assert [s.sample_id for s in batch.samples] == ["s1", "s0"]
    assert batch.prompts == ["what is in elk ?", "what is in ant ?"]
    assert batch.f.shape == (2, 3, 5, 7)
    assert batch.f.dtype == torch.float16
    for row, (video, frames) in enumerate([("elk", [0, 2, 4]), ("ant", [0, 3, 9])]):
        np.testing.assert_array_equal(batch.f[row].numpy(), makers.features("tokens", video, frames))
        assert batch.y_star is not None
        np.testing.assert_array_equal(batch.y_star[row].numpy(), makers.features("pooled/layer8", video, frames))


def test_a_shorter_sample_is_padded_with_zeros(stores: dict[str, makers.FeatureStore]) -> None:
    short = sample("s3", "ant", [6])
    batch = CachedSamples([*SAMPLES, short], *stores.values()).batch([0, 3])
    assert batch.lengths == (3, 1)
    np.testing.assert_array_equal(batch.f[1, :1].numpy(), makers.features("tokens", "ant", [6]))
    assert torch.count_nonzero(batch.f[1, 1:]) == 0
    assert CachedSamples(SAMPLES, *stores.values()).batch([0, 1]).lengths is None


def test_evaluation_takes_the_first_draw_and_repeats_are_allowed(stores: dict[str, makers.FeatureStore]) -> None:
    batch = CachedSamples(SAMPLES, stores["tokens"]).batch([1])
    np.testing.assert_array_equal(batch.f[0].numpy(), makers.features("tokens", "elk", [1, 1, 6]))
    assert batch.y_star is None


def test_frames_that_several_samples_share_are_read_once(
    stores: dict[str, makers.FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = {"ant": ([0, 3, 9], [0, 3, 6]), "elk": ([0, 2, 4], [0, 2, 6])}
    shared = [sample(f"q{i}", video, frames[video][i // 4]) for i, video in enumerate(["elk", "ant"] * 3)]
    data = CachedSamples(shared, stores["tokens"])
    alone = torch.cat([data.batch([i]).f for i in range(6)])
    read, real = [], makers.FeatureStore.read

    def count(self: makers.FeatureStore, video: str, index: np.ndarray, **options: np.ndarray) -> np.ndarray:
        read.append((video, index.tolist()))
        return real(self, video, index, **options)

    monkeypatch.setattr(makers.FeatureStore, "read", count)
    batch = data.batch(range(6))
    assert batch.windows == (0, 1, 0, 1, 2, 3)
    assert torch.equal(batch.f[list(batch.windows)], alone)
    assert read == [("elk", [0, 2, 4]), ("ant", [0, 3, 9]), ("elk", [0, 2, 6]), ("ant", [0, 3, 6])]


def test_mean_and_covariance_of_the_targets_count_every_distinct_frame_once(
    stores: dict[str, makers.FeatureStore],
) -> None:
    mean, covariance = CachedSamples(SAMPLES[:2], *stores.values()).target_moments()
    rows = [
        makers.features("pooled/layer8", "ant", [0, 3, 6, 9]),
        makers.features("pooled/layer8", "elk", [0, 1, 2, 4, 6]),
    ]
    np.testing.assert_allclose(mean.numpy(), np.concatenate(rows).mean(0), rtol=1e-5, atol=1e-6)
    expected = np.cov(np.concatenate(rows).astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(covariance.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_samples_with_a_missing_frame_in_any_draw_are_dropped_and_named(
    stores: dict[str, makers.FeatureStore],
) -> None:
    late = [*SAMPLES, sample("s3", "elk", [0, 1, 2], [0, 1, 7]), sample("s4", "fox", [0, 1, 2], [0, 1, 2])]
    found = available(late, list(stores.values()))
    assert [s.sample_id for s in found.samples] == ["s0", "s1", "s2"]
    assert (found.dropped, set(found.missing)) == (2, {"elk", "fox"})
    with pytest.raises(CacheMissing, match="pipeline extract-clip"):
        found.require_all("pipeline extract-clip")
    available(SAMPLES, list(stores.values())).require_all("unused")  # complete: nothing is raised


def test_the_modality_that_lacks_frames_is_named(tmp_path: Path) -> None:
    stores = makers.extract(tmp_path / "store", ("tokens",))
    pooled = makers.create(tmp_path / "store", "pooled/layer8")
    found = available(SAMPLES, [stores["tokens"], pooled])
    assert not found.samples
    assert all(reason.startswith("pooled/layer8: ") for reason in found.missing.values())
