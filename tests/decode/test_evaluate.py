"""Evaluation writes every answer once, survives being stopped, and is scored again from its file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.data.samples import Batch
from stages.decode import llm
from stages.decode.evaluate import ClosedSets, by_window, evaluate, read_predictions, rescore, resume
from stages.decode.metrics import score
from stages.types import Sample
from tests.decode.conftest import WIDTH

HOSTILE = [
    "line\nbreak",
    "\x1b[31mred\x1b[0m",
    'quote " and \\',
    "\u2028\u2029\x85\r",
    "映画 🎬",
    "\ud800 alone",
    "</script>",
]


def sample(i: int, answer: str = "friend", prompt: str = "who?") -> Sample:
    return Sample(f"s{i}", f"v{i // 2}", np.array([[i, i + 1]]), prompt, answer, "task")


def batch(*samples: Sample) -> Batch:
    first = torch.tensor([float(s.draws[0, 0]) for s in samples])
    return Batch(samples, first[:, None, None, None].expand(-1, 2, 3, 1), None)


BATCHES = [batch(sample(0), sample(1, "wife")), batch(sample(2), sample(3), sample(4)), batch(sample(5))]


class Student:
    """A student whose prefix depends on the sample alone; counts what it was asked."""

    def __init__(self, stop_after: int = 99) -> None:
        self.asked: list[str] = []
        self.stop_after = stop_after

    def __call__(self, batch: Batch) -> Tensor:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [s.sample_id for s in batch.samples]
        wave = torch.arange(4 * WIDTH).reshape(4, WIDTH).float()
        return torch.stack([(wave * (1.3 + float(f[0, 0, 0]))).sin() for f in batch.f])


@pytest.fixture
def decoder(make: Any) -> llm.CausalLM:
    decoder: llm.CausalLM = make(num_beams=2, num_return=2, max_new_tokens=5)
    return decoder


def test_every_sample_is_answered_and_written_in_order(decoder: llm.CausalLM, tmp_path: Path) -> None:
    progress: list[int] = []
    path = tmp_path / "run" / "predictions.jsonl"
    predictions = evaluate(Student(), decoder, BATCHES, write=path, log=progress.append)
    assert [p.sample_id for p in predictions] == ["s0", "s1", "s2", "s3", "s4", "s5"]
    assert [len(p.beams) for p in predictions] == [2] * 6
    assert len({p.beams for p in predictions}) > 3
    assert read_predictions(path) == predictions
    assert progress == [2, 5, 6]


def test_questions_of_a_window_come_together_and_are_answered_as_one_by_one(
    decoder: llm.CausalLM, tmp_path: Path
) -> None:
    texts = ["who?", "a longer question: where?", "who?", "why"]
    asked = [replace(sample(i % 3), sample_id=f"q{i}", video_id=f"v{i % 3}", prompt=texts[i % 4]) for i in range(12)]
    asked.append(replace(asked[1], sample_id="again", answer="wife"))  # the same question about the same frames
    alone = evaluate(Student(), decoder, [batch(s) for s in asked], write=tmp_path / "alone.jsonl")
    order = by_window(asked, range(len(asked)))
    assert sorted(order) == list(range(13))
    assert [asked[i].video_id for i in order] == ["v0"] * 4 + ["v1"] * 5 + ["v2"] * 4
    student, batches = Student(), [batch(*(asked[i] for i in order[at : at + 5])) for at in (0, 5, 10)]
    together = evaluate(student, decoder, batches, write=tmp_path / "together.jsonl")
    assert sorted(together, key=str) == sorted(alone, key=str)
    assert len({p.beams for p in alone}) > 6
    pairs = {(s.video_id, s.prompt) for s in asked}
    assert len(student.asked) == len(pairs) == 9  # 13 samples, and no pair of window and question twice


def test_the_order_of_reading_is_over_what_is_asked_for_only() -> None:
    asked = [replace(sample(i % 2), sample_id=str(i), prompt="x" * (9 - i)) for i in range(6)]
    assert by_window(asked, [1, 2, 4, 5]) == [5, 1, 4, 2]


def test_a_stopped_evaluation_goes_on_where_it_was(decoder: llm.CausalLM, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "predictions.jsonl"
    expected = evaluate(Student(), decoder, BATCHES, write=whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Student(stop_after=5), decoder, BATCHES, write=path)
    assert [p.sample_id for p in read_predictions(path)] == ["s0", "s1", "s2", "s3", "s4"]
    again = Student()
    assert evaluate(again, decoder, BATCHES, write=path) == expected
    assert again.asked == ["s5"]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_half_written_line_is_answered_again(decoder: llm.CausalLM, tmp_path: Path, kept: int) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "predictions.jsonl"
    expected = evaluate(Student(), decoder, BATCHES, write=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:kept])
    assert read_predictions(path) == expected[:3]
    again = Student()
    assert evaluate(again, decoder, BATCHES, write=path) == expected
    assert path.read_bytes() == whole.read_bytes()
    assert again.asked == ["s3", "s4", "s5"]  # of the second batch, one was done


def test_a_finished_evaluation_asks_nothing(decoder: llm.CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    first = evaluate(Student(), decoder, BATCHES, write=path)
    student = Student(stop_after=0)
    assert evaluate(student, decoder, BATCHES, write=path) == first
    assert set(resume(path)) == {p.sample_id for p in first}


def test_answers_of_another_checkpoint_are_moved_aside(decoder: llm.CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    old = evaluate(Student(), decoder, BATCHES, write=path, run="step 10")
    student = Student()
    new = evaluate(student, decoder, BATCHES, write=path, run="step 20")
    assert len(student.asked) == 6
    assert {p.run for p in new} == {"step 20"}
    assert read_predictions(path) == new
    assert read_predictions(tmp_path / "p.jsonl.old") == old


def test_another_question_under_a_known_id_is_refused(decoder: llm.CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    evaluate(Student(), decoder, BATCHES[2:], write=path)
    with pytest.raises(ValueError, match="another question under the sample id 's5'"):
        evaluate(Student(), decoder, [batch(sample(5, prompt="where?"))], write=path)


def test_an_id_that_occurs_twice_is_refused_before_it_is_written(decoder: llm.CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match="'s5' occurs twice"):
        evaluate(Student(), decoder, [BATCHES[2], BATCHES[2]], write=path)
    assert len(read_predictions(path)) == 1


def test_a_diverged_student_is_named_and_not_scored(decoder: llm.CausalLM, tmp_path: Path) -> None:
    def diverged(batch: Batch) -> Tensor:
        prefix = torch.zeros(len(batch.samples), 4, WIDTH)
        prefix[1, 2, 3] = float("nan")
        return prefix

    with pytest.raises(ValueError, match=r"not finite for samples \['s1'\]"):
        evaluate(diverged, decoder, BATCHES, write=tmp_path / "p.jsonl")
    assert read_predictions(tmp_path / "p.jsonl") == []


def test_no_gradient_is_kept_during_evaluation(decoder: llm.CausalLM, tmp_path: Path) -> None:
    enabled: list[bool] = []

    def student(batch: Batch) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return Student()(batch)

    evaluate(student, decoder, BATCHES[:1], write=tmp_path / "p.jsonl")
    assert enabled == [False]


def test_scoring_again_from_the_file_gives_the_same_numbers(decoder: llm.CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    first = evaluate(Student(), decoder, BATCHES, write=path)
    labelled = [batch(sample(i, p.beams[0] if i % 2 else "never said")) for i, p in enumerate(first)]
    path.unlink()
    predictions = evaluate(Student(), decoder, labelled, write=path)
    report = score(predictions, "exact", train_majority="x")
    assert (report.overall.correct, report.overall.n, report.train_majority) == (3, 6, 0.0)
    assert rescore(path, "exact", train_majority="x") == report


def test_hostile_labels_stay_data(decoder: llm.CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    asked = batch(*(sample(i, answer=text, prompt=text) for i, text in enumerate(HOSTILE[:5] + HOSTILE[6:])))
    predictions = evaluate(Student(), decoder, [asked], write=path)
    assert [p.answer for p in predictions] == HOSTILE[:5] + HOSTILE[6:]
    assert read_predictions(path) == predictions
    raw = path.read_bytes()
    assert raw.count(b"\n") == 6
    assert all(byte >= 0x20 for byte in raw.replace(b"\n", b""))


class Parrot:
    """Says the prompt, whatever it spells; a real tokenizer cannot give a lone surrogate."""

    width = WIDTH

    def loss_sum(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, int]:
        raise AssertionError(f"evaluation needs no loss: {prefix.shape}, {prompts}, {answers}")

    def loss_per_sample(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        raise AssertionError(f"evaluation needs no loss: {prefix.shape}, {prompts}, {answers}")

    def score_answers(self, prefix: Tensor, prompts: Sequence[str], candidates: Sequence[str]) -> Tensor:
        raise AssertionError(f"evaluation ranks nothing: {prefix.shape}, {prompts}, {candidates}")

    def count_answer_tokens(self, answers: Sequence[str]) -> int:
        return len(answers)

    def generate(
        self, prefix: Tensor, prompts: Sequence[str], *, allowed: Sequence[str] | None = None
    ) -> list[list[str]]:
        assert allowed is None
        return [[prompt] for prompt, _ in zip(prompts, prefix, strict=True)]

    def unreachable(self, answers: Sequence[str]) -> list[str]:
        raise AssertionError(f"evaluation does not ask: {answers}")


def test_any_text_in_a_beam_survives_the_file(tmp_path: Path) -> None:
    asked = batch(*(sample(i, answer=text, prompt=text) for i, text in enumerate(HOSTILE)))
    predictions = evaluate(Student(), Parrot(), [asked], write=tmp_path / "p.jsonl")
    assert [p.beams for p in read_predictions(tmp_path / "p.jsonl")] == [(text,) for text in HOSTILE]
    assert rescore(tmp_path / "p.jsonl", "exact").overall.correct == len(HOSTILE) == len(predictions)


def bad_lines() -> Iterator[bytes]:
    good = {"sample_id": "s", "video_id": "v", "group": "g", "prompt": "p", "answer": "a", "beams": ["b"]}
    yield b"not json"
    yield b"[]"
    yield b"\x00\xff"
    yield json.dumps({**good, "beams": "b"}).encode()
    yield json.dumps({**good, "beams": [1]}).encode()
    yield json.dumps({**good, "answer": None}).encode()
    yield json.dumps({**good, "extra": "x"}).encode()
    yield json.dumps({k: v for k, v in good.items() if k != "group"}).encode()


@pytest.mark.parametrize("line", list(bad_lines()))
def test_a_damaged_line_is_named_by_file_and_number(tmp_path: Path, line: bytes) -> None:
    good = {"sample_id": "s0", "video_id": "v", "group": "g", "prompt": "p", "answer": "a", "beams": ["b"]}
    (tmp_path / "p.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2 is not a prediction"):
        read_predictions(tmp_path / "p.jsonl")


def test_a_sample_answered_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    good = {"sample_id": "s0", "video_id": "v", "group": "g", "prompt": "p", "answer": "a", "beams": ["b"]}
    (tmp_path / "p.jsonl").write_text(2 * (json.dumps(good) + "\n"))
    with pytest.raises(ValueError, match="line 2 answers 's0' a second time"):
        rescore(tmp_path / "p.jsonl", "exact")


class Chooser:
    """A decoder that says one thing freely, and knows how likely each label is."""

    width = WIDTH
    likely: ClassVar = {"friend": -2.0, "wife": -0.5, "bar": -1.0, "road": -1.0}

    def loss_sum(self, *_: Any) -> Any:
        raise AssertionError

    loss_per_sample = count_answer_tokens = unreachable = loss_sum

    def generate(self, prefix: Tensor, prompts: Sequence[str], *, allowed: Sequence[str] = ()) -> list[list[str]]:
        assert len(prefix) == len(prompts)
        return [list(reversed(allowed)) or ["a friend"] for _ in prompts]

    def score_answers(self, prefix: Tensor, prompts: Sequence[str], candidates: Sequence[str]) -> Tensor:
        assert len(prefix) == len(prompts)
        return torch.tensor([[self.likely[c] for c in candidates]]).repeat(len(prompts), 1)


def test_label_sets_are_ranked_and_decoded_per_group_beside_the_free_answer(tmp_path: Path) -> None:
    other = Sample("t", "v9", np.array([[0, 1]]), "where?", "bar", "scene")
    batches = [batch(sample(0), other, sample(1, "wife"))]
    labels = {"task": ["friend", "wife"], "scene": ["bar", "road"]}
    path = tmp_path / "both.jsonl"
    both = ClosedSets(labels, ("rank", "constrained"))
    predictions = evaluate(Student(), Chooser(), batches, write=path, closed=both)
    assert [p.beams for p in predictions] == [("a friend",)] * 3
    assert [p.ranked for p in predictions] == [("wife", "friend"), ("bar", "road"), ("wife", "friend")]
    assert [p.scores for p in predictions] == [(-0.5, -2.0), (-1.0, -1.0), (-0.5, -2.0)]
    assert [p.constrained[0] for p in predictions] == ["wife", "road", "wife"]
    assert read_predictions(path) == predictions
    report = score(predictions, "exact")
    assert (report.overall.correct, report.closed["ranked"].correct, report.closed["constrained"].correct) == (0, 2, 1)
    ranked = evaluate(Student(), Chooser(), batches, write=tmp_path / "r", closed=ClosedSets(labels, ("rank",)))
    assert [p.constrained for p in ranked] == [()] * 3


def test_scores_that_do_not_belong_to_labels_are_refused(tmp_path: Path) -> None:
    good = {"sample_id": "s", "video_id": "v", "group": "g", "prompt": "p", "answer": "a", "beams": ["a"], "run": ""}
    for wrong in ({"scores": [0.5]}, {"ranked": ["a"], "scores": ["b"]}, {"constrained": "a"}, {"ranked": [1]}):
        (tmp_path / "p").write_text(json.dumps(good | wrong) + "\n")
        with pytest.raises(ValueError, match="line 1 is not a prediction"):
            read_predictions(tmp_path / "p")
    (tmp_path / "p").write_text(json.dumps(good) + "\n")
    assert read_predictions(tmp_path / "p")[0].ranked == ()
