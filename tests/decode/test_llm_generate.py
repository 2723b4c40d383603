"""Answers by beam search: padding, prefix, penalty, and nothing from the checkpoint's own settings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from stages.decode import llm
from tests.decode.conftest import WIDTH

PROMPTS = ["what is the relationship of the movie?", "who?", "where does it go", "why"]
GREEDY = {"num_beams": 1, "num_return": 1}


def some_prefix(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def greedy_by_hand(decoder: llm.CausalLM, visual: Tensor, prompt: str) -> str:
    """Arg-max token after token over the whole sequence, no cache; the penalty is on what was generated."""
    embed, made = decoder.model.get_input_embeddings(), []
    for _ in range(decoder.cfg.max_new_tokens):
        ids = torch.tensor(decoder.text.prompt_ids(prompt) + made)
        logits = decoder.model(inputs_embeds=torch.cat([visual, embed(ids)])[None]).logits[0, -1]
        for token in set(made):
            penalty = decoder.cfg.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        made.append(int(logits.argmax()))
        if made[-1] == decoder.text.eos_id:
            break
    return decoder.text.decode(made)


@pytest.mark.parametrize("penalty", [1.0, 1.5, 4.0])
def test_greedy_answers_equal_a_loop_written_by_hand(make: Any, penalty: float) -> None:
    decoder = make(**GREEDY, max_new_tokens=12, repetition_penalty=penalty)
    prefix = some_prefix(4)
    expected = [[greedy_by_hand(decoder, visual, prompt)] for visual, prompt in zip(prefix, PROMPTS, strict=True)]
    assert decoder.generate(prefix, PROMPTS) == expected


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_batch_of_unequal_prompts_equals_one_by_one(make: Any, beams: int, penalty: float) -> None:
    decoder = make(num_beams=beams, max_new_tokens=12, repetition_penalty=penalty)
    prefix = some_prefix(4)
    alone = [decoder.generate(prefix[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(4)]
    assert decoder.generate(prefix, PROMPTS) == alone
    assert len({tuple(texts) for texts in alone}) == 4


@pytest.mark.parametrize("beams", [1, 5])
def test_a_prefix_of_embedded_tokens_equals_those_tokens(make: Any, beams: int) -> None:
    decoder = make(num_beams=beams, max_new_tokens=9, repetition_penalty=1.0)
    ids = torch.tensor([decoder.text.prompt_ids("a film: who is it?")])
    made = decoder.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=decoder.text.pad_id,
            eos_token_id=decoder.text.eos_id,
        ),
    )
    expected = [decoder.text.decode(row) for row in made[:, ids.shape[1] :].tolist()]
    assert len(set(expected)) == beams
    prefix = decoder.model.get_input_embeddings()(ids[:, :7])
    assert decoder.generate(prefix, ["a film: who is it?"[7:]]) == [expected]


def test_as_many_beams_return_as_asked_and_searched(make: Any) -> None:
    prefix, prompts = some_prefix(2), PROMPTS[:2]
    assert [len(beams) for beams in make().generate(prefix, prompts)] == [5, 5]
    assert [len(beams) for beams in make(num_beams=3).generate(prefix, prompts)] == [3, 3]
    five, two = make(max_new_tokens=6), make(max_new_tokens=6, num_return=2)
    assert [beams[:2] for beams in five.generate(prefix, prompts)] == two.generate(prefix, prompts)


def test_the_length_penalty_decides_between_short_and_long_answers(make: Any) -> None:
    lengths = []
    for penalty in (-5.0, 0.0, 5.0):  # scores are sums of log-probabilities divided by length ** penalty
        decoder = make(max_new_tokens=8, length_penalty=penalty, repetition_penalty=1.0)
        decoder.model.get_output_embeddings().weight[decoder.text.eos_id] *= 2.0  # an end must be likely to come early
        best = [beams[0] for beams in decoder.generate(some_prefix(4), PROMPTS)]
        lengths.append(sum(len(text) for text in best))
    assert lengths[0] < lengths[1] < lengths[2]


def bigrams(decoder: llm.CausalLM, table: dict[str, dict[str, float]], fill: str) -> None:
    """Make the LLaMA a table of p(next | last); what a row leaves over is spread over the letters of ``fill``."""
    model, end = decoder.model, decoder.text.eos_id
    letters = {letter: decoder.text.tokenizer.convert_tokens_to_ids(letter) for letter in {*table, *fill}}
    for layer in model.model.layers:  # the state of a token is its embedding alone
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings, head = model.get_input_embeddings().weight.zero_(), model.get_output_embeddings().weight
    head.fill_(-50.0)
    for place, (letter, token) in enumerate(letters.items()):
        embeddings[token, place] = 1.0
        row = table.get(letter, {})
        for other in fill:
            head[letters[other], place] = math.log((1 - sum(row.values())) / len(fill))
        for following, probability in row.items():
            head[end if following == "end" else letters[following], place] = math.log(probability)
    model.model.norm.weight.fill_(WIDTH**-0.5)  # the norm of a one-hot is itself


def test_a_cut_answer_is_divided_by_one_more_than_its_tokens(make: Any) -> None:
    """By hand, length penalty 1: "a" ended has (ln 0.2 + ln 0.7) / 2 = -0.98, "bcde", cut off after four tokens,
    ln 0.3 + 3 ln 0.35 = -4.35, so -1.09 over 4 and -0.87 over 5."""
    table = {
        "?": {"a": 0.2, "b": 0.3},
        "a": {"end": 0.7},
        "b": {"c": 0.35},
        "c": {"d": 0.35},
        "d": {"e": 0.35},
        "e": {"end": 0.35},
    }
    best = {}
    for ended in (True, False):
        decoder = make(repetition_penalty=1.0, end_cut_answers=ended)
        bigrams(decoder, table, fill="ghijklmnop")
        best[ended] = decoder.generate(some_prefix(1), ["who?"])[0][0]
    assert best == {True: "bcde", False: "a"}


def hypotheses(decoder: llm.CausalLM, visual: Tensor, prompt: str) -> list[str]:
    """MA-LMM's beam search by hand: a list of hypotheses, ended or, at the end, cut off, each divided by (start token +
    its tokens) ** penalty."""
    cfg, embed, end = decoder.cfg, decoder.model.get_input_embeddings(), decoder.text.eos_id
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    kept: list[tuple[float, list[int]]] = []
    for _ in range(cfg.max_new_tokens):
        candidates = []
        for total, ids in live:
            read = torch.cat([visual, embed(torch.tensor(decoder.text.prompt_ids(prompt) + ids))])
            scores = decoder.model(inputs_embeds=read[None]).logits[0, -1].log_softmax(-1)
            scores[ids] *= cfg.repetition_penalty
            candidates += [(total + float(score), [*ids, token]) for token, score in enumerate(scores)]
        candidates = sorted(candidates, reverse=True)[: 2 * cfg.num_beams]
        for total, ids in candidates[: cfg.num_beams]:
            if ids[-1] == end:
                kept.append((total / len(ids) ** cfg.length_penalty, ids[:-1]))
        kept = sorted(kept, reverse=True)[: cfg.num_beams]
        live = [(total, ids) for total, ids in candidates if ids[-1] != end][: cfg.num_beams]
        best, ids = candidates[0]
        if len(kept) == cfg.num_beams and kept[-1][0] >= best / len(ids) ** cfg.length_penalty:
            break
    else:
        kept += [(total / (len(ids) + 1) ** cfg.length_penalty, ids) for total, ids in live]
    return [decoder.text.decode(ids) for _, ids in sorted(kept, reverse=True)[: cfg.num_beams]]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_are_ranked_as_by_a_list_of_hypotheses(make: Any, penalty: float) -> None:
    """The best of all samples, and nearly all lists. An answer may be missing, since transformers stops once no
    unfinished beam can still enter, MA-LMM's versions only once no beam can, those included that have just ended."""
    decoder, prefix = make(max_new_tokens=4, length_penalty=penalty), some_prefix(24)
    decoder.model.get_output_embeddings().weight[decoder.text.eos_id] *= 2.0  # some answers end, some are cut off
    prompts = [PROMPTS[i % 4] for i in range(24)]
    expected = [hypotheses(decoder, visual, prompt) for visual, prompt in zip(prefix, prompts, strict=True)]
    answers = decoder.generate(prefix, prompts)
    assert [beams[0] for beams in answers] == [beams[0] for beams in expected]
    assert sum(a != b for a, b in zip(answers, expected, strict=True)) <= (1 if penalty else 0)


