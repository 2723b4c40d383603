"""One resize for CLIP and teacher: uint8, antialiased, one geometry."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from stages.extract.resize import Resize


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A frame with gradients, edges and fine texture: uint8 [h, w, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 120)
    return np.clip(smooth + generator.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)


def resized(frame: np.ndarray, resize: Resize) -> np.ndarray:
    return resize(frame[None])[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("height", "width"), [(360, 640), (211, 297), (60, 80)])
def test_squash_is_what_pil_gives_to_within_two_levels(height: int, width: int) -> None:
    frame = picture(height, width)
    ours = resized(frame, Resize(112)).astype(int)
    pil = np.asarray(Image.fromarray(frame).resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - pil).max() <= 2
    assert (ours == pil).mean() > 0.98


def test_a_frame_shrunk_in_height_and_stretched_in_width_stays_close_to_pil() -> None:
    frame = picture(211, 97)  # torch and PIL take the two axes in another order here and round in between
    ours = resized(frame, Resize(112)).astype(int)
    pil = np.asarray(Image.fromarray(frame).resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - pil).mean() < 0.5


def test_the_resize_is_antialiased() -> None:
    frame = picture(480, 720)
    ours = resized(frame, Resize(56)).astype(float)
    floats = torch.from_numpy(frame).permute(2, 0, 1)[None].float()

    def reference(antialias: bool) -> np.ndarray:
        out = torch.nn.functional.interpolate(floats, size=(56, 56), mode="bicubic", antialias=antialias)
        return out.clamp(0, 255)[0].permute(1, 2, 0).numpy()

    assert np.abs(ours - reference(True)).mean() < 0.5
    assert np.abs(ours - reference(False)).mean() > 5


def test_overshoot_at_a_hard_edge_does_not_wrap_around() -> None:
    frame = np.zeros((40, 40, 3), np.uint8)
    frame[:, 20:] = 255
    enlarged = resized(frame, Resize(96)).astype(int)
    assert enlarged[:, :40].max() < 30
    assert enlarged[:, 56:].min() > 225


def test_channels_stay_in_rgb_order() -> None:
    frame = np.zeros((30, 50, 3), np.uint8)
    frame[..., 0], frame[..., 1], frame[..., 2] = 200, 100, 7
    out = Resize(24)(frame[None])
    assert out.shape == (1, 3, 24, 24)
    assert [int(channel.float().mean()) for channel in out[0]] == [200, 100, 7]


def test_squash_sees_the_whole_frame_and_shortest_center_only_the_centred_square() -> None:
    frame = np.full((40, 100, 3), 90, np.uint8)
    frame[:, :25], frame[:, 75:] = 255, 255
    assert (resized(frame, Resize(32, "shortest_center")) == 90).all()
    assert resized(frame, Resize(32, "squash")).max() == 255
    tall = frame.transpose(1, 0, 2)
    assert (resized(tall, Resize(32, "shortest_center")) == 90).all()


@pytest.mark.parametrize("geometry", ["squash", "shortest_center"])
def test_clip_and_teacher_sizes_show_the_same_picture(geometry: str) -> None:
    frame = np.asarray(Image.fromarray(picture(30, 47)).resize((470, 300), Image.Resampling.BICUBIC))
    small = Image.fromarray(resized(frame, Resize(224, geometry)))  # type: ignore[arg-type]
    large = resized(frame, Resize(256, geometry))  # type: ignore[arg-type]
    enlarged = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(enlarged - large).mean() < 1.5


def test_every_frame_of_a_batch_is_resized_as_if_alone() -> None:
    frames = np.stack([picture(90, 130, seed) for seed in range(5)])
    together = Resize(48)(frames)
    for frame, row in zip(frames, together, strict=True):
        assert torch.equal(Resize(48)(frame[None])[0], row)


def test_read_only_frames_are_taken_without_warning_and_left_alone() -> None:
    frames = picture(20, 20)[None]
    frames.flags.writeable = False
    before = frames.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = Resize(20)(frames)
    out.zero_()
    assert (frames == before).all()


def test_a_very_long_frame_costs_no_more_than_a_square_one() -> None:
    assert Resize(16, "shortest_center")(np.zeros((1, 2, 60_000, 3), np.uint8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_anything_but_uint8_rgb_frames_is_refused(frames: np.ndarray) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)uint8"):
        Resize(8)(frames)


def test_the_spec_string_names_everything_that_changes_the_picture() -> None:
    assert str(Resize(224)) == "squash 224 bicubic antialias uint8"
    assert str(Resize(256, "shortest_center", "bilinear")) == "shortest_center 256 bilinear antialias uint8"
