"""FeatureSpec: every setting that changes a cached number, and nothing that only changes speed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from cache_schema.quantize import row_bytes

DTYPES = ("float16", "float32", "int8")
MAX_FRAME_BYTES = 1 << 28  # 256 MiB; EVA-g's 257 × 1408 float16 is 0.7 MiB
MAX_TEXT = 4096  # characters of one text field


@dataclass(frozen=True)
class FeatureSpec:
    """How one modality's numbers were made. Two specs are interchangeable exactly when their digests are equal.

    Raises:
        ValueError: a field has the wrong type or an impossible value; the message names the field.
    """

    encoder: str  # "open_clip:EVA01-g-14", "diffusers:DiT"
    weights: str  # sha256 hex digest of the weights used
    layer: int  # 1-based block whose output is stored
    pool: str  # "none" | "mean" | "grid4"
    resize: str  # "squash 224 bicubic antialias uint8"
    normalize: str  # "mean=0.481,0.458,0.408 std=0.269,0.261,0.276"
    latent: str  # "" for CLIP; "mode*0.18215" for DiT
    timestep: int | None  # diffusion time; None for CLIP
    label: int | None  # class label given to the teacher; None for CLIP
    dtype: str  # "float16" | "float32" | "int8" (with two-level scales, read as float16): what is stored
    compute_dtype: str  # what the encoder ran in
    frame_shape: tuple[int, ...]  # (P, C) | (D,) | (g, g, D): the features of one frame
    frame_rule: str  # how a frame index becomes a picture
    decoder: str  # decoder with version

    def __post_init__(self) -> None:
        for name, allowed in _FIELD_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, allowed) or isinstance(value, bool):
                wanted = " or ".join(kind.__name__ for kind in allowed)
                raise ValueError(f"FeatureSpec.{name} must be {wanted}, not {value!r}")
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise ValueError(f"FeatureSpec.{name} has {len(value)} characters; at most {MAX_TEXT} are allowed")
        if self.dtype not in DTYPES:
            raise ValueError(f"FeatureSpec.dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        sizes = self.frame_shape
        if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
            raise ValueError(f"FeatureSpec.frame_shape must hold one or more positive integers, not {sizes!r}")
        if self.frame_bytes > MAX_FRAME_BYTES:
            raise ValueError(
                f"FeatureSpec.frame_shape {sizes} is {self.frame_bytes} bytes a frame; the limit is {MAX_FRAME_BYTES}"
            )

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's features as stored."""
        if self.dtype == "int8":
            return row_bytes(self.frame_shape)
        return math.prod(self.frame_shape) * (2 if self.dtype == "float16" else 4)

    @property
    def feature_dtype(self) -> str:
        """What goes in and comes out: float16 where int8 is stored."""
        return "float16" if self.dtype == "int8" else self.dtype

    def digest(self) -> str:
        """sha256 over the canonical JSON (sorted keys, no spaces, ASCII) of all fields."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def differences(self, other: FeatureSpec) -> dict[str, tuple[object, object]]:
        """Field -> (own value, other's value), in field order, for every field that differs."""
        pairs = {field: (getattr(self, field), getattr(other, field)) for field in FIELDS}
        return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values (``frame_shape`` as a list)."""
        return {**{field: getattr(self, field) for field in FIELDS}, "frame_shape": list(self.frame_shape)}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> FeatureSpec:
        """Inverse of ``to_json``. Raises ValueError naming a field that is missing, unknown, or of the wrong type."""
        if not isinstance(document, Mapping):
            raise ValueError(f"a feature spec must be a JSON object, not {type(document).__name__}")
        missing = [field for field in FIELDS if field not in document]
        unknown = sorted(str(field) for field in document if field not in FIELDS)
        if missing or unknown:
            raise ValueError(f"feature spec: missing fields {missing}, unknown fields {unknown}")
        fields: dict[str, typing.Any] = {field: document[field] for field in FIELDS}
        if isinstance(fields["frame_shape"], list):  # JSON has no tuples
            fields["frame_shape"] = tuple(fields["frame_shape"])
        return cls(**fields)


FIELDS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(FeatureSpec))


def _runtime_types(hint: object) -> tuple[type, ...]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(part) or part for part in parts)


_FIELD_TYPES = {name: _runtime_types(hint) for name, hint in typing.get_type_hints(FeatureSpec).items()}
