"""Any folder of videos with an annotation file in either of MA-LMM's layouts, or with none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from stages.config import DataConfig
from stages.data.annotations import (
    EVERY_SPLIT,
    SPLITS,
    AnnotationError,
    Entry,
    LvuEntry,
    Problems,
    QaEntry,
    RawFile,
    check_split,
    distinct_answers,
    leak_warnings,
    load_files,
    require_path,
    validated,
)
from stages.data.lvu import check_task, cross_task_videos, lvu_samples, tasks_of
from stages.data.msvd import qa_files, qa_samples
from stages.data.sampling import grid_count
from stages.types import Sample, VideoRejected

_LAYOUT_FIELDS = {"lvu": {"duration", "num_frames"}, "qa": {"question", "answer", "frame_length"}}


class ClipsDataset:
    """``data.annotations`` is one file, or a folder with train.json / val.json / test.json or qa_*.json, or nothing.

    The layout is recognised by the fields of the entries. ``subset`` of an entry (either layout) names its split; a
    single file without any puts every entry into every split, and ``warnings`` says so. All grid frames of every
    annotated video are wanted, so that windows, T or the task can change without a new extraction. In the QA layout
    frames are evenly spaced in training too, unless ``data.draws`` asks for more than one choice.

    Without annotations there are no samples, and all videos are wanted whole.

    Args:
        list_videos: ids of the videos to take when there are no annotations.
        count_frames: number of grid frames of a video, for the same case (``FrameSource.count_frames``). A video whose
            length it refuses (VideoRejected) wants frame 0, so that extraction tries it and records the reason.
    """

    answer_rule: ClassVar[Literal["exact"]] = "exact"

    def __init__(
        self,
        cfg: DataConfig,
        *,
        list_videos: Callable[[], Sequence[str]] | None = None,
        count_frames: Callable[[str], int] | None = None,
    ) -> None:
        self.cfg, self._list_videos, self._count_frames = cfg, list_videos, count_frames
        self._lvu: dict[str, dict[str, LvuEntry]] = {}
        self._qa: dict[str, dict[str, QaEntry]] = {}
        self.layout: Literal["lvu", "qa", "none"] = "none"
        repeated = False
        if cfg.annotations:
            self.layout, repeated = self._read(require_path(cfg.annotations))
        self.splits = tuple(self._entries)
        self.leaks = cross_task_videos(self._lvu, tasks_of(cfg))
        self.warnings = self._collect_warnings(repeated)

    @property
    def _entries(self) -> Mapping[str, Mapping[str, Entry]]:
        return self._lvu or self._qa

    def samples(self, split: str) -> list[Sample]:
        """Windows (LVU layout) or questions (QA layout) of a split, in annotation order."""
        check_split(split, self.splits)
        if self._lvu:
            return lvu_samples(self._lvu[split], self.cfg)
        return qa_samples(self._qa[split], self.cfg, random_draws=split == "train" and self.cfg.draws > 1)

    def wanted(self, splits: Sequence[str] | None = None) -> dict[str, Int[np.ndarray, " n"]]:
        """All grid indices of every video in these splits (default: all splits; without annotations, all videos)."""
        if self.layout == "none":
            return self._whole_videos()
        frames: dict[str, Int[np.ndarray, " n"]] = {}
        for split in self.splits if splits is None else splits:
            check_split(split, self.splits)
            for key, entry in self._entries[split].items():
                if (video := entry.video_id(key)) not in frames:
                    frames[video] = np.arange(grid_count(entry.count(), self.cfg.fps), dtype=np.int64)
        return frames

    def labels(self, split: str) -> tuple[str, ...]:
        """The distinct answers of a split, sorted."""
        return distinct_answers(self.samples(split))

    def published_n(self, split: str) -> int | None:  # noqa: ARG002 - nothing is published about a folder of clips
        """None: there is no published protocol."""
        return None

    def _read(self, path: Path) -> tuple[Literal["lvu", "qa"], bool]:
        """Fill the entries; return the layout, and whether one file stands for every split."""
        problems = Problems(str(path))
        raw = load_files(_files_by_split(path), problems)
        layouts = {_layout(file, problems) for file in raw} - {None}
        if len(layouts) > 1:
            problems.found.append(f"{', '.join(f.path.name for f in raw)} have different layouts; give one of them")
        if layouts == {"lvu"}:
            self._lvu = validated(raw, LvuEntry, problems)
        elif layouts == {"qa"}:
            self._qa = validated(raw, QaEntry, problems)
        problems.raise_any()
        if self._lvu:
            check_task(self.cfg, self._lvu, str(path))
        return "lvu" if self._lvu else "qa", raw[0].split == EVERY_SPLIT and all(
            "subset" not in e for e in raw[0].objects.values()
        )

    def _collect_warnings(self, repeated: bool) -> tuple[str, ...]:
        if self.layout == "none":
            return ("no annotations: features can be extracted, nothing can be trained or scored",)
        if repeated:
            name = Path(self.cfg.annotations).name
            return (f"{name} names no splits: train, val and test are the same samples, so scores measure memory",)
        absent = [split for split in SPLITS if split not in self.splits]
        return (*(f"the annotations have no {split} split" for split in absent), *leak_warnings(self._entries))

    def _whole_videos(self) -> dict[str, Int[np.ndarray, " n"]]:
        if self._list_videos is None or self._count_frames is None:
            raise ValueError(
                "without annotations the ids and lengths come from the videos: give list_videos, count_frames"
            )
        return {video: np.arange(self._count_or_one(video), dtype=np.int64) for video in self._list_videos()}

    def _count_or_one(self, video: str) -> int:
        assert self._count_frames is not None
        try:
            return max(self._count_frames(video), 1)
        except VideoRejected:
            return 1


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    if not path.is_dir():
        return {EVERY_SPLIT: [path]}
    plain = {split: [path / f"{split}.json"] for split in SPLITS if (path / f"{split}.json").exists()}
    if not (found := plain or qa_files(path)):
        raise AnnotationError(str(path), ["has none of train.json, val.json, test.json, qa_train.json, ..."])
    return found


def _layout(file: RawFile, problems: Problems) -> str | None:
    """``lvu``, ``qa``, or None with a problem noted: the layout that most fields of the file belong to."""
    hits = {
        layout: sum(len(names & entry.keys()) for entry in file.objects.values())
        for layout, names in _LAYOUT_FIELDS.items()
    }
    best = max(hits, key=lambda layout: hits[layout])
    if hits[best]:
        return best
    if file.objects:
        wanted = " or ".join(" + ".join(sorted(names)) for names in _LAYOUT_FIELDS.values())
        problems.add(file.path, f"has neither layout: entries need {wanted}")
    return None
