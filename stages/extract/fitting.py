"""Batches that are too large for the memory, encoded in parts: what they hold is the same, so the run goes on."""

from __future__ import annotations

import logging

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cache_schema.spec import FeatureSpec
from stages.types import FrozenEncoder

log = logging.getLogger(__name__)


class Fitting:
    """An encoder that halves a batch when the memory does not hold it, and takes no larger one from then on.

    Features do not depend on the batch size, so neither does the store.
    """

    def __init__(self, encoder: FrozenEncoder) -> None:
        self.encoder = encoder
        self.most: int | None = None  # frames at once; None: as many as come

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        """Those of the encoder."""
        return self.encoder.specs

    def view(self, frames: UInt8[np.ndarray, "b h w 3"]) -> UInt8[Tensor, "b 3 size size"]:
        """As the encoder does."""
        return self.encoder.view(frames)

    def weights_digest(self) -> str:
        """That of the encoder."""
        return self.encoder.weights_digest()

    def __call__(self, frames: UInt8[np.ndarray, "b h w 3"]) -> dict[str, np.ndarray]:
        """``encode`` of ``view``."""
        return self.encode(self.view(frames))

    def encode(self, pictures: UInt8[Tensor, "b 3 size size"]) -> dict[str, np.ndarray]:
        """The features of a batch, in as many parts as the memory asks for. Raises where one frame is too much."""
        parts: list[dict[str, np.ndarray]] = []
        first = 0
        while first < len(pictures):
            part = pictures[first : first + (self.most or len(pictures))]
            try:
                parts.append(self.encoder.encode(part))
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                if len(part) == 1:
                    size = f"one frame of {part.shape[3]}x{part.shape[2]}"
                    if type(error) is RuntimeError:  # what torch raises on a CPU
                        raise MemoryError(f"{size}: {error}") from error
                    error.add_note(f"That was with {size}.")
                    raise
                self.most = len(part) // 2
            else:
                first += len(part)
                continue
            # Behind the except block, whose traceback holds what the failed attempt had allocated.
            log.warning("%d frames at once are too much for the memory; going on with %d", len(part), self.most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _out_of_memory(error: Exception) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}  # the class moved between versions of torch
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "can't allocate memory" in str(error)
