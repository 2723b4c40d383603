"""The memory bank as a value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages.train.memory import MemoryBank, merge_choice, merge_pairs
from stages.train.plan import merge_plan


def literal_bank(frames: torch.Tensor, max_len: int) -> tuple[list[list[torch.Tensor]], list[list[int]]]:
    """MA-LMM's rule with Python lists, one sample: per token a list of entries and of sizes.

    One entry too many: the neighbours with the highest cosine become their mean, weighted by size.
    """
    num_tokens = frames.shape[1]
    entries: list[list[torch.Tensor]] = [[] for _ in range(num_tokens)]
    sizes: list[list[int]] = [[] for _ in range(num_tokens)]
    for frame in frames:
        for n in range(num_tokens):
            entries[n].append(frame[n])
            sizes[n].append(1)
            if len(entries[n]) > max_len:
                pairs = zip(entries[n], entries[n][1:], strict=False)
                cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs]
                j = cosines.index(max(cosines))
                a, b = sizes[n][j], sizes[n][j + 1]
                entries[n][j : j + 2] = [(a * entries[n][j] + b * entries[n][j + 1]) / (a + b)]
                sizes[n][j : j + 2] = [a + b]
    return entries, sizes


def fill(frames: torch.Tensor, max_len: int) -> MemoryBank:
    bank = MemoryBank.empty(max_len)
    for t in range(frames.shape[1]):
        bank = bank.append(frames[:, t])
    return bank


@given(num_frames=st.integers(1, 14), max_len=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_memory_bank_never_forgets_a_frame(num_frames: int, max_len: int, seed: int) -> None:
    frames = torch.randn(2, num_frames, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bank = fill(frames, max_len)
    assert bank.values is not None
    assert bank.sizes is not None
    assert len(bank) == min(num_frames, max_len)
    assert torch.equal(bank.sizes.sum(1), torch.full((2, 3), float(num_frames), dtype=torch.float64))
    weighted = (bank.values * bank.sizes[..., None]).sum(1) / num_frames
    torch.testing.assert_close(weighted, frames.mean(1), rtol=0, atol=1e-12)


@given(num_frames=st.integers(1, 12), max_len=st.integers(1, 5), seed=st.integers(0, 99))
def test_it_merges_as_the_rule_written_with_lists(num_frames: int, max_len: int, seed: int) -> None:
    frames = torch.randn(2, num_frames, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bank = fill(frames, max_len)
    assert bank.values is not None
    assert bank.sizes is not None
    for b in range(2):
        entries, sizes = literal_bank(frames[b], max_len)
        for n in range(3):
            torch.testing.assert_close(bank.values[b, :, n], torch.stack(entries[n]), rtol=0, atol=1e-12)
            assert bank.sizes[b, :, n].tolist() == sizes[n]


def test_of_several_repeats_the_first_is_merged() -> None:
    same = torch.ones(1, 4, 2, 3)
    assert merge_choice(same).tolist() == [[0, 0]]


def test_a_repeat_comes_before_a_pair_whose_cosine_only_rounds_to_one() -> None:
    """By rounding, neighbours that point the same way may get a cosine above the one of two equal vectors."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = torch.randn(2, 7, dtype=torch.float64, generator=generator)
        values = torch.stack([a, a * (1 + 1e-9), -a, b, b])[None, :, None]
        assert merge_choice(values).tolist() == [[3]]


def test_of_pairs_that_are_nearly_alike_the_more_similar_one_is_merged() -> None:
    values = torch.ones(1, 4, 1, 3, dtype=torch.float64)
    values[0, :, 0, 0] += torch.tensor([0, 1e-5, 2e-5, 2.9e-5])  # cosines of 1 - 1e-11 and less far from 1 at the end
    assert merge_choice(values).tolist() == [[2]]


@given(num_frames=st.integers(2, 40), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_run_of_repeats_stays_the_frame_that_it_repeats(num_frames: int, seed: int, dtype: torch.dtype) -> None:
    """To the last bit, however its entries were merged: else the next repeat would be none."""
    frame = torch.randn(1, 1, 3, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    bank = fill(frame.expand(1, num_frames, 3, 5), 3)
    assert bank.values is not None
    assert torch.equal(bank.values, frame.expand(1, min(num_frames, 3), 3, 5))


@given(
    lengths=st.lists(st.integers(1, 4), min_size=4, max_size=7),
    max_len=st.integers(2, 4),
    batch=st.integers(1, 3),
    width=st.sampled_from([3, 37, 160]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_video_of_repeated_frames_merges_alike_in_the_bank_and_in_the_plan(
    lengths: list[int], max_len: int, batch: int, width: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(batch, len(lengths), 2, width, dtype=dtype, generator=generator)
    frames = torch.cat([pictures[:, [i]].expand(-1, n, -1, -1) for i, n in enumerate(lengths)], 1)
    plan, bank = merge_plan(frames.transpose(0, 1), max_len), MemoryBank.empty(max_len)
    for t in range(frames.shape[1] - 1):
        bank = bank.append(frames[:, t])
        assert bank.slots is not None
        rows = plan.rows_at(t + 1)  # [R, B, N], by slot
        assert bank.sizes is not None
        singles = bank.sizes == 1
        frame_in_slot = rows.transpose(0, 1).gather(1, bank.slots)
        assert torch.equal(frame_in_slot < frames.shape[1], singles)


def test_each_token_index_merges_its_own_pair() -> None:
    values = torch.eye(3)[None, :, None, :].repeat(1, 1, 2, 1)  # orthogonal entries
    values[0, 1, 0], values[0, 2, 1] = values[0, 0, 0], values[0, 1, 1]  # token 0: pair 0; token 1: pair 1
    choice = merge_choice(values)
    assert choice.tolist() == [[0, 1]]
    merged, sizes = merge_pairs(values, torch.tensor([[[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]]), choice)
    assert sizes[0].tolist() == [[4.0, 1.0], [1.0, 4.0]]
    assert merged.shape == (1, 2, 2, 3)


def test_the_past_carries_no_gradient_and_the_current_frame_does() -> None:
    frame = torch.randn(1, 2, 3, requires_grad=True)
    source = MemoryBank.empty(2).append(frame).followed_by(frame * 2)
    torch.cat(source).sum().backward()
    assert frame.grad is not None
    assert torch.equal(frame.grad, torch.full_like(frame, 2.0))


def test_a_zero_vector_is_a_legal_entry() -> None:
    bank = fill(torch.zeros(1, 5, 2, 3), 2)
    assert bank.values is not None
    assert torch.isfinite(bank.values).all()
