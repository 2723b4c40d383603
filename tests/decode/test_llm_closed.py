"""Closed sets of answers, ranked by likelihood or decoded under constraint, and losses apart from one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from stages.config import DecodeConfig
from stages.decode import llm
from tests.decode.conftest import BYTES, WIDTH, byte_tokenizer

PROMPTS = ["what is the relationship of the movie?", "who?", "why", "when"]
LABELS = ["friend", "husband wife", "", "fr", "boss", "friends"]  # one is nothing but the end, some begin alike


def some_prefix(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def one_by_one(decoder: llm.CausalLM, prefix: Tensor, prompts: list[str], candidates: list[str]) -> Tensor:
    with torch.no_grad():
        rows = [
            [-decoder.loss_sum(visual[None], [prompt], [candidate])[0] for candidate in candidates]
            for visual, prompt in zip(prefix, prompts, strict=True)
        ]
    return torch.tensor(rows)


# ---------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("sizes", [{}, {"batch_size": 2}, {"batch_size": 1, "num_beams": 2, "num_return": 2}])
def test_scores_are_those_of_every_candidate_alone(make: Any, sizes: dict[str, int]) -> None:
    decoder, prefix = make(**sizes), some_prefix(4)
    scores = decoder.score_answers(prefix, PROMPTS, LABELS)
    torch.testing.assert_close(scores, one_by_one(decoder, prefix, PROMPTS, LABELS), rtol=1e-5, atol=1e-4)
    assert scores.shape == (4, 6)
    assert scores.std(1).min() > 1
    assert not scores.requires_grad


def test_a_model_that_changes_logits_behind_its_head_scores_as_it_loses(tmp_path: Path) -> None:
    sizes = {"vocab_size": 4 + len(BYTES), "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    Gemma2ForCausalLM(
        Gemma2Config(**sizes, initializer_range=0.4, head_dim=6, final_logit_softcapping=2.0)
    ).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    decoder, prefix = llm.build(DecodeConfig(llm=str(tmp_path)), device="cpu"), some_prefix(2)
    scores = decoder.score_answers(prefix, PROMPTS[:2], LABELS)
    torch.testing.assert_close(scores, one_by_one(decoder, prefix, PROMPTS[:2], LABELS), rtol=1e-5, atol=1e-4)


def test_prefix_and_prompt_are_read_once_per_sample(make: Any) -> None:
    decoder, read = make(), []
    decoder.model.base_model.layers[0].register_forward_hook(lambda _m, args, _o: read.append(tuple(args[0].shape[:2])))
    decoder.score_answers(some_prefix(2), ["when", "why?"], LABELS)
    length = 3 + len(decoder.text.prompt_ids("when"))
    assert read[0] == (2, length)
    assert {rows for rows, _ in read[1:]} == {2 * 5}  # one candidate is only an end, which the prompt's states predict
    assert all(tokens < len(decoder.text.answer_ids("husband wife")) for _, tokens in read[1:])


def test_nothing_to_score_is_an_empty_table(make: Any) -> None:
    assert make().score_answers(some_prefix(2), PROMPTS[:2], []).shape == (2, 0)
    assert make().score_answers(some_prefix(0), [], LABELS).shape == (0, 6)


# ---------------------------------------------------------------- losses apart


def test_the_losses_of_a_batch_are_those_of_its_samples_with_their_gradients(make: Any) -> None:
    decoder, answers = make(), ["friend", "", "husband wife", "no"]
    together, apart = some_prefix(4).requires_grad_(), some_prefix(4).requires_grad_()
    losses = decoder.loss_per_sample(together, PROMPTS, answers)
    alone = [decoder.loss_sum(apart[i : i + 1], PROMPTS[i : i + 1], answers[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(losses.sum(), decoder.loss_sum(together, PROMPTS, answers)[0])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (losses * weights).sum().backward()
    (torch.stack(alone) * weights).sum().backward()
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-4, atol=1e-4)
    assert together.grad is not None
    assert together.grad.abs().amax((1, 2)).min() > 1e-3


# ---------------------------------------------------------------- decoding under constraint


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_a_small_set_is_returned_whole_in_the_order_of_its_likelihoods(make: Any, count: int) -> None:
    decoder = make(num_beams=6, num_return=6, length_penalty=0.0, repetition_penalty=1.0, max_new_tokens=2)
    prefix = some_prefix(4)
    scores = decoder.score_answers(prefix, PROMPTS, LABELS[:count])
    order = [[LABELS[i] for i in row] for row in scores.argsort(dim=1, descending=True).tolist()]
    assert decoder.generate(prefix, PROMPTS, allowed=LABELS[:count]) == order


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_only_answers_of_the_set_are_given(make: Any, beams: int) -> None:
    words = [a + b + c for a in "wxyz" for b in "abc" for c in ("", "d", "de")]
    decoder, prefix = make(num_beams=beams, num_return=beams), some_prefix(4)
    answers = decoder.generate(prefix, PROMPTS, allowed=words)
    assert all(set(texts) <= set(words) and len(set(texts)) == len(texts) for texts in answers)
    assert all(texts for texts in answers)
    assert len({tuple(texts) for texts in answers}) > 1
    alone = [decoder.generate(prefix[i : i + 1], PROMPTS[i : i + 1], allowed=words)[0] for i in range(4)]
    assert answers == alone


def test_a_closed_set_leaves_free_answers_as_they_were(make: Any) -> None:
    decoder, prefix = make(max_new_tokens=5), some_prefix(4)
    before = decoder.generate(prefix, PROMPTS)
    decoder.generate(prefix, PROMPTS, allowed=LABELS)
    assert decoder.generate(prefix, PROMPTS) == before
    assert not any(text in LABELS for texts in before for text in texts)


def test_answers_are_the_labels_as_they_were_given_without_outer_spaces(make: Any) -> None:
    decoder = make()
    assert decoder.generate(some_prefix(1), PROMPTS[:1], allowed=[" two  words "]) == [["two  words"]]
    with pytest.raises(ValueError, match="closed set is empty"):
        decoder.generate(some_prefix(1), PROMPTS[:1], allowed=[])
