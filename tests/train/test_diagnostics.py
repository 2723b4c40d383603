"""Diagnostics against hand-worked numbers and slow definitions, and the promise that training does not notice them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.config import AlignConfig, TrainConfig
from stages.data.samples import CachedSamples
from stages.decode.llm import CausalLM
from stages.train import diagnostics
from stages.train.alignment import Alignment
from stages.train.diagnostics import (
    centred_cosine,
    constant_cosine,
    entry_starts,
    frame_attention,
    linear_cka,
    mean_similarity,
    observe,
    read_frames,
    saturated_share,
    saturation,
    scalars,
    slot_frames,
    unbiased_hsic,
)
from stages.train.loop import Trainer, train
from stages.train.student import Student

ALIGN = AlignConfig(levels=(3, 5))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- alignment


def test_a_constant_scores_half_the_root_of_two_on_two_orthogonal_targets() -> None:
    targets = torch.tensor([[3.0, 0.0], [0.0, 0.5]])  # lengths do not matter: (1, 1) has cosine 1/sqrt(2) with both
    assert constant_cosine(targets) == pytest.approx(1 / math.sqrt(2))
    assert constant_cosine(torch.tensor([[2.0, 1.0], [4.0, 2.0]])) == pytest.approx(1.0)
    assert constant_cosine(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])) == pytest.approx(0.0)


def test_no_constant_scores_more_than_the_constant_cosine() -> None:
    targets = drawn(40, 3) + 1.0
    best = constant_cosine(targets)
    tried = torch.nn.functional.normalize(drawn(4000, 3, seed=1), dim=-1)
    scores = torch.nn.functional.cosine_similarity(tried[:, None], targets[None], dim=-1).mean(1)
    assert best - 0.01 < float(scores.max()) <= best + 1e-12


def test_a_common_part_of_r_times_the_deviation_gives_the_cosine_of_the_design_note() -> None:
    """cos = r / sqrt(1 + r²): 0.97 at r = 4, though such a predictor knows nothing about any frame."""
    deviation = torch.nn.functional.normalize(drawn(4000, 500), dim=-1)
    for r in (2.0, 4.0):
        common = torch.zeros(500, dtype=torch.float64)
        common[0] = r
        assert constant_cosine(deviation + common) == pytest.approx(r / math.sqrt(1 + r * r), abs=2e-3)


def test_the_centred_cosine_sees_through_a_common_part() -> None:
    y = drawn(30, 4)
    knows, guesses = y + 7.0, drawn(30, 4, seed=1) * 0.01 + 7.0
    shifted = y + 7.0
    assert torch.nn.functional.cosine_similarity(guesses, shifted, dim=-1).mean() > 0.95
    assert abs(centred_cosine(guesses, shifted)) < 0.3
    assert centred_cosine(knows, shifted) == pytest.approx(1.0)
    assert centred_cosine(-y, shifted) == pytest.approx(-1.0)


def test_saturated_counts_single_weights_at_both_ends() -> None:
    assert saturated_share(torch.tensor([[0.995, 0.5], [0.005, 0.98]])) == 0.5


def weights(step: int, *values: float | None) -> dict[str, Any]:
    return {"step": step, "loss_ce": 1.0, **{f"w/{8 + i}": value for i, value in enumerate(values)}}


def test_the_alarm_names_the_step_from_which_all_levels_stay_saturated() -> None:
    records = [weights(1, 0.5, 0.5), weights(2, 0.96, 0.97), weights(3, 0.9, 0.99), weights(4, 0.96, 0.99)]
    assert saturation(records) is None or saturation(records).step == 4  # type: ignore[union-attr]
    records += [weights(5, 0.99, 0.02)]  # at either end
    alarm = saturation(records)
    assert alarm is not None
    assert alarm.step == 4
    assert alarm.level_weights == {8: 0.99, 9: 0.02}
    assert "step 4" in str(alarm)


@pytest.mark.parametrize("last", [(0.96, 0.5), (0.05, 0.95)])
def test_one_undecided_level_is_no_alarm(last: tuple[float, float]) -> None:
    assert saturation([weights(1, 0.96, 0.99), weights(2, *last)]) is None


def test_runs_without_weights_raise_no_alarm() -> None:
    assert saturation([]) is None
    assert saturation([{"step": 1, "loss_ce": 2.0}]) is None


# ---------------------------------------------------------------- similarity


def slow_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The U-statistic by its definition: an average over all ordered quadruples of distinct frames."""
    n, total, count = len(k), 0.0, 0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
        count += 1
    return total / count


