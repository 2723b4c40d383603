"""Every registered part can be imported, and a wrong name is answered with the right ones."""

from __future__ import annotations

import pytest

from pipeline import presets, registry
from pipeline.errors import ConfigError

PARTS = [(kind, name) for kind, parts in registry.KINDS.items() for name in parts]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_registered_part_can_be_imported(kind: str, name: str) -> None:
    assert callable(registry.load(kind, name))


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_every_preset_names_registered_parts(preset: str) -> None:
    config = presets.get(preset)
    assert config.data.name in registry.DATASETS
    assert config.clip.source in registry.ENCODERS
    assert config.teacher.name in registry.TEACHERS
    assert config.student.name in registry.STUDENTS
    assert config.decode.name in registry.DECODERS


@pytest.mark.parametrize(("typed", "near"), [("msvd-qa", "msvd_qa"), ("clip", "clips"), ("zzz", "clips, lvu, msvd_qa")])
def test_an_unknown_part_names_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"no dataset is called '{typed}'; known: .*{near}"):
        registry.load("dataset", typed)
