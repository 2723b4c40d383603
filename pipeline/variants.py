"""Which variants an ablation has: from ``--vary``, ``--zip``, ``--seeds`` and ``--study`` to named configurations.

Nothing here loads torch, so a typing error is answered at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline import overrides
from pipeline.errors import ConfigError
from stages.config import PipelineConfig
from stages.urls import without_credentials

MATCHED = "matched"  # as a value of align.uniform_weight: the mean weight of the adaptive arm with the same seed

LAMBDAS = ("0", "0.1", "0.5", "1", "2", "5", "10")
LEVELS = ("all", "13", "1-7", "8-13")


@dataclass(frozen=True)
class Study:
    """An ablation of the paper: arms by name, each a list of ``section.key=value``."""

    figure: str
    arms: Mapping[str, tuple[str, ...]]


def studies(config: PipelineConfig) -> dict[str, Study]:
    """The ablations of §4.4. Figure 3 prints no list of its λ; the values here include its optimum and both ends."""
    average = 1 / len(config.align.levels)
    return {
        "lambda": Study("Figure 3", {f"lambda_kd={value}": (f"train.lambda_kd={value}",) for value in LAMBDAS}),
        "levels": Study("Figure 4", {f"levels={value}": (f"align.levels={value}",) for value in LEVELS}),
        # Table 4's "average" may be read as 1/M each: then it also divides λ by what the adaptive weights add up to.
        # The matched arm keeps the sum, so it alone tells whether weighing by level helps (D7, D62).
        "weights": Study(
            "Table 4",
            {
                "weights=adaptive": ("align.weights=adaptive",),
                "weights=matched": ("align.weights=uniform", f"align.uniform_weight={MATCHED}"),
                "weights=average": ("align.weights=uniform", f"align.uniform_weight={average:.6g}"),
            },
        ),
    }


@dataclass(frozen=True)
class Variant:
    """One run of an ablation.

    Attributes:
        name: its folder below OUT.
        arm: the name without the seed: runs of one arm differ in their seed only.
        settings: the varied keys with their values, as typed.
        seed: ``train.seed``.
        config: complete. For a matched arm ``align.uniform_weight`` is not known before ``needs`` has run.
        needs: name of the adaptive variant that a matched arm takes its weight from.
    """

    name: str
    arm: str
    settings: Mapping[str, str]
    seed: int
    config: PipelineConfig = field(repr=False)
    needs: str | None = None


def make_variants(
    config: PipelineConfig,
    *,
    vary: Sequence[str] = (),
    zipped: bool = False,
    study: str | None = None,
    seeds: str | None = None,
) -> tuple[list[Variant], list[str]]:
    """Every variant, and notes about those that were left out.

    Arms that cannot differ are trained once: where ``train.lambda_kd`` is 0, ``align`` and ``teacher`` have no effect.

    Raises:
        ConfigError: nothing to vary, a key or value that does not exist, or two variants that are the same.
    """
    arms = _arms(config, vary, zipped, study)
    found: list[Variant] = []
    same: dict[str, Variant] = {}
    left_out: list[Variant] = []
    for (arm, sets), seed in itertools.product(arms.items(), parse_seeds(seeds) if seeds else (config.train.seed,)):
        variant = _variant(config, arm, sets, seed)
        twin = same.setdefault(_fingerprint(variant), variant)
        if twin is variant:
            found.append(variant)
        elif variant.config.train.lambda_kd == 0 and twin.config != variant.config:
            left_out.append(variant)
        else:
            raise ConfigError(f"{twin.name} and {variant.name} are the same run; vary each value once")
    notes = []
    if left_out:
        names = [variant.name for variant in left_out]
        notes.append(
            f"left out: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: "
            "with train.lambda_kd=0 they differ in align.* or teacher.* only, and these then do nothing"
        )
    return found, notes


def parse_vary(item: str) -> tuple[str, tuple[str, ...]]:
    """``align.levels=all,13,1-7,[1,5]`` -> the key and its values; a comma inside brackets or quotes separates none."""
    key, equals, raw = item.partition("=")
    values = tuple(part for part in _split(raw) if part)
    if not equals or not values:
        raise ConfigError(f"--vary {item}: expected key=value,value,…\nFor example:  --vary train.lambda_kd=0,1,10")
    if key.strip() == "train.seed":
        raise ConfigError("--vary train.seed: seeds have an option of their own:  --seeds 0-4")
    return key.strip(), values


def parse_seeds(text: str) -> tuple[int, ...]:
    """``0-4`` or ``1,5,9-11``. Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise ConfigError(f"--seeds {text}: expected numbers and ranges, such as 0-4 or 1,5,9")
        seeds.extend(range(int(first), int(last or first) + 1))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: names a seed twice")
    return tuple(seeds)


def _arms(config: PipelineConfig, vary: Sequence[str], zipped: bool, study: str | None) -> dict[str, tuple[str, ...]]:
    if (study is None) == (not vary):
        raise ConfigError("say what varies: --vary KEY=VALUE,VALUE (repeatable) or --study NAME, one of the two")
    if study is not None:
        known = studies(config)
        if study not in known:
            raise ConfigError(f"--study {study}: no such study; known: {', '.join(known)}")
        return dict(known[study].arms)
    axes = [parse_vary(item) for item in vary]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--vary names {max(keys, key=keys.count)} twice; give all its values once")
    lengths = {len(values) for _, values in axes}
    if zipped and len(lengths) > 1:
        told = ", ".join(f"{key} has {len(values)}" for key, values in axes)
        raise ConfigError(f"--zip pairs the values one by one, but {told}")
    values = [found for _, found in axes]
    rows = zip(*values, strict=True) if zipped else itertools.product(*values)
    arms: dict[str, tuple[str, ...]] = {}
    for row in rows:
        name = "_".join(
            f"{_short(key, keys)}={_slug(without_credentials(value))}" for key, value in zip(keys, row, strict=True)
        )
        sets = tuple(f"{key}={value}" for key, value in zip(keys, row, strict=True))
        if name in arms and arms[name] != sets:  # two values whose letters are the same once slashes are gone
            name = f"{name}-{hashlib.sha256(repr(sets).encode()).hexdigest()[:6]}"
        if name in arms:
            raise ConfigError(f"--vary gives {' '.join(sets)} twice")
        arms[name] = sets
    return arms


def _variant(config: PipelineConfig, arm: str, sets: Sequence[str], seed: int) -> Variant:
    settings = dict(without_credentials(item).split("=", 1) for item in sets)
    matched = settings.get("align.uniform_weight") == MATCHED
    given = [item for item in sets if not (matched and item.startswith("align.uniform_weight="))]
    try:
        complete = overrides.apply(config, [*given, f"train.seed={seed}"])
    except ConfigError as error:
        raise ConfigError(f"{arm}: {error}") from error
    needs = _name("weights=adaptive", seed) if matched else None
    return Variant(_name(arm, seed), arm, settings, seed, complete, needs)


def _name(arm: str, seed: int) -> str:
    return f"{arm}_seed={seed}"


def _fingerprint(variant: Variant) -> str:
    """Equal for variants that train to the same weights."""
    return json.dumps([overrides.effective(variant.config), variant.needs], sort_keys=True)


def _short(key: str, keys: Sequence[str]) -> str:
    """The key without its section, unless another varied key has the same last part."""
    leaf = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == leaf for other in keys) > 1 else leaf


def _slug(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.,+-]+", "-", value).strip("-.")[-40:] or "empty"


def _split(raw: str) -> list[str]:
    """At commas outside of brackets and double quotes."""
    parts, depth, quoted = [""], 0, False
    for letter in raw:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