def test_the_unbiased_hsic_is_the_average_over_all_quadruples() -> None:
    x, y = drawn(7, 3), drawn(7, 2, seed=1)
    k, gram = x @ x.T, y @ y.T
    assert unbiased_hsic(k, gram) == pytest.approx(slow_hsic(k.numpy(), gram.numpy()), rel=1e-10)


def test_similarity_is_one_after_rotation_and_scale_and_shift() -> None:
    x = drawn(50, 6)
    rotation, _ = torch.linalg.qr(drawn(6, 6, seed=1))
    cka = linear_cka([x, 3.0 * x @ rotation + 5.0])
    assert np.array(cka) == pytest.approx(np.ones((2, 2)))
    assert linear_cka([x, x * torch.tensor([9.0, 1, 1, 1, 1, 1])])[0][1] < 0.95  # not after stretching one direction


def test_unrelated_features_are_unlike_even_with_more_dimensions_than_frames() -> None:
    cka = linear_cka([drawn(24, 300, seed=s) for s in range(6)])
    assert abs(mean_similarity(cka)) < 0.1  # the biased estimate gives 0.93 here


def test_a_level_that_is_the_same_for_every_frame_has_no_similarity() -> None:
    x = drawn(20, 4)
    same = torch.full((20, 4), 0.3, dtype=torch.float64) + 1e-9 * drawn(20, 4, seed=1)
    cka = linear_cka([same, x, 2 * x])
    assert math.isnan(cka[0][1])
    assert math.isnan(cka[0][0])
    assert mean_similarity(cka) == pytest.approx(1.0)  # of the one pair that is defined


# ---------------------------------------------------------------- banks and attention


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_slots_and_starts_agree_with_lists_of_frames(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 3))
    entries = data.draw(st.integers(1, 4))
    runs = data.draw(  # per token index the sizes of its entries, which add up to one number of frames
        st.lists(st.lists(st.integers(1, 3), min_size=entries, max_size=entries), min_size=tokens, max_size=tokens)
    )
    total = max(map(sum, runs))
    runs = [[*run[:-1], run[-1] + total - sum(run)] for run in runs]
    sizes = torch.tensor(runs, dtype=torch.float32).T[None]  # [1, k, P]
    mass = torch.rand(1, entries, tokens, generator=torch.Generator().manual_seed(3))
    mass = mass / mass.sum()
    held, starts, read = np.zeros((entries, total)), np.zeros(total), np.zeros(total)
    for n, run in enumerate(runs):
        frames = iter(range(total))
        for s, size in enumerate(run):
            members = [next(frames) for _ in range(size)]
            starts[members[0]] += 1 / tokens
            for frame in members:
                held[s, frame] += 1 / tokens
                read[frame] += float(mass[0, s, n]) / size
    np.testing.assert_allclose(slot_frames(sizes, total)[0], held, atol=1e-6)
    np.testing.assert_allclose(entry_starts(sizes, total)[0], starts, atol=1e-6)
    np.testing.assert_allclose(frame_attention(mass, sizes, total)[0], read, atol=1e-6)
    assert read.sum() == pytest.approx(1.0)


