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
from pathlib import Path
from typing import Any, Literal

from cache_schema.errors import CacheMismatch, CacheMissing
from cache_schema.objects import StorePath
from cache_schema.store import FeatureStore
from pipeline import presets, provenance, registry
from pipeline.errors import ConfigError
from pipeline.overrides import DRAWN, apply, flatten
from pipeline.runs import RunFolder
from stages.config import PipelineConfig
from stages.data.annotations import without_suffix
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
    """The dataset that ``data.name`` names. The videos are opened only if the annotations leave something to ask."""
    if config.data.annotations.startswith(DRAWN) and not Path(config.data.annotations).exists():
        raise ConfigError(f"the videos of preset {config.preset} are not drawn yet.\nDraw them:  pipeline synth")
    with contextlib.closing(_Videos(config)) as videos:
        return registry.load("dataset", config.data.name)(config.data, videos if config.data.videos else None)


class _Videos:
    """The frame source of a configuration, opened when it is first asked."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        self._source: Any = None

    def _open(self) -> Any:
        self._source = self._source or open_source(self._config.data)
        return self._source

    def video_ids(self) -> list[str]:
        ids: list[str] = self._open().video_ids()
        return ids

    def has(self, video_id: str) -> bool:
        return bool(self._open().has(video_id))

    def count_frames(self, video_id: str) -> int:
        return int(self._open().count_frames(video_id))

    def close(self) -> None:
        if self._source is not None:
            self._source.close()


def unannotated(config: PipelineConfig, dataset: Any) -> tuple[str, ...]:
    """A sentence about the videos that no sample asks about, where there are any."""
    asked = {without_suffix(video) for video in dataset.wanted()} | set(dataset.wanted())
    with contextlib.closing(open_source(config.data)) as source:
        ids = source.video_ids()
    others = [video for video in ids if video not in asked]
    if not others:
        return ()
    shown = ", ".join(others[:3])
    return (f"{len(others)} of {len(ids)} videos in data.videos have no annotation here and are left out: {shown}, …",)


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
        raise ConfigError(
            "without annotations there is nothing to learn or score.\nName them:  --set data.annotations=FILE_OR_FOLDER"
        )
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
    for which in BOTH if aligned else BOTH[:1]:
        command = extract_command(f"extract-{which}", config, cache)
        store = FeatureStore.open(cache, _modality(config, which), help_command=command, io=config.data.io)
        refuse_other_features(store, config, which)
        opened.append(store)
    return opened


def check_stores(config: PipelineConfig, cache: StorePath, encoders: Sequence[Which]) -> None:
    """For ``--dry-run``: raise CacheMismatch where the cache has other features; what it lacks does not matter."""
    for which in encoders:
        with contextlib.suppress(CacheMissing):
            refuse_other_features(FeatureStore.open(cache, _modality(config, which)), config, which)


def _modality(config: PipelineConfig, which: Which) -> str:
    if which == "clip":
        return next(iter(shapes(config, which)))[0]
    return f"pooled/layer{config.teacher.layer}{f'_grid{config.teacher.grid}' if config.teacher.grid > 1 else ''}"


def refuse_other_features(store: FeatureStore, config: PipelineConfig, which: Which) -> None:
    """Raise CacheMismatch where ``store`` holds other features than ``config`` asks for."""
    wrong = differing(store, config, which)
    if wrong:
        lines = [f"  {key}: {getattr(store.spec, key)!r} there, {value!r} here" for key, value in wrong.items()]
        title = f"{store.path}, {store.modality} was made with other settings:"
        sets = settings_of(store, config, which, wrong)
        use = f"Use it as it is:  {' '.join(f'--set {item}' for item in sets)}" if sets else ""
        command = other_cache_command("extract", config, store.path)
        another = "Or make another in a new folder, and give that as --cache from then on:"
        raise CacheMismatch("\n".join([title, *lines, *([use] if use else []), another]), help_command=command)


def differing(store: FeatureStore, config: PipelineConfig, which: Which) -> dict[str, object]:
    """Field of the spec -> what ``config`` wants there instead, as far as can be told without the encoder's weights.

    Extraction compares everything. Some fields of a spec hold more than their setting says (a resize also names its
    size), so their beginnings count.
    """
    part = config.clip if which == "clip" else config.teacher
    known = dict(shapes(config, which))
    expected: dict[str, object] = {
        "layer": config.clip.layer if which == "clip" else config.teacher.layer,
        "compute_dtype": part.compute_dtype,
        "dtype": part.dtype,
    }
    if store.modality in known:
        expected["frame_shape"] = tuple(known[store.modality][0])
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
    return wrong


def settings_of(
    store: FeatureStore, config: PipelineConfig, which: Which, wrong: Mapping[str, object]
) -> tuple[str, ...]:
    """The settings, as ``key=value``, with which ``config`` would read this store; () where they cannot be told."""
    spec = store.spec
    values = {
        "layer": f"{which}.layer={spec.layer}",
        "dtype": f"{which}.dtype={spec.dtype}",
        "compute_dtype": f"{which}.compute_dtype={spec.compute_dtype}",
        "frame_rule": f"data.fps={spec.frame_rule.partition(' ')[0]}",
        "resize": "clip.geometry={0} teacher.geometry={0}".format(spec.resize.partition(" ")[0]),
        "timestep": f"teacher.timestep={spec.timestep}",
        "latent": f"teacher.posterior={spec.latent.partition('*')[0]}",
        "encoder": f"clip.model={spec.encoder.removeprefix('open_clip:').partition('#')[0]}",
    }
    typed = [item for key in wrong if key in values for item in values[key].split()]
    try:
        fitting = apply(config, typed)
        return tuple(typed) if not differing(store, fitting, which) else ()
    except ValueError:  # settings that do not go together, or a model that is not here
        return ()


def refuse_features_of_another_run(run: RunFolder, store: FeatureStore) -> None:
    """Raise CacheMismatch where ``store`` has other features than those that the run learned from."""
    known = None if run.provenance is None else run.provenance.features.get(store.modality)
    if known is None:
        return
    now = provenance.spec_facts(store.spec)
    changed = provenance.different(now, {key: known.get(key) for key in now})
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise CacheMismatch(
            f"{store.path}, {store.modality} has other features than {run.path} learned from:\n{lines}\n"
            f"Name the store that it read, or extract again:",
            help_command=other_cache_command("extract", run.located_config, store.path),
        )


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
    changed = [key for key in ours if ours[key] != base[key]]
    rooms = ("data.", *(f"{which}." for which in BOTH if command in (f"extract-{which}", *BOTH_READ)))
    sets = [f"{key}={_typed(ours[key])}" for key in changed if key.startswith(rooms)]
    try:
        apply(presets.get(config.preset), sets)
    except ConfigError:  # such as one geometry without the other, or more frames than the student has places for
        sets = [f"{key}={_typed(ours[key])}" for key in changed]
    parts = ["pipeline", *command.split(), "--preset", config.preset, "--cache", str(cache)]
    return shlex.join(parts + [part for item in sets for part in ("--set", item)])


def other_cache_command(command: str, config: PipelineConfig, cache: StorePath) -> str:
    """As ``extract_command``, into a folder beside ``cache`` that does not exist yet."""
    if isinstance(cache, Path):
        numbered = (cache.with_name(f"{cache.name}-{number}") for number in range(2, 1000))
        return extract_command(command, config, next(path for path in numbered if not path.exists()))
    return extract_command(command, config, cache).replace(str(cache), f"{cache}-2")


def _typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
