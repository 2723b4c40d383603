"""Numbers know what they were made from: every input of a number against everything that uses one.

``MATRIX`` says for each pair what happens when the input changes: the consumer refuses (R) and names it, works anew
from what is there now and says so (N), or gives what it gave before (=), since the input does not reach it. No cell is
empty.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cache_schema.errors import CacheError
from pipeline import compose, presets, provenance
from pipeline.ablate import ablate
from pipeline.baselines import baselines
from pipeline.diagnose import diagnose
from pipeline.errors import ConfigError
from pipeline.overrides import apply
from pipeline.report.build import report
from pipeline.runs import RunFolder
from pipeline.scoring import compare
from pipeline.variants import make_variants
from stages.config import PipelineConfig
from stages.data.annotations import AnnotationError
from tests.conftest import PROJECT
from tests.pipeline.conftest import QUIET

CACHE = Path("cache")
SETTINGS = (  # relative paths: the folder of a study moves as a whole
    *("data.videos=videos", "data.annotations=qa", "decode.llm=llm", "student.init=seed:0"),
    *("clip.weights=seed:0", "teacher.weights=seed:0", "data.num_frames=3", "student.num_layers=4", "align.levels=3-5"),
    *("train.epochs=1", "train.max_steps=2", "train.batch_size=4", "train.save_every=1", "train.warmup_steps=0"),
    *("train.select=best_val", "decode.num_beams=1", "decode.num_return=1"),
)
KEPT = {"train": 8, "val": 4, "test": 6}  # questions of a split


def config_of(*sets: str) -> PipelineConfig:
    return apply(presets.miniature(), [*SETTINGS, *sets])


def variants(*sets: str) -> Any:
    return make_variants(config_of(*sets), vary=["train.lambda_kd=0,1"])[0]


# ---------------------------------------------------------------- what uses a number


@dataclass
class Outcome:
    """What a consumer did: its numbers, and what it said."""

    numbers: Any = None
    words: str = ""
    anew: bool = False
    refused: bool = field(default=False)

    @property
    def letter(self) -> str:
        return "R" if self.refused else "N" if self.anew else "="


def train(out: str, *sets: str) -> Outcome:
    compose.train(config_of(*sets), cache=CACHE, out=Path(out), **QUIET)
    return Outcome(RunFolder.open(Path(out)).tensors_sha256("final"))


def ablation(*sets: str) -> Outcome:
    found = ablate(variants(*sets), cache=CACHE, out=Path("ablation"), memory=None, **QUIET)
    aside = sorted(path.name for path in Path("ablation").rglob("predictions-test-*"))
    return Outcome([(row["variant"], row["k"], row["n"]) for row in found["variants"]], " ".join(aside), bool(aside))


def evaluate(*sets: str) -> Outcome:
    given = [item for item in sets if not item.startswith(provenance.IGNORED)]  # the others are refused by name
    found = compose.evaluate(Path("done"), split="test", checkpoint=None, sets=given, **QUIET)
    return Outcome(
        (found["n"], found["correct"], found["made_from"]), " ".join(found["warnings"]), not found["resumed"]
    )


def fit_baselines(*sets: str) -> Outcome:
    options: Any = {"split": "test", "names": ["majority", "clip_mean"], "dry_run": False, "progress": lambda *_: None}
    found = baselines(config_of(*sets), cache=CACHE, out=Path("baselines"), **options)
    assert len(found["baselines"]) == 2
    return Outcome([part["correct"] for part in found["baselines"].values()], "", found["fitted"] > 0)


def look(*_: str) -> Outcome:
    before = json.loads(Path("done/diagnostics.json").read_text())
    diagnose(Path("done"), split="test", samples=8, checkpoint="", device="cpu", progress=lambda *_: None)
    now = json.loads(Path("done/diagnostics.json").read_text())
    return Outcome(now["levels"], "", now["made_from"] != before["made_from"])


def compare_runs(*_: str) -> Outcome:
    found = compare([Path("done"), Path("other")], split="test")
    return Outcome((found["variants"], found["pairs"], found["answers"]), " ".join(found["warnings"]))


def write_report(*_: str) -> Outcome:
    found = report([Path("done"), Path("other")], out=Path("page.html"), shown=0, progress=lambda *_: None)
    left_out = " ".join(found["warnings"])
    if left_out:  # what is refused of one run is named, and the page is made of the others
        raise ConfigError(left_out)
    return Outcome((found["answers"], Path("page.html").read_text()))


CONSUMERS: dict[str, Callable[..., Outcome]] = {  # tables first: they are of the answers that are there
    "compare": compare_runs,
    "report": write_report,
    "resume": lambda *sets: train("half", *sets),
    "done": lambda *sets: train("done", *sets),
    "ablate": ablation,
    "evaluate": evaluate,
    "baselines": fit_baselines,
    "diagnose": look,
}


# ---------------------------------------------------------------- what a number is made from


def edit(split: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    """Change the annotations of a split in place; ``change`` gets entry by id."""

    def apply_it() -> None:
        path = Path(f"qa/qa_{split}.json")
        entries = json.loads(path.read_text())
        path.write_text(json.dumps(change(entries) or entries))

    return apply_it


def last(entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = list(entries.values())[-1]
    return found


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: last(entries).__setitem__(name, value)


def renamed(entries: dict[str, Any]) -> None:
    key = list(entries)[-1]
    entries["0009999"] = entries.pop(key) | {"question_id": "0009999"}


def swap(entries: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(entries.items()))


def dropped(entries: dict[str, Any]) -> None:
    entries.pop(list(entries)[-1])


def extended(entries: dict[str, Any]) -> None:
    entries["0009999"] = last(entries) | {"question_id": "0009999", "question": "what is new here?"}


def other_video(entries: dict[str, Any]) -> None:
    other = next(entry for entry in entries.values() if entry["video"] != last(entries)["video"])
    last(entries).update({key: other[key] for key in ("video", "frame_length")})


def shorter(entries: dict[str, Any]) -> None:
    video = last(entries)["video"]
    for entry in entries.values():
        if entry["video"] == video:
            entry["frame_length"] = 30


FIELDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "question": set_field("question", "what is it called?"),
    "answer": set_field("answer", "nothing"),
    "answer_type": set_field("answer_type", "whose"),
    "video": other_video,
    "frame_length": shorter,
    "question_id": renamed,
    "order": swap,
    "an entry less": dropped,
    "an entry more": extended,
}


def replace_video() -> None:
    one, two = sorted(Path("videos").iterdir())[:2]
    shutil.copy(two, one)


def replace_videos_and_extract() -> None:
    """Every file becomes another one with the same pictures, and the cache follows."""
    for file in Path("videos").iterdir():
        with file.open("ab") as video:
            video.write(b"\0\0\0\x08free")  # an empty box: padding
    shutil.rmtree(CACHE)
    extract()


def extract(*sets: str) -> None:
    options = {"workers": 0, "retry_failed": False, "splits": [], **QUIET}
    compose.extract(config_of(*sets), which="both", cache=CACHE, **options)


def extract_otherwise() -> None:
    shutil.rmtree(CACHE)
    extract("clip.weights=seed:1")


def swap_llm() -> None:
    file = Path("llm/model.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})


def move_annotations() -> None:
    Path("qa").rename("questions")


def edit_config(folder: str) -> None:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["student"]["memory_len"] = 3
    path.write_text(json.dumps(config))


def edit_configs() -> None:
    for folder in ("half", "done", *(str(path.parent) for path in Path("ablation").glob("*/config.json"))):
        edit_config(folder)


def foreign_checkpoint() -> None:
    """Whole checkpoints of another run."""
    for folder in ("half", "done", *(str(path.parent) for path in Path("ablation").glob("*/config.json"))):
        shutil.rmtree(Path(folder) / "checkpoints")
        shutil.copytree("other/checkpoints", Path(folder) / "checkpoints")


@dataclass(frozen=True)
class Row:
    """An input of a number: how it changes, what is set beside, and what each consumer does then."""

    cells: str  # one letter per consumer, in the order of CONSUMERS
    change: Callable[[], None] = lambda: None
    sets: tuple[str, ...] = ()
    named: str = ""  # what refusals say


QUESTIONS_LEARNED = "==RRR=N="  # a student learns from them or is selected by them; what it answers stays
# What was answered stays answered: tables are of the questions as they were, and say so by the digest.
QUESTIONS_TEST = "====NNNN"
MATRIX: dict[str, Row] = {
    **{
        f"{split}: {name}": Row(QUESTIONS_LEARNED, edit(split, change), named=f"{split} questions")
        for split in ("train", "val")
        for name, change in FIELDS.items()
    },
    **{f"test: {name}": Row(QUESTIONS_TEST, edit("test", change)) for name, change in FIELDS.items()},
    "annotations moved": Row("========", move_annotations, ("data.annotations=questions",)),  # noted on resuming
    "video file": Row("==RRR===", replace_video, named="replaced"),
    "video file, extracted again": Row("==RRRNNN", replace_videos_and_extract, named="other video files"),
    "spec field": Row("==RRRRNR", extract_otherwise, named="weights"),
    "language model": Row("==RRRN==", swap_llm, named="decode.llm"),
    "config.json": Row("RRRRRR=R", edit_configs, named="student.memory_len"),
    "checkpoint": Row("RRRRRR=R", foreign_checkpoint, named="checkpoint"),
    "data": Row("==RRRNN=", sets=("data.num_frames=2",), named="data.num_frames"),
    "data, speed": Row("========", sets=("data.io=pread",)),
    "clip": Row("==RRRRR=", sets=("clip.layer=4",), named="layer"),
    "teacher": Row("==RRR===", sets=("teacher.timestep=7",), named="timestep"),
    "extract": Row("========", sets=("extract.batch_size=8",)),
    "student": Row("==RRRN==", sets=("student.memory_len=3",), named="student.memory_len"),
    "align": Row("==RRR===", sets=("align.head=linear",), named="align.head"),
    "train": Row("==RRR===", sets=("train.lr=0.5",), named="train.lr"),
    "decode": Row("==RRRN==", sets=("decode.repetition_penalty=1",), named="decode.repetition_penalty"),
}


# ---------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def study(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a study leaves: a finished run, a stopped one, an ablation, baselines, diagnostics."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(world / "videos", folder / "videos")
    shutil.copytree(PROJECT / "stages/miniature/llm", folder / "llm")
    (folder / "qa").mkdir()
    for split, count in KEPT.items():
        entries = json.loads((world / f"msvd_qa/qa_{split}.json").read_text())
        kept = list(entries.items())[:: len(entries) // count][:count]  # of several videos
        (folder / f"qa/qa_{split}.json").write_text(json.dumps(dict(kept)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extract()
        train("done")
        train("other", "train.lr=0.001")
        shutil.copytree("done", "half")
        shutil.rmtree("half/checkpoints/step-000002")
        for marker in ("best", "final"):
            Path(f"half/checkpoints/{marker}.json").unlink(missing_ok=True)
        Path("half/checkpoints/latest.json").write_text(json.dumps({"folder": "step-000001", "step": 1}))
        compose.evaluate(Path("other"), split="test", checkpoint=None, **QUIET)
        for consumer in (evaluate, ablation, fit_baselines):
            consumer()
        Path("done/diagnostics.json").write_text(json.dumps({"made_from": None}))
        look()
    return folder


@pytest.fixture
def copied(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in another place, as the working folder."""
    shutil.copytree(study, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    return tmp_path / "moved"


@pytest.fixture(scope="module")
def before(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    """What every consumer gives where nothing has changed."""
    copy = tmp_path_factory.mktemp("before") / "moved"
    shutil.copytree(study, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        return {name: consumer() for name, consumer in CONSUMERS.items()}


def test_nothing_is_done_twice_where_nothing_has_changed(before: Mapping[str, Outcome]) -> None:
    assert {name: outcome.letter for name, outcome in before.items()} == dict.fromkeys(CONSUMERS, "=")


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.usefixtures("copied")
def test_what_uses_a_number_notices_that_its_input_has_changed(name: str, before: Mapping[str, Outcome]) -> None:
    row = MATRIX[name]
    row.change()
    found: dict[str, Outcome] = {}
    for consumer, run in CONSUMERS.items():
        try:
            found[consumer] = run(*row.sets)
        except (ConfigError, CacheError, AnnotationError) as error:
            found[consumer] = Outcome(words=str(error), refused=True)
    assert "".join(outcome.letter for outcome in found.values()) == row.cells, {k: v.words for k, v in found.items()}
    for consumer, outcome in found.items():
        if outcome.refused:
            assert row.named in outcome.words, (consumer, outcome.words)
        if outcome.letter == "=" and (not row.sets or row.cells == "=" * len(CONSUMERS)):
            assert outcome.numbers == before[consumer].numbers, consumer


@pytest.mark.parametrize("name", [name for name, row in MATRIX.items() if row.sets and row.cells[0] == "R"])
@pytest.mark.usefixtures("copied")
def test_runs_that_differ_in_more_than_their_seed_are_two_variants(name: str) -> None:
    done = RunFolder.open(Path("done"))
    known = done.provenance
    assert known is not None
    for folder, sets in (("seed", ("train.seed=1",)), ("changed", ("train.seed=1", *MATRIX[name].sets))):
        config = config_of(*sets)
        facts = replace(known, settings=provenance.settings_of(config))
        RunFolder.create(Path(folder), config, provenance=facts)
    same, changed = (provenance.variant_settings(RunFolder.open(Path(folder))) for folder in ("seed", "changed"))
    assert same == provenance.variant_settings(done)
    assert changed != same


@pytest.mark.usefixtures("copied")
def test_answers_of_another_library_version_are_given_anew_and_a_comparison_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = provenance.packages()
    monkeypatch.setattr(provenance, "packages", lambda: real | {"transformers": "0.0.1"})
    found = evaluate()
    assert found.anew
    assert f"transformers: '{real['transformers']}' then, '0.0.1' now" in found.words
    assert "other versions than" in compare_runs().words
