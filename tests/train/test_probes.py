"""Probes on real stores whose features carry known facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from cache_schema.spec import FeatureSpec
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult, write_task
from stages.train import probes
from stages.train.probes import Frames, ProbeRefused, Space, Splits
from stages.types import Sample
from tests.cache_schema.makers import TOKENS

T, P, C, D = 3, 4, 5, 6
SIZES = {"train": 160, "val": 60, "test": 90}


def spec(shape: tuple[int, ...]) -> FeatureSpec:
    return replace(TOKENS, dtype="float32", frame_shape=shape)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, FeatureStore], dict[str, np.ndarray]]:
    """Videos of T frames. ``color`` (3) shifts all tokens; ``place`` (P) is the token that holds a marker in every
    frame; ``when`` (T) is the frame in which the marker is strongest. The teacher knows ``color`` alone."""
    total, rng = sum(SIZES.values()), np.random.default_rng(7)
    facts = {"color": rng.integers(0, 3, total), "place": rng.integers(0, P, total), "when": rng.integers(0, T, total)}
    tokens = rng.normal(0, 0.3, (total, T, P, C)).astype(np.float32)
    pooled = rng.normal(0, 0.3, (total, T, D)).astype(np.float32)
    for i in range(total):
        tokens[i, :, :, facts["color"][i]] += 1.0
        tokens[i, :, facts["place"][i], 3] += 2.0
        tokens[i, facts["when"][i], facts["place"][i], 4] += 4.0
        pooled[i, :, facts["color"][i]] += 1.0
    path = tmp_path_factory.mktemp("probes") / "store"
    parts = {"tokens": tokens, "pooled/layer8": pooled}
    stores = {
        name: FeatureStore.create(path, name, spec(part.shape[2:]), shard_frames=64) for name, part in parts.items()
    }
    stores["tokens"].extend_plan({f"v{i}": range(T) for i in range(total)})

    def produce(segment: Any) -> SegmentResult[Any]:
        i = int(segment.video_id[1:])
        return SegmentResult(iter([{name: part[i] for name, part in parts.items()}]), facts=dict)

    for task in stores["tokens"].pending():
        write_task(stores, task, produce)
    return {"clip": stores["tokens"], "teacher": stores["pooled/layer8"]}, facts


@pytest.fixture
def stores(world: tuple[dict[str, FeatureStore], dict[str, np.ndarray]]) -> dict[str, FeatureStore]:
    return world[0]


@pytest.fixture
def ask(world: tuple[dict[str, FeatureStore], dict[str, np.ndarray]]) -> Callable[[str], Splits]:
    """The three splits of a question about one fact."""

    def make(fact: str) -> Splits:
        first, parts = 0, []
        for size in SIZES.values():
            parts.append(
                [
                    Sample(f"s{i}", f"v{i}", np.arange(T)[None], f"which {fact}?", f"{fact} {world[1][fact][i]}", fact)
                    for i in range(first, first + size)
                ]
            )
            first += size
        return Splits(*parts)

    return make


def top1(answers: probes.Answers, splits: Splits) -> float:
    return float(np.mean([said[0] == s.answer for said, s in zip(answers.ranked(), splits.test, strict=True)]))


# ---------------------------------------------------------------- what each probe can and cannot read


@pytest.mark.parametrize(
    ("probe", "fact", "low", "high"),
    [
        ("clip_mean", "color", 0.95, 1.0),
        ("clip_mean", "place", 0.0, 0.45),  # 1/4: pooling forgets the place
        ("clip_frames", "place", 0.0, 0.45),
        ("clip_frames", "when", 0.95, 1.0),
        ("clip_mean", "when", 0.0, 0.5),  # 1/3: so does the mean over time
        ("clip_last", "place", 0.95, 1.0),
        ("clip_last", "when", 0.0, 0.75),  # last or not last
        ("clip_flat", "place", 0.95, 1.0),
        ("clip_flat", "when", 0.8, 1.0),
        ("clip_attentive", "color", 0.95, 1.0),
        ("clip_attentive", "place", 0.9, 1.0),
        ("clip_attentive", "when", 0.9, 1.0),
        ("teacher_mean", "color", 0.95, 1.0),
        ("teacher_frames", "color", 0.9, 1.0),
        ("teacher_mean", "place", 0.0, 0.45),
        ("teacher_attentive", "color", 0.9, 1.0),
        ("majority", "color", 0.2, 0.5),
    ],
)
def test_a_probe_reads_what_its_features_keep(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits], probe: str, fact: str, low: float, high: float
) -> None:
    splits = ask(fact)
    assert low <= top1(getattr(probes, probe)(stores, splits), splits) <= high


# ---------------------------------------------------------------- the linear probe, against scipy


def objective(x: np.ndarray, y: np.ndarray, penalty: float, classes: int) -> Callable[[np.ndarray], float]:
    def value(flat: np.ndarray) -> float:
        weights = flat.reshape(-1, classes)
        log_probs = log_softmax(x @ weights[:-1] + weights[-1], axis=1)
        return float(-log_probs[np.arange(len(y)), y].mean() + penalty / 2 * (weights[:-1] ** 2).sum())

    return value


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_logistic_regression_finds_the_optimum_that_scipy_finds(penalty: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 4, 40)
    start = torch.zeros(4, 4, dtype=torch.float64)
    ours = probes.fit_logistic(torch.from_numpy(x), torch.from_numpy(y), penalty=penalty, start=start).numpy()
    value = objective(x, y, penalty, 4)
    peer = minimize(value, np.zeros(16), method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9})
    assert value(ours.ravel()) <= peer.fun + 1e-9
    assert ours[:-1] == pytest.approx(peer.x.reshape(4, 4)[:-1], abs=1e-3)


def test_fewer_coordinates_than_features_give_the_same_probe() -> None:
    rng = np.random.default_rng(1)
    x, new, y = rng.normal(size=(12, 30)), rng.normal(size=(9, 30)), torch.from_numpy(rng.integers(0, 3, 12))
    space = Space.of(x)
    assert space.basis is not None
    assert space(x).shape == (12, 11)  # centring costs one dimension
    scaled = replace(space, basis=None)
    small, large = (
        probes.fit_logistic(
            torch.from_numpy(s(x)), y, penalty=0.05, start=torch.zeros(s(x).shape[1] + 1, 3, dtype=torch.float64)
        ).numpy()
        for s in (space, scaled)
    )
    assert space(new) @ small[:-1] + small[-1] == pytest.approx(scaled(new) @ large[:-1] + large[-1], abs=1e-4)


def test_a_constant_feature_is_left_out() -> None:
    x = np.random.default_rng(2).normal(size=(20, 3))
    x[:, 1] = 5.0
    space = Space.of(x)
    assert space.scale[1] == 0
    assert space(x).std(axis=0) == pytest.approx([1, 0, 1])


def test_the_penalty_is_chosen_on_val_and_never_on_test(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits]
) -> None:
    splits = ask("when")
    answers = probes.clip_flat(stores, splits)
    wrong = [replace(s, answer="when 0") for s in splits.test]
    again = probes.clip_flat(stores, splits._replace(test=wrong))
    assert np.array_equal(answers.log_probs, again.log_probs)
    one = [replace(s, answer="when 1") for s in splits.val]  # now the flattest probe is no worse than any other
    assert probes.clip_flat(stores, splits._replace(val=one)).chosen["penalty"] != answers.chosen["penalty"]


# ---------------------------------------------------------------- ridge


def test_ridge_is_the_closed_form_at_the_penalty_that_val_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(6, 2))
    parts = [(x, x @ w + rng.normal(0, 2, (len(x), 2))) for x in (rng.normal(size=(n, 6)) for n in (30, 25, 40))]
    train, val, test = parts
    monkeypatch.setattr(probes, "RIDGE_PENALTIES", (0.2,))
    mean, std, offset = train[0].mean(0), train[0].std(0), train[1].mean(0)
    z = (train[0] - mean) / std
    augmented = np.vstack([z, np.sqrt(0.2 * len(z)) * np.eye(6)])  # ridge as ordinary least squares
    solution, *_ = np.linalg.lstsq(augmented, np.vstack([train[1] - offset, np.zeros((6, 2))]), rcond=None)
    guess = (test[0] - mean) / std @ solution + offset
    expected = 1 - ((test[1] - guess) ** 2).mean(0) / test[1].var(0)
    assert probes.ridge_r2(train, val, test) == pytest.approx(expected)
    monkeypatch.setattr(probes, "RIDGE_PENALTIES", (1e6, 0.2, 1e7))
    assert probes.ridge_r2(train, val, test) == pytest.approx(expected)


def test_ridge_explains_a_linear_target_and_not_a_foreign_one() -> None:
    rng = np.random.default_rng(4)
    x = [rng.normal(size=(n, 50)) for n in (40, 60, 80)]
    linear = [(part, np.stack([part[:, 0] - 2 * part[:, 1], rng.normal(size=len(part))], 1)) for part in x]
    assert probes.ridge_r2(*linear)[1] < 0.1
    many = [rng.normal(size=(n, 7)) for n in (200, 60, 80)]
    exact = probes.ridge_r2(*[(part, part[:, :2] @ [[1.0], [-2.0]]) for part in many])
    assert exact == pytest.approx([1.0], abs=1e-3)


# ---------------------------------------------------------------- attentive, tasks, limits


def test_the_attentive_probe_is_a_function_of_its_seed(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "ATTENTIVE_STEPS", 100)
    splits = ask("place")
    before = torch.random.get_rng_state()
    first, second = (probes.clip_attentive(stores, splits, seed=5) for _ in range(2))
    assert np.array_equal(first.log_probs, second.log_probs)
    assert not np.array_equal(first.log_probs, probes.clip_attentive(stores, splits, seed=6).log_probs)
    assert torch.equal(before, torch.random.get_rng_state())


def test_features_read_again_are_those_kept_in_memory(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [replace(s, draws=s.draws[:, ::-1]) for s in ask("color").test]
    kept = Frames(stores["clip"], samples)
    monkeypatch.setattr(probes, "IN_MEMORY_BYTES", 0)
    read = Frames(stores["clip"], samples)
    order = [7, 0, 7, 31]
    assert torch.equal(kept.rows(order), read.rows(order))
    expected = stores["clip"].read(samples[31].video_id, np.array([2, 1, 0]))
    assert np.array_equal(kept.rows(order)[3].numpy(), expected)


def test_probes_are_fitted_per_prompt_where_prompts_are_few_else_per_group(
    ask: Callable[[str], Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = ask("color"), ask("place")
    both = Splits(*([*a, *(replace(s, group="color") for s in b)] for a, b in zip(one, other, strict=True)))
    cut = probes.tasks(both)
    assert list(cut) == ["which color?", "which place?"]
    assert cut["which color?"] == one
    monkeypatch.setattr(probes, "MAX_PROMPTS", 1)
    assert {name: len(parts.test) for name, parts in probes.tasks(both).items()} == {"color": 2 * SIZES["test"]}


def test_open_questions_share_a_probe_per_type(ask: Callable[[str], Splits]) -> None:
    """A question that is asked once has no probe of its own."""
    splits = Splits(*([replace(s, prompt=f"{s.prompt} {i}") for i, s in enumerate(part[:20])] for part in ask("color")))
    assert {name: len(parts.train) for name, parts in probes.tasks(splits).items()} == {"color": 20}


def test_a_task_without_val_samples_gets_the_most_frequent_answer_and_the_others_their_probe(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits]
) -> None:
    one, other = ask("color"), ask("place")._replace(val=[])
    both = Splits(*([*a, *b] for a, b in zip(one, other, strict=True)))
    told: list[tuple[int, int]] = []
    color, place = probes.fit_tasks(probes.clip_mean, stores, both, seed=0, log=lambda *done: told.append(done))
    assert (color.task, color.refused) == ("which color?", "")
    assert np.array_equal(color.answers.log_probs, probes.clip_mean(stores, one).log_probs)
    assert "'which place?' has 160 training and 0 val samples" in place.refused
    assert place.answers.ranked(1) == probes.majority(stores, other).ranked(1)
    assert told[0] == (0, 200)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    with pytest.raises(ProbeRefused, match="has 160 training and 0 val samples"):
        probes.fit_tasks(probes.clip_mean, stores, other, seed=0)
    assert not probes.fit_tasks(probes.majority, stores, other, seed=0)[0].refused
    no_train = Splits(one.train, one.val, [replace(s, prompt="?", group="new") for s in one.test])
    assert set(probes.fit_tasks(probes.majority, stores, no_train, seed=0)[0].answers.ranked(1)) == set(
        probes.majority(stores, one).ranked(1)
    )


def test_what_a_probe_cannot_do_is_refused(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = ask("place")
    monkeypatch.setattr(probes, "MAX_FLAT", T * P * C - 1)
    with pytest.raises(ProbeRefused, match="60 numbers per sample"):
        probes.clip_flat(stores, splits)
    uneven = [replace(s, draws=s.draws[:, :2]) if i == 3 else s for i, s in enumerate(splits.val)]
    with pytest.raises(ProbeRefused, match="the samples have 2 to 3 frames"):
        probes.clip_mean(stores, splits._replace(val=uneven))
    monkeypatch.setattr(probes, "MAX_CLASSES", 3)
    with pytest.raises(ProbeRefused, match="4 different answers"):
        probes.clip_mean(stores, splits)


def test_an_answer_that_training_never_shows_is_never_given(
    stores: dict[str, FeatureStore], ask: Callable[[str], Splits]
) -> None:
    splits = ask("color")
    fewer = splits._replace(train=[s for s in splits.train if s.answer != "color 1"])
    answers = probes.clip_mean(stores, fewer)
    assert answers.labels == ("color 0", "color 2")
    share = np.mean([s.answer != "color 1" for s in splits.val])
    assert answers.chosen["val_top1"] == pytest.approx(share, abs=0.05)


def test_majority_is_that_of_the_training_set(stores: dict[str, FeatureStore], ask: Callable[[str], Splits]) -> None:
    splits = ask("color")
    flipped = splits._replace(train=[replace(s, answer=s.answer if i % 3 else "z") for i, s in enumerate(splits.train)])
    flipped = flipped._replace(train=[*flipped.train, *(replace(s, answer="z") for s in splits.train)])
    assert set(probes.majority(stores, flipped).ranked(1)) == {("z",)}
