"""Trains the small language model to answer questions from a description, in the layout of MA-LMM.

``description <s> prompt answer </s> <s> prompt answer </s> …``: a student's visual tokens later stand where the
description stands. It knows the words of every task, fine ones too, as a language model does; it has seen no picture.

To find what belongs to a word is learned first, on lists: in questions about videos alone it was never learned, since
with two actors "one of the two colors" is right every other time. Without lists later on it is lost again.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from stages.data.lvu import lvu_prompt
from stages.data.msvd import PROMPT, clean_question
from stages.miniature import LLM_FOLDER
from stages.miniature.draw import COLORS, SHAPES
from stages.miniature.pictures import FIRST_HIDDEN_SEED
from stages.miniature.sayings import fine_questions, questions, statements
from stages.miniature.videos import VideoSpec, labels, specs

LISTS_ALONE = 400  # steps; at about 280 all answers turn right at once
LISTS = 0.4  # their share later on
Asked = tuple[str, str, str, str]  # the fact it rests on, its type, prompt, answer
BINDING = ("who", "glow")
QUESTIONS = {  # words in a question -> what it is about, and the fact that it rests on
    "color of": ("color", "who"),
    "shape of": ("shape", "who"),
    "one?": ("other color", "who"),
    "who is with": ("other shape", "who"),
    "tint": ("director", "director"),
    "where are": ("scene", "scene"),
    "weather": ("genre", "genre"),
    "when does it": ("daytime", "daytime"),
    "shapes move": ("relationship", "relationship"),
    "where in the picture": ("spot", "spot"),
    "between": ("contact", "contact"),
    "glow": ("glow", "glow"),
}


def asked(spec: VideoSpec, draw: random.Random) -> list[Asked]:
    """Every question about a video: LVU's tasks in both styles of prompt, and MSVD-QA's questions."""
    found: list[Asked] = []
    for task, label in labels(spec).items():
        style = "malmm" if draw.random() < 0.7 else "paper"
        found.append(("glow" if task == "first" else task, task, lvu_prompt(task, style), label))  # type: ignore[arg-type]
    for kind, question, answer in (*questions(spec), *fine_questions(spec)):
        about, fact = next(entry for words, entry in QUESTIONS.items() if words in question)
        found.append((fact, f"{kind}: {about}", PROMPT.format(clean_question(question)), answer))
    return found


def described(spec: VideoSpec, draw: random.Random, *, keep: float) -> tuple[str, set[str]]:
    """A description in random order with each fact kept at random, and the facts in it.

    The facts that tie two things together (which colour has which shape) are the hardest to learn and kept more often.
    """
    said = {
        fact: words
        for fact, words in statements(spec).items()
        if draw.random() < (max(keep, 0.7) if fact in BINDING else keep)
    }
    kept = list(said.items())
    draw.shuffle(kept)
    return " ".join(words for _, words in kept), {fact for fact, _ in kept}


def train_llm(*, steps: int, batch: int = 32, log: Callable[[str], None] = print) -> LlamaForCausalLM:
    """The model after ``steps`` steps. Deterministic on one machine."""
    torch.manual_seed(31)
    tokenizer = AutoTokenizer.from_pretrained(LLM_FOLDER)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(LLM_FOLDER))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    draw = random.Random(31)
    known = specs(20_000, FIRST_HIDDEN_SEED + 31)
    encode = _Encoder(tokenizer)
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = [
            _listed(draw, encode)
            if step < LISTS_ALONE or draw.random() < LISTS
            else _of_a_video(draw.choice(known), draw, encode)
            for _ in range(batch)
        ]
        tokens, answers, told = _padded(rows, encode.pad)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        answer_loss = losses[answers[:, 1:].flatten()].mean()
        loss = answer_loss + (told[:, 1:].flatten() * losses).sum() / (told[:, 1:] > 0).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(float(answer_loss.detach()))
        if step % 200 == 199 or step == steps - 1:
            log(f"llm {step + 1}/{steps} answer loss {sum(recent[-200:]) / len(recent[-200:]):.4f}")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def accuracy_from_descriptions(model: LlamaForCausalLM, *, videos: int = 300) -> dict[str, float]:
    """Type of question -> share answered from a gold description, greedily, on descriptions it was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(LLM_FOLDER)
    encode, draw = _Encoder(tokenizer), random.Random(32)
    right, total = Counter[str](), Counter[str]()
    for spec in specs(videos, FIRST_HIDDEN_SEED + 32):
        text, facts = described(spec, draw, keep=0.9)
        for fact, kind, prompt, answer in asked(spec, draw):
            if fact not in facts:
                continue
            ids = [*encode(text), encode.bos, *encode(prompt)]
            said = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            right[kind] += said == encode(answer)[0]
            total[kind] += 1
    return {kind: right[kind] / total[kind] for kind in sorted(total)}


class _Encoder:
    """Token ids of a text, remembered."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer, self.known = tokenizer, dict[str, list[int]]()
        self.bos, self.eos, self.pad = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[operator]
            if len(self.known) > 50_000:
                return list(ids)
            self.known[text] = list(ids)
        return self.known[text]


Row = tuple[list[int], list[int], float]  # ids; for each 0 prompt, 1 answer, 2 description; what those weigh


def _listed(draw: random.Random, encode: _Encoder) -> Row:
    """All shapes with their colours, told twice: the second time in another order, so that colours can be foreseen.

    Colours may repeat, so that none follows from the others.
    """
    pairs = [(shape, draw.choice(sorted(COLORS))) for shape in sorted(SHAPES)]
    told = []
    for form in ("a {1} {0}", "the {0} {1}"):
        draw.shuffle(pairs)
        told.append(" and ".join(form.format(*pair) for pair in pairs))
    draw.shuffle(pairs)
    questions = [(PROMPT.format(clean_question(f"what is the color of the {shape}?")), color) for shape, color in pairs]
    return _row(" ".join(told), questions, encode, weight=1.0)


def _of_a_video(spec: VideoSpec, draw: random.Random, encode: _Encoder) -> Row:
    text, facts = described(spec, draw, keep=draw.choice((0.2, 0.5, 0.95)))
    answerable = [question for question in asked(spec, draw) if question[0] in facts]
    draw.shuffle(answerable)
    by_kind = {question[1]: question for question in answerable}  # one of a kind: the second would follow from it
    hard = [question for question in by_kind.values() if question[0] in BINDING]
    chosen = {question[1]: question for question in (*hard[:2], *by_kind.values())}
    order = list(chosen.values())[:6]
    draw.shuffle(order)
    return _row(text, [(prompt, answer) for _, _, prompt, answer in order], encode, weight=0.1)


def _row(text: str, questions: list[tuple[str, str]], encode: _Encoder, *, weight: float) -> Row:
    ids = list(encode(text))
    kinds = [2] * len(ids)
    for prompt, answer in questions:
        question, reply = [encode.bos, *encode(prompt)], [*encode(answer), encode.eos]
        ids += question + reply
        kinds += [0] * len(question) + [1] * len(reply)
    return ids, kinds, weight


def _padded(rows: list[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, L], padded on the right; where answers are; what each token of a description weighs."""
    longest = max(2, *(len(ids) for ids, _, _ in rows))
    tokens = torch.full((len(rows), longest), pad)
    kind, weight = torch.zeros_like(tokens), torch.empty(len(rows), 1)
    for row, (ids, kinds, told) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        kind[row, : len(ids)] = torch.tensor(kinds, dtype=torch.long)
        weight[row] = told
    return tokens, kind == 1, (kind == 2) * weight
