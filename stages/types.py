"""The values that pass between stages, and the few Protocols with more than one real implementation.

Letters in shapes are those of the notation table in ``stages/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

if TYPE_CHECKING:
    from torch import Tensor

    from cache_schema.report import SourceFile
    from cache_schema.spec import FeatureSpec


class VideoRejected(ValueError):
    """A video that gives no trustworthy frames. It is quarantined with this reason; the run goes on.

    Attributes:
        video_id: the id in the annotation.
        kind: short machine-readable class of the reason, such as ``truncated`` or ``not_a_video``.
        reason: one sentence a user can act on.
    """

    def __init__(self, video_id: str, kind: str, reason: str) -> None:
        super().__init__(f"{video_id}: {reason}")
        self.video_id, self.kind, self.reason = video_id, kind, reason

    def __reduce__(self) -> tuple[type[VideoRejected], tuple[str, str, str]]:
        return type(self), (self.video_id, self.kind, self.reason)


@dataclass(frozen=True)
class Sample:
    """One question about one window of one video.

    ``draws`` holds K alternative frame choices for training (K = 1 unless the dataset draws at random);
    evaluation uses ``draws[0]``. Indices count on the grid of ``DataConfig.fps`` from the start of the video.
    """

    sample_id: str
    video_id: str
    draws: Int[np.ndarray, "K T"] = field(repr=False)
    prompt: str
    answer: str
    group: str  # LVU: the task; QA: the question type (what, who, …)

    @property
    def frame_index(self) -> Int[np.ndarray, " T"]:
        """Frame indices used at evaluation."""
        first: Int[np.ndarray, " T"] = self.draws[0]
        return first


Runs = tuple[tuple[int, int], ...]  # (first, last) of consecutive grid indices, both included


@dataclass(frozen=True)
class SourceFacts:
    """What a frame source knows of the file that it read: stored beside the features."""

    size: int  # bytes
    sha256: str  # of the file (frame folder: of the names and sizes)
    pts: tuple[float, ...]  # presentation time in seconds of every returned frame, same order as the indices
    clamped: int = 0  # frames just past the end, answered with the last one (MA-LMM's counts differ by 1–2)
    count: int = 0  # grid frames of the whole video
    damaged: Runs = ()  # grid frames up to the last wanted one that do not decode, where data.around_damage allows it
    hdr: str = ""  # "PQ", "HLG" or "BT.2020": a picture that was read as if it were an ordinary one (D82)


@dataclass(frozen=True)
class Extent:
    """Which grid frames of a video there are: ``count``, without those in ``damaged``."""

    count: int
    damaged: Runs = ()


class VideoFrames:
    """The frames of one reading in batches [b, h, w, 3], once; ``facts`` are those of this reading, after its end."""

    def __init__(self, batches: Generator[UInt8[np.ndarray, "b h w 3"], None, SourceFacts]) -> None:
        self._batches = batches
        self._facts: SourceFacts | None = None

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
        self._facts = yield from self._batches

    @property
    def facts(self) -> SourceFacts:
        """Raises ValueError before the last batch was taken."""
        if self._facts is None:
            raise ValueError("a video's facts are known once its frames were read to the end")
        return self._facts


@runtime_checkable
class FrameSource(Protocol):
    """Where decoded frames come from: video files, frame folders, or WebDataset tars."""

    @property
    def frame_rule(self) -> str:
        """How an index becomes a picture; part of the feature spec."""

    @property
    def decoder(self) -> str:
        """Decoder with version; part of the feature spec."""

    def has(self, video_id: str) -> bool:
        """Whether the source holds something under this id (not whether it decodes)."""

    def count_frames(self, video_id: str) -> int:
        """Number of grid frames by the container's own account, without decoding. Raises VideoRejected."""

    def extent(self, video_id: str) -> Extent:
        """Which grid frames can be had. Decodes only where ``data.around_damage`` asks for it. Raises VideoRejected."""

    def unasked(self, video_ids: Iterable[str]) -> list[str]:
        """Ids of the videos of the source that none of these ids means."""

    def frames(self, video_id: str, frame_index: Int[np.ndarray, " n"], *, batch_size: int) -> VideoFrames:
        """RGB frames in the order of ``frame_index`` (sorted, unique), up to ``batch_size`` at a time.

        One array holds frames of one size. Raises VideoRejected; the frames already given are then void.
        """

    def file(self, video_id: str) -> SourceFile:
        """The video's file as it is now, without decoding. Raises VideoRejected."""

    def close(self) -> None:
        """End child processes and open files."""


@runtime_checkable
class FrozenEncoder(Protocol):
    """A frozen network turned into a pure function of uint8 frames."""

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        """Modality name -> spec: ``{"tokens": …}`` for CLIP, ``{"pooled/layer8": …}`` for the teacher."""

    def __call__(self, frames: UInt8[np.ndarray, "b h w 3"]) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Features of every modality for a batch of frames of one size, in the spec's dtype. No gradient, no state.

        It is ``encode(view(frames))``: two steps, so that one thread can prepare what another encodes.
        """

    def view(self, frames: UInt8[np.ndarray, "b h w 3"]) -> UInt8[Tensor, "b 3 size size"]:
        """The frames as the network sees them, resized, in CPU memory. Safe beside ``encode`` in another thread."""

    def encode(self, pictures: UInt8[Tensor, "b 3 size size"]) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Features of what ``view`` gave."""

    def weights_digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of all weights in memory: equal before and after a run."""


@dataclass(frozen=True)
class StudentOutput:
    """What the student gives for a batch.

    ``prefix`` [B, N, V]: the visual tokens the LLM reads; N = Q, from the last frame (T · Q for a per-frame student).
    ``hidden`` {u: [B, T', Q, E]}: query states of level u at the frames that the alignment asked for.
    """

    prefix: Float[Tensor, "B N V"]
    hidden: dict[int, Float[Tensor, "B T Q E"]]


@dataclass(frozen=True)
class AlignmentLoss:
    """Eq. 7 with its parts, for logging."""

    total: Float[Tensor, ""]
    per_level: dict[int, Float[Tensor, ""]]  # mean L_kd^(u) over frames and batch, before weighting (Eq. 5)
    weights: dict[int, Float[Tensor, ""]]  # mean w_u (Eq. 6)


@runtime_checkable
class Decoder(Protocol):
    """A frozen causal language model that reads a visual prefix."""

    @property
    def width(self) -> int:
        """V: the size of its input embeddings."""

    def loss_sum(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Float[Tensor, ""], int]:
        """Sum of the negative log-likelihood over all answer tokens (incl. end of sequence), and their number.

        Eq. 8 is the quotient; sum and count are returned apart so that micro-batches add up exactly.
        """

    def loss_per_sample(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], answers: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """The parts of ``loss_sum``: one sum per sample, in one pass."""

    def score_answers(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], candidates: Sequence[str]
    ) -> Float[Tensor, "B n"]:
        """Log-likelihood of each candidate (incl. end of sequence) for each sample, without gradient."""

    def count_answer_tokens(self, answers: Sequence[str]) -> int:
        """The number of answer tokens ``loss_sum`` would count, without running the model."""

    def unreachable(self, answers: Sequence[str]) -> list[str]:
        """The distinct answers that ``generate`` can never give, such as those longer than its limit."""

    def generate(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], *, allowed: Sequence[str] | None = None
    ) -> list[list[str]]:
        """Per sample the returned beams, best first, as stripped text.

        ``allowed`` closes the set of answers: no other can be given, and there may be fewer beams than asked for.
        """
