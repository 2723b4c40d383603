"""One page from runs: its numbers, what it does with what is missing or hostile, and how a real browser sees it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from pipeline import presets
from pipeline.cli import app
from pipeline.diagnose import FORMAT
from pipeline.errors import ConfigError
from pipeline.overrides import apply
from pipeline.report import answer, cost, insight, paper, videos
from pipeline.report.build import report
from pipeline.report.read import Variant, label_of, read_studies
from pipeline.runs import RunFolder
from stages.config import DataConfig, PipelineConfig
from stages.data.frames import open_source
from stages.decode.evaluate import line_of
from stages.decode.metrics import Prediction
from stages.decode.statistics import paired, share_interval
from tests.conftest import PROJECT

TRUTHS = ("northwest", "northeast", "southwest", "southeast")
HOSTILE = "<script>document.title='owned'</script> {{7*7}} =cmd() $\\frac{1}{ \x1b[31mred\x1b[0m \u202egnp"
Run = Callable[..., Path]
DRAWN = "w3s0v0000"  # ids of the small world's videos begin so
LOOKED_AT = {
    "format": FORMAT,
    "num_frames": 9,
    "levels": {"constant": None, "cosine": {}, "cka": [], "similarity": None, "cka_teacher": []},
    "per_frame": {},
    "starts": None,
    "per_sample": {},
    "operations": {},
}


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.quiet = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.quiet = tag == "style"

    def handle_endtag(self, _tag: str) -> None:
        self.quiet = False

    def handle_data(self, data: str) -> None:
        if not self.quiet:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make(paths: Path | Sequence[Path], out: Path, shown: int = 3) -> Page:
    roots = [paths] if isinstance(paths, Path) else list(paths)
    report(roots, out=out, shown=shown, progress=lambda *_: None)
    return Page(out.read_text())


@pytest.fixture
def make_run(tmp_path: Path) -> Run:
    """A run folder in the real formats: eight questions about four videos, right where ``right`` says so."""

    def make(
        name: str,
        *sets: str,
        right: Sequence[int] | None = (0, 1, 2, 3, 4, 5, 6, 7),
        config: PipelineConfig | None = None,
        truths: Sequence[str] = TRUTHS,
        prompt: str = "what is the spot of the movie?",
        video: str = "v",
        records: Sequence[Mapping[str, Any]] = (),
    ) -> Path:
        data = [f"data.annotations={tmp_path}/none", f"data.videos={tmp_path}/none"]
        run = RunFolder.create(tmp_path / name, apply(config or presets.miniature(), [*data, *sets]))
        for record in records:
            run.log(record)
        if right is not None:
            run.predictions.write_bytes(
                b"".join(
                    line_of(
                        Prediction(
                            f"s{i}",
                            f"{video}{i // 2}",
                            run.config.data.task,
                            prompt,
                            truths[i % 4],
                            (truths[i % 4] if i in right else "no label",),
                        )
                    )
                    for i in range(8)
                )
            )
        return run.path

    return make


# ---------------------------------------------------------------- numbers


def test_the_scores_on_the_page_are_those_of_the_answers(make_run: Run, tmp_path: Path) -> None:
    make_run("runs/a", "train.lambda_kd=0", "train.seed=1", right=(0, 1, 2))
    make_run("runs/b", "train.lambda_kd=0", "train.seed=2", right=(0,))
    make_run("runs/c", "train.lambda_kd=1", "train.seed=1", right=(0, 1, 2, 3, 4))
    (study,) = read_studies([tmp_path / "runs"])
    result = answer.result_of(study)
    assert [(v.label, len(v.runs)) for v in study.variants] == [("λ = 0 (MA-LMM)", 2), ("λ = 1", 1)]
    base, kd = (result.scores[v.key] for v in study.variants)
    assert (base.n, base.correct, base.top1, base.per_seed) == (8, 2.0, 0.25, (3 / 8, 1 / 8))
    assert (kd.correct, kd.top1) == (5.0, 5 / 8)
    assert base.recalls["northwest"] == (0.5, 2)  # s0 by both seeds, s4 by none
    means = np.array([1, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert base.interval == share_interval(means, ["v0", "v0", "v1", "v1", "v2", "v2", "v3", "v3"])
    page = make(tmp_path / "runs", tmp_path / "page.html")
    assert "Does learning from the diffusion teacher make more answers right?" in page.text
    assert "+37.5 points" in page.text
    assert "No difference is shown." in page.text  # four videos cannot show one
    assert "With 1" not in page.text
    assert "8 questions about 4 test videos, 1 to 2 seeds per variant. With fewer than 10 seeds" in page.text


def test_a_difference_that_the_seeds_do_not_agree_on_is_not_called_one() -> None:
    """400 videos leave no doubt about these five trainings, but the next five may turn out otherwise."""
    videos = [f"v{i}" for i in range(400)]
    agree, disagree = ([0.1] * 5, [0.4, 0.4, -0.2, -0.2, 0.1])
    base = np.repeat(np.arange(400) % 2, 5).reshape(400, 5).T
    for gains, called in ((agree, True), (disagree, False)):
        other = base.copy()
        for row, gain in zip(other, gains, strict=True):
            flipped = np.flatnonzero(row == (gain < 0))[: round(abs(gain) * 400)]
            row[flipped] = int(gain > 0)
        test = paired(base, other, videos, same_seeds=True)
        assert (test.difference, test.p) == (pytest.approx(0.1), pytest.approx(0, abs=1e-3))
        variants = [Variant(key, key) for key in ("a", "b")]
        assert answer.Contrast(variants[1], variants[0], test, test.p).sure is called


@pytest.mark.parametrize(("seeds", "verdict"), [((1,), "One seed cannot tell."), ((1, 2), "Yes.")])
def test_one_seed_a_variant_decides_nothing(
    make_run: Run, tmp_path: Path, seeds: tuple[int, ...], verdict: str
) -> None:
    for seed in seeds:
        make_run(f"runs/a{seed}", "train.lambda_kd=0", f"train.seed={seed}", right=())
        make_run(f"runs/b{seed}", "train.lambda_kd=1", f"train.seed={seed}", right=range(8))
    result = answer.result_of(read_studies([tmp_path / "runs"])[0])
    (contrast,) = result.contrasts
    assert contrast.test.difference == 1
    sure = replace(result, contrasts=(replace(contrast, p_holm=0.001),))  # four videos alone have a p of 1/8
    assert answer.headline(sure).verdict == verdict
    tested = {1: "p over videos = 0.001.", 2: "p over videos = 0.001, over seeds 0.5."}
    assert answer.headline(sure).sentences[1].endswith(tested[len(seeds)])


def test_one_run_alone_is_no_comparison(make_run: Run, tmp_path: Path) -> None:
    page = make(make_run("a", right=(0, 1)), tmp_path / "page.html")
    assert "How many of the test questions does this student answer?" in page.text
    assert "25.0 % of 8." in page.text
    assert "p (Holm)" not in page.text


def test_settings_without_effect_do_not_make_two_variants(make_run: Run, tmp_path: Path) -> None:
    make_run("runs/a", "train.lambda_kd=0", "align.levels=13")
    make_run("runs/b", "train.lambda_kd=0", "align.levels=all", "teacher.grid=2", "train.seed=7")
    make_run("runs/c", "align.levels=all")
    (study,) = read_studies([tmp_path / "runs"])
    assert [len(v.runs) for v in study.variants] == [2, 1]
    assert study.differing == ["train.lambda_kd"]


def test_an_ablation_says_itself_which_runs_differ_in_their_seed_only(make_run: Run, tmp_path: Path) -> None:
    for seed, weight in ((0, 0.9), (1, 0.8)):
        sets = ("align.weights=uniform", f"align.uniform_weight={weight}", f"train.seed={seed}")
        make_run(f"out/weights=matched_seed={seed}", *sets)
    assert len(read_studies([tmp_path / "out"])[0].variants) == 2
    arms = [{"variant": f"weights=matched_seed={s}", "arm": "weights=matched"} for s in (0, 1)]
    (tmp_path / "out" / "ablation.json").write_text(json.dumps({"variants": arms}))
    for root in ("out", "."):
        (study,) = read_studies([tmp_path / root])
        assert [len(v.runs) for v in study.variants] == [2]


@pytest.mark.parametrize("table", ["[]", "{", '{"variants": [{"variant": []}]}', '{"variants": [1]}'])
def test_a_damaged_table_of_an_ablation_hides_no_run(make_run: Run, tmp_path: Path, table: str) -> None:
    make_run("out/a")
    make_run("out/b", "train.lambda_kd=0")
    (tmp_path / "out" / "ablation.json").write_text(table)
    assert len(read_studies([tmp_path / "out"])[0].variants) == 2


def test_labels_name_what_differs() -> None:
    settings = {"train.lambda_kd": 0.5, "align.levels": [8, 9, 10], "train.lr": 0.001}
    assert label_of(settings, ["train.lambda_kd", "align.levels"]) == "λ = 0.5, levels 8–10"
    assert label_of({"train.lambda_kd": 0.0}, ["train.lambda_kd"]) == "λ = 0 (MA-LMM)"
    assert label_of({**settings, "align.levels": [1, 5]}, ["align.levels"]) == "levels 1, 5"


def test_without_the_cache_every_frame_is_encoded_at_every_step(make_run: Run, tmp_path: Path) -> None:
    """Two runs of 10 steps of 16 samples of 9 frames: 320 samples; 100 distinct frames; counts by hand."""
    counted = {"training_sample": 50.0, "encoder_frame": 3.0, "teacher_frame": 7.0}
    seen = LOOKED_AT | {"operations": counted}
    for name, value in (("a", 0), ("b", 1)):
        folder = make_run(f"runs/{name}", f"train.lambda_kd={value}", records=[{"step": 10, "loss_ce": 1.0}])
        (folder / "diagnostics.json").write_text(json.dumps(seen))
    (study,) = read_studies([tmp_path / "runs"])
    found = cost.cost_of(study, distinct_frames=100)
    assert found.training == 2 * 160 * 50
    assert found.encoding_each_time == 160 * 9 * (3 + 10)  # the run without a teacher needs no teacher frames
    assert found.encoding_once == 100 * 10
    assert found.ratio == pytest.approx((16000 + 18720) / (16000 + 1000))
    assert cost.cost_of(study, distinct_frames=None).ratio is None


def test_the_claim_about_alike_levels_is_read_off_two_variants_that_differ_in_their_levels_only(
    make_run: Run, tmp_path: Path
) -> None:
    arms = {
        "a": (0.83, "align.levels=all"),
        "b": (0.58, "align.levels=8-13"),
        "c": (0.95, "align.levels=8-13", "train.lambda_kd=10"),
    }
    for name, (alike, *sets) in arms.items():
        folder = make_run(f"runs/{name}", *sets)
        levels = {"constant": None, "cosine": {}, "cka": [], "similarity": alike, "cka_teacher": []}
        seen = LOOKED_AT | {"levels": levels}
        (folder / "diagnostics.json").write_text(json.dumps(seen))
    (study,) = read_studies([tmp_path / "runs"])
    (told,) = insight._findings(study, study.variants)
    assert told.endswith("this study agrees: 0.83 with all levels, 0.58 with levels 8–13.")
    study.variants = [variant for variant in study.variants if variant.runs[0].path.name != "b"]
    (told,) = insight._findings(study, study.variants)
    assert told.endswith("this study has no pair that could show it.")


def test_the_alarm_is_on_the_page(make_run: Run, tmp_path: Path) -> None:
    weights = [{f"w/{u}": 0.5 + step / 10 for u in range(8, 14)} for step in range(1, 6)]
    cosines = {f"kd/{u}": -0.9 for u in range(8, 14)}
    records = [{"step": i + 1, "loss_ce": 2.0} | w | cosines for i, w in enumerate(weights)]
    page = make(make_run("a", records=records), tmp_path / "page.html")
    assert "all 6 level weights are saturated from step 5 on" in page.text
    calm = make(make_run("b", "align.weights=uniform", records=records), tmp_path / "calm.html")
    assert "Alarm" not in calm.text  # constant weights are a setting


# ---------------------------------------------------------------- the paper


def test_the_papers_numbers_are_the_papers(shared_data: Path) -> None:
    text = (shared_data.parent / "paper" / "diff-lmm.md").read_text()
    lines = [line.replace("<u>", "").replace("</u>", "").split("\t") for line in text.splitlines()]
    rows = [(cells[0], [cell for cell in cells[1:] if cell]) for cells in lines]

    def printed(name: str, count: int) -> list[float]:
        """The first row of a table with ``count`` numbers whose name begins so."""
        return next([float(v) for v in row[:7]] for start, row in rows if start.startswith(name) and len(row) == count)

    assert printed("MA-LMM", 8) == list(paper.TABLE_1_MALMM)
    assert printed("Diff-LMM (Ours)", 8) == list(paper.TABLE_1_DIFFLMM)
    assert printed("MA-LMM", 2) == [base for _, base, _ in paper.TABLE_2.values()]
    assert printed("Diff-LMM (Ours)", 2) == [diff for _, _, diff in paper.TABLE_2.values()]
    assert [*printed("MA-LMM", 1), *printed("Diff-LMM (Ours)", 1)] == list(paper.TABLE_3)
    assert printed("Top-1 Acc.", 2) == list(paper.TABLE_4.values())
    assert "15.3%" in text


@pytest.mark.parametrize(
    ("base", "diff", "n"), list(zip(paper.TABLE_1_MALMM, paper.TABLE_1_DIFFLMM, paper.WINDOWS, strict=True))
)
def test_every_figure_of_table_1_is_a_whole_number_of_windows(base: float, diff: float, n: int) -> None:
    for value in (base, diff):
        assert any(abs(100 * k / n - value) < 0.051 for k in range(n + 1)), (value, n)


def test_only_runs_on_lvu_stand_in_the_columns_of_lvu(make_run: Run, tmp_path: Path) -> None:
    lvu = presets.get("lvu-relationship")
    truths = ("friend", "husband wife", "friend", "friend")
    make_run("runs/lvu", config=lvu, right=(0, 1, 2), truths=truths)
    make_run("runs/world", "data.task=relationship", right=(0,), video=DRAWN)
    make_run(
        "runs/mine", "data.task=relationship", "data.annotations=mine.json", right=(0, 1), truths=("a", "b", "c", "d")
    )
    studies = read_studies([tmp_path / "runs"])
    results = [answer.result_of(study) for study in studies]

    def scores(variant: Any) -> Any:
        return next((r.of(variant) for r in results if variant in r.study.variants), None)

    one, two, *_ = paper.tables(studies, scores)
    cells = dict(one.rows)["Relationship (n\u00a0=\u00a091)"]
    assert [cell.text for cell in cells] == ["58.2", "69.2", "not run", "37.5", "not run", "12.5"]
    assert cells[3].kind == "ours"
    assert cells[3].note.startswith("3 of 8")
    wives = dict(two.rows)["Husband & wife"]
    assert (wives[3].text, wives[3].note) == ("50.0", "1 of 2")
    make_run("others/half", "train.lambda_kd=0.5", config=lvu, right=(0, 1, 2), truths=truths)
    (other,) = read_studies([tmp_path / "others"])
    wives = dict(paper.tables([other], answer.result_of(other).of)[1].rows)["Husband & wife"]
    assert wives[3].note == "half: 1 of 2"  # another λ than the paper's


def test_beside_a_point_of_the_paper_stands_the_run_that_is_the_papers_in_everything_else(
    make_run: Run, tmp_path: Path
) -> None:
    """All three studies on one page, with runs that must not pass for a point of any."""
    sixth = "align.uniform_weight=0.166667"
    arms: dict[str, tuple[str, ...]] = {
        "a-no-memory": ("train.lambda_kd=0", "student.name=no_memory"),  # 1 right, the others one more each
        "b-malmm": ("train.lambda_kd=0",),
        "c-low": ("train.lambda_kd=0.1",),
        "d-centred": ("train.lambda_kd=1", "align.target_norm=center"),
        "e-equal": ("train.lambda_kd=1", "align.weights=uniform", "align.uniform_weight=0.98"),
        "f-average": ("train.lambda_kd=1", "align.weights=uniform", sixth),
        "g-all": ("train.lambda_kd=1", "align.levels=all"),
        "h-paper": ("train.lambda_kd=1",),
    }
    for number, (name, sets) in enumerate(arms.items()):
        make_run(f"runs/{name}", "data.task=relationship", *sets, right=range(number + 1), video=DRAWN)
    (study,) = read_studies([tmp_path / "runs"])
    result = answer.result_of(study)
    assert result.reference is not None
    assert result.reference.runs[0].path.name == "b-malmm"
    one, table_4, figure_3, figure_4 = paper.tables([study], result.of)

    def right(table: paper.Table) -> dict[str, str]:
        return {name: cells[-1].note.partition(" of")[0] for name, cells in table.rows if cells[-1].kind == "ours"}

    assert right(table_4) == {"Adaptive": "8", "Average, 1/M each": "6", "Equal, not 1/M": "5"}
    assert right(figure_3) == {"λ = 0": "2", "λ = 0.1": "3", "λ = 1": "8"}
    assert right(figure_4) == {"levels 8–13": "8", "levels 1–13 (all)": "7"}
    assert [cell.text for cell in dict(one.rows)["Relationship (n\u00a0=\u00a091)"][-2:]] == ["25.0", "100.0"]


def test_a_student_with_other_settings_than_the_papers_says_so_beside_the_paper(make_run: Run, tmp_path: Path) -> None:
    kinds = {"base": (0,), "low": (0.1,), "layer": (1, "teacher.layer=6"), "seeded": (1, "clip.weights=seed:0")}
    for number, (name, (weight, *sets)) in enumerate(kinds.items()):
        all_sets = ("data.task=relationship", f"train.lambda_kd={weight}", *sets)
        make_run(f"runs/{name}", *all_sets, right=range(number + 1), video=DRAWN)
    (study,) = read_studies([tmp_path / "runs"])
    one, *_, figure_3, figure_4 = paper.tables([study], answer.result_of(study).of)
    base, low = dict(one.rows)["Relationship (n\u00a0=\u00a091)"][-2:]
    assert base.note.startswith("1 of 8")
    assert low.note.startswith("λ = 0.1")
    assert ": 2 of 8" in low.note
    assert {cells[-1].text for _, cells in figure_4.rows} == {"not run"}
    assert dict(figure_3.rows)["λ = 1"][-1].text == "not run"
    study.variants = [v for v in study.variants if v.runs[0].path.name == "seeded"]
    one = paper.tables([study], answer.result_of(study).of)[0]
    assert "with clip.weights=seed:0: 4 of 8" in dict(one.rows)["Relationship (n\u00a0=\u00a091)"][-1].note


def test_beside_anybodys_videos_stands_nothing_of_the_paper(make_run: Run, tmp_path: Path) -> None:
    """The README's flow: the miniature's preset on other videos, with open questions."""
    sets = ("data.videos=data/birds", "data.annotations=birds/asked.json")
    for weight in (0, 0.5, 1):
        make_run(f"runs/{weight}", *sets, f"train.lambda_kd={weight}", right=(0, 1))
    for folder in (tmp_path / "runs").iterdir():  # a question type, as the QA layout has it
        answers = folder / "predictions.jsonl"
        answers.write_text(answers.read_text().replace('"group": "spot"', '"group": "what"'))
    page = make(tmp_path / "runs", tmp_path / "page.html")
    assert "Videos in “birds”, questions of “asked.json”" in page.text
    for word in ("small world", "Table 1", "Table 4", "Figure 3", ", task", "LVU"):
        assert word not in page.text, word
    assert "Nothing has been published about these videos and questions" in page.text


@pytest.mark.parametrize(
    ("sets", "question"),
    [
        (("train.lambda_kd=1",), "Does learning from the diffusion teacher make more answers right?"),
        (
            ("train.lambda_kd=1", "teacher.weights=seed:0"),
            "Does learning from an untrained diffusion teacher make more answers right?",
        ),
        (
            ("train.lambda_kd=1", "teacher.name=depth"),
            "Does learning from the teacher “depth” make more answers right?",
        ),
        (
            ("train.lambda_kd=0", "student.name=no_memory"),
            "Does the kind of student change how many answers are right?",
        ),
    ],
)
def test_the_question_is_about_what_differs(
    make_run: Run, tmp_path: Path, sets: tuple[str, ...], question: str
) -> None:
    make_run("runs/a", "train.lambda_kd=0", right=(0,))
    make_run("runs/b", *sets, right=(0, 1))
    (study,) = read_studies([tmp_path / "runs"])
    assert answer.headline(answer.result_of(study)).question == question


def entries(path: Path, **splits: range) -> Path:
    """Videos v0, v1, … in LVU's layout, by split; ``every`` names none."""
    videos = {
        f"v{n}": {"duration": 6.0, "num_frames": 60, "spot": "northwest"} | ({} if s == "every" else {"subset": s})
        for s, numbers in splits.items()
        for n in numbers
    }
    path.write_text(json.dumps(videos))
    return path


