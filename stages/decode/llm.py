"""The frozen language model: Eq. 8 on the answer tokens, and answers by beam search.

Any causal LM of transformers. MA-LMM's layout: visual prefix, then prompt, then answer.

That order says what samples can share. The states of a prompt depend on the prefix in front of it from the first
attention on, so keys and values of a prompt serve one prefix only: not another video, and not another variant of the
student. The prefix depends on the prompt in turn (the Q-Former reads it), so two questions about one window share
nothing here. What is left, and done: candidates for one question continue one prefix and prompt (``score_answers``);
variants of one question go through as one batch with losses apart (``loss_per_sample``).
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from stages import weights
from stages.config import DecodeConfig
from stages.decode import smollm2
from stages.decode.closed import ClosedSet
from stages.decode.text import TextCodec

VICUNA_VERSION = "1.1"  # the one that InstructBLIP's Q-Former was trained for
LLAMA_VOCABULARY = 32_000
LLAMA_POSITIONS = 2048  # Llama-1, so Vicuna up to v1.3; Llama-2 (v1.5) has 4096
CONFIGS = ("config.json", "*.json", "tokenizer*")  # beside the weights; Vicuna has tokenizer.model only


def build(cfg: DecodeConfig, *, device: str) -> CausalLM:
    """Load the language model that ``cfg.llm`` names, frozen, in ``cfg.dtype``.

    ``cfg.llm`` is a folder, a hub id, ``smollm2``, or ``seed:<n>`` (random weights for the config in ``llm_config``).

    Raises:
        WeightsMissing: the weights are not there; names the command that fetches them.
        WeightsRefused: they are there, but damaged, incomplete, or a pickle with more than tensors in it.
        ValueError: settings that do not go together, a tokenizer without end of sequence, or a wrong Vicuna.
    """
    seed = weights.parse_seed(cfg.llm)
    folder = _folder(cfg, seed)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise weights.WeightsMissing(f"{folder} has no tokenizer that transformers can read: {error}") from error
    model = _load(cfg, folder, device) if seed is None else _random(cfg, folder, seed, device)
    vicuna = is_vicuna(cfg.llm, model.config)
    if vicuna:
        check_vicuna(cfg.llm, model, tokenizer)
    return CausalLM(model, TextCodec(tokenizer, cfg, vicuna=vicuna), cfg)


class CausalLM:
    """A frozen causal LM behind the ``Decoder`` protocol.

    Deliberately not an ``nn.Module``: nothing that walks a student's parameters can find the LLM's.

    Attributes:
        model: the transformers model, in eval mode, no parameter with a gradient.
        text: strings to token ids and back.
    """

    def __init__(self, model: Any, text: TextCodec, cfg: DecodeConfig) -> None:
        self.model, self.text, self.cfg = model.eval().requires_grad_(False), text, cfg
        self._embed = model.get_input_embeddings()
        self._plain_head = _has_plain_head(model)
        self._generation = _generation_config(cfg, text)
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the checkpoint's would fill gaps

    @property
    def width(self) -> int:
        """V: the size of the input embeddings."""
        width: int = self._embed.weight.shape[1]
        return width

    def count_answer_tokens(self, answers: Sequence[str]) -> int:
        """How many tokens ``loss_sum`` counts for these answers (end of sequence included)."""
        return sum(len(self.text.answer_ids(answer)) for answer in answers)

    def loss_sum(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Float[Tensor, ""], int]:
        """Eq. 8 before the division: summed negative log-likelihood of the answer tokens, and their number.

        Gradients reach ``prefix`` only. Logits are computed for the answer's positions only.
        """
        logits, targets = self._answer_logits(prefix, prompts, answers)
        wanted = self._tensor([token for ids in targets for token in ids])
        return cross_entropy(logits, wanted, reduction="sum"), len(wanted)

    def loss_per_sample(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], answers: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """``loss_sum`` of every sample apart, from one batch: variants of one sample can go through together.

        Each is summed over its own tokens alone. On one CPU thread a sample keeps its bits whatever the number of
        samples, but not whatever the padded length, which the longest neighbour sets (measured:
        tests/bench/results/decode_2core-cpu_20261124.md).
        """
        logits, targets = self._answer_logits(prefix, prompts, answers)
        wanted = self._tensor([token for ids in targets for token in ids])
        losses = cross_entropy(logits, wanted, reduction="none").split([len(ids) for ids in targets])
        return torch.stack([part.sum() for part in losses])

    def _answer_logits(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Float[Tensor, "n vocabulary"], list[list[int]]]:
        """Logits where the answer tokens are predicted, sample after sample, and those tokens."""
        questions = [self.text.prompt_ids(prompt) for prompt in prompts]
        targets = [self.text.answer_ids(answer) for answer in answers]
        # The last answer token predicts nothing, so it need not be read.
        read = [q + a[:-1] for q, a in zip(questions, targets, strict=True)]
        # Padding is on the right, where no position of a causal model looks; so it needs no mask.
        embeds = torch.cat([self._cast(prefix), self._embed(self._padded(read))], dim=1)  # [B, Q + L, V]
        # The state at the last prompt token predicts the first answer token.
        rows = [b for b, ids in enumerate(targets) for _ in ids]
        starts = [prefix.shape[1] + len(question) - 1 for question in questions]
        columns = [start + i for start, ids in zip(starts, targets, strict=True) for i in range(len(ids))]
        return self._logits_at(embeds, self._tensor(rows), self._tensor(columns)).float(), targets

    @torch.no_grad()
    def score_answers(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], candidates: Sequence[str]
    ) -> Float[Tensor, "B n"]:
        """Log-likelihood of every candidate answer, end of sequence included: minus ``loss_sum`` of each alone.

        Prefix and prompt are read once per sample; every candidate continues from their keys and values. Samples whose
        prompts have equally many tokens go together, so that nothing between prompt and answer is padding.
        """
        targets = [self.text.answer_ids(candidate) for candidate in candidates]
        questions = [self.text.prompt_ids(prompt) for prompt in prompts]
        scores = torch.zeros(len(prompts), len(candidates), device=self._device)
        lengths: dict[int, list[int]] = {}
        for row, ids in enumerate(questions):
            lengths.setdefault(len(ids), []).append(row)
        for same in lengths.values():
            for start in range(0, len(same), self.cfg.batch_size):
                rows = same[start : start + self.cfg.batch_size]
                scores[rows] = self._score_part(prefix[rows], [questions[row] for row in rows], targets)
        return scores

    def _score_part(
        self, prefix: Float[Tensor, "b Q V"], questions: list[list[int]], targets: list[list[int]]
    ) -> Float[Tensor, "b n"]:
        embeds = torch.cat([self._cast(prefix), self._embed(self._padded(questions))], dim=1)
        states, cache = self._states(embeds)
        first = self._head(states[:, -1]).float().log_softmax(-1)  # [b, vocabulary]
        scores = first[:, [ids[0] for ids in targets]]
        # The rest of the longer candidates, in groups that a beam search of the same batch size would also hold.
        longer = sorted((n for n, ids in enumerate(targets) if len(ids) > 1), key=lambda n: len(targets[n]))
        at_once = max(1, self.cfg.batch_size * self.cfg.num_beams // len(questions))
        for start in range(0, len(longer), at_once):
            group = longer[start : start + at_once]
            continued = copy.deepcopy(cache)
            continued.batch_repeat_interleave(len(group))
            read = self._padded([targets[n][:-1] for n in group]).repeat(len(questions), 1)  # [b * group, L]
            states, _ = self._states(self._embed(read), continued)
            wanted = self._padded([targets[n][1:] for n in group]).repeat(len(questions), 1)
            losses = cross_entropy(self._head(states).float().transpose(1, 2), wanted, reduction="none")
            counts = self._tensor([len(targets[n]) - 1 for n in group]).repeat(len(questions))
            real = torch.arange(read.shape[1], device=self._device) < counts[:, None]
            scores[:, group] -= (losses * real).sum(1).view(len(questions), len(group))
        return scores

    def _states(self, embeds: Float[Tensor, "b L V"], cache: Any = None) -> tuple[Float[Tensor, "b L X"], Any]:
        """What ``_head`` turns into logits, and the keys and values so far (``cache`` itself, longer)."""
        model = self.model.base_model if self._plain_head else self.model
        out = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return (out.last_hidden_state if self._plain_head else out.logits), out.past_key_values

    def _head(self, states: Float[Tensor, "... X"]) -> Float[Tensor, "... vocabulary"]:
        return self.model.get_output_embeddings()(states) if self._plain_head else states

    @torch.no_grad()
    def generate(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], *, allowed: Sequence[str] | None = None
    ) -> list[list[str]]:
        """Per sample the returned beams, best first, stripped and without special tokens.

        With ``allowed``, only those answers can be given: each step admits the tokens that continue one of them, and
        the end of sequence behind a whole one. Fewer answers than beams return fewer texts. ``decode.max_new_tokens``
        does not cut them. Raises ValueError for an empty set.
        """
        size, closed = self.cfg.batch_size, None if allowed is None else ClosedSet(allowed, self.text)
        parts = [
            self._generate_part(prefix[start : start + size], prompts[start : start + size], closed)
            for start in range(0, len(prompts), size)
        ]
        return [beams for part in parts for beams in part]

    def unreachable(self, answers: Sequence[str]) -> list[str]:
        """The distinct answers that ``generate`` can never give: too long, or changed by the tokenizer."""
        return [
            answer
            for answer in sorted(set(answers))
            if len(ids := self.text.answer_ids(answer)[:-1]) > self.cfg.max_new_tokens
            or self.text.decode(ids) != answer.strip()
        ]

    def _generate_part(
        self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str], closed: ClosedSet | None
    ) -> list[list[str]]:
        questions = [self.text.prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, questions))
        blocks, mask = [], torch.ones(len(questions), prefix.shape[1] + longest, dtype=torch.long, device=self._device)
        for row, (visual, ids) in enumerate(zip(self._cast(prefix), questions, strict=True)):
            missing = longest - len(ids)
            mask[row, :missing] = 0
            padding = self._embed(self._tensor([self.text.pad_id] * missing))
            blocks.append(torch.cat([padding, visual, self._embed(self._tensor(ids))]))  # pad | prefix | prompt
        penalty, config = self.cfg.repetition_penalty, self._generation
        if closed is not None:
            config = copy.deepcopy(config)
            config.max_new_tokens, config.forced_eos_token_id = closed.longest, None  # all of them end
        new_ids = self.model.generate(
            inputs_embeds=torch.stack(blocks),
            attention_mask=mask,
            generation_config=config,
            prefix_allowed_tokens_fn=None if closed is None else closed.next_tokens,
            # Given as a processor: through the config transformers would skip the first answer tokens of a padded row,
            # because it takes the width of the padding for a count of generated ids.
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []),
        )
        per_sample = len(new_ids) // len(questions)
        grouped = [new_ids[start : start + per_sample].tolist() for start in range(0, len(new_ids), per_sample)]
        if closed is not None:
            return [closed.answers(beams) for beams in grouped]
        return [[self.text.decode(ids) for ids in beams] for beams in grouped]

    def _logits_at(
        self, embeds: Float[Tensor, "B L V"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]
    ) -> Float[Tensor, "n vocabulary"]:
        if self._plain_head:
            states = self.model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            logits: Tensor = self.model.get_output_embeddings()(states[rows, columns])
        else:
            logits = self.model(inputs_embeds=embeds, use_cache=False).logits[rows, columns]
        return logits

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._embed.weight.device
        return device

    def _cast(self, prefix: Float[Tensor, "B Q V"]) -> Float[Tensor, "B Q V"]:
        return prefix.to(device=self._device, dtype=self._embed.weight.dtype)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "B L"]:
        """One tensor, filled on the right; a call of torch for every row would cost more than the embedding."""
        longest = max(map(len, rows), default=0)
        padded = [[*ids, *[self.text.pad_id] * (longest - len(ids))] for ids in rows]
        return torch.tensor(padded, dtype=torch.long, device=self._device).view(len(rows), longest)

    def _tensor(self, ids: Sequence[int]) -> Int[Tensor, " n"]:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


def is_vicuna(name: str, config: Any) -> bool:
    """Whether MA-LMM's rules for Vicuna apply: LLaMA architecture, and "vicuna" in the name of folder or hub id."""
    return config.model_type == "llama" and "vicuna" in _own_name(name)


