"""Annotations written by strangers: every problem is named at once, and nothing else ever comes out."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.config import DataConfig
from stages.data import annotation_files
from stages.data.annotation_files import AnnotationError
from stages.data.clips import ClipsDataset
from stages.data.ids import safe_id
from stages.data.lvu import LvuDataset
from stages.data.msvd import MsvdQaDataset

GOOD_VIDEO = '{"subset": "train", "duration": 9, "num_frames": 98, "director": "steven"}'
GOOD_QUESTION = '{"question": "who?", "answer": "man", "answer_type": "who", "video": "v", "frame_length": 98}'


def lvu(tmp_path: Path, content: str | bytes) -> LvuDataset:
    (tmp_path / "train.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return LvuDataset(DataConfig(annotations=str(tmp_path), task="director"))


def qa(tmp_path: Path, content: str) -> MsvdQaDataset:
    (tmp_path / "qa_test.json").write_bytes(content.encode())
    return MsvdQaDataset(DataConfig(annotations=str(tmp_path)))


def problems(make: Any, tmp_path: Path, content: str | bytes) -> list[str]:
    with pytest.raises(AnnotationError) as caught:
        make(tmp_path, content)
    return caught.value.problems


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": %s,\n "b": {"subset" "x"}}', "train.json:2 is not JSON: Expecting ':' delimiter (column 17)"),
        ("", "train.json:1 is not JSON: Expecting value (column 1)"),
        ("[%s]", "train.json:#1:video Field required"),
        ("7", "train.json must hold entries, in an object or a list, not a int"),
        ("{}", "train.json holds no entries"),
        ('{"a": %s, "a": %s}', "train.json:a appears more than once"),
        ('{"a": %s, "b": 7}', "train.json:b must be an object with fields, not 7"),
        ('{"a": {"duration": 3, "duration": 4, "num_frames": 50, "director": "x"}}', "a:duration is given more than"),
        ('{"a": {"duration": "9", "num_frames": 98}}', "train.json:a:duration Input should be a valid number; got '9'"),
        ('{"a": {"duration": NaN, "num_frames": 98}}', "train.json:a:duration Input should be"),
        ('{"a": {"duration": 1e999, "num_frames": 98}}', "train.json:a:duration Input should be"),
        ('{"a": {"duration": -1, "num_frames": 98}}', "train.json:a:duration Input should be greater than 0; got -1"),
        ('{"a": {"duration": 9, "num_frames": 98.0}}', "train.json:a:num_frames Input should be a valid integer"),
        ('{"a": {"duration": 9, "num_frames": true}}', "train.json:a:num_frames Input should be a valid integer"),
        ('{"a": {"duration": 9, "num_frames": 0}}', "train.json:a:num_frames Input should be greater than or equal"),
        ('{"a": {"duration": 9, "num_frames": 99999999999}}', "train.json:a:num_frames Input should be less than"),
        ('{"a": {"duration": 9}}', "train.json:a:num_frames Field required"),
        ('{"a": {"duration": 99, "num_frames": 98}}', "num_frames counts 10 frames per second, so 98 is too few"),
        ('{"a": {"subset": "test", "duration": 9, "num_frames": 98}}', "a:subset says 'test' in the file of 'train'"),
        ('{"a": {"subset": "dev", "duration": 9, "num_frames": 98}}', "a:subset Input should be 'train', 'val' or"),
        ('{"../../etc/x": %s}', "train.json:../../etc/x video id ../../etc/x has an empty, '.' or '..' part"),
        ('{"a\\u0000b": %s}', "has control characters"),
        ('{"\\ud800": %s}', "has control characters or broken Unicode"),
        ('{"a": ' + "9" * 5000 + "}", "train.json is not usable JSON"),
        ("[" * 200_000, "train.json is not usable JSON"),
        (b"\xff\xfe{\x00}\x00", "train.json is not UTF-8 text"),
    ],
)
def test_a_broken_lvu_file_is_named_by_file_key_and_field(tmp_path: Path, content: str | bytes, expected: str) -> None:
    text = content.replace("%s", GOOD_VIDEO) if isinstance(content, str) else content
    found = problems(lvu, tmp_path, text)
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"answer": ""}, "0:answer String should have at least 1 character; got ''"),
        ({"answer": " \t"}, "0:answer String should have at least 1 character"),
        ({"answer": 3.5}, "0:answer Input should be a valid string; got 3.5"),
        ({"answer": True}, "0:answer Input should be a valid string; got True"),
        ({"answer": None}, "0:answer Input should be a valid string; got None"),
        ({"question": "x" * 3000}, "0:question String should have at most 2000 characters"),
        ({"question": ["a"]}, "0:question Input should be a valid string"),
        ({"video": "/etc/passwd"}, "0 video id /etc/passwd is an absolute path"),
        ({"video": "x" * 300}, "is too long"),
        ({"video": 7.5}, "0:video Input should be a valid string"),
        ({"video": None}, "0:video Input should be a valid string"),
        ({"frame_length": float("nan")}, "0:frame_length Input should be a valid integer; got nan"),
        ({"question_id": "1"}, "0 question_id '1' differs from its key"),
    ],
)
def test_a_broken_question_is_named_by_file_key_and_field(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    found = problems(qa, tmp_path, json.dumps({"0": {**json.loads(GOOD_QUESTION), **change}}))
    assert len(found) == 1
    assert expected in found[0]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    dataset = lvu(tmp_path, b"\xef\xbb\xbf{\r\n" + f'"a": {GOOD_VIDEO}'.encode() + b"\r\n}\r\n")
    assert [sample.video_id for sample in dataset.samples("train")] == ["a"]


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text("{")
    found = problems(lvu, tmp_path, '{"a": {"duration": -1, "num_frames": "9"}, "b": 3, "..": ' + GOOD_VIDEO + "}")
    assert len(found) == 5
    assert {problem.split(" ")[0] for problem in found} == {
        "train.json:a:duration",
        "train.json:a:num_frames",
        "train.json:b",
        "train.json:..",
        "test.json:1",
    }


def test_a_long_list_of_problems_is_cut_in_the_message_and_kept_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(
        AnnotationError, match=r"(?s)500 problems in .*\.\.\. and 460 more\nCorrect that, then"
    ) as caught:
        lvu(tmp_path, json.dumps({str(n): 1 for n in range(500)}))
    assert len(caught.value.problems) == 500
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_one_video_with_two_lengths_is_a_problem(tmp_path: Path) -> None:
    longer = GOOD_QUESTION.replace("98", "99")
    (found,) = problems(qa, tmp_path, f'{{"0": {GOOD_QUESTION}, "1": {longer}}}')
    assert found == "qa_test.json:1 video v has 99 frames here and 98 in qa_test.json:0"


def test_a_file_over_the_size_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_files, "MAX_FILE_BYTES", 50)
    (found,) = problems(lvu, tmp_path, f'{{"a": {GOOD_VIDEO}}}')
    assert found == "train.json has 81 bytes; at most 50 are read"


def test_a_pipe_or_a_folder_in_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.json")
    (tmp_path / "val.json").mkdir()
    with pytest.raises(AnnotationError) as caught:
        LvuDataset(DataConfig(annotations=str(tmp_path), task="director"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("dataset", [LvuDataset, MsvdQaDataset])
@pytest.mark.parametrize(("path", "words"), [("", "is not set"), ("nowhere", "does not exist")])
def test_absent_annotations_name_the_setting(dataset: Any, path: str, words: str) -> None:
    with pytest.raises(AnnotationError, match=rf"{words}(?s:.*)--set data\.annotations="):
        dataset(DataConfig(annotations=path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["subset", "duration", "num_frames", "director", "question", "answer", "video", "frame_length"]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.text(max_size=6), st.dictionaries(FIELDS, JSON, max_size=8) | JSON, max_size=4) | JSON)
def test_whatever_the_json_says_the_outcome_is_a_dataset_or_an_annotation_error(tmp_path: Path, value: object) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    try:
        dataset = ClipsDataset(DataConfig(annotations=str(path), task="director"))
    except AnnotationError:
        return
    assert set(dataset.splits) <= {"train", "val", "test"}


@pytest.mark.parametrize(
    "video_id",
    ["-4wsuPCjDBc_5_15", "видео 🎬 名前 ü & 'quote'", "a b", "sub/folder/a", "a.b..c", "x" * 240, ";rm -rf ~", "$(id)"],
)
def test_ids_that_stay_below_a_root_are_kept_as_they_are(video_id: str) -> None:
    assert safe_id(video_id) == video_id


@pytest.mark.parametrize(
    "video_id",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        "/etc/passwd",
        "a\\b",
        "a\nb",
        "a\0b",
        "\ud800",
        "a\u2028b",
        "x" * 241,
        "a/" * 16 + "a",
    ],
)
def test_ids_that_could_leave_a_root_are_refused(video_id: str) -> None:
    with pytest.raises(ValueError, match="video id"):
        safe_id(video_id)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_safe_id_always_names_something_below_the_root(video_id: str) -> None:
    try:
        safe_id(video_id)
    except ValueError:
        return
    root = "/some/root"
    assert os.path.normpath(os.path.join(root, video_id)).startswith(root + "/")