def test_the_number_of_samples_per_call_does_not_change_answers(make: Any) -> None:
    prefix = some_prefix(4)
    assert make(batch_size=3).generate(prefix, PROMPTS) == make(batch_size=16).generate(prefix, PROMPTS)


def test_no_samples_give_no_answers(make: Any) -> None:
    assert make().generate(torch.zeros(0, 3, WIDTH), []) == []


def test_two_decoders_on_one_model_keep_their_own_settings(make: Any) -> None:
    long, prefix = make(**GREEDY, max_new_tokens=9), some_prefix(1)
    before = long.generate(prefix, PROMPTS[:1])
    short = llm.CausalLM(long.model, long.text, long.cfg.model_copy(update={"max_new_tokens": 2}))
    assert short.generate(prefix, PROMPTS[:1]) != before == long.generate(prefix, PROMPTS[:1])


def test_an_empty_prompt_leaves_the_prefix_alone(make: Any) -> None:
    decoder, prefix = make(**GREEDY, repetition_penalty=1.0, max_new_tokens=1), some_prefix(2)
    first = decoder.generate(prefix, ["", "why"])[0][0]
    logits = decoder.model(inputs_embeds=prefix[:1]).logits[0, -1]
    assert first == decoder.text.decode([int(logits.argmax())])
    loss, _ = decoder.loss_sum(prefix[:1], [""], [""])
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[decoder.text.eos_id])


def test_answers_are_the_same_every_time(make: Any) -> None:
    decoder, prefix = make(max_new_tokens=8), some_prefix(4)
    torch.manual_seed(1)
    first = decoder.generate(prefix, PROMPTS)
    torch.manual_seed(2)
    assert decoder.generate(prefix, PROMPTS) == first


def test_the_generation_settings_of_the_checkpoint_stay_out(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = make(**GREEDY, max_new_tokens=12, repetition_penalty=1.0)  # saved with max_length 3, sampling, no repeats
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = decoder.generate(some_prefix(4), PROMPTS)
    assert capfd.readouterr().err == ""
    lengths = [len(decoder.text.answer_ids(texts[0])) - 2 for texts in answers]  # without gap and end
    assert max(lengths) > 3


def test_answers_carry_neither_special_tokens_nor_outer_spaces(make: Any) -> None:
    text = make().text
    ids = text.tokenizer.convert_tokens_to_ids(["<|user|>"]) + text.answer_ids(" two  words , here ")
    assert text.decode([*ids, text.pad_id]) == "two  words , here"
