"""What several tests of frame sources share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.data.frames import VideoFiles
from stages.data.sources.video_process import DecoderProcess


@pytest.fixture(scope="module")
def spare() -> Iterator[list[DecoderProcess]]:
    """Decoder processes that the tests of one file hand on, because starting one costs more than most tests."""
    processes: list[DecoderProcess] = []
    yield processes
    for process in processes:
        process.kill()


@pytest.fixture
def open_folder(tmp_path: Path, spare: list[DecoderProcess]) -> Callable[..., VideoFiles]:
    """Makes VideoFiles of tmp_path or another folder; options are those of VideoFiles."""

    def make(folder: Path = tmp_path, *, fps: float = 10, **options: object) -> VideoFiles:
        source = VideoFiles(folder, fps=fps, **options)  # type: ignore[arg-type]
        source._reader.decoder.idle = spare
        return source

    return make
