"""MSVD-QA: the published counts on the real annotations, and the rules on small ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config import DataConfig
from stages.data.annotation_files import AnnotationError
from stages.data.msvd import MsvdQaDataset, clean_question


@pytest.fixture(scope="module")
def real(shared_data: Path) -> MsvdQaDataset:
    return MsvdQaDataset(DataConfig(annotations=str(shared_data / "annotations" / "msvd"), num_frames=20))


@pytest.mark.parametrize(
    ("split", "questions", "videos"), [("train", 30_933, 1161), ("val", 6_415, 245), ("test", 13_157, 504)]
)
def test_questions_and_videos_are_those_of_the_standard_split(
    real: MsvdQaDataset, split: str, questions: int, videos: int
) -> None:
    samples = real.samples(split)
    assert len(samples) == questions == real.published_n(split)
    assert len({sample.video_id for sample in samples}) == len(real.wanted([split])) == videos


def test_question_types_of_the_test_split(real: MsvdQaDataset) -> None:
    counts = Counter(sample.group for sample in real.samples("test"))
    assert counts == {"what": 8149, "who": 4552, "how": 370, "when": 58, "where": 28}


def test_splits_of_the_real_annotations_share_no_video(real: MsvdQaDataset) -> None:
    assert real.warnings == ()
    assert len(real.wanted()) == 1161 + 245 + 504


def test_one_draw_of_20_frames_wants_at_most_20_frames_per_video(real: MsvdQaDataset) -> None:
    assert max(map(len, real.wanted(["train"]).values())) == 20


def question(key: str = "0000000", video: str = "v_1_5", **fields: Any) -> dict[str, Any]:
    return {
        "answer": "nut",
        "question": "what is a small animal chewing on?",
        "answer_type": "what",
        "question_id": key,
        "dataset": "msvd",
        "video": video,
        "frame_length": 72,
        **fields,
    }


def folder_with(tmp_path: Path, **files: dict[str, Any]) -> str:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(tmp_path)


def test_a_sample_is_one_question_in_the_prompt_of_the_base_code(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, qa_test={"7": question("7", question='Who "is" (it): #A; B~C?!', answer=" man ")})
    (sample,) = MsvdQaDataset(DataConfig(annotations=folder, num_frames=4)).samples("test")
    assert sample.prompt == "Question: who is it a bc? Short answer:"
    assert (sample.sample_id, sample.answer, sample.group) == ("7", "man", "what")
    assert sample.draws.tolist() == [[0, 24, 47, 71]]


@pytest.mark.parametrize(("dataset", "published"), [("msvd", 13_157), ("miniature", None)])
def test_only_annotations_of_msvd_are_set_beside_its_published_counts(
    tmp_path: Path, dataset: str, published: int | None
) -> None:
    folder = folder_with(tmp_path, qa_test={"7": question("7"), "8": question("8", dataset=dataset)})
    assert MsvdQaDataset(DataConfig(annotations=folder)).published_n("test") == published


def test_question_cleaning_removes_these_characters_only() -> None:
    assert clean_question("A.b!c\"d(e)f*g#h:i;j~K, l? m-n'o") == "abcdefghijk, l? m-n'o"


def test_training_frames_are_seeded_draws_shared_by_the_questions_of_a_video(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, qa_train={"0": question("0"), "1": question("1", answer="squirrel"), "2": question("2", video="w")}
    )
    dataset = MsvdQaDataset(DataConfig(annotations=folder, num_frames=6, draws=3))
    first, second, other = dataset.samples("train")
    assert first.draws.shape == (3, 6)
    assert (first.draws == second.draws).all()
    assert (first.draws != other.draws).any()
    assert (dataset.wanted()["w"] == np.unique(other.draws)).all()
    again = MsvdQaDataset(DataConfig(annotations=folder, num_frames=6, draws=3, draw_seed=1))
    assert (again.samples("train")[0].draws != first.draws).any()


def test_frame_length_is_converted_to_the_grid_of_the_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, qa_val={"0": question("0", frame_length=101)})
    (sample,) = MsvdQaDataset(DataConfig(annotations=folder, num_frames=3, fps=2)).samples("val")
    assert sample.frame_index.tolist() == [0, 10, 20]


def test_training_parts_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        qa_train_part2={"b": question("b")},
        qa_train_part1={"a": question("a")},
        qa_train_notes={"c": {}},  # another file: not a part
        qa_ans2label={"nut": 0},
    )
    dataset = MsvdQaDataset(DataConfig(annotations=folder))
    assert dataset.splits == ("train",)
    assert [sample.sample_id for sample in dataset.samples("train")] == ["a", "b"]


def test_without_a_question_type_the_first_word_is_the_group(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, qa_test={"0": question("0", answer_type="", question="Where is it?")})
    assert MsvdQaDataset(DataConfig(annotations=folder)).samples("test")[0].group == "where"


def test_an_id_in_two_training_parts_is_a_problem(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, qa_train_part1={"a": question("a")}, qa_train_part2={"a": question("a")})
    with pytest.raises(AnnotationError, match=r"qa_train_part2\.json:a is in another file of split 'train' too"):
        MsvdQaDataset(DataConfig(annotations=folder))


def test_a_folder_without_annotation_files_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"qa_val\.json"):
        MsvdQaDataset(DataConfig(annotations=str(tmp_path)))
