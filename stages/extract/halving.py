"""Batches that are too large for the memory, encoded in halves: what they hold is the same, so the run can go on."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from stages.types import FrozenEncoder

log = logging.getLogger(__name__)


def encode(encoder: FrozenEncoder, pictures: UInt8[Tensor, "b 3 size size"]) -> Mapping[str, np.ndarray]:
    """The encoder on a batch; when that is too much for the memory, once more on its two halves.

    Features do not depend on the batch size, so neither does the store.
    """
    try:
        return _encode(encoder, pictures)
    except Exception as error:
        if len(pictures) < 2 or not _out_of_memory(error):
            raise
    half = len(pictures) // 2
    log.warning("%d frames at once are too much for the memory; going on with %d", len(pictures), half)
    parts = [_encode(encoder, pictures[:half]), _encode(encoder, pictures[half:])]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _encode(encoder: FrozenEncoder, pictures: UInt8[Tensor, "b 3 size size"]) -> Mapping[str, np.ndarray]:
    try:
        return encoder.encode(pictures)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        size = f"{len(pictures)} frames of {pictures.shape[3]}x{pictures.shape[2]} at once"
        if type(error) is RuntimeError:  # what torch raises on a CPU
            raise MemoryError(f"{size}: {error}") from error
        error.add_note(f"That was with {size}.")
        raise


def _out_of_memory(error: Exception) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}  # the class moved between versions of torch
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "can't allocate memory" in str(error)
