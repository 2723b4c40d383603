"""Eq. 8: the loss on the answer tokens, held against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from stages import weights
from stages.config import DecodeConfig
from stages.decode import llm
from stages.types import Decoder
from tests.decode.conftest import BYTES, WIDTH, byte_tokenizer

PROMPTS = ["what is the relationship of the movie?", "who?", "where does it go"]
ANSWERS = ["friend", "husband wife", ""]
NUM_VISUAL = 5


def some_prefix(batch: int, *, width: int = WIDTH, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, NUM_VISUAL, width, generator=generator).requires_grad_()


def transformers_loss_sum(decoder: llm.CausalLM, prefix: Tensor, prompts: list[str], answers: list[str]) -> Tensor:
    """The same loss from whole sequences, labels of -100 and transformers' mean, one sample after another."""
    total = torch.zeros(())
    for visual, prompt, answer in zip(prefix, prompts, answers, strict=True):
        question, target = decoder.text.prompt_ids(prompt), decoder.text.answer_ids(answer)
        embeds = decoder.model.get_input_embeddings()(torch.tensor(question + target))
        labels = torch.tensor([[-100] * (len(visual) + len(question)) + target])
        loss = decoder.model(inputs_embeds=torch.cat([visual, embeds])[None], labels=labels).loss
        total = total + loss * len(target)
    return total


def test_the_llm_is_a_decoder(make: Any) -> None:
    assert isinstance(make(), Decoder)
    assert make().width == WIDTH


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1], [0, 1, 2, 1]])
def test_loss_and_gradient_equal_those_of_transformers(make: Any, rows: list[int]) -> None:
    decoder = make()
    prompts, answers = [PROMPTS[i] for i in rows], [ANSWERS[i] for i in rows]
    ours, theirs = some_prefix(len(rows)), some_prefix(len(rows))
    loss, count = decoder.loss_sum(ours, prompts, answers)
    expected = transformers_loss_sum(decoder, theirs, prompts, answers)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert count == decoder.count_answer_tokens(answers) == sum(len(decoder.text.answer_ids(a)) for a in answers)


def test_a_longer_neighbour_does_not_change_a_sample(make: Any) -> None:
    decoder = make()
    alone, together = some_prefix(1), some_prefix(1)
    loss, _ = decoder.loss_sum(alone, PROMPTS[1:2], ANSWERS[:1])
    loss.backward()
    stack = torch.cat([together, some_prefix(1, seed=8)])
    both, _ = decoder.loss_sum(stack, [PROMPTS[1], "a much longer question " * 3], [ANSWERS[0], "a long answer"])
    both.backward()
    torch.testing.assert_close(together.grad, alone.grad)


def test_logits_are_computed_for_the_answer_tokens_only(make: Any) -> None:
    decoder, rows = make(), []
    decoder.model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(out.shape))
    _, count = decoder.loss_sum(some_prefix(2), PROMPTS[:2], ANSWERS[:2])
    assert [tuple(shape) for shape in rows] == [(count, 4 + len(BYTES))]


def test_nothing_of_the_llm_takes_part_in_training(make: Any) -> None:
    decoder = make(num_beams=2, num_return=1)
    before = weights.weights_digest(decoder.model)
    decoder.loss_sum(some_prefix(2), PROMPTS[:2], ANSWERS[:2])[0].backward()
    decoder.generate(some_prefix(2), PROMPTS[:2])
    assert not any(p.requires_grad or p.grad is not None for p in decoder.model.parameters())
    assert not decoder.model.training
    assert weights.weights_digest(decoder.model) == before


@pytest.mark.parametrize("capped", [True, False])
def test_a_model_that_changes_logits_behind_its_head_still_gets_its_own_loss(tmp_path: Path, capped: bool) -> None:
    sizes = {
        "vocab_size": 4 + len(BYTES),
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    if capped:
        model: Any = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=6, final_logit_softcapping=2.0))
    else:
        model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    decoder = llm.build(DecodeConfig(llm=str(tmp_path)), device="cpu")
    prefix = some_prefix(2)
    loss, _ = decoder.loss_sum(prefix, PROMPTS[:2], ANSWERS[:2])
    torch.testing.assert_close(loss, transformers_loss_sum(decoder, prefix, PROMPTS[:2], ANSWERS[:2]))


def test_an_own_padding_token_gives_the_same_loss_as_none(tmp_path: Path, make: Any, tiny_folder: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    padded = byte_tokenizer()
    padded.pad_token = "<|user|>"
    padded.save_pretrained(tmp_path)
    with_pad, without = llm.build(DecodeConfig(llm=str(tmp_path)), device="cpu"), make()
    assert with_pad.text.pad_id != without.text.pad_id == without.text.eos_id
    prefix = some_prefix(2)
    loss, _ = with_pad.loss_sum(prefix, PROMPTS[:2], ANSWERS[:2])
    assert torch.equal(loss, without.loss_sum(prefix, PROMPTS[:2], ANSWERS[:2])[0])
    assert with_pad.generate(prefix, PROMPTS[:2]) == without.generate(prefix, PROMPTS[:2])
