"""The frozen language model: what sharing and less overhead save, and whether a batch changes a sample's bits.

    python -m tests.bench.bench_decode [--repeat 15] [--only loss|variants|scores|questions|bits]

At the miniature's size (LLaMA, 4 layers of 96; 8 visual tokens), random weights, one thread. Each pair runs in one
process, in turns; CPU seconds; medians of the ratios slower / faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from pipeline import presets
from stages.decode import llm

B, Q = 32, 8
PROMPTS = ["what is the relationship of the movie?"] * B
LABELS = ["friend", "husband", "wife", "boyfriend"]
ANSWERS = LABELS * (B // len(LABELS))
VARIANTS = 8
CLOSED = [f"{first}{second}" for first in ("wife", "boss", "friend", "son") for second in ("", " of", "s", " too")]
QUESTIONS = 26  # of one video, as in MSVD-QA; 4 % of its questions ask the same of the same video again (502 of 13,157)


def ratio(slower: Callable[[], object], faster: Callable[[], object], repeat: int) -> float:
    """Median CPU time of one over the other, in turns, after a warm-up."""
    times: list[list[float]] = [[], []]
    for turn in range(repeat + 2):
        for side, work in enumerate((slower, faster)):
            started = time.process_time()
            work()
            if turn >= 2:
                times[side].append(time.process_time() - started)
    return round(statistics.median(a / b for a, b in zip(*times, strict=True)), 3)


def loss_sum_before(decoder: llm.CausalLM, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """``loss_sum`` as it was: every text tokenized again, one tensor and one padding step per sample."""
    text = decoder.text
    questions = [list(text._tokenize_prompt(prompt)) for prompt in prompts]
    targets = [list(text._tokenize_answer(answer)) for answer in answers]
    read = [decoder._tensor(q + a[:-1]) for q, a in zip(questions, targets, strict=True)]
    tokens = pad_sequence(read, batch_first=True, padding_value=text.pad_id)
    embeds = torch.cat([decoder._cast(prefix), decoder._embed(tokens)], dim=1)
    rows = [b for b, ids in enumerate(targets) for _ in ids]
    starts = [prefix.shape[1] + len(question) - 1 for question in questions]
    columns = [start + i for start, ids in zip(starts, targets, strict=True) for i in range(len(ids))]
    logits = decoder._logits_at(embeds, decoder._tensor(rows), decoder._tensor(columns))
    return cross_entropy(logits.float(), decoder._tensor([t for ids in targets for t in ids]), reduction="sum")


def bench_loss(decoder: llm.CausalLM, prefix: Tensor, repeat: int) -> dict[str, float | bool]:
    """One training step's language model, forward and back, before and after."""

    def before() -> Tensor:
        prefix.grad = None
        loss = loss_sum_before(decoder, prefix, PROMPTS, ANSWERS)
        loss.backward()
        return loss

    def after() -> Tensor:
        prefix.grad = None
        loss, _ = decoder.loss_sum(prefix, PROMPTS, ANSWERS)
        loss.backward()
        return loss

    old, old_grad = before(), prefix.grad
    new = after()
    assert old_grad is not None
    same = torch.equal(old, new) and torch.equal(old_grad, prefix.grad)  # type: ignore[arg-type]
    return {"loss_sum_speedup": ratio(before, after, repeat), "loss_sum_same_bits": same}


def bench_variants(decoder: llm.CausalLM, repeat: int) -> dict[str, float]:
    """K ablation variants of a small batch: K passes with a loss each, or one pass with losses apart."""
    prefix = torch.randn(VARIANTS, 4, Q, decoder.width).requires_grad_()
    prompts, answers = PROMPTS[:4], ANSWERS[:4]

    def apart() -> None:
        for variant in prefix:
            decoder.loss_sum(variant, prompts, answers)[0].backward()

    def together() -> None:
        decoder.loss_per_sample(prefix.flatten(0, 1), prompts * VARIANTS, answers * VARIANTS).sum().backward()

    return {f"variants_{VARIANTS}x4_in_one_pass_speedup": ratio(apart, together, repeat)}


def bench_scores(decoder: llm.CausalLM, prefix: Tensor, repeat: int) -> dict[str, float]:
    """A closed set of 16: prefix and prompt read once per sample, or once per candidate."""

    @torch.no_grad()
    def each() -> None:
        for candidate in CLOSED:
            decoder.loss_per_sample(prefix, PROMPTS, [candidate] * B)

    return {"score_answers_speedup": ratio(each, lambda: decoder.score_answers(prefix, PROMPTS, CLOSED), repeat)}


def bench_questions(decoder: llm.CausalLM, repeat: int) -> dict[str, float]:
    """The questions of one video in batches of 16, or each alone, as a sequential evaluation would."""
    prefix = torch.randn(QUESTIONS, Q, decoder.width)
    prompts = [f"what is the {word} of the movie?" for word in "abcdefghijklmnopqrstuvwxyz"]

    def alone() -> None:
        for i in range(QUESTIONS):
            decoder.generate(prefix[i : i + 1], prompts[i : i + 1])

    return {"generate_batched_speedup": ratio(alone, lambda: decoder.generate(prefix, prompts), max(3, repeat // 5))}


@torch.no_grad()
def bench_bits(decoder: llm.CausalLM) -> dict[str, object]:
    """Is a sample's loss the same bits whatever else is in the batch? By batch size; and with other neighbours."""
    prefix = torch.randn(256, Q, decoder.width)
    prompts, answers = PROMPTS * 8, ANSWERS * 8
    reference = decoder.loss_per_sample(prefix, prompts, answers)
    equal: dict[str, str] = {}
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        parts = [
            decoder.loss_per_sample(prefix[at : at + size], prompts[at : at + size], answers[at : at + size])
            for at in range(0, 256, size)
        ]
        difference = (torch.cat(parts) - reference).abs()
        equal[str(size)] = (
            f"{int((difference == 0).sum())} of 256 equal, largest difference {float(difference.max()):.1e}"
        )
    order = torch.randperm(256)
    shuffled = decoder.loss_per_sample(prefix[order], prompts, [answers[i] for i in order])
    moved = int((shuffled != reference[order]).sum())
    longer = decoder.loss_per_sample(prefix, prompts, [*answers[:-1], "a much longer answer than all the others"])
    padded = int((longer[:-1] != reference[:-1]).sum())
    return {"against_a_batch_of_256": equal, "changed_by_another_order": moved, "changed_by_a_longer_neighbour": padded}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--only", choices=("loss", "variants", "scores", "questions", "bits"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    decoder = llm.build(presets.miniature().decode.model_copy(update={"llm": "seed:0"}), device="cpu")
    prefix = torch.randn(B, Q, decoder.width).requires_grad_()
    parts: dict[str, Callable[[], dict[str, object]]] = {
        "loss": lambda: dict(bench_loss(decoder, prefix, options.repeat)),
        "variants": lambda: dict(bench_variants(decoder, options.repeat)),
        "scores": lambda: dict(bench_scores(decoder, prefix, options.repeat)),
        "questions": lambda: dict(bench_questions(decoder, options.repeat)),
        "bits": lambda: bench_bits(decoder),
    }
    result: dict[str, object] = {}
    for name, part in parts.items():
        if options.only in (None, name):
            result |= part()
            print(name, result, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
