"""What a configuration reads: its dataset, the samples of a split, and their features in the cache.

Every refusal names what is wrong, and the command that mends it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from cache_schema.errors import CacheMismatch
from cache_schema.objects import StorePath
from cache_schema.store import FeatureStore
from pipeline import presets, registry
from pipeline.errors import ConfigError
from pipeline.overrides import flatten
from stages.config import PipelineConfig
from stages.data.clips import ClipsDataset
from stages.data.frames import open_source
from stages.data.manifest import changed_sources
from stages.data.samples import Availability, Batch, CachedSamples, Request, available
from stages.types import Sample

Which = Literal["clip", "teacher"]
BOTH: tuple[Which, ...] = ("clip", "teacher")
BOTH_READ = ("extract", "cache repair --sources", "cache verify --sources")  # commands that settings of both matter to
SamplesFrom = Callable[[Sequence[Sample], FeatureStore], CachedSamples]  # how an evaluation reads


# ---------------------------------------------------------------- questions


def load_dataset(config: PipelineConfig) -> Any:
    """The dataset that ``data.name`` names; a plain folder of videos lists and measures them itself."""
    build = registry.load("dataset", config.data.name)
    if build is ClipsDataset and not config.data.annotations:
        with contextlib.closing(open_source(config.data)) as source:
            dataset = build(config.data, list_videos=source.video_ids, count_frames=source.count_frames)
            lengths = dataset.wanted()  # asked now, while the source is open
        return build(config.data, list_videos=lambda: list(lengths), count_frames=lambda video: len(lengths[video]))
    return build(config.data)


def refuse_leaks(config: PipelineConfig, leaks: Sequence[str]) -> None:
    """Raise ConfigError where a test video of one task trains another, unless ``data.allow_leak`` asks for that."""
    if leaks and not config.data.allow_leak:
        raise ConfigError(
            f"data.task={config.data.task}: {len(leaks)} test videos of one task are training videos of another, "
            f"such as {', '.join(leaks[:3])}; a student trained on all tasks has seen its test videos.\n"
            f"Train one task at a time, or accept it:  --set data.allow_leak=true"
        )


def samples_of(dataset: Any, split: str) -> list[Sample]:
    """The samples of a split. Raises ConfigError when there are none."""
    if not dataset.splits:
        raise ConfigError("without annotations there is nothing to learn or score; give data.annotations")
    samples: list[Sample] = dataset.samples(split)
    if not samples:
        raise ConfigError(f"the {split} split has no samples")
    return samples


# ---------------------------------------------------------------- features


def builder_of(config: PipelineConfig, which: Which) -> str:
    """The import string of an encoder's ``build``. Raises ConfigError where nothing is registered under its name."""
    if which == "clip":
        return registry.import_string("encoder", config.clip.source)
    return registry.import_string("teacher", config.teacher.name)


def shapes(config: PipelineConfig, which: Which) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Modality, frame shape and dtype, without loading any weights."""
    module = importlib.import_module(builder_of(config, which).partition(":")[0])
    yield from module.describe(config).items()


def open_stores(config: PipelineConfig, cache: StorePath, *, aligned: bool) -> list[FeatureStore]:
    """The CLIP store and, where aligned, the teacher's; refused when their features are not those of ``config``."""
    opened = []
    for which in ("clip", "teacher") if aligned else ("clip",):
        known = dict(shapes(config, which))
        name = next(iter(known)) if which == "clip" else f"pooled/layer{config.teacher.layer}{_grid(config)}"
        command = extract_command(f"extract-{which}", config, cache)
        store = FeatureStore.open(cache, name, help_command=command, io=config.data.io)
        _refuse_other_features(store, config, which, known, command)
        opened.append(store)
    return opened


def _grid(config: PipelineConfig) -> str:
    return f"_grid{config.teacher.grid}" if config.teacher.grid > 1 else ""


