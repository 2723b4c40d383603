"""LVU: the published protocol on the real annotations, and the rules on small ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config import DataConfig
from stages.data.annotation_files import AnnotationError
from stages.data.lvu import PUBLISHED_TEST_WINDOWS, LvuDataset, lvu_prompt
from stages.data.manifest import estimate, majority_answer

# algorithm.md §2: videos and windows in train/val/test, accuracy of the majority class of train on test
TABLE = {
    "relationship": ((138, 49, 41), (298, 103, 91), 46.2),
    "way_speaking": ((876, 196, 189), (2135, 470, 473), 28.1),
    "scene": ((515, 108, 82), (1202, 269, 218), 23.4),
    "director": ((680, 163, 107), (1731, 393, 268), 4.9),
    "genre": ((2810, 569, 588), (6432, 1428, 1291), 31.5),
    "writer": ((748, 174, 168), (2126, 484, 432), 9.5),
    "year": ((726, 163, 141), (1688, 454, 337), 14.5),
}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, LvuDataset]:
    folder = str(shared_data / "annotations" / "lvu")
    return {task: LvuDataset(DataConfig(annotations=folder, task=task)) for task in TABLE}


@pytest.mark.parametrize("task", TABLE)
def test_videos_and_windows_are_those_of_the_published_protocol(real: dict[str, LvuDataset], task: str) -> None:
    dataset = real[task]
    samples = {split: dataset.samples(split) for split in SPLITS}
    videos, windows, majority = TABLE[task]
    assert dataset.splits == SPLITS
    assert tuple(len({s.video_id for s in samples[split]}) for split in SPLITS) == videos
    assert tuple(len(samples[split]) for split in SPLITS) == windows
    assert dataset.published_n("test") == len(samples["test"]) == PUBLISHED_TEST_WINDOWS[task]
    constant = majority_answer(samples["train"])
    hits = sum(sample.answer == constant for sample in samples["test"])
    assert round(100 * hits / len(samples["test"]), 1) == majority


def test_all_windows_of_all_tasks_need_1_052_940_frames_of_8198_videos(real: dict[str, LvuDataset]) -> None:
    frames: dict[str, np.ndarray] = {}
    for dataset in real.values():
        for video, index in dataset.wanted().items():
            frames[video] = np.union1d(frames.get(video, index), index)
    assert len(frames) == 8198
    assert sum(map(len, frames.values())) == 1_052_940


def test_relationship_wants_28_080_frames_of_228_videos_in_20_gigabytes(real: dict[str, LvuDataset]) -> None:
    size = estimate(real["relationship"].wanted(), {"tokens": 257 * 1408 * 2})
    assert (size.videos, size.frames, round(size.total_bytes / 1e9, 1)) == (228, 28_080, 20.3)


def test_label_counts_of_the_relationship_windows(real: dict[str, LvuDataset]) -> None:
    counts = Counter(sample.answer for sample in real["relationship"].samples("test"))
    assert counts == {"friend": 42, "husband wife": 36, "boyfriend girlfriend": 13}
    assert len(real["relationship"].labels("train")) == 4
    assert real["year"].labels("train") == tuple("012345678")


def test_no_video_is_in_train_and_test_of_one_task_but_204_cross_tasks(
    real: dict[str, LvuDataset], shared_data: Path
) -> None:
    assert all(dataset.warnings == () for dataset in real.values())
    together = LvuDataset(
        DataConfig(annotations=str(shared_data / "annotations" / "lvu"), task=",".join(PUBLISHED_TEST_WINDOWS))
    )
    assert len(together.leaks) == 204
    assert together.published_n("test") == 3110 == len(together.samples("test"))


def entry(subset: str = "train", **fields: Any) -> dict[str, Any]:
    return {"subset": subset, "duration": 133, "num_frames": 1628, "director": "steven", **fields}


def folder_with(tmp_path: Path, **files: dict[str, Any]) -> str:
    for split, content in files.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(tmp_path)


def test_a_sample_is_one_window_with_the_label_of_its_video(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train={"-wX6_qCCnPc": entry(director_answer="(a)")})
    samples = LvuDataset(DataConfig(annotations=folder, task="director")).samples("train")
    assert [s.sample_id for s in samples] == ["-wX6_qCCnPc@0s", "-wX6_qCCnPc@20s"]
    assert samples[1].frame_index.tolist() == list(range(200, 1200, 10))
    assert (samples[1].answer, samples[1].group) == ("steven", "director")
    assert samples[1].prompt == "what is the director of the movie?"


def test_indices_count_on_the_grid_of_the_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train={"a": entry()})
    samples = LvuDataset(DataConfig(annotations=folder, task="director", fps=2)).samples("train")
    assert samples[1].frame_index.tolist() == list(range(40, 240, 2))


def test_wanted_is_the_sorted_union_of_the_windows_of_the_splits_asked_for(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train={"a": entry()}, test={"b": entry("test"), "c": entry("test", director="ron")})
    dataset = LvuDataset(DataConfig(annotations=folder, task="director"))
    assert dataset.splits == ("train", "test")
    assert dataset.wanted(["train"])["a"].tolist() == list(range(0, 1200, 10))
    assert set(dataset.wanted()) == {"a", "b", "c"}
    assert dataset.wanted([]) == {}
    assert dataset.labels("test") == ("ron", "steven")


def test_videos_without_the_label_are_left_out(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train={"a": entry(), "b": entry(genre="comedy")})
    dataset = LvuDataset(DataConfig(annotations=folder, task="genre"))
    assert {sample.video_id for sample in dataset.samples("train")} == {"b"}


def test_a_video_in_train_and_test_of_a_task_gives_a_warning(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train={"a": entry(), "b": entry()}, test={"b": entry("test")})
    (warning,) = LvuDataset(DataConfig(annotations=folder, task="director")).warnings
    assert warning == "1 videos are in both train and test: b"


def test_several_tasks_ask_each_window_about_each(tmp_path: Path) -> None:
    train = {"a": entry(scene="bar"), "b": entry(scene="bar"), "c": entry()}
    del train["b"]["director"]
    test = {"a": entry("test", scene="road"), "c": entry("test"), "d": entry("test")}
    folder = folder_with(tmp_path, train=train, test=test)
    both = LvuDataset(DataConfig(annotations=folder, task="director, scene"))
    alone = {name: LvuDataset(DataConfig(annotations=folder, task=name)) for name in ("director", "scene")}
    assert [(s.sample_id, s.prompt, s.answer) for s in both.samples("train")] == [
        (f"{s.sample_id}#{name}", s.prompt, s.answer) for name, part in alone.items() for s in part.samples("train")
    ]
    assert both.leaks == ("a", "c")
    assert all(part.leaks == () for part in alone.values())
    with pytest.raises(AnnotationError, match="'scenes'"):
        LvuDataset(DataConfig(annotations=folder, task="director,scenes"))


def test_the_paper_style_uses_the_words_of_the_paper() -> None:
    assert lvu_prompt("way_speaking", "malmm") == "what is the way_speaking of the movie?"
    assert lvu_prompt("way_speaking", "paper") == "What is the speaking style of the movie?"
    assert lvu_prompt("year", "paper") == "What is the release year of the movie?"
    assert lvu_prompt("scene", "paper") == "What is the scene of the movie?"


def test_an_unknown_task_names_the_nearest_ones(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train={"a": entry()})
    with pytest.raises(AnnotationError, match=r"'directors'(?s:.*)--set data\.task=director$"):
        LvuDataset(DataConfig(annotations=folder, task="directors"))
    with pytest.raises(AnnotationError, match="duration"):  # a field, but no label
        LvuDataset(DataConfig(annotations=folder, task="duration"))


def test_a_missing_split_is_named_with_those_that_exist(tmp_path: Path) -> None:
    dataset = LvuDataset(DataConfig(annotations=folder_with(tmp_path, train={"a": entry()}), task="director"))
    with pytest.raises(ValueError, match="no split 'test'; they have train"):
        dataset.samples("test")


@pytest.mark.parametrize("label", [3.5, None, "", "  ", ["steven"], float("nan"), True])
def test_a_label_that_is_not_text_is_a_problem(tmp_path: Path, label: object) -> None:
    folder = folder_with(tmp_path, train={"a": entry(), "b": entry(director=label)})
    with pytest.raises(AnnotationError, match="train:b:director a label must be a text"):
        LvuDataset(DataConfig(annotations=folder, task="director"))
