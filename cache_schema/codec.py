"""The Zarr v3 codec of int8 arrays: with this package installed, any zarr-python reads them as float16.

Registered under the entry point group ``zarr.codecs``. Needs zarr; nothing else of this package imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from cache_schema.quantize import CODEC_NAME, ChannelScale, row_bytes


@dataclass(frozen=True)
class Int8Codec(ArrayBytesCodec):
    """One frame [1, *tokens, C] of float16 <-> its token scales and int8 numbers (cache_schema.quantize)."""

    channel_scale: str  # base64 of C little-endian float32
    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """From the metadata of an array."""
        _, configuration = parse_named_configuration(data, CODEC_NAME)
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        """For the metadata of an array."""
        return {"name": CODEC_NAME, "configuration": {"channel_scale": self.channel_scale}}

    def _scale(self, chunk_spec: ArraySpec) -> ChannelScale:
        return ChannelScale.from_json(self.channel_scale, chunk_spec.shape[-1])

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        shape = chunk_spec.shape
        rows = np.asarray(chunk_data.as_numpy_array()).view(np.uint8).reshape(shape[0], row_bytes(shape[1:]))
        features: Any = np.empty(shape, np.float16)
        self._scale(chunk_spec).dequantize(rows, features)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(features)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        rows = self._scale(chunk_spec).quantize(np.asarray(chunk_data.as_numpy_array()))
        return chunk_spec.prototype.buffer.from_array_like(rows.reshape(-1))

    def compute_encoded_size(self, _input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Bytes of a chunk."""
        shape: tuple[Any, ...] = chunk_spec.shape
        return int(shape[0]) * row_bytes(shape[1:])