def test_the_merge_timeline_shows_which_frames_were_alike(make_student: Callable[..., Student]) -> None:
    """Frames a a b c d with room for three: the two a's are merged, nothing else."""
    student = make_student(memory_len=3)
    torch.nn.init.zeros_(student.image_pe.weight)
    a, b, c, d = (drawn(6, 10, seed=s) for s in range(4))
    reading = read_frames(student, torch.stack([a, a, b, c, d])[None], ["who runs ?"])
    assert reading.sizes[0].T.tolist() == [[2.0, 1.0, 1.0]] * 6
    assert slot_frames(reading.all_sizes, 5)[0].tolist() == [
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert reading.starts[0].tolist() == [
        [0, 0, 0, 0, 0],  # before the first frame the bank is empty
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
    ]


def test_attention_that_cannot_tell_sources_apart_is_even_over_slots(make_student: Callable[..., Student]) -> None:
    """Without a query projection every source token weighs the same: one slot in four is the current frame."""
    student = make_student(memory_len=3)
    for layer in student.qformer.layers:
        if layer.crossattention is not None:
            torch.nn.init.zeros_(layer.crossattention.attention.query.weight)
            torch.nn.init.zeros_(layer.crossattention.attention.query.bias)
    torch.nn.init.zeros_(student.image_pe.weight)
    a, b, c, d = (drawn(6, 10, seed=s) for s in range(4))
    reading = read_frames(student, torch.stack([a, a, b, c, d])[None], ["who runs ?"])
    assert reading.mass.shape == (1, 2, 4, 6)  # blocks 1 and 3 of four have cross-attention
    torch.testing.assert_close(reading.mass, torch.full_like(reading.mass, 1 / 24))
    share = frame_attention(reading.mass.mean(1), reading.all_sizes, 5)[0]
    torch.testing.assert_close(share, torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4]).to(share.dtype))


