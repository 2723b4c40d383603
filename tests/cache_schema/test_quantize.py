"""int8 with two-level scales: how exact it is, what lies on disk, and who can read it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.registry import register_codec

from cache_schema import (
    CacheCorrupt,
    CacheMismatch,
    FeatureStore,
    SegmentResult,
    TooInexact,
    calibrate,
    quantize,
    verify,
)
from cache_schema.codec import Int8Codec
from cache_schema.quantize import CODEC_NAME, ChannelScale, measure, row_bytes, split
from tests.cache_schema.makers import TOKENS, flip_bit, tree, write_single

SHAPE = (6, 64)
SPEC = replace(TOKENS, dtype="int8", frame_shape=SHAPE)


def tokens(frames: int, seed: int = 0, outliers: int = 2) -> np.ndarray:
    """Features as ViTs have them: log-normal channel gains, and a few channels 20 times as large with an offset."""
    rng = np.random.default_rng(7)
    gains, offset = np.exp(rng.normal(0, 1, SHAPE[1])), np.zeros(SHAPE[1])
    gains[:outliers] *= 20
    offset[:outliers] = 40
    noise = np.random.default_rng([seed, 1]).normal(size=(frames, *SHAPE))
    return (noise * gains + offset).astype(np.float16)


@pytest.fixture(scope="module")
def scale() -> ChannelScale:
    return calibrate(tokens(200))


def make(path: Path, scale: ChannelScale) -> FeatureStore:
    store = FeatureStore.create(path, "tokens", SPEC, shard_frames=8, channel_scale=scale)
    store.extend_plan({"a": range(5), "b": range(6)})
    for task in store.pending():
        write_single(store, task, lambda s: SegmentResult(iter([tokens(len(s), seed=ord(s.video_id))])))
    return store


def slowly(scale: ChannelScale, features: np.ndarray) -> np.ndarray:
    """The definition, number by number."""
    out = np.empty_like(features)
    for n, p in np.ndindex(*features.shape[:2]):
        x = features[n, p].astype(np.float32) / scale.values
        s = np.float16(np.abs(x).max() / np.float32(127))
        for c in range(features.shape[2]):
            q = np.int8(min(127, max(-127, round(float(x[c] / np.float32(s)))))) if s else np.int8(0)
            out[n, p, c] = np.float16(np.float32(q) * np.float32(s) * scale.values[c])
    return out


def test_the_quick_way_equals_the_definition_number_by_number(scale):
    features = tokens(3, seed=5)
    features[1, 2] = 0
    got = np.empty_like(features)
    scale.dequantize(scale.quantize(features), got)
    np.testing.assert_array_equal(got, slowly(scale, features))
    assert not got[1, 2].any()


def test_with_outlier_channels_the_error_is_about_one_percent_where_one_scale_a_token_loses_more(scale):
    features = tokens(40, seed=9)
    error, cosine = measure(scale, features)
    one_level = ChannelScale(np.ones(SHAPE[1], np.float32))
    stored = np.empty_like(features)
    one_level.dequantize(one_level.quantize(features), stored)
    difference = (stored.astype(np.float64) - features) / scale.values
    naive = np.linalg.norm(difference) / np.linalg.norm(features / scale.values.astype(np.float64))
    assert error < 0.012
    assert cosine > 0.9995
    assert naive > 5 * error


def test_a_calibration_says_what_it_measured_on_frames_it_did_not_use(scale):
    frames = tokens(200)
    held_out = np.arange(200) % 5 == 4
    assert scale.frames == 160
    assert (scale.error, scale.min_cosine) == measure(ChannelScale(scale.values), frames[held_out])
    np.testing.assert_allclose(scale.values, frames[~held_out].astype(np.float64).std(axis=(0, 1)), rtol=1e-5)
    changed = frames.copy()
    changed[held_out] *= np.float16(0.5)
    np.testing.assert_array_equal(calibrate(changed).values, scale.values)


def test_features_that_int8_would_spoil_are_refused_with_the_way_out():
    frames = tokens(50)
    frames[4::5, :, 3] = 30 * frames[:, :, 3].astype(np.float64).std()  # one channel in frames that are held out
    with pytest.raises(TooInexact, match=r"(?s)limit 1.5 %.*--set clip.dtype=float16"):
        calibrate(frames)


@pytest.mark.parametrize("frames", [np.zeros((15, 6, 64), np.float16), np.full((20, 6, 64), np.nan, np.float16)])
def test_a_calibration_of_too_few_or_not_finite_frames_is_refused(frames):
    with pytest.raises(ValueError, match=r"(?s)16 or more frames of finite.*--set clip.dtype=float16"):
        calibrate(frames)


def test_a_store_gives_back_what_the_quantiser_gives(tmp_path, scale):
    store = make(tmp_path, scale)
    expected = np.empty((6, *SHAPE), np.float16)
    scale.dequantize(scale.quantize(tokens(6, seed=ord("b"))), expected)
    got = FeatureStore.open(tmp_path, "tokens", SPEC).read("b", [5, 0, 3], verify=True)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, expected[[5, 0, 3]])
    np.testing.assert_array_equal(store.read("b", [2]), expected[[2]])
    assert verify.full(store) == []


def test_scales_and_numbers_can_be_had_as_they_are_stored(tmp_path, scale):
    store = make(tmp_path, scale)
    rows = store.read_stored("b", [1, 4], out=store.buffer(2))
    token_scale, q = split(rows, SHAPE)
    assert (token_scale.shape, token_scale.dtype, q.shape, q.dtype) == ((2, 6), np.float16, (2, *SHAPE), np.int8)
    by_hand = q * token_scale.astype(np.float32)[..., None] * scale.values
    np.testing.assert_array_equal(by_hand.astype(np.float16), store.read("b", [1, 4]))


def test_a_frame_of_eva_g_takes_503_thousandths_of_float16():
    assert -(-row_bytes((257, 1408)) // 4096) * 4096 / (-(-257 * 1408 * 2 // 4096) * 4096) == pytest.approx(
        0.503, abs=5e-4
    )


def test_zarr_with_the_registered_codec_reads_float16(tmp_path, scale):
    store = make(tmp_path, scale)
    register_codec(CODEC_NAME, Int8Codec)
    array = zarr.open_group(tmp_path, mode="r")["tokens"]
    assert array.dtype == np.float16
    for video, count in (("a", 5), ("b", 6)):
        rows = store.plan.rows(video, range(count))
        np.testing.assert_array_equal(array[rows[0] : rows[-1] + 1], store.read(video, range(count)))
    assert np.isnan(array[7:8]).all()  # not planned
    codec = Int8Codec.from_dict(Int8Codec(scale.to_json()).to_dict())
    assert codec == Int8Codec(scale.to_json())


def test_zarr_writes_with_the_codec_what_it_reads(scale):
    register_codec(CODEC_NAME, Int8Codec)
    features = tokens(4, seed=3)
    array = zarr.create_array(
        zarr.storage.MemoryStore(), shape=features.shape, chunks=(1, *SHAPE), shards=(4, *SHAPE), dtype="float16",
        serializer=Int8Codec(scale.to_json()), compressors=None, filters=None,
    )  # fmt: skip
    array[:] = features
    expected = np.empty_like(features)
    scale.dequantize(scale.quantize(features), expected)
    np.testing.assert_array_equal(array[:], expected)


def test_the_package_registers_the_codec():
    project = tomllib.loads((Path(quantize.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["zarr.codecs"] == {CODEC_NAME: f"{Int8Codec.__module__}:{Int8Codec.__name__}"}


def test_an_int8_store_keeps_its_scales_and_cannot_be_made_without(tmp_path, scale):
    with pytest.raises(ValueError, match="calibrate first"):
        FeatureStore.create(tmp_path / "none", "tokens", SPEC)
    make(tmp_path / "a", scale)
    again = FeatureStore.create(tmp_path / "a", "tokens", SPEC, channel_scale=ChannelScale(scale.values * 2))
    np.testing.assert_array_equal(again.layout.info.channel_scale.values, scale.values)
    kept = again.layout.info.channel_scale
    assert (kept.frames, kept.error, kept.min_cosine) == (scale.frames, scale.error, scale.min_cosine)
    with pytest.raises(CacheMismatch, match="dtype"):
        FeatureStore.open(tmp_path / "a", "tokens", replace(SPEC, dtype="float16"))


def test_changed_scales_are_noticed_in_the_metadata_and_in_a_shard_of_another_array(tmp_path, scale):
    store = make(tmp_path / "a", scale)
    make(tmp_path / "b", ChannelScale(scale.values * 2))
    file = tmp_path / "a/tokens/zarr.json"
    text = file.read_text()
    file.write_text(text.replace(scale.to_json()[:8], ChannelScale(scale.values * 2).to_json()[:8]))
    with pytest.raises(CacheCorrupt, match="channel_scale"):
        FeatureStore.open(tmp_path / "a", "tokens")
    file.write_text(text)
    store.layout.info.shard_file(0).write_bytes((tmp_path / "b/tokens/c.0.0.0").read_bytes())
    with pytest.raises(CacheCorrupt, match="channel_scale_digest"):
        FeatureStore.open(tmp_path / "a", "tokens").read("a", [0])


def test_a_flipped_bit_of_an_int8_frame_is_found(tmp_path, scale):
    store = make(tmp_path, scale)
    flip_bit(store.layout.info.shard_file(0), 2 * store.layout.stride + 100)
    assert [(p.kind, p.video_id, p.frame_index) for p in verify.full(store)] == [("frame", "a", 2)]


def test_a_retry_copies_int8_frames_as_they_are(tmp_path, scale):
    def run(path, bad):
        store = FeatureStore.create(path, "tokens", SPEC, shard_frames=16, channel_scale=scale)
        store.extend_plan({"a": range(5), "b": range(6)})

        def produce(segment):
            features = tokens(len(segment), seed=ord(segment.video_id))
            if segment.video_id in bad:
                features[1, 2, 3] = np.inf
            return SegmentResult(iter([features]))

        for task in store.pending(retry_failed=True):
            write_single(store, task, produce)

    run(tmp_path / "a", bad={"b"})
    run(tmp_path / "a", bad=())
    run(tmp_path / "b", bad=())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