def check_vicuna(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a Vicuna that would give gibberish with MA-LMM's and InstructBLIP's weights.

    Raises:
        ValueError: another version than v1.1 (by the name, or by Llama-2's number of positions), or another vocabulary.
    """
    stated = re.search(r"v(\d+(?:\.\d+)?)", _own_name(name).rpartition("vicuna")[2])
    version = stated.group(1) if stated else VICUNA_VERSION
    if model.config.max_position_embeddings > LLAMA_POSITIONS and version == VICUNA_VERSION:
        version = "1.5 (by its number of positions)"
    if version != VICUNA_VERSION:
        raise ValueError(
            f"{name} is Vicuna v{version}; the Q-Former of InstructBLIP and MA-LMM was trained for v{VICUNA_VERSION}.\n"
            f"Use  --set decode.llm=lmsys/vicuna-7b-v{VICUNA_VERSION}"
        )
    rows, entries = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    first_ids = tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"])
    extra = range(LLAMA_VOCABULARY, LLAMA_VOCABULARY + 65)  # [PAD], or rows added to fill a multiple of 64
    if rows not in extra or entries not in extra or first_ids != [0, 1, 2] or tokenizer.eos_token_id != 2:
        raise ValueError(
            f"{name} is not the Vicuna it says: {rows} embeddings, {entries} tokens, <unk> <s> </s> = {first_ids}, "
            f"end of sequence {tokenizer.eos_token_id}; expected 32000 (and padding), 32000, [0, 1, 2], 2.\n"
            f"Fetch it again:  hf download lmsys/vicuna-7b-v{VICUNA_VERSION}"
        )


def _own_name(name: str) -> str:
    """Last part of a hub id or path; for a snapshot in the hub's cache, the part that names the repository."""
    return re.sub(r"/snapshots/[^/]+$", "", name.rstrip("/")).rpartition("/")[2].lower()


def _folder(cfg: DecodeConfig, seed: int | None) -> Path:
    if seed is not None:
        if not cfg.llm_config:
            raise ValueError(f"decode.llm={cfg.llm} needs decode.llm_config: a folder with config.json and a tokenizer")
        return weights.resolve(cfg.llm_config, patterns=CONFIGS)
    if cfg.llm == "smollm2":
        return smollm2.folder()
    return weights.resolve_weights(
        cfg.llm,
        cfg.revision,
        prefixes=("",),
        configs=CONFIGS,
        advise=("*.json", "tokenizer*", "*.safetensors", "*.bin"),
    )


def _load(cfg: DecodeConfig, folder: Path, device: str) -> Any:
    # An explicit dtype, since "auto" would give float16 for Vicuna, which a CPU cannot run at a usable speed.
    options: dict[str, Any] = {"dtype": getattr(torch, cfg.dtype), "output_loading_info": True}
    if cfg.quantize != "none":
        options |= {"quantization_config": _quantization(cfg), "device_map": {"": device}}
    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(folder, **options)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise weights.WeightsRefused(f"{cfg.llm} cannot be loaded from {folder}: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"]:  # transformers would fill these with random numbers
        absent = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[:5])
        raise weights.WeightsRefused(f"{folder} is not the whole of {cfg.llm}: missing or of another shape: {absent}")
    if cfg.quantize == "none":
        return model.to(device)
    for module in model.modules():
        # On some CPUs the first call without gradients would repack 4-bit weights for inference, for good; from then on
        # the gradient to the input is silently zero (bitsandbytes 0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantization(cfg: DecodeConfig) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"decode.quantize={cfg.quantize} needs bitsandbytes, which is not installed.\n"
            f"Install it:  pip install diff-lmm[quantize]"
        )
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # else a line per layer and call
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=cfg.quantize == "int8",
        load_in_4bit=cfg.quantize == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, cfg.dtype),
    )


