"""Frames out of an object store: neighbouring frames in one GET, several GETs at a time, every checksum checked.

What came over a network is always checked. A shard of a store on a local disk never comes here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cache_schema.objects import RANGE, ObjectPath
from cache_schema.shard import Layout, Shard

GAP = 1 << 20  # bytes that are read and dropped rather than asked around: 10 ms at 100 MB/s, less than one more request

Rows = npt.NDArray[np.uint8]


def read_slots(layout: Layout, shard: Shard, slots: npt.NDArray[np.int64], rows: Rows) -> int | None:
    """Fill rows [n, frame_bytes] with the frames of these slots [n], in this order; repeats are read once.

    Returns the position of a frame that does not fit its checksum; None when all are sound.
    Raises ObjectChanged when the shard was replaced since its footer was read, and StoreUnavailable.
    """
    if not isinstance(shard.file, ObjectPath):
        raise AssertionError("a shard of an object store")
    order = np.argsort(slots, kind="stable")
    wanted, first = np.unique(slots[order], return_index=True)
    positions = dict(zip(wanted.tolist(), np.split(order, first[1:]), strict=True))  # slot -> rows that want it
    spans = _spans(layout, wanted)
    bounds = [(span[0] * layout.stride, span[-1] * layout.stride + layout.chunk_bytes) for span in spans]
    for span, (start, _), data in zip(spans, bounds, shard.file.fetch(bounds), strict=True):
        for slot in span:
            chunk = data[slot * layout.stride - start :][: layout.chunk_bytes]
            if not layout.is_sound(chunk):
                return int(positions[slot][0])
            rows[positions[slot]] = np.frombuffer(chunk, np.uint8, layout.frame_bytes)
    return None


def _spans(layout: Layout, slots: npt.NDArray[np.int64]) -> list[list[int]]:
    """Sorted slots in groups, one GET each: close together, and at most ``RANGE`` bytes unless it is one frame."""
    spans: list[list[int]] = []
    for slot in slots.tolist():
        near = spans and (slot - spans[-1][-1]) * layout.stride - layout.chunk_bytes <= GAP
        if near and (slot - spans[-1][0]) * layout.stride + layout.chunk_bytes <= RANGE:
            spans[-1].append(slot)
        else:
            spans.append([slot])
    return spans
