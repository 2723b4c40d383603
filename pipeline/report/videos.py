"""Single questions like the paper's Figure 5: frames, question, truth, every variant's answer, alignment over time."""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from pipeline import registry
from pipeline.printing import in_one_line
from pipeline.report import figures
from pipeline.report.answer import Result
from pipeline.report.figures import Picture
from pipeline.report.read import Study, Variant
from stages.data.frames import open_source
from stages.decode.metrics import Prediction, is_correct, spoken
from stages.types import FrameSource, Sample

STRIP = 9  # frames of a strip at most
HEIGHT = 120  # pixels of a strip's pictures
QUALITY = 82


@dataclass(frozen=True)
class Said:
    """What one variant answered: the answers of its seeds, the most frequent first."""

    label: str
    answers: tuple[tuple[str, int, bool], ...]  # answer, number of seeds, right
    seeds: int


@dataclass(frozen=True)
class VideoView:
    """One question of one video."""

    video_id: str
    sample_id: str
    question: str
    truth: str
    said: tuple[Said, ...]
    strip: tuple[tuple[int, str], ...]  # number of the frame in the window, data URI
    no_strip: str  # why there are no pictures
    alignment: Picture | None


def views_of(result: Result, number: int, prefix: str) -> list[VideoView]:
    """At most ``number`` questions, those first on which the variants disagree."""
    study = result.study
    chosen = choose(result, number)
    if not chosen:
        return []
    samples, why = _samples(study)
    with _source(study) as (source, no_source):
        return [
            _view(study, key, samples.get(key), source, why or no_source, f"{prefix}-video-{i}")
            for i, key in enumerate(chosen)
        ]


def choose(result: Result, number: int) -> list[str]:
    """Sample ids: in turn one on which variants disagree, one that all have right, one that none has; videos differ.

    Where some questions have diagnostics, only those are taken.
    """
    students = [v for v in result.study.variants if v.key in result.scores]
    rows = {id(run): {p.sample_id: p for p in run.predictions} for v in students for run in v.runs if run.predictions}
    diagnosed: set[str] = set()
    for variant in students:
        for found in variant.diagnosed:
            diagnosed |= set(found["per_sample"])
    ids = [key for key in result.samples if key in diagnosed] or list(result.samples)
    piles: dict[str, list[str]] = {"mixed": [], "right": [], "wrong": []}
    for key in ids:
        right = [_right(table[key], result.study) for table in rows.values()]
        piles["right" if all(right) else "mixed" if any(right) else "wrong"].append(key)
    chosen: list[str] = []
    videos: set[str] = set()
    table = next(iter(rows.values()), {})
    while len(chosen) < number and any(piles.values()):
        for pile in piles.values():
            while pile:
                key = pile.pop(0)
                if table[key].video_id not in videos:
                    videos.add(table[key].video_id)
                    chosen.append(key)
                    break
    return chosen[:number]


def _right(prediction: Prediction, study: Study) -> bool:
    return bool(prediction.beams) and is_correct(prediction.beams[0], prediction.answer, study.match)


def _view(study: Study, key: str, sample: Sample | None, source: FrameSource | None, why: str, name: str) -> VideoView:
    variants = [*study.variants, *study.baselines]
    asked = next(p for v in variants for run in v.runs for p in run.predictions if p.sample_id == key)
    strip: tuple[tuple[int, str], ...] = ()
    if source is not None and sample is not None:
        try:
            strip = tuple(strip_of(source, asked.video_id, sample.frame_index))
        except (ValueError, OSError) as error:  # VideoRejected among them: the page says so and goes on
            why = in_one_line(error)
    elif not why:
        why = "the annotations have no such sample any more"
    return VideoView(
        video_id=asked.video_id,
        sample_id=key,
        question=asked.prompt,
        truth=asked.answer,
        said=tuple(said for v in variants if (said := _said(v, key, study)) is not None),
        strip=strip,
        no_strip="" if strip else why,
        alignment=_alignment(study, key, name),
    )


def _said(variant: Variant, key: str, study: Study) -> Said | None:
    found = [p for run in variant.runs for p in run.predictions if p.sample_id == key]
    if not found:
        return None
    answers = Counter((spoken(p.beams[0], study.match) if p.beams else "", _right(p, study)) for p in found)
    ordered = sorted(answers.items(), key=lambda item: (-item[1], item[0]))
    return Said(variant.label, tuple((answer, count, right) for (answer, right), count in ordered), len(found))


def _alignment(study: Study, key: str, name: str) -> Picture | None:
    """Mean cosine of the aligned levels and share of the attention, per frame, of the first seed that has them."""
    cosine, attention = [], []
    colors = figures.palette([variant.label for variant in study.variants])
    for variant in study.variants:
        found = next((d["per_sample"][key] for d in variant.diagnosed if key in d["per_sample"]), None)
        if found is None:
            continue
        if levels := list(found.get("cosine", {}).values()):
            means = [math.nan if None in values else sum(values) / len(values) for values in zip(*levels, strict=True)]
            cosine.append((variant.label, means))
        if found.get("attention"):
            attention.append((variant.label, found["attention"]))
    return figures.under_strip(cosine[:4], attention[:4], colors, name=name) if cosine or attention else None


# ---------------------------------------------------------------- pictures


def strip_of(source: FrameSource, video_id: str, frame_index: Int[np.ndarray, " T"]) -> Iterator[tuple[int, str]]:
    """Evenly spaced frames of a window as small JPEGs: (number in the window from 1, data URI).

    They come through the ordinary frame source, so a hostile file is refused here as it is everywhere.
    """
    count = min(STRIP, len(frame_index))
    places = [i * (len(frame_index) - 1) // max(1, count - 1) for i in range(count)]
    wanted = np.unique(frame_index[places])
    pictures: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    numbers = iter(wanted.tolist())
    for batch in source.frames(video_id, wanted, batch_size=len(wanted)):
        pictures |= dict(zip(numbers, batch, strict=False))
    for place in dict.fromkeys(places):
        yield place + 1, jpeg(pictures[int(frame_index[place])])


def jpeg(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """A small JPEG as a data URI."""
    image = Image.fromarray(picture)
    image = image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _samples(study: Study) -> tuple[dict[str, Sample], str]:
    """The test samples by id, or why there are none."""
    try:
        dataset = registry.load("dataset", study.config.data.name)(study.config.data)
        return {sample.sample_id: sample for sample in dataset.samples("test")}, ""
    except (ValueError, OSError) as error:
        return {}, in_one_line(error)


@contextlib.contextmanager
def _source(study: Study) -> Iterator[tuple[FrameSource | None, str]]:
    try:
        source = open_source(study.config.data)
    except (ValueError, OSError) as error:
        yield None, in_one_line(error)
        return
    with contextlib.closing(source):
        yield source, ""
