"""What a number was made from, as one chain of values that can be printed; each link holds a digest of those before.

::

    features + questions + frozen models + settings -> run -> checkpoint -> answers -> tables
    RUN/provenance/run.json               what the run learns from; its digest stands in every checkpoint
    RUN/provenance/answers-<digest>.json  what a predictions file was made from; its digest stands in every line

Digests are of content: where videos, annotations and weights lie is not part of them, so a run may go on after a move.
Whoever resumes, scores, compares or reports makes the link anew, compares it, and says what differs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.overrides import PLACES, deciding, effective, flatten
from pipeline.runs import RunFolder, step_of
from stages.config import PipelineConfig
from stages.types import Sample

if TYPE_CHECKING:
    from cache_schema.spec import FeatureSpec
    from cache_schema.store import FeatureStore

ANSWER_SECTIONS = ("student.", "decode.")  # beside features and questions, what an answer follows from
# Of those, what changes no answer: how fast it is computed, and what only training uses.
NEUTRAL = (
    *("student.evaluation", "student.recompute_layers", "student.dropout", "student.bank_detach"),
    *("student.init", "student.train_ln_vision", "decode.batch_size"),
)
IGNORED = ("train.", "align.", "teacher.", "extract.")  # sections that an evaluation does not read
ANSWER_MODELS = ("decode.llm", "decode.llm_config", "student.tokenizer")  # the trained rest is in the checkpoint
ANSWER_PACKAGES = ("torch", "transformers", "tokenizers")
NAMED = 5  # changed samples named one by one


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Questions:
    """The samples of one split, in order: ids, videos, windows, questions, answers.

    Attributes:
        split: its name.
        videos: number of distinct videos.
        samples: sample id -> digest of the sample, in order.
    """

    split: str
    videos: int
    samples: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, split: str, samples: Sequence[Sample]) -> Questions:
        """Raises ValueError when a sample id occurs twice."""
        digests = {sample.sample_id: sample_digest(sample) for sample in samples}
        if len(digests) < len(samples):
            raise ValueError(f"the {split} split uses a sample id twice")
        return cls(split, len({sample.video_id for sample in samples}), digests)

    @property
    def digest(self) -> str:
        """Of all samples and their order."""
        return digest_of(list(self.samples.items()))

    def to_json(self) -> dict[str, Any]:
        """For ``provenance/``."""
        return {"n": len(self.samples), "videos": self.videos, "digest": self.digest, "samples": dict(self.samples)}

    @classmethod
    def from_json(cls, split: str, document: Mapping[str, Any]) -> Questions:
        """Raises KeyError, TypeError or ValueError for anything that ``to_json`` did not write."""
        return cls(split, int(document["videos"]), {str(key): str(value) for key, value in document["samples"].items()})

    def differences(self, before: Questions) -> str:
        """``43 samples before, 44 now; 3 changed: q17, q20, q31; 1 new: q99``; empty where nothing differs."""
        if self.digest == before.digest:
            return ""
        groups = {
            "changed": [key for key in self.samples if before.samples.get(key, self.samples[key]) != self.samples[key]],
            "new": [key for key in self.samples if key not in before.samples],
            "gone": [key for key in before.samples if key not in self.samples],
        }
        parts = [f"{len(before.samples)} samples before, {len(self.samples)} now"]
        parts += [f"{len(keys)} {what}: {shortened(keys)}" for what, keys in groups.items() if keys]
        return "; ".join(parts if any(groups.values()) else [*parts, "in another order"])


def sample_digest(sample: Sample) -> str:
    """Of everything that a sample is: 16 hex digits."""
    frames = hashlib.sha256(repr(sample.draws.shape).encode() + sample.draws.astype("<i8").tobytes()).hexdigest()
    return digest_of([sample.sample_id, sample.video_id, frames, sample.prompt, sample.answer, sample.group])


# ---------------------------------------------------------------- features and frozen models


def features(store: FeatureStore, samples: Iterable[Sample]) -> dict[str, Any]:
    """Which features these samples read: of which spec, and ``files``, a digest of the video files behind them."""
    videos = sorted({sample.video_id for sample in samples})  # the order of the plan: neighbours are of one shard
    files = {video: str(store.facts(video).get("sha256", "")) for video in videos}
    return spec_facts(store.spec) | {"files": digest_of(sorted(files.items()))}


def spec_facts(spec: FeatureSpec) -> dict[str, Any]:
    """Digest of a feature spec, and what a reader knows it by."""
    named = {"encoder": spec.encoder, "weights": spec.weights, "layer": spec.layer, "dtype": spec.dtype}
    return {"digest": spec.digest(), **named, "frame_shape": list(spec.frame_shape)}


def frozen(config: PipelineConfig) -> dict[str, str]:
    """Setting -> digest of the frozen files that it names: what the language model and the student start from."""
    from stages import weights  # brings torch, which reading a run folder must not

    decode, student = config.decode, config.student
    inside = weights.local_path(student.init) / "qformer_tokenizer"  # what is read where none is named
    tokenizer = student.tokenizer or (str(inside) if inside.is_dir() else student.init)
    named = {
        "decode.llm": (decode.llm, decode.revision),
        "decode.llm_config": (decode.llm_config, ""),
        "student.init": (student.init, student.revision),
        "student.tokenizer": (tokenizer, ""),
    }
    return {key: weights.files_digest(name, revision) for key, (name, revision) in named.items() if name}


def packages() -> dict[str, str]:
    """Versions of the libraries whose arithmetic or vocabulary an answer follows from."""
    return {name: importlib.metadata.version(name) for name in ANSWER_PACKAGES}


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class RunProvenance:
    """What a run learns from.

    Attributes:
        settings: those that decide a number, flattened; places are left out.
        features: modality -> what ``features`` gives.
        questions: by split: train, and val where it selects the checkpoint.
        frozen: what ``frozen`` gives.
        cache: the store: a URL, or a folder as seen from the run's.
        started_in: the folder that relative paths of the configuration start from, as seen from the run's.
    """

    settings: Mapping[str, Any] = field(repr=False)
    features: Mapping[str, Mapping[str, Any]]
    questions: Mapping[str, Questions]
    frozen: Mapping[str, str]
    cache: str
    started_in: str

    @property
    def digest(self) -> str:
        """Of everything but the two places."""
        questions = {split: part.digest for split, part in self.questions.items()}
        return digest_of([dict(self.settings), self.features, questions, dict(self.frozen)])

    def to_json(self) -> dict[str, Any]:
        """For ``provenance/run.json``."""
        return {
            "digest": self.digest,
            "cache": self.cache,
            "started_in": self.started_in,
            "settings": dict(self.settings),
            "features": {name: dict(facts) for name, facts in self.features.items()},
            "frozen": dict(self.frozen),
            "questions": {split: part.to_json() for split, part in self.questions.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunProvenance:
        """Raises ValueError for anything that ``to_json`` did not write, a changed value included."""
        try:
            found = cls(
                dict(document["settings"]),
                {str(name): dict(facts) for name, facts in document["features"].items()},
                {split: Questions.from_json(split, part) for split, part in document["questions"].items()},
                dict(document["frozen"]),
                str(document["cache"]),
                str(document["started_in"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it is not the provenance of a run: {error!r}") from error
        if found.digest != document.get("digest"):
            raise ValueError("its digest is not that of its values: it was changed by hand")
        return found

    def differences(self, before: RunProvenance) -> list[str]:
        """One line per link that is another now: settings, questions, features, frozen models."""
        lines = different(self.settings, before.settings)
        for split in sorted(self.questions.keys() | before.questions.keys()):
            now, then = (part.questions.get(split, Questions(split, 0, {})) for part in (self, before))
            if told := now.differences(then):
                lines.append(f"{split} questions: {told}")
        lines += feature_differences(self.features, before.features)
        return lines + frozen_differences(self.frozen, before.frozen)


def of_run(
    config: PipelineConfig,
    stores: Sequence[FeatureStore],
    samples: Mapping[str, Sequence[Sample]],
    *,
    cache: object,
    out: Path,
) -> RunProvenance:
    """The provenance of a run that starts now.

    Args:
        config: of the run.
        stores: those that it learns from.
        samples: by split, all that the cache can serve: train, and val where it selects the checkpoint.
        cache: where the stores are.
        out: the run folder.
    """
    every = [sample for part in samples.values() for sample in part]
    return RunProvenance(
        settings_of(config),
        # val reads tokens only
        {
            store.modality: features(store, every if number == 0 else samples["train"])
            for number, store in enumerate(stores)
        },
        {split: Questions.of(split, part) for split, part in samples.items()},
        frozen(config),
        seen_from(out, cache),
        seen_from(out, Path.cwd()),
    )


def settings_of(config: PipelineConfig) -> dict[str, Any]:
    """What decides the numbers of a run, flattened; what lies at ``PLACES`` is known by content instead."""
    return {key: value for key, value in deciding(config).items() if key not in PLACES}


def variant_settings(run: RunFolder) -> dict[str, Any]:
    """What runs that differ in their seed only have in common, flattened: settings, and what was learned from."""
    settings = effective(run.config)
    del settings["train.seed"]
    known = run.provenance
    if known is None:
        return settings
    return (
        {key: value for key, value in settings.items() if key not in PLACES}
        | dict(known.frozen)
        | {
            f"{'clip' if name == 'tokens' else 'teacher'}.features": digest_of(facts)
            for name, facts in known.features.items()
        }
        | {f"questions.{split}": questions.digest for split, questions in known.questions.items()}
    )


def feature_differences(now: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per modality whose spec or video files are others."""
    lines = []
    for name in sorted(now.keys() | then.keys()):
        here, before = now.get(name), then.get(name)
        if here is None or before is None:
            lines.append(f"features {name}: {'not read then' if before is None else 'not read now'}")
        elif here != before:
            keys = [key for key in here if here[key] != before.get(key)]
            what = "other video files" if keys == ["files"] else f"other settings ({', '.join(keys)})"
            lines.append(f"features {name}: made from {what}")
    return lines