def test_questions_of_the_training_set_are_said_to_be_so_first_and_nothing_is_tested(
    make_run: Run, tmp_path: Path
) -> None:
    annotations = entries(tmp_path / "all.json", every=range(8))
    for weight, right in ((0, ()), (1, range(8))):
        make_run(f"runs/{weight}", f"data.annotations={annotations}", f"train.lambda_kd={weight}", right=right)
    page = make(tmp_path / "runs", tmp_path / "page.html")
    assert "This is no test. Not held out: all 8 test questions are in train too" in page.text
    assert page.text.index("Not held out") < page.text.index("100.0 %")
    assert "p (Holm)" not in page.text
    assert "sign-flip" not in page.text
    assert "What these comparisons can show" not in page.text
    done = CliRunner().invoke(app, ["report", str(tmp_path / "runs"), "--json"])
    (held,) = json.loads(done.stdout)["held_out"]
    assert (held["held_out"], held["shared"]["train"]) == (False, {"samples": 8, "videos": 8})


def test_the_page_says_what_so_many_videos_and_seeds_can_show(make_run: Run, tmp_path: Path) -> None:
    for seed in range(5):
        make_run(f"runs/a{seed}", "train.lambda_kd=0", f"train.seed={seed}", right=range(seed))
        make_run(f"runs/b{seed}", "train.lambda_kd=1", f"train.seed={seed}", right=range(seed + 1))
    page = make(tmp_path / "runs", tmp_path / "page.html")
    assert "With 4 videos, no difference can reach p < 0.05; no p over 5 seeds falls below 0.062" in page.text
    assert "What these comparisons can show" in page.text


