"""Students without memory banks, held to the ordinary one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stages.config import AlignConfig, TrainConfig
from stages.data.samples import CachedSamples
from stages.decode.llm import CausalLM
from stages.train.alignment import Alignment
from stages.train.loop import Trainer, make_schedule
from stages.train.student import Student
from stages.train.variants import EveryFrame, LastFrame, no_memory, per_frame

PROMPTS = ["what is the relationship of the movie ?", "who runs ?"]
Make = Callable[..., Student]


def recast(student: Student, kind: type[Student]) -> Student:
    """The same weights in another class."""
    other = kind(student.cfg, student.tokenizer, clip_width=10, llm_width=8).to(torch.float64).eval()
    other.load_state_dict(student.state_dict(), strict=True)
    return other


@pytest.mark.parametrize("kind", [LastFrame, EveryFrame])
def test_with_one_frame_it_is_the_ordinary_student(
    make_student: Make, features: Callable[..., torch.Tensor], kind: type[Student]
) -> None:
    student, f = make_student(per_frame_pe=True), features(2, 1)
    expected = student(f, PROMPTS, levels=(1, 3, 5), frames="all")
    got = recast(student, kind)(f, PROMPTS, levels=(1, 3, 5), frames="all")
    torch.testing.assert_close(got.prefix, expected.prefix)
    for level in (1, 3, 5):
        torch.testing.assert_close(got.hidden[level], expected.hidden[level])


def test_every_frame_goes_in_without_its_position_as_in_malmm_without_banks(
    make_student: Make, features: Callable[..., torch.Tensor]
) -> None:
    """Frame after frame through an ordinary student whose PE is zero; the PE of this one is not, and is not trained."""
    student, f = recast(make_student(), EveryFrame), features(2, 4)
    assert float(student.image_pe.weight.detach().abs().min()) > 0
    assert not student.image_pe.weight.requires_grad
    ordinary = recast(student, Student)
    torch.nn.init.zeros_(ordinary.image_pe.weight)
    one_by_one = torch.cat([ordinary(f[:, [t]], PROMPTS).prefix for t in range(4)], 1)
    torch.testing.assert_close(student(f, PROMPTS).prefix, one_by_one, rtol=0, atol=1e-12)
    assert not torch.allclose(recast(make_student(per_frame_pe=True), EveryFrame)(f, PROMPTS).prefix, one_by_one)


def test_a_frame_knows_nothing_of_the_others(make_student: Make, features: Callable[..., torch.Tensor]) -> None:
    student, f = make_student(per_frame_pe=True), features(2, 4)
    changed = f.clone()
    changed[:, 1] = f[:, 1].flip(-1)  # not a shift, which ln_vision would take away
    last, every = recast(student, LastFrame), recast(student, EveryFrame)
    torch.testing.assert_close(last(changed, PROMPTS).prefix, last(f, PROMPTS).prefix)
    assert not torch.allclose(student(changed, PROMPTS).prefix, student(f, PROMPTS).prefix)
    prefix, before = every(changed, PROMPTS).prefix, every(f, PROMPTS).prefix
    assert prefix.shape == (2, 4 * 5, 8)
    same = (prefix - before).abs().amax(dim=(0, 2)).unflatten(0, (4, 5)).amax(dim=1) < 1e-12
    assert same.tolist() == [True, False, True, True]
    torch.testing.assert_close(every(f, PROMPTS).prefix[:, -5:], last(f, PROMPTS).prefix)


@pytest.mark.parametrize("frames", ["last", "all", 2])
@pytest.mark.parametrize("kind", [LastFrame, EveryFrame])
def test_aligned_frames_are_those_of_the_setting(
    make_student: Make, features: Callable[..., torch.Tensor], kind: type[Student], frames: object
) -> None:
    student, f = recast(make_student(), kind), features(2, 4)
    whole = student(f, PROMPTS, levels=(3,), frames="all").hidden[3]
    count = {"last": 1, "all": 4, 2: 2}[frames]  # type: ignore[index]
    part = student(f, PROMPTS, levels=(3,), frames=frames).hidden[3]
    torch.testing.assert_close(part, whole[:, -count:])


@pytest.mark.parametrize(("build", "tokens"), [(no_memory, 5), (per_frame, 20)])
def test_training_moves_every_part_that_the_task_reaches(
    make_student: Make, decoder: CausalLM, cached: CachedSamples, build: Callable[..., Student], tokens: int
) -> None:
    cfg = make_student(per_frame_pe=True).cfg
    student = build(cfg, clip_width=10, llm_width=decoder.width)
    align, train = AlignConfig(levels=(3, 5)), TrainConfig(epochs=1, batch_size=7, lr=1e-2, warmup_steps=0)
    trainer = Trainer(student, Alignment(align, hidden_size=12, target_size=6), decoder, train, align)
    before = {name: p.detach().clone() for name, p in trainer.trainable().items()}
    logged = trainer.step(cached, 0, make_schedule(train, len(cached)))
    assert logged["grad_norm"] > 0
    still = {name for name, p in trainer.trainable().items() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not {n for n in still if "image_pe" in n or "query_tokens" in n or "crossattention" in n or "llm_proj" in n}
    assert not torch.equal(before["student.query_tokens"], student.query_tokens)
    assert student(cached.batch([0, 1]).f, ["who runs ?"] * 2).prefix.shape == (2, tokens, 8)


def test_too_many_frames_and_levels_are_refused(make_student: Make, features: Callable[..., torch.Tensor]) -> None:
    student = recast(make_student(), EveryFrame)
    with pytest.raises(ValueError, match="max_frames is 16"):
        student(features(1, 17), ["who runs ?"])
    with pytest.raises(ValueError, match="levels 1 to 5"):
        student(features(1, 2), ["who runs ?"], levels=(6,))
