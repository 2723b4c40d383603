"""Annotations in the layouts in which people have them: each is read, or refused with what to do."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from stages.config import DataConfig
from stages.data.annotation_files import LAYOUTS, AnnotationError
from stages.data.annotations import read_annotations
from stages.data.clips import ClipsDataset
from stages.data.lvu import LvuDataset
from stages.data.msvd import MsvdQaDataset
from tests.data.test_clips import Videos

AUTHORS = [
    {"id": 0, "video_id": 1451, "question": "who opens the box?", "answer": "someone"},
    {"id": 1, "video_id": 2, "question": "how many are there?", "answer": 2},
]


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def clips(path: Path, videos: Videos | None = None, **fields: Any) -> ClipsDataset:
    return ClipsDataset(DataConfig(name="clips", annotations=str(path), fps=2, num_frames=2, **fields), videos)


def asked(dataset: Any, split: str = "test") -> list[tuple[str, str, str]]:
    return [(s.sample_id, s.video_id, s.answer) for s in dataset.samples(split)]


# ---------------------------------------------------------------- the files as they are published


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Path:
    return shared_data / "annotations"


class Everything(Videos):
    """A folder that has whatever it is asked for."""

    def has(self, video_id: str) -> bool:  # noqa: ARG002
        return True

    def count_frames(self, video_id: str) -> int:  # noqa: ARG002
        return 20


@pytest.mark.parametrize(
    ("pattern", "questions_and_videos"),
    [
        ("msvd", {"train": (30_933, 1_161), "val": (6_415, 245), "test": (13_157, 504)}),
        ("msrvtt_qa/qa_*.json", {"val": (12_278, 497)}),
        ("msrvtt_qa/*.csv", {"val": (12_278, 497), "test": (72_821, 2_990)}),
        ("activitynet_qa/*_[qa].json", {"train": (32_000, 3_200), "val": (18_000, 1_800), "test": (8_000, 800)}),
        ("activitynet_qa/test_q.json", {"test": (8_000, 800)}),
        ("activitynet_qa/qa_test.json", {"test": (7_960, 796)}),
    ],
)
def test_question_files_are_read_as_they_are_published(
    published: Path, pattern: str, questions_and_videos: dict[str, tuple[int, int]]
) -> None:
    read = read_annotations(str(published / pattern), fps=2.0, layout="qa", videos=Everything())
    counts = {s: (len(part), len({e.video for e in part.values()})) for s, part in read.questions.items()}
    assert counts == questions_and_videos


def test_breakfast_is_a_file_of_labels(published: Path) -> None:
    config = DataConfig(
        annotations=str(published / "breakfast"), task="class_name", fps=2, num_frames=2, history_s=1000
    )
    dataset = LvuDataset(config)
    assert (len(dataset.samples("train")), len(dataset.samples("val"))) == (1_357, 355)
    assert len(dataset.labels("train")) == 10


def test_lvu_has_1029_videos_with_all_seven_tasks(published: Path) -> None:
    tasks = "relationship,way_speaking,scene,director,genre,writer,year"
    dataset = LvuDataset(DataConfig(annotations=str(published / "lvu"), task=tasks))
    assert len(dataset.samples("test")) == 3_110


@pytest.mark.parametrize(
    ("files", "told", "pattern"),
    [
        (("qa_test.json", "test_q.json", "test_a.json", "val_q.json"), "qa_test.json and by test_a.json, test_q.json",
         "qa_*.json"),
        (("qa_val.json", "val.csv", "test.csv"), "qa_val.json and by val.csv", "qa_*.json"),
    ],
)  # fmt: skip
def test_a_split_that_is_there_in_two_forms_is_not_counted_twice(
    tmp_path: Path, files: tuple[str, ...], told: str, pattern: str
) -> None:
    for name in files:
        row = {"video": "v", "question": "what?", "answer": "nut", "question_id": name}
        for field in {"_q.": ["answer"], "_a.": ["question", "video"]}.get(name[-7:-4], []):
            del row[field]
        write(tmp_path / name, "video,question,answer\nv,what?,nut\n" if name.endswith("csv") else [row])
    with pytest.raises(AnnotationError, match=f"is annotated by {told}") as caught:
        clips(tmp_path, Videos(v=9))
    (typed,) = shlex.split(caught.value.hint.split("--set ")[1])
    assert typed == f"data.annotations={tmp_path}/{pattern}"
    assert clips(Path(typed.partition("=")[2]), Videos(v=9)).splits


# ---------------------------------------------------------------- every layout, in small


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_example_of_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    example = LAYOUTS[layout]
    videos = Videos(**dict.fromkeys(["v1", "video1451", "v_x"], 30))
    if " beside " in example:
        questions, answers = example.split(" beside ")
        write(tmp_path / "test_q.json", questions)
        write(tmp_path / "test_a.json", answers)
    elif example.startswith("video"):
        write(tmp_path / "test.csv", f"{example}\nv1,{'what is it?,nut' if 'question' in example else 'nut'}\n")
    else:
        write(tmp_path / ("test.jsonl" if "Lines" in layout else "test.json"), example)
    task = "director" if "director" in example else "label"
    (_, video, answer), *_ = asked(clips(tmp_path, videos, task=task))
    assert video in ("v1", "video1451", "v_x")
    assert answer in ("nut", "someone", "no", "steven")


def test_msvd_qa_of_its_authors_is_read_with_its_mapping_file(tmp_path: Path) -> None:
    write(tmp_path / "test_qa.json", AUTHORS)
    write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1451\r\njfrrO5K_vKM_55_65 vid2\r\n")
    videos = Videos(**{"-4wsuPCjDBc_5_15": 20, "jfrrO5K_vKM_55_65": 5})
    dataset = MsvdQaDataset(DataConfig(annotations=str(tmp_path), fps=2, num_frames=2), videos)
    assert asked(dataset) == [("0", "-4wsuPCjDBc_5_15", "someone"), ("1", "jfrrO5K_vKM_55_65", "2")]
    assert dataset.samples("test")[0].frame_index.tolist() == [0, 19]
    assert dataset.published_n("test") == 13_157


def test_a_number_that_the_mapping_file_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path / "test_qa.json", AUTHORS)
    write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1451\n")
    with pytest.raises(AnnotationError, match=r"test_qa\.json:1:video 2 is not in youtube_mapping\.txt"):
        clips(tmp_path, Videos())


@pytest.mark.parametrize("prefix", ["", "video", "vid"])
def test_numbers_without_a_mapping_file_find_the_videos_under_their_usual_names(tmp_path: Path, prefix: str) -> None:
    write(tmp_path / "test_qa.json", AUTHORS)
    dataset = clips(tmp_path, Videos(**{f"{prefix}1451": 9, f"{prefix}2": 4, "other": 7}))
    assert [video for _, video, _ in asked(dataset)] == [f"{prefix}1451", f"{prefix}2"]
    assert dataset.published_n("test") is None


def test_numbers_that_name_no_video_at_all_say_where_the_names_are(tmp_path: Path) -> None:
    path = write(tmp_path / "test_qa.json", AUTHORS)
    with pytest.raises(
        AnnotationError, match=r"looked for 1451, v_1451, video1451, vid1451(?s:.*)youtube_mapping\.txt"
    ):
        clips(path, Videos(other=7))


def test_without_videos_the_lengths_that_the_annotations_lack_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"how many frames 2 videos have, such as 1451(?s:.*)--set data\.videos="):
        clips(write(tmp_path / "test_qa.json", AUTHORS))


def test_activitynet_qa_is_joined_by_question_whatever_the_order(tmp_path: Path) -> None:
    questions = [{"video_name": f"x{n}", "question": "is it?", "question_id": f"v_x{n}_1"} for n in (1, 2)]
    answers = [{"answer": answer, "type": 3, "question_id": f"v_x{n}_1"} for n, answer in ((2, "no"), (1, "yes"))]
    write(tmp_path / "val_q.json", questions)
    write(tmp_path / "val_a.json", answers)
    dataset = clips(tmp_path, Videos(v_x1=9, x2=9))
    assert asked(dataset, "val") == [("v_x1_1", "v_x1", "yes"), ("v_x2_1", "x2", "no")]
    assert {sample.group for sample in dataset.samples("val")} == {"3"}


@pytest.mark.parametrize(
    ("questions", "answers", "expected"),
    [
        ([1, 2], [1], r"test_q\.json has 1 questions without an answer in test_a\.json, such as q2"),
        ([1], [1, 2], r"test_a\.json has 1 answers more than test_q\.json has questions"),
        ([1], None, r"test_q\.json has questions without answers"),
        (None, [1], r"test_a\.json has answers, and no file of questions"),
    ],
)
def test_halves_that_do_not_fit_are_named(
    tmp_path: Path, questions: list[int] | None, answers: list[int] | None, expected: str
) -> None:
    if questions is not None:
        rows = [{"question_id": f"q{n}", "video": "v", "question": "is it?"} for n in questions]
        write(tmp_path / "test_q.json", rows)
    if answers is not None:
        write(tmp_path / "test_a.json", [{"question_id": f"q{n}", "answer": "no"} for n in answers])
    with pytest.raises(AnnotationError, match=expected):
        clips(tmp_path, Videos(v=9))


@pytest.mark.parametrize(
    "text",
    [
        "Video,Question,Answer,split\nv,what is it?,nut,test\n",
        "\ufeffvideo;question;answer;subset\r\nv;what is it?;nut ;TEST\r\n",
        "video\tquestion\tanswer\tsubset\n v \twhat is it?\tnut\ttest\n",
        'video_path,id,question,answer,split\nv,#1,"what, is ""it""?",nut,testing\n',
    ],
)
def test_tables_are_read_with_any_delimiter_and_the_usual_names(tmp_path: Path, text: str) -> None:
    assert asked(clips(write(tmp_path / "all.csv", text), Videos(v=9))) == [("#1", "v", "nut")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("video,question,answer\nv,what is it?\n", r"test\.csv:2 has 2 cells, and the header 3 names"),
        ("video,answer,answer,question\nv,a,b,c\n", r"test\.csv names a column more than once: answer"),
        ('video,question,answer\nv,"what is it?,nut\n', r"test\.csv:\d is no table"),
        ("video,question,answer\n", r"test\.csv holds no entries"),
        ("video,question,answer,frame_length\nv,what?,nut,many\n", r"frame_length Input should be a valid integer"),
        ("video,question,answer,id\nv,what?,nut,1\nv,who?,nut,1\n", r"test\.csv:1 appears more than once"),
        ("video,question,answer\nv,what?,\nv,who?,man\n", r"#1:answer Field required"),
        ("video,question,answer\nv,what?,\n", r"test\.csv has questions without answers"),
        ("video,label\nv,a\nv,b\n", r"test\.csv:v appears more than once"),
    ],
)
def test_a_broken_table_is_named_by_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(AnnotationError, match=expected):
        clips(write(tmp_path / "test.csv", text), Videos(v=9), task="label")


def test_a_table_of_labels_is_windows_of_whole_videos(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", "video,mood,split\nv,calm,train\nw,loud,test\n")
    dataset = clips(path, Videos(v=20, w=9), task="mood", history_s=5, stride_s=2)
    assert [(s.sample_id, s.answer) for s in dataset.samples("train")] == [
        ("v@0s", "calm"), ("v@2s", "calm"), ("v@4s", "calm")
    ]  # fmt: skip
    assert dataset.samples("test")[0].frame_index.tolist() == [0, 8]


def test_json_lines_name_the_line_that_is_broken(tmp_path: Path) -> None:
    good = '{"video": "v", "question": "what?", "answer": "nut"}'
    assert len(clips(write(tmp_path / "test.json", f"{good}\n\n{good}\n"), Videos(v=9)).samples("test")) == 2
    with pytest.raises(AnnotationError, match=r"test\.json:2 is not JSON"):
        clips(write(tmp_path / "test.json", f"{good}\n{good[:20]}\n{good}"), Videos(v=9))


def test_files_in_folders_and_compressed_ones_are_found(tmp_path: Path) -> None:
    row = {"question": "what?", "answer": "nut", "frame_length": 41}
    write(tmp_path / "train" / "scene1.json", {"a": {**row, "video": "a"}})
    write(tmp_path / "train" / "scene2.json", {"b": {**row, "video": "b"}})
    (tmp_path / "qa_test.json.gz").write_bytes(gzip.compress(json.dumps({"c": {**row, "video": "c"}}).encode()))
    write(tmp_path / "validation.jsonl", json.dumps({**row, "video": "d"}))
    write(tmp_path / "README.json", {"about": "these files"})
    dataset = clips(tmp_path)
    assert {split: sorted(dataset.wanted([split])) for split in dataset.splits} == {
        "train": ["a", "b"], "val": ["d"], "test": ["c"]
    }  # fmt: skip


def test_a_compressed_file_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(b"{}" * 500)[:-9])
    with pytest.raises(AnnotationError, match=r"test\.json\.gz is not a whole gzip file"):
        clips(tmp_path)


def test_a_file_of_another_kind_beside_the_annotations_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "test_qa.json", AUTHORS)
    write(tmp_path / "MSRVTT_test.csv", "key,vid_key,sentence\n1,2,a dog\n")
    dataset = clips(tmp_path, Videos(video2=4, video1451=9))
    assert len(dataset.samples("test")) == 2
    assert dataset.warnings[0] == "MSRVTT_test.csv holds no annotations of this kind and is left out"


def test_the_same_video_in_train_and_test_is_said_whatever_its_suffix(tmp_path: Path) -> None:
    row = {"question": "what?", "answer": "nut", "frame_length": 41}
    write(tmp_path / "train.json", {"0": {**row, "video": "a.mp4"}})
    write(tmp_path / "test.json", {"1": {**row, "video": " a "}})
    assert "1 videos are in both train and test: a" in clips(tmp_path).warnings


def test_labels_that_differ_in_case_alone_are_said(tmp_path: Path) -> None:
    rows = "v,Calm,train\nw,calm ,train\nx,calm,test\n"
    dataset = clips(write(tmp_path / "l.csv", f"video,mood,split\n{rows}"), Videos(v=9, w=9, x=9), task="mood")
    assert "1 answers are written in several ways, which count as different answers: 'calm' (2 times), 'Calm' (1" in (
        " ".join(dataset.warnings)
    )


def test_a_file_whose_name_says_its_split_is_that_split_alone(tmp_path: Path) -> None:
    dataset = clips(write(tmp_path / "val_qa.json", AUTHORS), Videos(vid2=4, vid1451=9))
    assert dataset.splits == ("val",)


def test_labels_given_to_a_dataset_of_questions_name_the_one_that_reads_both(tmp_path: Path) -> None:
    write(tmp_path / "test.json", {"v": {"duration": 9, "num_frames": 98, "scene": "bar"}})
    with pytest.raises(AnnotationError, match=r"labels of videos(?s:.*)--set data\.name=clips"):
        MsvdQaDataset(DataConfig(annotations=str(tmp_path)))


def test_a_length_that_only_some_entries_have_is_a_problem(tmp_path: Path) -> None:
    row = {"video": "v", "question": "what?", "answer": "nut"}
    with pytest.raises(AnnotationError, match=r"test\.json:1:frame_length Field required"):
        clips(write(tmp_path / "test.json", {"0": {**row, "frame_length": 41}, "1": row}), Videos(v=9))