def frozen_differences(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """One line per frozen model whose files are others."""
    return [
        f"{key}: other files than then" for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)
    ]


def different(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """One line per key whose value is another."""
    keys = (key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key))
    return [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in keys]


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class AnswersProvenance:
    """What the answers in one predictions file were made from.

    Attributes:
        split: that was answered.
        checkpoint: {"folder", "step", "sha256"}.
        questions: of the whole split, whether or not the cache can serve them all.
        features: as of a run, of the tokens.
        settings: those that can change an answer, flattened.
        changed: setting -> value, where it is another than the run's.
        frozen: language model and tokenizer.
        labels: digest of the label sets; None without ``decode.closed_set``.
        packages: versions.
        own: whether these are the run's own answers: its settings, and the checkpoint that it stands for.
        held_out: what the split shares with train and val; changes no answer, and says what a score means.
    """

    split: str
    checkpoint: Mapping[str, Any]
    questions: Questions
    features: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(repr=False)
    changed: Mapping[str, Any]
    frozen: Mapping[str, str]
    labels: str | None
    packages: Mapping[str, str]
    own: bool
    held_out: Mapping[str, Any] = field(repr=False)

    @property
    def digest(self) -> str:
        """Of everything that can change an answer: 16 hex digits, in every line of the file."""
        parts = [self.split, self.checkpoint["sha256"], self.questions.digest, self.features, dict(self.settings)]
        return digest_of([*parts, dict(self.frozen), self.labels, dict(self.packages)])

    def to_json(self) -> dict[str, Any]:
        """For ``provenance/answers-<digest>.json``."""
        return {
            "digest": self.digest,
            "split": self.split,
            "checkpoint": dict(self.checkpoint),
            "own": self.own,
            "changed": dict(self.changed),
            "settings": dict(self.settings),
            "frozen": dict(self.frozen),
            "features": {name: dict(facts) for name, facts in self.features.items()},
            "labels": self.labels,
            "packages": dict(self.packages),
            "held_out": dict(self.held_out),
            "questions": self.questions.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> AnswersProvenance:
        """Raises ValueError for anything that ``to_json`` did not write."""
        try:
            checkpoint = document["checkpoint"]
            return cls(
                str(document["split"]),
                {"folder": checkpoint["folder"], "step": int(checkpoint["step"]), "sha256": str(checkpoint["sha256"])},
                Questions.from_json(document["split"], document["questions"]),
                {str(name): dict(facts) for name, facts in document["features"].items()},
                dict(document["settings"]),
                dict(document["changed"]),
                dict(document["frozen"]),
                document["labels"],
                dict(document["packages"]),
                bool(document["own"]),
                dict(document["held_out"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it is not the provenance of answers: {error!r}") from error

    def differences(self, before: AnswersProvenance) -> list[str]:
        """One line per link that is another now."""
        lines = []
        if self.checkpoint["sha256"] != before.checkpoint["sha256"]:
            lines.append(f"checkpoint: step {before.checkpoint['step']} then, step {self.checkpoint['step']} now")
        if told := self.questions.differences(before.questions):
            lines.append(f"{self.split} questions: {told}")
        lines += feature_differences(self.features, before.features)
        lines += different(self.settings, before.settings) + different(self.packages, before.packages)
        lines += frozen_differences(self.frozen, before.frozen)
        return lines + (["label sets: others"] if self.labels != before.labels else [])


def of_answers(
    run: RunFolder,
    config: PipelineConfig,
    *,
    split: str,
    samples: Sequence[Sample],
    available: Sequence[Sample],
    tokens: FeatureStore,
    labels: Mapping[str, Sequence[str]] | None,
    checkpoint: str,
    changed: Mapping[str, Any],
    held_out: Mapping[str, Any],
) -> AnswersProvenance:
    """The provenance of answers that are given now.

    Args:
        run: whose student answers.
        config: of the evaluation.
        split: its name.
        samples: the whole split.
        available: what the cache can serve of it.
        tokens: the CLIP store.
        labels: label sets, where they are asked about too.
        checkpoint: by name; "" is the one that the run stands for.
        changed: settings of the evaluation that are others than the run's.
        held_out: what the split shares with train and val.
    """
    folder = run.checkpoint_folder(checkpoint)
    sha256 = run.tensors_sha256(checkpoint)
    return AnswersProvenance(
        split,
        {"folder": folder.name, "step": step_of(folder), "sha256": sha256},
        Questions.of(split, samples),
        {tokens.modality: features(tokens, available)},
        answer_settings(config),
        dict(changed),
        {key: value for key, value in frozen(config).items() if key in ANSWER_MODELS},
        None if labels is None else digest_of({group: list(names) for group, names in labels.items()}),
        packages(),
        own=not changed and sha256 == run.tensors_sha256(),
        held_out=dict(held_out),
    )


def answer_settings(config: PipelineConfig) -> dict[str, Any]:
    """What an answer follows from beside features, questions and weights, flattened."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(ANSWER_SECTIONS) and key not in (*NEUTRAL, *PLACES)
    }


def changed_settings(config: PipelineConfig, run: RunFolder, *, same_questions: bool) -> dict[str, Any]:
    """Setting -> value of an evaluation, where it differs from the run's and can change questions or answers.

    Of places the content counts: ``same_questions`` says it of the annotations, digests say it of frozen models, and of
    videos and encoders the features.
    """
    now, then = deciding(config), deciding(run.config)
    reading = ("data.allow_missing", "data.allow_leak", *NEUTRAL)
    changed = {key: now[key] for key in now if now[key] != then[key] and key not in reading}
    if run.provenance is None:
        return changed
    models, before = frozen(config), run.provenance.frozen
    moved = {key for key in PLACES if key not in ANSWER_MODELS or models.get(key) == before.get(key)}
    if not same_questions:
        moved.discard("data.annotations")
    return {key: value for key, value in changed.items() if key not in moved}


def learned_from(run: RunFolder, split: str, samples: Sequence[Sample]) -> bool:
    """Whether the run learned from these samples, or some of them, as they are now; True where nothing is known."""
    known = None if run.provenance is None else run.provenance.questions.get(split)
    if known is None:
        return True
    now = {sample.sample_id: sample_digest(sample) for sample in samples}
    return all(now.get(key) == digest for key, digest in known.samples.items())


# ---------------------------------------------------------------- places and digests


def seen_from(folder: Path, place: object) -> str:
    """A URL as it is; a folder as seen from another, so that a tree of both may be moved as one."""
    if "://" in str(place):
        return str(place)
    return os.path.relpath(os.path.realpath(str(place)), os.path.realpath(folder))


def locate_from(folder: Path, place: str) -> str:
    """The inverse of ``seen_from``: absolute, or as seen from here where that is shorter."""
    if "://" in place:
        return place
    path = os.path.normpath(os.path.join(os.path.realpath(folder), place))
    return min(path, os.path.relpath(path), key=len)


def located(config: PipelineConfig, base: Path) -> PipelineConfig:
    """``config`` with the relative paths that exist below ``base`` as seen from here; names of hubs stay."""
    values = config.model_dump(mode="json")
    for key in PLACES:
        section, name = key.split(".")
        value = values[section][name]
        if value and not os.path.isabs(value) and "://" not in value and (base / value).exists():
            values[section][name] = os.path.relpath(base / value)
    return PipelineConfig.model_validate(values)


def digest_of(value: object) -> str:
    """16 hex digits over the JSON of a value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def shortened(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