# ---------------------------------------------------------------- what is missing


def test_a_run_that_has_only_begun_gives_a_page_with_the_next_commands(make_run: Run, tmp_path: Path) -> None:
    folder = make_run("new", right=None)
    page = make(folder, tmp_path / "page.html")
    assert "Not answered yet." in page.text
    for command in ("train-student --out", "evaluate --run", "diagnose --run"):
        assert f"pipeline {command} {folder}" in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(make_run: Run, tmp_path: Path) -> None:
    good, bad = make_run("runs/a", "train.seed=1"), make_run("runs/b", "train.seed=2")
    (bad / "predictions.jsonl").write_text("{not json}\n")
    (bad / "diagnostics.json").write_text("[1, 2")
    (good / "metrics.jsonl").write_text("}\n")
    page = make(tmp_path / "runs", tmp_path / "page.html")
    assert "answers (damaged:" in page.text
    assert "diagnostics of the finished student (damaged:" in page.text
    assert "a training log (damaged:" in page.text
    assert "100.0 % of 8." in page.text


def test_without_videos_the_questions_are_shown_without_pictures(make_run: Run, tmp_path: Path) -> None:
    page = make(make_run("a"), tmp_path / "page.html")
    assert "img" not in page.tags
    assert page.text.count("No pictures:") == 3
    assert page.text.count("No pictures: 1 problem in data.annotations: ") == 3  # and which one it is
    assert "ground truth" in page.text


