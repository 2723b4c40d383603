"""The miniature world: everything follows from the seed, and the files are what the labels say."""

from __future__ import annotations

import dataclasses
import itertools
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
from stages.miniature.draw import COLORS, DAYTIMES, DECADES, FRAMES, SHAPES, TEXTURES, TINTS, VOICES, WEATHER
from stages.miniature.sayings import fine_questions, questions, statements
from stages.miniature.train_clip import facts, sentence
from stages.miniature.videos import (
    ALONG_A_LINE,
    AXES,
    CONTACT,
    FINE_TASKS,
    FPS,
    MOTIONS,
    SIZE,
    SPOTS,
    TASKS,
    VERSION,
    VideoSpec,
    labels,
    positions,
    render,
    specs,
)
from stages.miniature.world import WorldSummary, encode, write_world


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


def test_a_video_file_shows_what_was_drawn_at_its_frame_rate(world: WorldSummary) -> None:
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
        drawn = render(spec, [number / FPS])[0]
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
    with pytest.raises(ValueError, match=f"seed 5; this is version {VERSION}, seed 6"):
        write_world(world.root, videos=6, seed=6)


def test_a_world_too_small_for_three_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 3 videos"):
        write_world(tmp_path, videos=2, seed=0)


def test_ids_name_their_content_so_other_seeds_have_other_ids() -> None:
    assert not {spec.video_id for spec in specs(9, 0)} & {spec.video_id for spec in specs(9, 1)}


def test_the_lvu_annotations_give_every_label_and_windows_by_its_rule(world: WorldSummary) -> None:
    by_id = {spec.video_id: spec for spec in specs(6, 5)}
    for task in (*TASKS, *FINE_TASKS):
        cfg = DataConfig(annotations=str(world.lvu_folder), task=task, fps=2.0, num_frames=9, history_s=5, stride_s=2)
        dataset = LvuDataset(cfg)
        samples = [sample for split in dataset.splits for sample in dataset.samples(split)]
        labelled = [spec for spec in by_id.values() if task in labels(spec)]
        assert {sample.video_id for sample in samples} == {spec.video_id for spec in labelled}
        assert len(samples) == sum(1 + (spec.seconds == 7) for spec in labelled)
        for sample in samples:
            assert sample.answer == labels(by_id[sample.video_id])[task]
            assert np.diff(sample.frame_index).tolist() == [1] * 8  # half a second apart: the grid itself


def test_the_qa_annotations_are_one_word_questions(world: WorldSummary) -> None:
    for folder, ask in ((world.qa_folder, questions), (world.root / "msvd_qa_fine", fine_questions)):
        dataset = MsvdQaDataset(DataConfig(annotations=str(folder), num_frames=4))
        counts = {split: len(dataset.samples(split)) for split in dataset.splits}
        assert sum(counts.values()) == sum(len(ask(spec)) for spec in specs(6, 5))
        assert all(" " not in answer for split in dataset.splits for answer in dataset.labels(split))
    coarse = MsvdQaDataset(DataConfig(annotations=str(world.qa_folder), num_frames=4))
    assert {sample.group for sample in coarse.samples("train")} == {"who", "what", "how", "where", "when"}
    assert sum(len(coarse.samples(split)) for split in coarse.splits) == world.questions


def test_both_layouts_are_read_by_the_generic_dataset_with_every_frame(world: WorldSummary) -> None:
    for folder, task in ((world.lvu_folder, "scene"), (world.qa_folder, "")):
        dataset = ClipsDataset(DataConfig(annotations=str(folder), task=task, fps=2.0))
        assert dataset.warnings == ()
        assert sum(map(len, dataset.wanted().values())) == world.frames * 2 / FPS


FINE_WORDS = {*MOTIONS, *SPOTS, *CONTACT, *AXES, *FRAMES, *VOICES, *DECADES, "early", "late", "glows"}


def test_captions_and_coarse_questions_never_mention_what_is_fine() -> None:
    for spec in specs(300, 0):
        said = [sentence(facts(spec)), *(f"{question} {answer}" for _, question, answer in questions(spec))]
        assert not FINE_WORDS & {word.strip("?") for text in said for word in text.split()}


def test_every_answer_is_among_the_statements_so_a_description_can_be_answered_from() -> None:
    derived = {"nothing", "space"}  # said as touching and apart
    for spec in specs(100, 0):
        words = set(" ".join(statements(spec).values()).split())
        assert set(labels(spec).values()) <= words
        assert {answer for _, _, answer in (*questions(spec), *fine_questions(spec))} <= words | derived


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_are_balanced_in_every_split(split: str) -> None:
    part = [spec for spec in specs(180, 2) if spec.split == split]
    for name, values in LABELS.items():
        counts = Counter(everything_about(spec)[name] for spec in part)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1


LABELS = {
    "motion": MOTIONS, "texture": tuple(TEXTURES), "tint": tuple(TINTS), "weather": WEATHER, "daytime": tuple(DAYTIMES),
    "frame": FRAMES, "decade": tuple(DECADES), "voice": VOICES, "spot": tuple(SPOTS), "contact": CONTACT,
    "axis": tuple(AXES),
}  # fmt: skip


def everything_about(spec: VideoSpec) -> dict[str, str]:
    scene = spec.scene
    return {
        "motion": spec.motion, "texture": scene.texture, "tint": scene.tint, "weather": scene.weather,
        "daytime": scene.daytime, "frame": scene.frame, "decade": scene.decade, "voice": spec.voice,
        "spot": spec.spot, "contact": spec.contact, "axis": spec.axis,
    }  # fmt: skip


