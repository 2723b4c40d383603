"""A folder of somebody's own videos, from the command line: with annotations, without any, and with some."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline import inputs, presets
from pipeline.cli import app
from pipeline.errors import ConfigError
from pipeline.overrides import apply
from tests.pipeline.conftest import SEEDED, options_of


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--json"])


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three short videos, in a place without anything else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for number, video in enumerate(sorted((world / "videos").glob("*.mp4"))[:3]):
        shutil.copy(video, tmp_path / "mine" / f"clip{number}.mp4")
    return tmp_path / "mine"


def extract(*sets: str) -> dict[str, object]:
    done = run("extract-clip", *options_of([*SEEDED, "data.fps=0.5", *sets]), "--cache", "C", "--device", "cpu")
    assert done.exit_code == 0, done.output
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_own_videos_without_annotations_are_extracted_whole_and_never_meet_those_of_the_miniature(folder: Path) -> None:
    result = extract("data.name=clips", f"data.videos={folder}")
    assert (result["videos"], result["failed"]) == (3, 0)
    assert result["warnings"] == ["no annotations: features can be extracted, nothing can be trained or scored"]
    again = run("train-student", *options_of([*SEEDED, f"data.videos={folder}"]), "--cache", "C", "--device", "cpu")
    assert again.exit_code == 2
    assert again.stderr.endswith("--set data.annotations=FILE_OR_FOLDER\n")


def test_videos_that_no_annotation_names_are_counted(folder: Path) -> None:
    Path("labels.csv").write_text("video,mood,split\nclip0.mp4,calm,train\nclip2,loud,test\n")
    result = extract(f"data.videos={folder}", "data.annotations=labels.csv", "data.task=mood")
    assert result["videos"] == 2
    assert "1 of 3 videos in data.videos have no annotation here and are left out: clip1" in str(result["warnings"])


def test_the_drawn_annotations_stay_with_the_drawn_videos() -> None:
    base = presets.miniature()
    assert apply(base, ["data.fps=4"]).data.annotations == base.data.annotations
    assert apply(base, [f"data.videos={base.data.videos}"]).data.annotations == base.data.annotations
    assert apply(base, ["data.videos=mine"]).data.annotations == ""
    assert apply(base, ["data.videos=mine", "data.annotations=a.json"]).data.annotations == "a.json"
    lvu = presets.lvu("scene")
    assert apply(lvu, ["data.videos=mine"]).data.annotations == lvu.data.annotations


def test_videos_that_are_not_drawn_yet_name_the_command_that_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Draw them:  pipeline synth$"):
        inputs.load_dataset(presets.miniature())
