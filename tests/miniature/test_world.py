"""The miniature world: everything follows from the seed, and the files are what the labels say."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stages.config import DataConfig
from stages.data.clips import ClipsDataset
from stages.data.lvu import LvuDataset
from stages.data.msvd import MsvdQaDataset
from stages.miniature import world as world_module
from stages.miniature.draw import COLORS, SHAPES, TEXTURES, TINTS
from stages.miniature.world import (
    FPS,
    MOTIONS,
    SIZE,
    VideoSpec,
    WorldSummary,
    encode,
    positions,
    questions,
    render,
    specs,
    write_world,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldSummary:
    return write_world(tmp_path_factory.mktemp("world"), videos=6, seed=5)


def pixels(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def all_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_two_runs_write_the_same_bytes(world: WorldSummary, tmp_path: Path) -> None:
    again = write_world(tmp_path, videos=6, seed=5)
    assert all_files(again.root) == all_files(world.root)


def test_a_video_file_shows_what_was_drawn_at_ten_frames_per_second(world: WorldSummary) -> None:
    spec = specs(6, 5)[1]
    path = world.videos_folder / f"{spec.video_id}.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(video=0)]
        assert (stream.codec_context.name, stream.average_rate, len(container.streams)) == ("h264", Fraction(FPS), 1)
    assert np.allclose(times, np.arange(spec.num_frames) / FPS)
    decoded = pixels(path)
    assert decoded.shape == (spec.num_frames, SIZE, SIZE, 3)
    for number in (0, 17, spec.num_frames - 1):
        drawn = render(spec, number / FPS)
        assert np.abs(decoded[number].astype(int) - drawn).mean() < 6  # compression and 4:2:0 colour, nothing else


def test_a_second_call_does_nothing_and_says_so(world: WorldSummary) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.root.rglob("*")}
    again = write_world(world.root, videos=6, seed=5)
    assert again.written == 0
    assert "already complete; nothing to do" in str(again)
    assert {path: path.stat().st_mtime_ns for path in world.root.rglob("*")} == before


def test_a_lost_or_cut_video_is_drawn_again(tmp_path: Path) -> None:
    first = write_world(tmp_path, videos=6, seed=1)
    whole = all_files(tmp_path)
    one, two = sorted(first.videos_folder.glob("*.mp4"))[:2]
    one.unlink()
    two.write_bytes(two.read_bytes()[:100])
    assert write_world(tmp_path, videos=6, seed=1).written == 2
    assert all_files(tmp_path) == whole


def test_an_interrupted_run_is_not_taken_for_complete(tmp_path: Path) -> None:
    write_world(tmp_path, videos=6, seed=1)
    whole = all_files(tmp_path)
    (tmp_path / "world.json").write_text('{"version": 1')
    assert write_world(tmp_path, videos=6, seed=1).written == 6
    assert all_files(tmp_path) == whole


def test_a_larger_world_keeps_every_video_of_the_smaller_one() -> None:
    assert specs(40, 3)[:7] == specs(7, 3)


def test_growing_draws_only_the_new_videos(tmp_path: Path) -> None:
    write_world(tmp_path, videos=6, seed=1)
    grown = write_world(tmp_path, videos=8, seed=1)
    assert (grown.videos, grown.written) == (8, 2)


def test_growing_that_stops_before_the_marker_does_not_pass_for_the_smaller_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path, videos=6, seed=1)
    publish = world_module._publish

    def stop_at_marker(path: Path, content: bytes) -> None:
        if path.name == "world.json":
            raise KeyboardInterrupt
        publish(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(world_module, "_publish", stop_at_marker)
        with pytest.raises(KeyboardInterrupt):
            write_world(tmp_path, videos=8, seed=1)
    write_world(tmp_path, videos=6, seed=1)
    annotated = [key for path in (tmp_path / "lvu").iterdir() for key in json.loads(path.read_text())]
    assert len(annotated) == 6


def test_another_seed_in_the_same_folder_is_refused(world: WorldSummary) -> None:
    with pytest.raises(ValueError, match="seed 5; this is version 1, seed 6"):
        write_world(world.root, videos=6, seed=6)


def test_a_world_too_small_for_three_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 6 videos"):
        write_world(tmp_path, videos=5, seed=0)


def test_ids_name_their_content_so_other_seeds_have_other_ids() -> None:
    assert not {spec.video_id for spec in specs(9, 0)} & {spec.video_id for spec in specs(9, 1)}


def test_the_lvu_annotations_give_labels_for_three_tasks(world: WorldSummary) -> None:
    by_id = {spec.video_id: spec for spec in specs(6, 5)}
    for task in ("relationship", "scene", "director"):
        dataset = LvuDataset(DataConfig(annotations=str(world.lvu_folder), task=task, num_frames=8))
        samples = [sample for split in dataset.splits for sample in dataset.samples(split)]
        assert len(samples) == 6
        for sample in samples:
            spec = by_id[sample.video_id]
            truth = {"relationship": spec.motion, "scene": spec.scene.texture, "director": spec.scene.tint}
            assert sample.answer == truth[task]
            assert sample.frame_index[-1] == spec.num_frames - 1


def test_the_qa_annotations_are_one_word_questions(world: WorldSummary) -> None:
    dataset = MsvdQaDataset(DataConfig(annotations=str(world.qa_folder), num_frames=4))
    counts = {split: len(dataset.samples(split)) for split in dataset.splits}
    assert counts == {"train": 24, "val": 6, "test": 6}
    assert sum(counts.values()) == world.questions
    assert all(" " not in answer for split in dataset.splits for answer in dataset.labels(split))
    assert {sample.group for sample in dataset.samples("train")} == {"who", "what", "how", "where"}


def test_both_layouts_are_read_by_the_generic_dataset_with_every_frame(world: WorldSummary) -> None:
    for folder, task in ((world.lvu_folder, "scene"), (world.qa_folder, "")):
        dataset = ClipsDataset(DataConfig(annotations=str(folder), task=task))
        assert dataset.warnings == ()
        assert sum(map(len, dataset.wanted().values())) == world.frames


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_are_balanced_in_every_split(split: str) -> None:
    part = [spec for spec in specs(180, 2) if spec.split == split]
    for values, labels in (
        ([spec.motion for spec in part], MOTIONS),
        ([spec.scene.texture for spec in part], tuple(TEXTURES)),
        ([spec.scene.tint for spec in part], tuple(TINTS)),
    ):
        counts = Counter(values)
        assert set(counts) == set(labels)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_three_labels_are_independent_of_each_other() -> None:
    everything = [(spec.motion, spec.scene.texture, spec.scene.tint) for spec in specs(3000, 0)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = Counter((labels[a], labels[b]) for labels in everything)
        expected = 3000 / (len({labels[a] for labels in everything}) * len({labels[b] for labels in everything}))
        assert min(pairs.values()) > expected - 4 * expected**0.5
        assert max(pairs.values()) < expected + 4 * expected**0.5
        assert abs(sum(pairs.values()) / len(pairs) - expected) < 1e-9  # every pair occurs


def test_the_two_actors_differ_in_shape_and_colour_so_questions_have_one_answer() -> None:
    everything = specs(200, 0)
    for spec in everything:
        first, second = spec.actors
        assert first.shape != second.shape
        assert first.color != second.color
        assert len({question for _, question, _ in questions(spec)}) == len(questions(spec))
    assert {spec.actors[0].shape for spec in everything} == set(SHAPES)
    assert {spec.actors[0].color for spec in everything} == set(COLORS)


def test_actors_stay_in_the_picture() -> None:
    for spec in specs(150, 4):
        for t in np.linspace(0, spec.seconds, 30):
            for actor, (x, y) in zip(spec.actors, positions(spec, float(t)), strict=True):
                assert 0.7 * actor.radius < x < 1 - 0.7 * actor.radius
                assert 0.7 * actor.radius < y < 1 - 0.7 * actor.radius


def gaps(spec: VideoSpec) -> list[float]:
    return [math.dist(*positions(spec, spec.seconds * k / 20)) for k in range(21)]


def first_with(motion: str) -> VideoSpec:
    return next(spec for spec in specs(60, 0) if spec.motion == motion)


def test_motions_are_what_their_names_say() -> None:
    meet, orbit, chase = gaps(first_with("meet")), gaps(first_with("orbit")), gaps(first_with("chase"))
    assert meet[0] > 0.6
    assert meet[-1] < 0.3
    assert max(orbit) - min(orbit) < 1e-9
    assert max(chase) < 0.45
    avoid = first_with("avoid")
    assert min(gaps(avoid)) > 0.2
    mirror = first_with("mirror")
    for k in range(5):
        (x1, y1), (x2, y2) = positions(mirror, float(k))
        assert math.isclose(x1 + x2, 1)
        assert y1 == y2


def test_render_is_pure_and_the_scene_pans() -> None:
    spec = specs(1, 0)[0]
    assert (render(spec, 1.3) == render(spec, 1.3)).all()
    corners = [render(spec, t)[:8, :8].astype(int) for t in (0.0, 2.0)]
    assert np.abs(corners[0] - corners[1]).mean() > 1


def test_edges_of_shapes_are_smooth() -> None:
    reds = render(specs(1, 0)[0], 0.0)[..., 0]
    assert len(np.unique(reds)) > 60  # hard edges and flat colours would give a handful


def test_encoding_does_not_depend_on_what_was_encoded_before() -> None:
    spec = specs(5, 5)[1]
    pictures = np.stack([render(spec, n / FPS) for n in range(25)])
    results = set()
    for number in range(8):  # x264's defaults give several results here
        results.add(encode(pictures))
        encode(np.roll(pictures, number, axis=2))
    assert len(results) == 1


def test_the_marker_lists_what_was_written(world: WorldSummary) -> None:
    marker = json.loads((world.root / "world.json").read_text())
    assert (marker["version"], marker["seed"], marker["videos"], len(marker["bytes"])) == (1, 5, 6, 6)
