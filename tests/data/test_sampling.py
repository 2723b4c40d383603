"""Frame choice: pure integers, held to MA-LMM's rules."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.sampling import grid_count, segment_draws, uniform_frames, window_frames, window_starts

FPS = st.sampled_from([0.5, 1.0, 2.0, 2.5, 10.0, 12.5, 24.0, 30.0])
LENGTH = st.integers(1, 120)


@st.composite
def videos(draw: st.DrawFn) -> tuple[int, int]:
    """(duration in s, frames at 10 fps) as annotations have them: with an outro, or a few frames short."""
    duration = draw(st.integers(1, 400))
    return duration, max(1, 10 * duration + draw(st.integers(-9, 320)))


@settings(deadline=None)
@given(videos(), FPS, LENGTH, st.integers(1, 120), st.integers(1, 60))
def test_a_window_has_exactly_t_sorted_frames_of_the_video(
    video: tuple[int, int], fps: float, length: int, history: int, stride: int
) -> None:
    duration, num_frames = video
    count = grid_count(num_frames, fps)
    for start in window_starts(duration, history_s=history, stride_s=stride):
        frames = window_frames(start, duration_s=duration, num_frames=count, fps=fps, history_s=history, length=length)
        assert frames.shape == (length,)
        assert frames.dtype == np.int64
        assert (np.diff(frames) >= 0).all()
        assert frames[0] >= 0
        assert frames[-1] < count
        assert frames[-1] <= np.rint(fps * duration)  # never into the outro


@settings(deadline=None)
@given(st.integers(1, 500), LENGTH)
def test_evaluation_frames_run_from_the_first_to_the_last(num_frames: int, length: int) -> None:
    frames = uniform_frames(num_frames, length)
    assert frames.shape == (length,)
    assert (np.diff(frames) >= 0).all()
    assert frames[0] == 0
    assert length == 1 or frames[-1] == num_frames - 1


@settings(deadline=None)
@given(st.integers(1, 500), LENGTH, st.integers(1, 4), st.integers(0, 2**40), st.text(min_size=1, max_size=12))
def test_random_draws_are_sorted_and_stay_in_their_segments(
    num_frames: int, length: int, draws: int, seed: int, video: str
) -> None:
    chosen = segment_draws(num_frames, length, draws=draws, seed=seed, video_id=video)
    bounds = np.linspace(0, num_frames, length + 1, dtype=int)
    assert chosen.shape == (draws, length)
    assert (np.diff(chosen, axis=1) >= 0).all()
    assert (chosen >= np.minimum(bounds[:-1], num_frames - 1)).all()
    assert (chosen < np.maximum(bounds[1:], bounds[:-1] + 1)).all()
    assert chosen.max() < num_frames


@settings(deadline=None)
@given(st.integers(1, 100_000), FPS)
def test_the_grid_ends_where_the_annotated_frames_end(num_frames: int, fps: float) -> None:
    count = grid_count(num_frames, fps)
    last_second = (num_frames - 1) / 10
    assert (count - 1) / fps <= last_second + 1e-6
    assert count / fps > last_second + 1e-6


def test_at_ten_frames_per_second_the_grid_is_the_annotation() -> None:
    assert [grid_count(n, 10.0) for n in (1, 2, 98, 1628)] == [1, 2, 98, 1628]


def test_a_video_of_98_frames_has_20_points_at_two_per_second() -> None:
    assert grid_count(98, 2.0) == 20  # 0.0, 0.5, ..., 9.5 s


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        grid_count(0, 10.0)


def test_a_full_window_is_one_frame_per_second() -> None:
    frames = window_frames(20, duration_s=162, num_frames=1923, fps=10, history_s=100, length=100)
    assert frames.tolist() == list(range(200, 1200, 10))


def test_windows_start_at_zero_and_then_wherever_a_full_one_fits() -> None:
    starts = {d: window_starts(d, history_s=100, stride_s=20) for d in (22, 119, 120, 162)}
    assert starts == {22: [0], 119: [0], 120: [0, 20], 162: [0, 20, 40, 60]}


def test_a_short_video_is_sampled_finer_and_up_to_its_duration() -> None:
    frames = window_frames(0, duration_s=22, num_frames=510, fps=10, history_s=100, length=100)
    assert frames[0] == 0
    assert frames[-1] == 220  # not 509: the outro is left out
    assert len(np.unique(frames)) == 100


def test_halves_are_rounded_to_even_as_numpy_rint_does() -> None:
    assert uniform_frames(6, 3).tolist() == [0, 2, 5]  # 2.5 -> 2


def test_more_draws_keep_the_first_ones() -> None:
    few = segment_draws(72, 20, draws=2, seed=7, video_id="a")
    many = segment_draws(72, 20, draws=5, seed=7, video_id="a")
    assert (many[:2] == few).all()


def test_draws_differ_between_videos_seeds_and_draws() -> None:
    base = segment_draws(500, 20, draws=2, seed=0, video_id="a")
    assert (base[0] != base[1]).any()
    assert (base != segment_draws(500, 20, draws=2, seed=1, video_id="a")).any()
    assert (base != segment_draws(500, 20, draws=2, seed=0, video_id="b")).any()


def test_draws_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from stages.data.sampling import segment_draws as s;"
        "print(s(72, 5, draws=1, seed=3, video_id='-4wsuPCjDBc_5_15').tolist())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    here = segment_draws(72, 5, draws=1, seed=3, video_id="-4wsuPCjDBc_5_15").tolist()
    assert done.stdout.strip() == str(here)
    assert here == GOLDEN_DRAWS


# Written down on 2026-11-22: a cache holds exactly these frames, so they must never change.
GOLDEN_DRAWS = [[5, 23, 29, 54, 61]]


def test_each_frame_of_a_segment_is_drawn_about_equally_often() -> None:
    draws = segment_draws(50, 5, draws=4000, seed=0, video_id="x")
    counts = np.bincount(draws[:, 2], minlength=30)[20:30]
    assert counts.sum() == 4000
    assert counts.min() > 330  # expected 400, standard deviation 19
    assert counts.max() < 470
