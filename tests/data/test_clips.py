"""Any folder of videos: both layouts, one file or a folder, or no annotations at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config import DataConfig
from stages.data.annotation_files import AnnotationError
from stages.data.clips import ClipsDataset
from stages.types import VideoRejected


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def video(subset: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"duration": 9, "num_frames": 98, "scene": "park", **fields} | ({"subset": subset} if subset else {})


def question(video_id: str = "v", **fields: Any) -> dict[str, Any]:
    base = {"question": "Who is it?", "answer": "big buck bunny", "answer_type": "who"}
    return {**base, "video": video_id, "frame_length": 41, **fields}


def clips(annotations: str, **fields: Any) -> ClipsDataset:
    return ClipsDataset(DataConfig(name="clips", annotations=annotations, task="scene", **fields))


def test_the_29_real_clips_are_read_in_both_layouts(shared_data: Path) -> None:
    by_label = ClipsDataset(
        DataConfig(annotations=str(shared_data / "clips" / "lvu_style.json"), task="setting", fps=2, num_frames=8)
    )
    by_question = ClipsDataset(DataConfig(annotations=str(shared_data / "clips" / "qa.json"), fps=2, num_frames=8))
    assert (by_label.layout, by_label.splits, len(by_label.wanted())) == ("lvu", ("test",), 29)
    assert by_label.labels("test") == ("indoor", "none", "outdoor")
    assert (by_question.layout, len(by_question.samples("train")), len(by_question.wanted())) == ("qa", 116, 29)
    for name, frames in by_label.wanted().items():
        assert (frames == by_question.wanted()[name]).all()
        assert (frames == np.arange(len(frames))).all()


def test_every_grid_frame_of_every_video_is_wanted_whatever_the_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"v": video("train"), "w": {"duration": 2, "num_frames": 30, "subset": "test"}})
    dataset = clips(path, fps=2, num_frames=3)
    assert {name: frames.tolist() for name, frames in dataset.wanted().items()} == {
        "v": list(range(20)),
        "w": list(range(6)),  # without a label for the task, but another task may have one
    }
    assert set(dataset.wanted(["test"])) == {"w"}
    assert dataset.samples("train")[0].frame_index.tolist() == [0, 9, 18]  # up to second 9


def test_frames_of_samples_are_among_the_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"v": video("train", duration=9.64, num_frames=98)})
    for fps in (0.7, 2, 10, 24):
        dataset = clips(path, fps=fps, num_frames=50)
        (sample,) = dataset.samples("train")
        assert set(sample.frame_index.tolist()) <= set(dataset.wanted()["v"].tolist())


def test_subset_decides_the_split_in_one_lvu_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"v": video("train"), "w": video("test"), "x": video("train")})
    dataset = clips(path)
    assert dataset.splits == ("train", "test")
    assert [sample.video_id for sample in dataset.samples("train")] == ["v", "x"]
    assert dataset.warnings == ("the annotations have no val split",)


def test_questions_without_subsets_are_in_every_split_and_the_dataset_says_so(tmp_path: Path) -> None:
    dataset = clips(write(tmp_path / "qa.json", {"0": question()}))
    assert dataset.splits == ("train", "val", "test")
    assert all(len(dataset.samples(split)) == 1 for split in dataset.splits)
    (warning,) = dataset.warnings
    assert "scores measure memory" in warning


def test_questions_with_subsets_are_divided(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.json", {"0": question(subset="train"), "1": question("w", subset="val")})
    dataset = clips(path)
    assert dataset.splits == ("train", "val")
    assert "no test split" in dataset.warnings[0]


def test_a_subset_that_only_some_entries_have_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.json", {"0": question(subset="train"), "1": question("w")})
    with pytest.raises(AnnotationError, match=r"qa\.json:1:subset is missing here"):
        clips(path)


@pytest.mark.parametrize(
    ("names", "entry"),
    [
        (("train.json", "val.json", "test.json"), video()),
        (("train.json", "val.json", "test.json"), question()),
        (("qa_train.json", "qa_val.json", "qa_test.json"), question()),
        (("qa_train_part1.json", "qa_val.json", "qa_test.json"), question()),
    ],
)
def test_a_folder_has_one_file_per_split_in_either_layout(
    tmp_path: Path, names: tuple[str, ...], entry: dict[str, Any]
) -> None:
    for number, name in enumerate(names):
        key = f"k{number}"
        write(tmp_path / name, {key: entry | ({"video": key} if "video" in entry else {})})
    dataset = clips(str(tmp_path))
    assert dataset.splits == ("train", "val", "test")
    assert [dataset.samples(split)[0].video_id for split in dataset.splits] == ["k0", "k1", "k2"]
    assert dataset.warnings == ()


def test_a_video_of_train_in_test_gives_a_warning(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write(tmp_path / f"{name}.json", {"0": question("v" if name != "val" else "w")})
    assert clips(str(tmp_path)).warnings == ("1 videos are in both train and test: v",)


def test_two_layouts_in_one_folder_are_a_problem(tmp_path: Path) -> None:
    write(tmp_path / "train.json", {"v": video()})
    write(tmp_path / "test.json", {"0": question()})
    with pytest.raises(AnnotationError, match="have different layouts"):
        clips(str(tmp_path))


def test_a_file_in_neither_layout_says_what_entries_need(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"its fields are caption(?s:.*)LVU(?s:.*)--set data\.task=NAME$"):
        clips(write(tmp_path / "a.json", {"v": {"caption": "a dog"}}))


def test_one_broken_entry_does_not_change_the_layout(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json", {"u": {"question": "a?", "subset": "test"}, "v": video("test"), "w": video("test")}
    )
    with pytest.raises(AnnotationError) as caught:
        clips(path)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["a.json:u:num_frames"]


def test_answers_of_several_words_are_compared_as_a_whole(tmp_path: Path) -> None:
    dataset = clips(write(tmp_path / "qa.json", {"0": question()}))
    assert dataset.answer_rule == "exact"
    assert dataset.labels("test") == ("big buck bunny",)
    assert dataset.published_n("test") is None


def test_training_frames_of_questions_are_evenly_spaced_unless_several_draws_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.json", {"0": question()})
    assert clips(path, num_frames=5).samples("train")[0].draws.tolist() == [[0, 10, 20, 30, 40]]
    drawn = clips(path, num_frames=5, draws=3)
    assert drawn.samples("train")[0].draws.shape == (3, 5)
    assert drawn.samples("test")[0].draws.tolist() == [[0, 10, 20, 30, 40]]


class Videos:
    """A folder of videos, by their grid frames; None where the length is refused."""

    def __init__(self, **lengths: int | None) -> None:
        self.lengths = lengths

    def video_ids(self) -> list[str]:
        return sorted(self.lengths)

    def has(self, video_id: str) -> bool:
        return video_id in self.lengths

    def count_frames(self, video_id: str) -> int:
        count = self.lengths.get(video_id)
        if count is None:
            raise VideoRejected(video_id, "truncated", "the file ends early")
        return count


def test_without_annotations_all_videos_are_wanted_whole_and_there_are_no_samples() -> None:
    dataset = ClipsDataset(DataConfig(name="clips"), Videos(v=3, w=5, broken=None))
    assert dataset.splits == ()
    assert {name: frames.tolist() for name, frames in dataset.wanted().items()} == {
        "v": [0, 1, 2],
        "w": [0, 1, 2, 3, 4],
        "broken": [0],  # so that extraction meets it, and quarantines it with its reason
    }
    assert "nothing can be trained" in dataset.warnings[0]
    with pytest.raises(ValueError, match="they have none"):
        dataset.samples("train")


def test_without_annotations_and_without_videos_the_error_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"--set data\.videos="):
        clips("")
