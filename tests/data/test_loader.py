"""The ring of reader threads gives the batches of the simple way, and ends cleanly whatever happens."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cache_schema import CacheMissing, FeatureStore, calibrate
from cache_schema.errors import CacheCorrupt
from stages.data.loader import Frames, Ring
from stages.data.samples import Batch, CachedSamples, Request, SampleDataset
from stages.types import Sample
from tests.cache_schema import makers
from tests.cache_schema import test_quantize as quantize

MODALITIES = ("tokens", "pooled/layer8", "tokens_large")


def sample(name: str, video: str, *draws: list[int]) -> Sample:
    return Sample(name, video, np.array(draws), f"what is in {video} ?", "friend", "test")


SAMPLES = [
    sample("s0", "ant", [0, 3, 9], [3, 6, 9]),
    sample("s1", "elk", [1, 1, 6], [0, 2, 4]),
    sample("s2", "cat", [1, 8, 19], [19, 3, 3]),  # over a run of three shards
    sample("s3", "elk", [2, 4, 6]),
    sample("s4", "ant", [0, 3, 6]),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    return makers.extract(tmp_path_factory.mktemp("loader") / "store", MODALITIES)


def data(stores: dict[str, FeatureStore], tokens: str = "tokens", readers: int = 2) -> CachedSamples:
    return CachedSamples(SAMPLES, stores[tokens], stores["pooled/layer8"], readers=readers)


def readers_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader-")]


requests = st.lists(
    st.lists(st.tuples(st.integers(0, len(SAMPLES) - 1), st.integers(0, 9)), min_size=1, max_size=6), max_size=8
)


@pytest.mark.parametrize("tokens", ["tokens", "tokens_large"])
@given(asked=requests, readers=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_ring_gives_bit_for_bit_the_batches_of_the_simple_way(
    stores: dict[str, FeatureStore], tokens: str, asked: list[list[tuple[int, int]]], readers: int
) -> None:
    source = data(stores, tokens, readers)
    order = [Request([p for p, _ in batch], [d for _, d in batch]) for batch in asked]
    count = 0
    for request, batch in zip(order, source.batches(order), strict=True):
        simple = source.batch(request.positions, request.draws)
        assert (batch.samples, batch.windows, batch.lengths) == (simple.samples, simple.windows, simple.lengths)
        assert torch.equal(batch.f, simple.f)
        assert batch.y_star is not None
        assert simple.y_star is not None
        assert torch.equal(batch.y_star, simple.y_star)
        count += 1
    assert count == len(order)
    assert readers_alive() == []


def test_a_reader_that_starts_in_the_middle_gives_the_rest_of_the_order(stores: dict[str, FeatureStore]) -> None:
    order = [Request([i % 5, (i * 3 + 1) % 5], [i, i]) for i in range(9)]
    whole = [batch.f.clone() for batch in data(stores).batches(order)]
    rest = [batch.f.clone() for batch in data(stores).batches(order[4:])]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_the_frames_of_a_video_are_read_once_for_all_samples_of_a_batch() -> None:
    frames = Frames.of([("a", np.array([0, 2, 4])), ("b", np.array([7, 7, 1])), ("a", np.array([2, 4, 6]))])
    assert [(video, index.tolist()) for video, index in frames.videos] == [("a", [0, 2, 4, 6]), ("b", [1, 7])]
    assert frames.rows.tolist() == [[0, 1, 2], [5, 5, 4], [1, 2, 3]]
    assert (frames.count, frames.in_order) == (6, False)
    assert Frames.of([("a", np.array([0, 2])), ("b", np.array([1, 3]))]).in_order


def test_a_window_with_fewer_frames_ends_in_zeros(stores: dict[str, FeatureStore]) -> None:
    frames = Frames.of([("a", np.array([3])), ("b", np.array([7, 9]))])
    assert frames.rows.tolist() == [[0, -1], [1, 2]]
    assert not frames.in_order
    short = replace(SAMPLES[1], sample_id="short", draws=SAMPLES[1].draws[:, :2])
    source = CachedSamples([*SAMPLES, short], stores["tokens"], stores["pooled/layer8"])
    order = [Request([1, 0, 4], [0, 0, 0]), Request([5, 0, 5], [0, 0, 0])]  # the first leaves numbers in the buffers
    _, ahead = (Batch(b.samples, b.f.clone(), b.y_star.clone(), b.windows, b.lengths) for b in source.batches(order))
    simple = source.batch([5, 0, 5])
    assert (ahead.windows, ahead.lengths) == (simple.windows, simple.lengths) == ((0, 1, 0), (2, 3))
    assert torch.equal(ahead.f, simple.f)
    assert torch.equal(ahead.y_star, simple.y_star)
    assert not ahead.f[0, 2].any()


def test_one_read_serves_overlapping_windows(stores: dict[str, FeatureStore], monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = FeatureStore.read_stored, []

    def counted(self: FeatureStore, video: str, index: np.ndarray, **options: object) -> np.ndarray:
        asked.append((self.modality, video, len(index)))
        return read(self, video, index, **options)

    monkeypatch.setattr(FeatureStore, "read_stored", counted)
    [batch] = list(CachedSamples(SAMPLES, stores["tokens"]).batches([Request([1, 3, 0, 4], [0, 0, 0, 0])]))
    assert sorted(asked) == [("tokens", "ant", 4), ("tokens", "elk", 4)]
    assert batch.f.shape == (4, 3, 5, 7)


def test_buffers_are_reused_and_a_batch_without_repeats_is_a_view_of_one(stores: dict[str, FeatureStore]) -> None:
    order = [Request([i % 2 * 2], [0]) for i in range(20)]  # ant, cat, ant, …
    addresses = [batch.f.data_ptr() for batch in data(stores, "tokens_large").batches(order)]
    assert len(set(addresses)) == 4  # two readers and two more


def test_frames_of_a_view_start_on_pages_of_the_buffer(stores: dict[str, FeatureStore]) -> None:
    batch = next(data(stores, "tokens_large").batches([Request([0, 2], [0, 0])]))
    assert all(frame.data_ptr() % 4096 == 0 and frame.is_contiguous() for frame in batch.f.flatten(0, 1))


# --- errors and the end


def test_an_error_of_a_reader_comes_at_its_batch_and_names_video_and_frames(stores: dict[str, FeatureStore]) -> None:
    source = CachedSamples([*SAMPLES, sample("bad", "elk", [0, 1, 99])], stores["tokens"])
    batches = source.batches([Request([0], [0]), Request([1], [0]), Request([5], [0]), Request([2], [0])])
    assert [next(batches).samples[0].sample_id for _ in range(2)] == ["s0", "s1"]
    with pytest.raises(CacheMissing, match=r"'elk'.*not planned: frame 99"):
        next(batches)
    assert readers_alive() == []


def test_a_shard_that_is_damaged_under_the_readers_is_named(tmp_path: Path) -> None:
    store = makers.extract(tmp_path / "store")["tokens"]
    batches = CachedSamples(SAMPLES, store, readers=1).batches([Request([i % 5], [0]) for i in range(50)])
    next(batches)
    file = store.layout.info.shard_file(0)
    makers.flip_bit(file, -40)  # the trailer
    with pytest.raises(CacheCorrupt, match=r"tokens/c\.0\.0\.0"):
        list(batches)
    assert readers_alive() == []


@pytest.mark.parametrize("how", ["close", "collect", "raise"])
def test_threads_end_when_the_consumer_stops_early(stores: dict[str, FeatureStore], how: str) -> None:
    batches = data(stores).batches(Request([i % 5], [0]) for i in range(1000))
    next(batches)
    assert len(readers_alive()) == 2
    if how == "close":
        batches.close()
    elif how == "collect":
        del batches
        gc.collect()
    else:
        with pytest.raises(KeyError, match="from the consumer"):
            batches.throw(KeyError("from the consumer"))
    assert readers_alive() == []


def test_a_ring_can_be_closed_twice_and_says_so_when_it_is_read_afterwards(stores: dict[str, FeatureStore]) -> None:
    ring = Ring([stores["tokens"]], [Frames.of([("elk", np.arange(4))])] * 9)
    next(ring)
    ring.close()
    ring.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(ring)


# --- for those who want a DataLoader


def test_the_dataset_gives_what_the_simple_way_gives(stores: dict[str, FeatureStore]) -> None:
    dataset = SampleDataset(data(stores))
    got = list(DataLoader(dataset, batch_size=None))
    assert [item["position"] for item in got] == list(range(5))
    for position, item in enumerate(got):
        simple = data(stores).batch([position])
        assert torch.equal(item["f"], simple.f[0])
        assert torch.equal(item["y_star"], simple.y_star[0])  # type: ignore[index]
    with pytest.raises(IndexError):
        dataset[5]


def test_forked_workers_are_refused_with_the_way_out(stores: dict[str, FeatureStore]) -> None:
    """Fault case 47: zarr and a forked DataLoader worker may deadlock."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    loader = DataLoader(SampleDataset(data(stores)), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="multiprocessing_context='spawn'"):
        next(iter(loader))


