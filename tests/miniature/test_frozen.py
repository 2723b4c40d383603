"""The shipped weights belong to their recipe, load where a user's would, and know what the card says."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from stages.config import PipelineConfig
from stages.decode.llm import build as build_llm
from stages.extract.clip import build as build_clip
from stages.extract.dit import build as build_dit
from stages.miniature import FOLDER, LLM_FOLDER, configs
from stages.miniature.draw import SHAPES
from stages.miniature.pictures import FIRST_HIDDEN_SEED, pictures
from stages.miniature.sayings import statements
from stages.miniature.train_clip import FACTS, WORDS, _said, facts, sentence, token_ids, train_clip
from stages.miniature.train_frozen import RECIPE, WEIGHTS, digest
from stages.miniature.train_llm import (
    QUESTIONS,
    _Encoder,
    _listed,
    accuracy_from_descriptions,
    asked,
    train_llm,
)
from stages.miniature.train_qformer import coarse_questions
from stages.miniature.train_teacher import latents_of, train_dit, train_vae
from stages.miniature.videos import FINE_TASKS, labels, render, specs
from stages.train.student import build as build_student

CONFIG = PipelineConfig(
    preset="miniature",
    clip=configs.clip(),
    teacher=configs.teacher(),
    student=configs.student(),
    decode=configs.decode(),
)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(RECIPE.read_text())
    return loaded


def test_the_weights_were_made_by_this_recipe(recipe: dict[str, Any]) -> None:
    made_by = {name: recipe[name]["digest"] for name in WEIGHTS}
    assert made_by == {name: digest(name) for name in WEIGHTS}, (
        "the recipe has changed since these weights were made: python -m stages.miniature.train_frozen"
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_file_is_the_one_that_the_recipe_names(name: str, recipe: dict[str, Any]) -> None:
    assert hashlib.sha256((FOLDER / WEIGHTS[name]).read_bytes()).hexdigest() == recipe[name]["sha256"]


def test_all_weights_are_half_precision_and_twelve_megabytes_at_most() -> None:
    assert sum((FOLDER / file).stat().st_size for file in WEIGHTS.values()) <= 12e6
    for file in WEIGHTS.values():
        with safe_open(FOLDER / file, "pt") as tensors:
            kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
        assert torch.float16 in kinds
        assert torch.float32 not in kinds


def test_every_part_loads_through_the_ordinary_door_and_fits_the_next() -> None:
    encoder = build_clip(CONFIG, frame_rule="", decoder="")
    teacher = build_dit(CONFIG, frame_rule="", decoder="")
    decoder = build_llm(CONFIG.decode, device="cpu")
    frames = render(specs(1, 3)[0], [0.0, 1.0])
    tokens, target = encoder(frames)["tokens"], teacher(frames)["pooled/layer8"]
    assert (tokens.shape, target.shape) == ((2, 37, 96), (2, 96))
    student = build_student(CONFIG.student, clip_width=96, llm_width=decoder.width).eval()
    with torch.no_grad():
        prefix = student(torch.from_numpy(tokens)[None], ["what is the scene of the movie?"]).prefix
    assert prefix.shape == (1, 8, 96)


def test_the_start_of_the_student_names_the_scene_of_unseen_videos() -> None:
    encoder = build_clip(CONFIG, frame_rule="", decoder="")
    decoder = build_llm(CONFIG.decode, device="cpu")
    student = build_student(CONFIG.student, clip_width=96, llm_width=decoder.width).eval()
    right = 0
    for spec in (seen := specs(24, 3)):
        tokens = torch.from_numpy(np.asarray(encoder(render(spec, [0.0, 2.0]))["tokens"], np.float32))
        with torch.no_grad():
            prefix = student(tokens[None], ["what is the scene of the movie?"]).prefix
        right += decoder.generate(prefix, ["what is the scene of the movie?"])[0][0] == spec.scene.texture
    assert right >= len(seen) - 2


def test_the_language_model_answers_every_type_from_a_description() -> None:
    decoder = build_llm(CONFIG.decode, device="cpu")
    accuracy = accuracy_from_descriptions(decoder.model, videos=60)
    assert {kind.partition(":")[0] for kind in accuracy} >= {"what", "who", "how", "where", "when", *FINE_TASKS}
    assert min(accuracy.values()) >= 0.95, accuracy


def test_nobody_who_meets_pictures_is_asked_a_fine_question() -> None:
    for spec in specs(100, 0):
        fine = {labels(spec)[task] for task in FINE_TASKS if task in labels(spec)} - {spec.glows_first.shape}
        assert not fine & set(sentence(facts(spec)).split())
        assert not fine & {answer for _, answer in coarse_questions(spec)}
        assert not any(task in prompt for prompt, _ in coarse_questions(spec) for task in FINE_TASKS)


def test_the_worlds_of_the_frozen_models_are_no_users() -> None:
    ids = {spec.video_id for spec in pictures(11, videos=3, per_video=1).specs}
    assert ids == {spec.video_id for spec in specs(3, FIRST_HIDDEN_SEED + 11)}
    assert not ids & {spec.video_id for spec in specs(3, 11)}


def test_captions_are_words_of_the_text_tower() -> None:
    draw = random.Random(0)
    for spec in specs(200, 1):
        said = sentence(_said(spec, draw))
        assert set(_said(spec, draw)) <= set(facts(spec)) <= set(FACTS)
        ids = token_ids(said, 24)
        assert (len(ids), ids[0], max(ids)) == (24, 1, 63)
        assert set(said.split()) <= set(WORDS)


def test_every_question_rests_on_a_statement() -> None:
    draw = random.Random(0)
    kinds = set()
    for spec in specs(60, 0):
        for fact, kind, _, _ in asked(spec, draw):
            assert fact in statements(spec)
            kinds.add(kind)
    assert {kind.partition(": ")[2] for kind in kinds if ": " in kind} == {about for about, _ in QUESTIONS.values()}


def test_lists_tell_every_color_twice_before_they_ask_for_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLM_FOLDER)
    draw, repeated = random.Random(0), 0
    for _ in range(20):
        ids, kinds, _ = _listed(draw, _Encoder(tokenizer))
        asks = kinds.index(0)
        told, questions = (tokenizer.decode(part).split() for part in (ids[:asks], ids[asks:]))
        colors = {shape: told[told.index(shape) - 1] for shape in SHAPES}  # "a red circle"
        again = told[len(told) // 2 :]
        assert {shape: again[again.index(shape) + 1] for shape in SHAPES} == colors  # "the circle red"
        answers = [
            tokenizer.decode([i]).strip()
            for i, kind in zip(ids, kinds, strict=True)
            if kind == 1 and i != tokenizer.eos_token_id
        ]
        asked_for = [word.rstrip("?") for word in questions if word.rstrip("?") in SHAPES]
        assert answers == [colors[shape] for shape in asked_for]
        assert sorted(asked_for) == sorted(SHAPES)
        repeated += len(set(answers)) < len(SHAPES)
    assert repeated  # so the last one asked for does not follow from the others


def test_training_is_deterministic() -> None:
    def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

    quiet: Any = lambda _line: None  # noqa: E731
    assert same(train_llm(steps=2, batch=4, log=quiet), train_llm(steps=2, batch=4, log=quiet))
    clips = [train_clip(steps=2, videos=8, batch=8, log=quiet) for _ in range(2)]
    assert same(*clips)
    seen = pictures(21, videos=8, per_video=1)
    images = seen.sized(32)
    vaes = [train_vae(images, steps=2, batch=4, log=quiet) for _ in range(2)]
    assert same(*vaes)
    latents = latents_of(vaes[0], images)
    assert abs(float(latents.mean())) < 1e-3
    assert abs(float(latents.std()) - 1) < 0.05
    assert same(*(train_dit(vaes[0], seen, images, steps=2, batch=4, log=quiet) for _ in range(2)))
