"""FeatureSpec: what makes two caches interchangeable."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from cache_schema import FeatureSpec
from tests.cache_schema.makers import POOLED, TOKENS

CHANGED: dict[str, object] = {
    "layer": 4,
    "timestep": 7,
    "label": 8,
    "dtype": "float32",
    "frame_shape": (7, 5),
}


@pytest.mark.parametrize("field", [field.name for field in fields(FeatureSpec)])
def test_every_field_changes_the_digest_and_is_named_as_the_difference(field):
    value = CHANGED.get(field, "something else")
    changed = replace(TOKENS, **{field: value})
    assert changed.digest() != TOKENS.digest()
    assert TOKENS.differences(changed) == {field: (getattr(TOKENS, field), value)}


def test_equal_specs_have_equal_digests_and_no_differences():
    assert replace(TOKENS).digest() == TOKENS.digest()
    assert TOKENS.differences(replace(TOKENS)) == {}


def test_the_digest_is_the_same_in_every_process_and_release():
    assert TOKENS.digest() == "3d3e17ccb2bb6f83704cb16aacf1d11e17a46074f9d6646ac5b08fc3b037c19a"


@pytest.mark.parametrize("spec", [TOKENS, POOLED], ids=["tokens", "pooled"])
def test_json_round_trip_is_the_identity(spec):
    assert FeatureSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", "8"),
        ("layer", True),
        ("timestep", 0.5),
        ("encoder", None),
        ("encoder", "x" * 5000),
        ("dtype", "bfloat16"),
        ("frame_shape", ()),
        ("frame_shape", (5, 0)),
        ("frame_shape", (5, 2.0)),
        ("frame_shape", 5),
        ("frame_shape", (1 << 20, 1 << 10)),
    ],
)
def test_a_field_of_the_wrong_type_or_size_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"FeatureSpec.{field}"):
        replace(TOKENS, **{field: value})


def test_a_missing_or_unknown_field_in_json_is_named():
    document = TOKENS.to_json()
    del document["pool"]
    with pytest.raises(ValueError, match=r"missing fields \['pool'\], unknown fields \['pol'\]"):
        FeatureSpec.from_json({**document, "pol": "mean"})