@pytest.mark.parametrize("pair", list(itertools.combinations(LABELS, 2)))
def test_labels_are_independent_of_each_other(pair: tuple[str, str], everything: list[dict[str, str]]) -> None:
    pairs = Counter((about[pair[0]], about[pair[1]]) for about in everything)
    expected = len(everything) / (len(LABELS[pair[0]]) * len(LABELS[pair[1]]))
    assert len(pairs) == len(LABELS[pair[0]]) * len(LABELS[pair[1]])
    assert min(pairs.values()) > expected - 4.5 * expected**0.5
    assert max(pairs.values()) < expected + 4.5 * expected**0.5


@pytest.fixture(scope="module")
def everything() -> list[dict[str, str]]:
    return [everything_about(spec) for spec in specs(3000, 0)]


def test_the_two_actors_differ_in_shape_and_colour_so_questions_have_one_answer() -> None:
    everything = specs(200, 0)
    for spec in everything:
        first, second = spec.actors
        assert first.shape != second.shape
        assert first.color != second.color
        assert len({question for _, question, _ in questions(spec)}) == len(questions(spec))
    assert {spec.actors[0].shape for spec in everything} == set(SHAPES)
    assert {spec.actors[0].color for spec in everything} == set(COLORS)


def test_actors_stay_in_the_picture_and_the_pair_in_its_quarter() -> None:
    for spec in specs(150, 4):
        centres = []
        for t in np.linspace(0, spec.seconds, 30):
            places = positions(spec, float(t))
            centres.append(np.mean(places, axis=0))
            for actor, (x, y) in zip(spec.actors, places, strict=True):
                assert 0.5 * actor.radius < x < 1 - 0.5 * actor.radius
                assert 0.5 * actor.radius < y < 1 - 0.5 * actor.radius
        assert (np.sign(np.mean(centres, axis=0) - 0.5) == SPOTS[spec.spot]).all()


def gaps(spec: VideoSpec) -> list[float]:
    return [math.dist(*positions(spec, spec.seconds * k / 20)) for k in range(21)]


def test_motions_are_what_their_names_say() -> None:
    for spec in specs(100, 0):
        distance = gaps(spec)
        if spec.motion in ALONG_A_LINE:
            signed = np.diff(distance) * (1 if spec.motion == "avoid" else -1)
            assert (signed > 0).all()
        else:
            assert max(distance) - min(distance) < 1e-9
        if spec.motion == "mirror":
            assert all(a[1] == b[1] for a, b in (positions(spec, float(t)) for t in range(5)))
        if spec.motion == "orbit":  # one is the centre of the other's circle
            steps = np.abs(np.diff([positions(spec, t / 4) for t in range(20)], axis=0)).sum(axis=(0, 2))
            assert steps[1] > 5 * steps[0]


def test_touching_pairs_touch_and_others_do_not() -> None:
    for spec in specs(100, 0):
        reach = sum(actor.radius for actor in spec.actors)
        assert (min(gaps(spec)) < reach) == (spec.contact == "touching")


def test_each_actor_glows_once_and_one_of_them_early() -> None:
    for spec in specs(50, 0):
        early, late = sorted(spec.glows)
        assert 0 < early < spec.seconds / 2 < late < spec.seconds - 1
        assert labels(spec).get("first", spec.glows_first.shape) == spec.glows_first.shape


def test_a_line_stands_or_lies() -> None:
    for spec in specs(100, 0):
        if "axis" in labels(spec):
            (x1, y1), (x2, y2) = positions(spec, 1.0)
            assert (abs(x1 - x2) > abs(y1 - y2)) == (labels(spec)["axis"] == "beside")


def test_render_is_pure_and_one_picture_is_that_of_many() -> None:
    spec = specs(1, 0)[0]
    times = [0.3, 1.3, 2.9]
    many = render(spec, times)
    assert (many == render(spec, times)).all()
    assert all((many[n] == render(spec, [t])[0]).all() for n, t in enumerate(times))


def test_every_part_of_the_scene_shows() -> None:
    spec = next(spec for spec in specs(50, 0) if spec.scene.decade == "0" and spec.scene.weather == "clear")
    base = render(spec, [0.5])[0].astype(int)
    others = {
        "texture": TEXTURES, "tint": TINTS, "weather": WEATHER, "daytime": DAYTIMES, "frame": FRAMES, "decade": DECADES,
    }  # fmt: skip
    for part, values in others.items():
        for value in values:
            if value != getattr(spec.scene, part):
                changed = dataclasses.replace(spec, scene=dataclasses.replace(spec.scene, **{part: value}))
                assert np.abs(render(changed, [0.5])[0] - base).mean() > 0.5, (part, value)
    for voice in VOICES:
        if voice != spec.voice:
            assert np.abs(render(dataclasses.replace(spec, voice=voice), [0.5])[0] - base).max() > 50


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    one = write_world(tmp_path / "one", videos=70, seed=3)
    two = write_world(tmp_path / "two", videos=70, seed=3, workers=2)
    assert all_files(one.root) == all_files(two.root)


def test_edges_of_shapes_are_smooth() -> None:
    reds = render(specs(1, 0)[0], [0.0])[0, ..., 0]
    assert len(np.unique(reds)) > 60  # hard edges and flat colours would give a handful


def test_encoding_does_not_depend_on_what_was_encoded_before() -> None:
    spec = specs(5, 5)[1]
    pictures = render(spec, [n / FPS for n in range(25)])
    results = set()
    for number in range(8):  # x264's defaults give several results here
        results.add(encode(pictures))
        encode(np.roll(pictures, number, axis=2))
    assert len(results) == 1


def test_the_marker_lists_what_was_written(world: WorldSummary) -> None:
    marker = json.loads((world.root / "world.json").read_text())
    assert (marker["version"], marker["seed"], marker["videos"], len(marker["bytes"])) == (VERSION, 5, 6, 6)