def test_one_unreadable_run_is_left_out_by_name_and_the_command_says_so(make_run: Run, tmp_path: Path) -> None:
    make_run("runs/good", right=(0, 1))
    (make_run("runs/torn") / "config.json").write_text('{"preset": "mini')
    (make_run("runs/foreign") / "config.json").write_text('{"preset": "miniature", "data": {"name": "nobody"}}')
    other = make_run("runs/other", "train.seed=3")
    (other / "sessions.jsonl").write_text('{"command": "train-student", "seconds"\n')
    (other / "diagnostics.json").write_text(json.dumps(LOOKED_AT | {"format": 99}))
    (tmp_path / "empty").mkdir()
    command = [
        "report",
        str(tmp_path / "runs"),
        str(tmp_path / "empty"),
        "--out",
        str(tmp_path / "page.html"),
        "--json",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3, done.output
    left_out = {Path(part["path"]).name: part["reason"] for part in json.loads(done.stdout)["left_out"]}
    assert set(left_out) == {"torn", "foreign", "sessions.jsonl", "diagnostics.json", "empty"}
    assert f"format 99; this version reads {FORMAT}" in left_out["diagnostics.json"]
    assert "left out: " in done.stderr
    page = Page((tmp_path / "page.html").read_text())
    assert "Left out. The page is made without these" in page.text
    assert str(tmp_path / "runs" / "torn") in page.text
    for name in ("good", "other"):
        shutil.rmtree(tmp_path / "runs" / name)
    with pytest.raises(ConfigError, match=r"no run can be read:\n.*foreign"):
        report([tmp_path / "runs"], out=None, shown=1, progress=lambda *_: None)


def test_no_run_is_an_error_with_a_command(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="pipeline train-student"):
            report([path], out=None, shown=1, progress=lambda *_: None)


def test_links_out_of_the_folder_are_not_followed(make_run: Run, tmp_path: Path) -> None:
    make_run("runs/inside")
    secret = make_run("elsewhere/secret", prompt="what is the secret?")
    (tmp_path / "runs" / "link").symlink_to(secret)
    assert "secret" not in make(tmp_path / "runs", tmp_path / "page.html").text


# ---------------------------------------------------------------- damage of any kind


def run_with_every_file(folder: Path, weight: int) -> None:
    """Small, and in the real formats: two frames, three levels."""
    sets = [f"train.lambda_kd={weight}", "data.annotations=none", "data.videos=none"]
    run = RunFolder.create(folder, apply(presets.miniature(), sets))
    (folder / "config.json").write_text(json.dumps(run.config.model_dump(mode="json")))
    for step in (1, 2, 3):
        run.log({"step": step, "loss_ce": 1.5, "val_top1": 0.5, "kd/8": -0.5, "w/8": 0.98, "probe/constant": 0.4})
    facts = {"digest": "ab", "encoder": "e", "weights": "w", "layer": 5, "dtype": "float16", "frame_shape": [3, 4]}
    run.note_session(
        {"command": "train-student", "seconds": 2.5, "cpu_seconds": 2.0, "bytes_read": 7, "features": {"tokens": facts}}
    )
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2"}, "python": "3", "commit": "ab"}))
    lines = [Prediction(f"s{i}", f"v{i}", "spot", "where?", TRUTHS[i], (TRUTHS[i * weight],)) for i in range(4)]
    run.predictions.write_bytes(b"".join(map(line_of, lines)))
    by_level = {"8": 0.5, "9": 0.6}
    levels = {"constant": 0.4, "similarity": 0.5, "cka": [[1.0, None], [0.5, 1.0]], "cka_teacher": [0.1, 0.2]}
    levels |= {"cosine": by_level, "centred": by_level, "weight": by_level, "saturated": by_level}
    sample = {"cosine": {"8": [0.5, 0.6]}, "attention": [0.4, 0.6], "slots": [[1.0, 0.0], [0.0, 1.0]]}
    found = {"format": FORMAT, "num_frames": 2, "levels": levels, "per_frame": {"8": [0.5, 0.6], "9": [0.1, None]}}
    found |= {"starts": [[0.0, 0.0], [1.0, 0.0]], "per_sample": {"s0": sample, "s1": sample}}
    found |= {"operations": {"training_sample": 10, "encoder_frame": 2, "teacher_frame": 3}}
    run.diagnostics.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def every_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run, one to be damaged, a baseline, and the table of an ablation."""
    root = tmp_path_factory.mktemp("every") / "runs"
    run_with_every_file(root / "sound", 0)
    run_with_every_file(root / "hurt", 1)
    (root / "probe").mkdir()
    shutil.copy(root / "hurt" / "predictions.jsonl", root / "probe")
    (root / "probe" / "probe.json").write_text(
        json.dumps({"probe": "clip_mean", "seed": 1, "not_fitted": {"who": {"samples": 2, "reason": "no val"}}})
    )
    (root / "ablation.json").write_text(json.dumps({"variants": [{"variant": "hurt", "arm": "x"}]}))
    return root


FILES = (
    *("hurt/config.json", "hurt/environment.json", "hurt/metrics.jsonl", "hurt/sessions.jsonl"),
    *("hurt/predictions.jsonl", "hurt/diagnostics.json", "probe/probe.json", "ablation.json"),
)


@contextlib.contextmanager
def instead(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_the_sound_folder_of_these_tests_is_read_whole(every_file: Path, tmp_path: Path) -> None:
    page = make(every_file, tmp_path / "page.html", shown=1)
    assert "damaged" not in page.text
    assert "Left out" not in page.text
    assert (
        "clip_mean: not fitted to 2 questions, where it gives the most frequent training answer (no val)" in page.text
    )
    for heading in ("Learning", "What the alignment does", "What the memory holds, and what is read"):
        assert heading in page.words


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_byte_leaves_the_other_runs_readable(every_file: Path, name: str) -> None:
    content = (every_file / name).read_bytes()
    left_out: list[Path] = []
    for length in range(len(content)):
        left_out.clear()
        with instead(every_file / name, content[:length]):
            studies = read_studies([every_file], lambda path, _: left_out.append(path))
        assert "sound" in {run.name for study in studies for run in study.runs}
        if name.endswith(".json") and name != "ablation.json" and length < len(content.rstrip()):
            assert left_out, length


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 0]) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("8"), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=20, deadline=None)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_value_of_any_other_type_in_any_file_still_gives_a_page(
    every_file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    lines = [json.loads(line) for line in (every_file / name).read_text().splitlines()] if "jsonl" in name else None
    whole = lines or json.loads((every_file / name).read_text())
    place = data.draw(st.sampled_from(places(whole)))
    changed = put(whole, place, data.draw(JSON))
    if lines and isinstance(changed, list):
        text = "".join(json.dumps(line) + "\n" for line in changed)
    else:
        text = json.dumps(changed)
    with instead(every_file / name, text.encode()):
        out = tmp_path_factory.mktemp("page") / "page.html"
        report([every_file], out=out, shown=1, progress=lambda *_: None)
    assert "sound" in out.read_text()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"\0" * 64, b'"text"', b"1e999"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_what_its_name_says_leaves_the_other_runs_readable(
    every_file: Path, name: str, content: bytes
) -> None:
    with instead(every_file / name, content + b"\n"):
        studies = read_studies([every_file])
    assert "sound" in {run.name for study in studies for run in study.runs}


# ---------------------------------------------------------------- strangers' texts


@pytest.fixture
def hostile(make_run: Run, tmp_path: Path) -> Path:
    """Two runs whose every free text is an attack: question, labels, a setting that names a variant, a folder."""
    truths = tuple(f"{HOSTILE} {i}" for i in range(4))
    for name, right in (("runs/plain", (0, 1)), ("runs/<img src=x onerror=alert(1)>", (0, 2, 3))):
        template = "{prompt}" if "plain" in name else f"{HOSTILE}{{prompt}}"
        config = apply(presets.miniature(), [f"decode.prompt_template={json.dumps(template)}"])
        made = RunFolder.create(tmp_path / name, config)
        source = make_run("template", right=right, truths=truths, prompt=HOSTILE)
        shutil.copy(source / "predictions.jsonl", made.predictions)
        made.log({"step": 1, "loss_ce": 1.0})
    return tmp_path / "runs"


def test_hostile_texts_are_texts(hostile: Path, tmp_path: Path) -> None:
    page = make(hostile, tmp_path / "page.html")
    raw = (tmp_path / "page.html").read_text()
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>document.title='owned'</script> {{7*7}} =cmd()" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert not {"\x1b", "\u202e"} & set(raw)


def test_the_page_needs_nothing_from_elsewhere(hostile: Path, tmp_path: Path) -> None:
    page = make(hostile, tmp_path / "page.html")
    loading = ("src", "href", "xlink:href", "srcset", "action", "data")
    links = [value for name, value in page.attributes if name in loading]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "url(" not in "".join((PROJECT / "pipeline/report/templates/style.css").read_text().split())
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_the_same_runs_give_the_same_bytes(hostile: Path, tmp_path: Path) -> None:
    make(hostile, tmp_path / "page.html")
    command = [sys.executable, "-m", "pipeline.cli", "report", str(hostile), "--videos", "3"]
    command += ["--out", str(tmp_path / "again.html")]
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": str(PROJECT)}
    subprocess.run(command, check=True, capture_output=True, env=environment)  # here: paths of a run may be relative
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed")


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A real server that a page could talk to, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def browse(page: Path, home: Path) -> tuple[Page, list[str]]:
    """What a real browser makes of the page: its elements after loading, and its console."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += ["--enable-logging=stderr", "--dump-dom", f"--user-data-dir={home}", "--virtual-time-budget=3000"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_it_without_a_complaint_and_asks_nobody(
    hostile: Path, make_run: Run, tmp_path: Path, listener: tuple[str, list[str]]
) -> None:
    address, asked = listener
    chromium()
    control = tmp_path / "control.html"
    control.write_text(f"<title>a</title><script>console.error('seen')</script><img src='{address}/control'>")
    _, complaints = browse(control, tmp_path / "home")
    assert any("seen" in line for line in complaints)  # this test would notice a complaint
    assert "/control" in asked  # and a request
    asked.clear()
    bait = f"<img src='{address}/bait'><script>console.error(1)</script>"
    answers = make_run("bait", prompt=bait, right=(1, 2), truths=tuple(f"{HOSTILE}{i}" for i in range(4)))
    for folder in hostile.iterdir():
        shutil.copy(answers / "predictions.jsonl", folder)
    make(hostile, tmp_path / "page.html")
    page, complaints = browse(tmp_path / "page.html", tmp_path / "home")
    assert complaints == []
    assert asked == []
    assert "script" not in page.tags
    assert "svg" in page.tags
    assert bait in page.text
    assert "<script>document.title='owned'</script> {{7*7}} =cmd()" in page.text


