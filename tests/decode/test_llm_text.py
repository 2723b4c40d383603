"""Prompts and answers as token ids: they are data, whatever they spell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stages.config import DecodeConfig
from stages.decode.llm import TextCodec
from tests.decode.conftest import BYTES, byte_tokenizer

CHAT_TEMPLATE = "<|user|>{prompt}\n<|model|>"


def codec(**settings: Any) -> TextCodec:
    return TextCodec(byte_tokenizer(), DecodeConfig(**settings), vicuna=False)


def spelled(text: TextCodec, ids: list[int]) -> str:
    return text.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "prompt", ["who?", "{prompt}", "{0.__class__} %s $x \\g<0>", "<|end|><|user|>", "a\nb\x1b[31m ü 映", ""]
)
@pytest.mark.parametrize("template", ["{prompt}", "Question: {prompt} Short answer:", CHAT_TEMPLATE])
def test_a_prompt_is_put_into_its_template_letter_by_letter(template: str, prompt: str) -> None:
    text = codec(prompt_template=template)
    ids = text.prompt_ids(prompt)
    assert spelled(text, ids) == template.replace("{prompt}", prompt)
    special = [i for i in ids if i in (1, 2, 3)]  # <|end|>, <|user|>, <|model|>
    assert special == ([2, 3] if template == CHAT_TEMPLATE else [])


def test_an_answer_cannot_end_itself() -> None:
    text = codec()
    assert text.answer_ids("a<|end|>b").count(text.eos_id) == 1
    assert text.answer_ids("a<|end|>b")[-1] == text.eos_id


@pytest.mark.parametrize("answer", ["friend", " husband wife\n", "a , b ?", "Ünï 映画 🎬", "a\x1b[31mb\x00"])
def test_an_answer_read_back_is_itself(answer: str) -> None:
    text = codec()
    assert text.decode(text.answer_ids(answer)) == answer.strip()


def test_an_empty_answer_is_the_end_alone() -> None:
    assert codec().answer_ids(" \n") == [codec().eos_id]


def test_an_answer_that_is_too_long_is_cut() -> None:
    text = codec()
    assert len(text.answer_ids("ab " * 500)) == 256
    assert text.eos_id not in text.answer_ids("ab " * 500)


@pytest.mark.parametrize(
    ("template", "first"), [("{prompt}", "Ġ"), ("{prompt} ->", "Ġ"), ("{prompt}\n", "f"), (CHAT_TEMPLATE, "f")]
)
def test_a_space_parts_the_answer_from_a_word_but_not_from_a_line_break(template: str, first: str) -> None:
    text = codec(prompt_template=template)
    assert text.tokenizer.convert_ids_to_tokens(text.answer_ids("friend"))[0] == first


def test_a_tokenizer_that_marks_word_starts_itself_gets_no_space() -> None:
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<e>", *"▁abc"])}, merges=[]))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    text = TextCodec(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>"), DecodeConfig(), vicuna=False)
    assert text.tokenizer.convert_ids_to_tokens(text.answer_ids("ab c")) == ["▁", "a", "b", "▁", "c", "<e>"]


def test_a_long_prompt_loses_its_beginning() -> None:
    text = codec(max_prompt_tokens=6)
    assert spelled(text, text.prompt_ids("what is the movie?")) == "movie?"


def test_a_start_token_of_the_tokenizer_is_kept_and_an_end_token_dropped() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 2), ("<|end|>", 1)]
    )
    text = TextCodec(tokenizer, DecodeConfig(max_prompt_tokens=5), vicuna=False)
    assert spelled(text, text.prompt_ids("what movie?")) == "<|user|>vie?"
    assert spelled(text, text.prompt_ids("a")) == "<|user|>a"


def test_a_template_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt_template has no \{prompt\}"):
        codec(prompt_template="what?")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        TextCodec(tokenizer, DecodeConfig(), vicuna=False)


def test_answers_that_can_never_be_given_are_named(make: Any) -> None:
    decoder = make(max_new_tokens=7)
    assert decoder.unreachable(["friend", "husband", "ex-friend", "friend"]) == ["ex-friend", "husband"]
    assert len(BYTES) == 256


def test_the_tokenizer_survives_a_round_trip_through_its_folder(tiny_folder: Path, make: Any) -> None:
    assert (tiny_folder / "tokenizer.json").is_file()
    assert make().text.prompt_ids("who?") == codec().prompt_ids("who?")
