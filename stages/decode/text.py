"""Strings to token ids as the language model reads them, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from stages.config import DecodeConfig

MAX_ANSWER_TOKENS = 256  # MA-LMM max_output_txt_len; a longer answer is cut and then has no end of sequence
KEPT_TEXTS = 1 << 16  # tokenized texts kept: training and evaluation ask for the same few again and again


class TextCodec:
    """Strings to token ids as the LLM reads them, and back.

    Prompts and answers are data: a special token spelled out inside one stays ordinary text. Only ``prompt_template``
    may name special tokens.

    Args:
        tokenizer: of transformers, fast or slow.
        cfg: for the template and the prompt length.
        vicuna: MA-LMM's rule for the first token: ``</s>``, since its tokenizer has bos = eos = unk = ``</s>``.
            Otherwise a prompt starts with what the tokenizer itself puts in front of a text.
    """

    def __init__(self, tokenizer: Any, cfg: DecodeConfig, *, vicuna: bool) -> None:
        if "{prompt}" not in cfg.prompt_template:
            raise ValueError(f"decode.prompt_template has no {{prompt}} in it: {cfg.prompt_template!r}")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {cfg.llm} has no end-of-sequence token, so no answer would ever end")
        self.tokenizer, self.vicuna, self.max_prompt_tokens = tokenizer, vicuna, cfg.max_prompt_tokens
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.start_ids = [self.eos_id] if vicuna else self._own_start()
        if len(self.start_ids) >= cfg.max_prompt_tokens:
            raise ValueError(f"decode.max_prompt_tokens={cfg.max_prompt_tokens} leaves no room for the prompt")
        specials = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, specials)) + ")", cfg.prompt_template) if specials else []
        self._template = [piece for piece in pieces or [cfg.prompt_template] if piece]
        self._specials = frozenset(specials)
        self._gap = self._gap_before_answer()
        self._prompt_ids = lru_cache(KEPT_TEXTS)(self._tokenize_prompt)
        self._answer_ids = lru_cache(KEPT_TEXTS)(self._tokenize_answer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt in its template, cut on the left to ``max_prompt_tokens`` (start token kept, MA-LMM)."""
        return list(self._prompt_ids(prompt))

    def answer_ids(self, answer: str) -> list[int]:
        """The stripped answer as it continues the prompt, and the end of sequence."""
        return list(self._answer_ids(answer))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens, stripped."""
        if self.vicuna:
            ids = [self.eos_id if i < 2 else i for i in ids]  # MA-LMM: <unk> and <s> read as </s>
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _tokenize_prompt(self, prompt: str) -> tuple[int, ...]:
        ids: list[int] = []
        for piece in self._template:
            if piece in self._specials:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids.extend(self._plain_ids(piece.replace("{prompt}", prompt)))
        return (*self.start_ids, *ids[-(self.max_prompt_tokens - len(self.start_ids)) :])

    def _tokenize_answer(self, answer: str) -> tuple[int, ...]:
        text = answer.strip()
        ids = self._plain_ids(self._gap + text) if text else []
        return (*ids, self.eos_id)[:MAX_ANSWER_TOKENS]

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def _own_start(self) -> list[int]:
        """What the tokenizer puts before a text (what it may put behind would end the prompt, so it is dropped)."""
        bare: list[int] = self.tokenizer("a", add_special_tokens=False).input_ids
        full: list[int] = self.tokenizer("a").input_ids
        return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]

    def _gap_before_answer(self) -> str:
        """A space where the answer's first word would otherwise stick to the prompt's last.

        SentencePiece marks word starts by itself; byte-level BPE has other tokens for " friend" than for "friend".
        """
        last = self._template[-1]
        marks_words = self.tokenizer.convert_ids_to_tokens(self._plain_ids("a"))[0].startswith("▁")
        return "" if marks_words or last in self._specials or last[-1].isspace() else " "