# ---------------------------------------------------------------- a real run


SMALL = (
    *("clip.weights=seed:0", "teacher.weights=seed:0", "decode.llm=seed:0", "decode.llm_config=stages/miniature/llm"),
    *("student.init=seed:0", "train.max_steps=3", "train.batch_size=3", "train.warmup_steps=1"),
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Drawn videos, extracted, trained with and without the teacher, answered and diagnosed: (runs, page)."""
    from pipeline import compose
    from pipeline.diagnose import diagnose
    from stages.miniature.world import write_world

    root = tmp_path_factory.mktemp("real")
    write_world(root / "world", videos=6, seed=3)
    quiet: dict[str, Any] = {"device": "cpu", "progress": lambda *_: None}
    sets = [*SMALL, f"data.videos={root}/world/videos", f"data.annotations={root}/world/lvu"]
    config = apply(presets.miniature(), sets)
    cache = root / "features"
    for which in ("clip", "teacher"):
        extract = {"workers": 0, "retry_failed": False, "splits": [], "dry_run": False}
        assert compose.extract(config, which=which, cache=cache, **extract, **quiet)["failed"] == 0  # type: ignore[arg-type]
    for value in (0, 1):
        out = root / "runs" / f"lambda-{value}"
        ours = apply(config, [f"train.lambda_kd={value}"])
        compose.train(ours, cache=cache, out=out, dry_run=False, **quiet)
        compose.evaluate(out, cache=cache, split="test", checkpoint=None, dry_run=False, **quiet)
        diagnose(out, cache=cache, split="test", samples=8, checkpoint="", **quiet)
    make(root / "runs", root / "page.html", shown=2)
    return root / "runs", root / "page.html"


def test_a_real_run_fills_every_section(real: tuple[Path, Path]) -> None:
    page = Page(real[1].read_text())
    for heading in (
        *("Results", "Learning", "What the alignment does", "Are the levels alike?", "Single questions", "Cost"),
        *("What the memory holds, and what is read", "Settings and versions", "Beside the paper"),
    ):
        assert heading in page.words, heading
    assert "Missing here" not in page.text
    assert "× the operations" in page.text
    assert page.tags.count("img") == 2 * 9
    (study,) = read_studies([real[0]])
    modalities = {name for run in study.runs for name in run.features}
    assert modalities == {"tokens", "pooled/layer8"}


def test_diagnostics_of_a_real_run_agree_with_each_other(real: tuple[Path, Path]) -> None:
    base, kd = (json.loads((real[0] / name / "diagnostics.json").read_text()) for name in ("lambda-0", "lambda-1"))
    assert base["levels"]["cosine"] == {}
    assert len(base["levels"]["cka_teacher"]) == 13  # the cache has targets, so the comparison is made
    assert list(kd["levels"]["cosine"]) == [str(u) for u in range(8, 14)]
    assert kd["levels"]["cosine"]["13"] == pytest.approx(np.mean(kd["per_frame"]["13"]), abs=1e-3)
    assert len(kd["levels"]["cka"]) == 13
    for facts in kd["per_sample"].values():
        assert sum(facts["attention"]) == pytest.approx(1, abs=2e-3)
        assert sum(facts["attention_slots"]) == pytest.approx(1, abs=2e-3)
        slots = np.array(facts["slots"])
        assert slots.shape == (5, 9)  # a bank of four, and the current frame
        np.testing.assert_allclose(slots.sum(0), 1, atol=1e-3)
        assert slots[-1].tolist() == [0] * 8 + [1]
    assert kd["operations"]["teacher_frame"] > 0
    assert kd["operations"]["training_sample"] > base["operations"]["training_sample"]


def test_the_strip_shows_the_frames_that_the_student_saw(real: tuple[Path, Path]) -> None:
    config = RunFolder.open(real[0] / "lambda-1").config
    source = open_source(DataConfig.model_validate(config.data.model_dump()))
    found = json.loads((real[0] / "lambda-1" / "diagnostics.json").read_text())["per_sample"]
    key, facts = next(iter(found.items()))
    index = np.array(facts["frame_index"])
    frames = np.concatenate(list(source.frames(key.partition("@")[0], np.unique(index), batch_size=4)))
    strip = list(videos.strip_of(source, key.partition("@")[0], index))
    source.close()
    assert [place for place, _ in strip] == list(range(1, 10))
    for (_, uri), frame in zip(strip, frames, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        wanted = Image.fromarray(frame).resize(picture.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(picture, dtype=float) - np.asarray(wanted, dtype=float)).mean() < 8


def test_the_command_names_the_page_and_what_is_missing(real: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(real[0], tmp_path / "runs")
    (copy / "lambda-0" / "diagnostics.json").unlink()
    done = CliRunner().invoke(app, ["report", str(copy), "--videos", "0", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["page"]) == copy / "report.html"
    (lack,) = result["missing"]
    assert lack["runs"] == ["lambda-0"]
    assert lack["command"] == f"pipeline diagnose --run {copy / 'lambda-0'}"
