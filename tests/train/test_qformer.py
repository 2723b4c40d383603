"""Our Q-Former against transformers' InstructBLIP Q-Former."""

from __future__ import annotations

import pytest
import torch
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from stages.train.memory import MemoryBank
from stages.train.qformer import QFormer

SIZES = {"hidden_size": 24, "num_layers": 4, "num_heads": 3, "intermediate_size": 40, "frame_size": 20}


def theirs(dropout: float = 0.0) -> InstructBlipQFormerModel:
    torch.manual_seed(1)
    config = InstructBlipQFormerConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=40,
        encoder_hidden_size=20,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        cross_attention_frequency=2,
    )
    model = InstructBlipQFormerModel(config).eval()
    for parameter in model.parameters():  # LayerNorms and biases must matter too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(reference: InstructBlipQFormerModel) -> QFormer:
    model = QFormer(vocab_size=50, cross_attention_every=2, max_positions=64, **SIZES).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("text", ["none", "whole", "padded"])
def test_one_frame_without_banks_equals_transformers_bit_for_bit(text: str) -> None:
    reference = theirs()
    model = ours(reference)
    queries, frame = torch.randn(2, 5, 24), torch.randn(2, 7, 20)
    ids = None if text == "none" else torch.randint(1, 50, (2, 6))
    keep = None if ids is None else torch.ones(2, 6, dtype=torch.bool)
    if text == "padded" and keep is not None:
        keep[1, 4:] = False
    with torch.inference_mode():
        mask = None if keep is None else torch.cat([torch.ones(2, 5, dtype=torch.long), keep.long()], 1)
        want = reference(
            input_ids=ids,
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=frame,
            output_hidden_states=True,
        )
        hidden, _ = model.step(queries, ids, keep, frame, MemoryBank.empty(3), model.empty_banks(3))
    assert len(hidden) == len(want.hidden_states) == 5
    for level, (mine, other) in enumerate(zip(hidden, want.hidden_states, strict=True), start=1):
        # Rows of padded text are nobody's input: transformers leaves its own numbers there.
        rows = slice(None) if text != "padded" else slice(0, 5)
        assert torch.equal(mine[:, rows], other[:, rows]), f"level {level}"


def test_text_padding_changes_no_query_even_with_banks() -> None:
    model = ours(theirs()).double()
    queries, frame = torch.randn(1, 5, 24).double(), torch.randn(1, 7, 20).double()
    short = torch.tensor([[4, 9, 2]])
    padded, keep = torch.tensor([[4, 9, 2, 0, 0]]), torch.tensor([[True, True, True, False, False]])
    with torch.inference_mode():
        outputs = []
        for ids, mask in ((short, torch.ones(1, 3, dtype=torch.bool)), (padded, keep)):
            banks = model.empty_banks(2)
            for t in range(4):
                hidden, banks = model.step(queries, ids, mask, frame * (t + 1), MemoryBank.empty(2), banks)
            outputs.append(hidden[-1][:, :5])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)


def test_a_query_bank_holds_the_input_of_its_layer_with_the_text() -> None:
    model = ours(theirs())
    queries, frame, ids = torch.randn(2, 5, 24), torch.randn(2, 7, 20), torch.randint(1, 50, (2, 6))
    hidden, banks = model.step(
        queries, ids, torch.ones(2, 6, dtype=torch.bool), frame, MemoryBank.empty(3), model.empty_banks(3)
    )
    assert len(banks) == 4
    for layer, bank in enumerate(banks):
        assert bank.values is not None
        assert torch.equal(bank.values[:, 0], hidden[layer])
        assert not bank.values.requires_grad
