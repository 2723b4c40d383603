"""Where decoded frames come from. The door of this room: everything else about frames is in sources/.

=================  =====================================  ==========================================
source             an id is                               frames
=================  =====================================  ==========================================
``VideoFiles``     a file's path below the root, with or  PyAV in a process of its own, by pts
                   without its extension
``FrameFolders``   the path of a folder of numbered       Pillow, 10 frames per second (MA-LMM)
                   images, such as ``frame%06d.jpg``
``WebDatasetTars`` a key in tars, local or http(s)        either of the two, read in place
=================  =====================================  ==========================================

All of them are a ``stages.types.FrameSource``: grid index i is the picture on screen i/fps seconds after the first one
(sources/frame_grid.py). Up to two indices past the end are answered with the last frame and counted. Everything that
gives no trustworthy frames is a ``VideoRejected`` with one of the kinds in REJECTION_KINDS.
"""

from __future__ import annotations

from pathlib import Path

from stages.config import DataConfig
from stages.data.ids import safe_id
from stages.data.sources.frame_folders import FrameFolders
from stages.data.sources.picture_batches import limits_of
from stages.data.sources.tars import WebDatasetTars
from stages.data.sources.video_files import VideoFiles

REJECTION_KINDS = {
    "ambiguous_id": "two files, folders or tar members answer to the id",
    "bad_id": "the id could leave the folder or break a line",
    "changed": "the file was written to while it was read",
    "damaged_container": "the container cannot be read to its end",
    "decode_error": "a picture does not decode, or had to be patched up",
    "decoder_crashed": "the decoder process died on it",
    "empty_file": "0 bytes",
    "missing_file": "nothing has this id",
    "missing_frame": "a frame number inside a sequence does not exist",
    "no_decoder": "no decoder for the codec",
    "no_frames": "a video stream or folder without pictures",
    "no_index": "an MP4 without its moov box",
    "no_video_stream": "audio, subtitles or a cover picture only",
    "not_a_file": "a pipe, device or folder where a file should be",
    "not_a_video": "an image, a text, a playlist or anything else",
    "out_of_memory": "decoding needs more memory than allowed",
    "outside_root": "a link that leaves the folder",
    "past_the_end": "an index more than two grid steps past the end",
    "timeout": "decoding takes longer than data.decode_timeout_s",
    "too_large": "more pixels than data.max_pixels",
    "too_long": "longer than data.max_duration_s",
    "truncated": "clearly shorter than its header says, or cut off",
    "unclear_frames": "images of one folder that are numbered in two ways, or twice",
    "unreadable": "the system does not let it be read",
}


def open_source(cfg: DataConfig) -> VideoFiles | FrameFolders | WebDatasetTars:
    """The frame source that ``data.source`` and ``data.videos`` name. Raises ValueError where there is none."""
    if not cfg.videos:
        raise ValueError("no videos are named.\nName a folder or a tar: --set data.videos=PATH")
    limits = limits_of(cfg)
    if cfg.source == "frame_folders":
        return FrameFolders(
            cfg.videos,
            fps=cfg.fps,
            limits=limits,
            around_damage=cfg.around_damage,
            follow_symlinks=cfg.follow_symlinks,
        )
    if cfg.source == "webdataset":
        return WebDatasetTars(cfg.videos, fps=cfg.fps, limits=limits, around_damage=cfg.around_damage)
    return VideoFiles(
        cfg.videos,
        fps=cfg.fps,
        limits=limits,
        around_damage=cfg.around_damage,
        follow_symlinks=cfg.follow_symlinks,
    )


def list_videos(root: str | Path, source: str = "files") -> list[str]:
    """Sorted ids of what a folder (``files``, ``frame_folders``) or a tar pattern (``webdataset``) holds."""
    videos = open_source(DataConfig.model_validate({"videos": str(root), "source": source}))
    try:
        return videos.video_ids()
    finally:
        videos.close()


__all__ = [
    "REJECTION_KINDS",
    "FrameFolders",
    "VideoFiles",
    "WebDatasetTars",
    "list_videos",
    "open_source",
    "safe_id",
]