def _read_in_child(dataset: SampleDataset, results: multiprocessing.Queue) -> None:
    results.put(dataset[2]["f"].numpy())


def test_a_spawned_worker_may_read(stores: dict[str, FeatureStore]) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(SampleDataset(data(stores)), results))
    child.start()
    np.testing.assert_array_equal(results.get(timeout=500), makers.features("tokens", "cat", [1, 8, 19]))
    child.join()
    assert len(pickle.loads(pickle.dumps(SampleDataset(data(stores))))) == 5


def test_reading_ahead_runs_beside_the_consumer(stores: dict[str, FeatureStore]) -> None:
    """While the consumer holds a batch, the next ones are already being read: all ring places but its own fill."""
    batches = data(stores).batches([Request([0], [0]) for _ in range(8)])
    next(batches)
    ring = batches.gi_frame.f_locals["ring"]
    deadline = time.monotonic() + 30
    while any(slot.pending for slot in ring._filling):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(ring._filling) == 3
    batches.close()


def test_int8_is_read_as_it_is_stored_and_decoded_to_the_same_bits(tmp_path: Path) -> None:
    scale = calibrate(quantize.tokens(200))
    store = quantize.make(tmp_path, scale)
    samples = [sample("s0", "a", [0, 2, 4]), sample("s1", "b", [5, 5, 1]), sample("s2", "a", [1, 2, 3])]
    source = CachedSamples(samples, store)
    order = [Request([0], [0]), Request([0, 1, 2], [0, 0, 0])]
    for request, batch in zip(order, source.batches(order), strict=True):
        assert batch.f.dtype == torch.float16
        assert torch.equal(batch.f, source.batch(request.positions).f)