def _random(cfg: DecodeConfig, folder: Path, seed: int, device: str) -> Any:
    if cfg.quantize != "none":
        raise ValueError("decode.quantize needs a model on disk; random weights (decode.llm=seed:<n>) have none")
    config = AutoConfig.from_pretrained(folder)
    auto: Any = AutoModelForCausalLM
    model: Any = weights.seeded_init(lambda: auto.from_config(config, dtype=getattr(torch, cfg.dtype)), seed)
    return model.to(device)


def _generation_config(cfg: DecodeConfig, text: TextCodec) -> GenerationConfig:
    """MA-LMM's beam search. ``max_new_tokens`` replaces its ``max_length``, which counted one start token.

    A beam's score is its log-likelihood over length ** ``length_penalty``. transformers counts the new tokens; MA-LMM's
    versions of it count the start token and the tokens of the answer. That is the same for an answer of n tokens that
    ended, n + 1; one that was cut off after n has n here and n + 1 there. ``end_cut_answers`` (D95) lets every cut one
    take one more step, on which the end of sequence is certain: it costs nothing and is counted.
    """
    settings: dict[str, object] = {"length_penalty": cfg.length_penalty} if cfg.num_beams > 1 else {}
    one_more = cfg.end_cut_answers and cfg.num_beams > 1
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=cfg.max_new_tokens + one_more,
        forced_eos_token_id=text.eos_id if one_more else None,
        num_beams=cfg.num_beams,
        num_return_sequences=min(cfg.num_return, cfg.num_beams),
        do_sample=False,
        use_cache=True,
        eos_token_id=text.eos_id,
        pad_token_id=text.pad_id,
        **settings,
    )


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether logits are just ``head(base(x))``: then they can be computed at chosen positions only.

    Some models scale states before the head or cap logits behind it. A hook catches what reaches the head and lets it
    return a ramp; both must pass through the model unchanged.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return False
    seen: list[Tensor] = []

    def ramp(_head: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return torch.linspace(-100, 100, output.shape[-1], dtype=output.dtype, device=output.device).expand_as(output)

    embeds = model.get_input_embeddings()(torch.tensor([[0, 1]], device=model.device))
    handle = head.register_forward_hook(ramp)
    try:
        logits = model(inputs_embeds=embeds, use_cache=False).logits
    finally:
        handle.remove()
    states = base(inputs_embeds=embeds, use_cache=False).last_hidden_state
    expected = torch.linspace(-100, 100, logits.shape[-1], dtype=seen[0].dtype, device=logits.device)
    return bool(torch.equal(seen[0], states)) and bool(torch.equal(logits[0, -1].to(expected.dtype), expected))