def test_the_attention_read_is_the_attention_that_made_the_prefix(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor]
) -> None:
    """With the last block's values replaced by one-hot rows, its output would be the mass: recomputed here by hand."""
    student, f = make_student(num_layers=1, evaluation="reference"), features(2, 6)
    reading = read_frames(student, f, ["who runs ?", "what is the scene ?"])
    block = student.qformer.layers[0].crossattention.attention  # type: ignore[index]
    heard: list[Any] = []
    handle = block.register_forward_hook(lambda _module, inputs, output: heard.append((*inputs, output)))
    student(f, ["who runs ?", "what is the scene ?"])
    handle.remove()
    states, sources, _, _, output = heard[-1]
    source = torch.cat(sources, 1)
    q, k, v = (layer(x).double() for layer, x in ((block.query, states), (block.key, source), (block.value, source)))
    mass = torch.zeros(2, source.shape[1], dtype=torch.float64)
    again = torch.zeros_like(output)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weight = torch.softmax(q[..., part] @ k[..., part].mT / 2.0, dim=-1)
        again[..., part] = weight @ v[..., part]
        mass += weight.mean(1) / 3
    torch.testing.assert_close(again, output)
    torch.testing.assert_close(reading.mass[:, 0].flatten(1).double(), mass, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frames", [1, 3, 4, 7])
def test_shares_add_up_whatever_the_number_of_frames(
    make_student: Callable[..., Student], features: Callable[..., torch.Tensor], frames: int
) -> None:
    reading = read_frames(make_student(memory_len=3), features(2, frames), ["who runs ?"] * 2)
    assert reading.all_sizes.sum(1).unique().tolist() == [frames]
    share = frame_attention(reading.mass.mean(1), reading.all_sizes, frames)
    torch.testing.assert_close(share.sum(1), torch.ones_like(share[:, 0]))
    torch.testing.assert_close(slot_frames(reading.all_sizes, frames).sum(1), torch.ones(2, frames))


# ---------------------------------------------------------------- looking at a student


def make_alignment(cfg: AlignConfig = ALIGN, **moments: Any) -> Alignment:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Alignment(cfg, hidden_size=12, target_size=6, **moments)


def test_what_is_observed_is_what_the_loss_sees(make_student: Callable[..., Student], cached: CachedSamples) -> None:
    student = make_student(dtype=torch.float32, dropout=0.4).train()
    alignment = make_alignment(AlignConfig(levels=(3, 5), target_norm="center"), target_mean=torch.arange(6.0))
    whole = cached.batch(range(7))
    seen = observe(student, alignment, [cached.batch(range(4)), cached.batch(range(4, 7))])
    assert student.training  # as before
    assert whole.y_star is not None
    y_star = whole.per_sample(whole.y_star)
    hidden = student.eval()(whole.per_sample(whole.f), whole.prompts, levels=(3, 5), frames="all").hidden
    loss = alignment(hidden, y_star)
    for u in (3, 5):
        assert float(seen.cosine()[u].mean()) == pytest.approx(-float(loss.per_level[u]), abs=1e-5)
        assert float(seen.w[u].mean()) == pytest.approx(float(loss.weights[u]), abs=1e-5)
    assert list(seen.hidden) == [1, 2, 3, 4, 5]
    logged = scalars(seen)
    assert logged["probe/cos/5"] == pytest.approx(-float(loss.per_level[5]), abs=1e-5)
    assert logged["probe/constant"] == pytest.approx(
        constant_cosine((y_star - torch.arange(6.0)).flatten(0, 1)), abs=1e-6
    )
    last = scalars(seen, last_frames=1)
    assert last["probe/cos/5"] == pytest.approx(float(seen.cosine()[5][:, -1].mean()), abs=1e-6)


def test_without_a_teacher_only_similarities_are_logged(
    make_student: Callable[..., Student], cached: CachedSamples
) -> None:
    logged = scalars(observe(make_student(dtype=torch.float32), None, [cached.batch(range(7))]))
    assert list(logged) == ["probe/cka"]
    assert -0.2 < logged["probe/cka"] <= 1.0


@pytest.mark.parametrize("align", [ALIGN, None], ids=["aligned", "without a teacher"])
def test_a_run_with_diagnostics_has_the_weights_of_a_run_without(
    make_student: Callable[..., Student],
    decoder: CausalLM,
    cached: CachedSamples,
    monkeypatch: pytest.MonkeyPatch,
    align: AlignConfig | None,
) -> None:
    cfg = TrainConfig(
        epochs=3, batch_size=3, lr=3e-3, schedule="cosine_steps", warmup_steps=1, select="last", drop_last=False
    )
    runs = []
    for due in (lambda *_a, **_k: True, lambda *_a, **_k: False):
        monkeypatch.setattr(diagnostics, "probe_due", due)
        torch.manual_seed(11)  # the generator that a careless look would draw from
        student = make_student(dtype=torch.float32, dropout=0.2)
        trainer = Trainer(student, make_alignment(align) if align else None, decoder, cfg, align or ALIGN)
        records: list[dict[str, Any]] = []
        train(trainer, cached, log=records.append, save=lambda *_: None)
        runs.append((records, {name: t.clone() for name, t in trainer.checkpoint().items()}, torch.rand(3).tolist()))
    (looked, with_looks, after), (blind, without, after_blind) = runs
    assert all("probe/cka" in record for record in looked)
    assert not any("probe/cka" in record for record in blind)
    kept = [{key: value for key, value in record.items() if not key.startswith("probe/")} for record in looked]
    assert kept == blind
    assert with_looks.keys() == without.keys()
    assert all(torch.equal(with_looks[name], without[name]) for name in without)
    assert after == after_blind


def test_looks_are_seldom_but_never_miss_the_first_and_the_last_step() -> None:
    def due(total: int, batch_size: int, num_samples: int) -> list[int]:
        sizes = {"batch_size": batch_size, "num_samples": num_samples}
        return [done for done in range(1, total + 1) if diagnostics.probe_due(done, total, **sizes)]

    assert due(25, 16, 800) == [1, 10, 20, 25]  # 8 samples looked at per 160 trained on
    assert due(8, 64, 298) == [1, 3, 6, 8]
    assert due(3, 4, 5) == [1, 3]
