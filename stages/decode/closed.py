"""A closed set of answers as a tree of token ids: what may come next, and which answer was said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from stages.decode.text import TextCodec


class ClosedSet:
    """The answers that a constrained decoding may give. Two that are the same tokens count as the first of them.

    Attributes:
        longest: tokens of the longest answer, end of sequence included.

    Raises:
        ValueError: the set is empty.
    """

    def __init__(self, answers: Sequence[str], text: TextCodec) -> None:
        if not answers:
            raise ValueError("no answer is allowed: the closed set is empty")
        self._eos = text.eos_id
        self._answer: dict[tuple[int, ...], str] = {}
        self._next: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            ids = tuple(text.answer_ids(answer))
            self._answer.setdefault(ids, answer.strip())
            for end, token in enumerate(ids):
                self._next.setdefault(ids[:end], set()).add(token)
        self.longest = max(map(len, self._answer))

    def next_tokens(self, _sample: int, said: Tensor) -> list[int]:
        """What may follow, as ``prefix_allowed_tokens_fn`` of transformers.

        A beam that left the tree (a search with more beams than answers has to fill them) can only end.
        """
        return sorted(self._next.get(tuple(said.tolist()), {self._eos}))

    def answers(self, beams: Iterable[Sequence[int]]) -> list[str]:
        """The answers among generated rows of ids, each once, in their order; what fills up a row does not count."""
        found: dict[str, None] = {}
        for ids in beams:
            end = ids.index(self._eos) + 1 if self._eos in ids else len(ids)
            answer = self._answer.get(tuple(ids[:end]))
            if answer is not None:
                found.setdefault(answer)
        return list(found)