def _refuse_other_features(
    store: FeatureStore,
    config: PipelineConfig,
    which: Which,
    known: Mapping[str, tuple[tuple[int, ...], str]],
    command: str,
) -> None:
    """Compare what can be told without loading the encoder's weights; extraction compares everything.

    Some fields of a spec hold more than their setting says (a resize also names its size), so their beginnings count.
    """
    part = config.clip if which == "clip" else config.teacher
    shape, dtype = known[store.modality]
    expected: dict[str, object] = {
        "layer": config.clip.layer if which == "clip" else config.teacher.layer,
        "frame_shape": tuple(shape),
        "dtype": dtype,
        "compute_dtype": part.compute_dtype,
    }
    beginnings = {"frame_rule": f"{config.data.fps:g} fps ", "resize": f"{part.geometry} "}
    if which == "teacher":
        expected["timestep"] = config.teacher.timestep
        beginnings["latent"] = f"{config.teacher.posterior}*"
    elif config.clip.source == "open_clip":  # two models may have tokens of one shape, such as EVA-g and EVA-g-plus
        beginnings["encoder"] = f"open_clip:{config.clip.model}#"
    wrong = {key: value for key, value in expected.items() if getattr(store.spec, key) != value}
    for key, start in beginnings.items():
        if not f"{getattr(store.spec, key)}#".startswith(start):  # a digest may follow an encoder's name
            wrong[key] = f"{start.rstrip('#')}…"
    if wrong:
        lines = [f"  {key}: {getattr(store.spec, key)!r} there, {value!r} here" for key, value in wrong.items()]
        title = f"{store.path}, {store.modality} was made with other settings:"
        raise CacheMismatch("\n".join([title, *lines]), help_command=command)


def available_samples(
    config: PipelineConfig, samples: Sequence[Sample], stores: Sequence[FeatureStore], cache: StorePath, split: str
) -> Availability:
    """What the cache can serve of a split; CacheMissing unless that is everything or ``data.allow_missing`` is set."""
    found = available(samples, stores)
    if not config.data.allow_missing:
        gaps = {reason.partition(":")[0] for reason in found.missing.values()}
        which = "extract-clip" if "tokens" in gaps else "extract-teacher"
        found.require_all(extract_command(which, config, cache))
    if not found.samples:
        command = extract_command("extract-clip", config, cache)
        raise ConfigError(f"the cache holds nothing of the {split} split.\nFill it:  {command}")
    return found


def refuse_changed_sources(
    config: PipelineConfig, store: FeatureStore, videos: Collection[str], cache: StorePath
) -> tuple[str, ...]:
    """Raise CacheMismatch where a video is another file now than at extraction, unless ``data.allow_changed`` is set.

    Returns what else is to be said. Nothing is looked at where ``data.videos`` is not on this machine: features are
    often trained on elsewhere.
    """
    if not config.data.videos or "://" in config.data.videos:
        return ()
    try:
        source = open_source(config.data)
    except ValueError:
        return ()
    with contextlib.closing(source):
        changed, touched = changed_sources(store, source, sorted(videos))
    repair = extract_command("cache repair --sources", config, cache)
    if changed and not config.data.allow_changed:
        shown = "".join(f"\n  {video} {what}" for video, what in list(changed.items())[:5])
        more = f"\n  … and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise CacheMismatch(
            f"{len(changed)} videos were replaced after their features were extracted:{shown}{more}\n"
            f"Go on with the old features:  --set data.allow_changed=true\nOr make them anew:",
            help_command=repair,
        )
    said = [f"{len(changed)} videos were replaced after their features were extracted"] if changed else []
    if touched:
        verify = extract_command("cache verify --sources", config, cache)
        said.append(f"{touched} videos were modified after extraction, too many to compare at every start: {verify}")
    return tuple(said)


def reading_ahead(config: PipelineConfig) -> SamplesFrom:
    """Samples of the CLIP store, read by as many threads as ``data.reader_threads`` says."""
    return functools.partial(CachedSamples, readers=config.data.reader_threads)


def batches(data: CachedSamples, positions: Sequence[int], size: int) -> Iterator[Batch]:
    """The samples at ``positions``, up to ``size`` at a time, with the first of their frame draws."""
    cuts = [list(positions[first : first + size]) for first in range(0, len(positions), size)]
    return data.batches(Request(cut, [0] * len(cut)) for cut in cuts)


def extract_command(command: str, config: PipelineConfig, cache: StorePath) -> str:
    """What the user would type: the preset, and every setting that differs from it and matters to an extraction."""
    base, ours = flatten(presets.get(config.preset)), flatten(config)
    rooms = ("data.", *(f"{which}." for which in BOTH if command in (f"extract-{which}", *BOTH_READ)))
    sets = [f"{key}={_typed(ours[key])}" for key in ours if ours[key] != base[key] and key.startswith(rooms)]
    parts = ["pipeline", *command.split(), "--preset", config.preset, "--cache", str(cache)]
    return shlex.join(parts + [part for item in sets for part in ("--set", item)])


def _typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
