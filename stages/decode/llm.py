"""The frozen language model: Eq. 8 on the answer tokens, and answers by beam search.

Any causal LM of transformers. MA-LMM's layout: visual prefix, then prompt, then answer.
"""

from __future__ import annotations

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
from torch.nn.utils.rnn import pad_sequence
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

MAX_ANSWER_TOKENS = 256  # MA-LMM max_output_txt_len; a longer answer is cut and then has no end of sequence
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
        questions = [self.text.prompt_ids(prompt) for prompt in prompts]
        targets = [self.text.answer_ids(answer) for answer in answers]
        # The last answer token predicts nothing, so it need not be read.
        read = [self._tensor(q + a[:-1]) for q, a in zip(questions, targets, strict=True)]
        # Padding is on the right, where no position of a causal model looks; so it needs no mask.
        tokens = pad_sequence(read, batch_first=True, padding_value=self.text.pad_id)  # [B, L]
        embeds = torch.cat([self._cast(prefix), self._embed(tokens)], dim=1)  # [B, Q + L, V]
        # The state at the last prompt token predicts the first answer token.
        rows = [b for b, ids in enumerate(targets) for _ in ids]
        starts = [prefix.shape[1] + len(question) - 1 for question in questions]
        columns = [start + i for start, ids in zip(starts, targets, strict=True) for i in range(len(ids))]
        logits = self._logits_at(embeds, self._tensor(rows), self._tensor(columns))
        wanted = self._tensor([token for ids in targets for token in ids])
        return cross_entropy(logits.float(), wanted, reduction="sum"), len(rows)

    @torch.no_grad()
    def generate(self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str]) -> list[list[str]]:
        """Per sample the returned beams, best first, stripped and without special tokens."""
        size = self.cfg.batch_size
        parts = [
            self._generate_part(prefix[start : start + size], prompts[start : start + size])
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

    def _generate_part(self, prefix: Float[Tensor, "B Q V"], prompts: Sequence[str]) -> list[list[str]]:
        questions = [self.text.prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, questions))
        blocks, mask = [], torch.ones(len(questions), prefix.shape[1] + longest, dtype=torch.long, device=self._device)
        for row, (visual, ids) in enumerate(zip(self._cast(prefix), questions, strict=True)):
            missing = longest - len(ids)
            mask[row, :missing] = 0
            padding = self._embed(self._tensor([self.text.pad_id] * missing))
            blocks.append(torch.cat([padding, visual, self._embed(self._tensor(ids))]))  # pad | prefix | prompt
        penalty = self.cfg.repetition_penalty
        new_ids = self.model.generate(
            inputs_embeds=torch.stack(blocks),
            attention_mask=mask,
            generation_config=self._generation,
            # Given as a processor: through the config transformers would skip the first answer tokens of a padded row,
            # because it takes the width of the padding for a count of generated ids.
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []),
        )
        texts = [self.text.decode(ids) for ids in new_ids.tolist()]
        per_sample = len(texts) // len(questions)
        return [texts[start : start + per_sample] for start in range(0, len(texts), per_sample)]

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

    def _tensor(self, ids: Sequence[int]) -> Int[Tensor, " n"]:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


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

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt in its template, cut on the left to ``max_prompt_tokens`` (start token kept, MA-LMM)."""
        ids: list[int] = []
        for piece in self._template:
            if piece in self._specials:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids.extend(self._plain_ids(piece.replace("{prompt}", prompt)))
        return self.start_ids + ids[-(self.max_prompt_tokens - len(self.start_ids)) :]

    def answer_ids(self, answer: str) -> list[int]:
        """The stripped answer as it continues the prompt, and the end of sequence."""
        text = answer.strip()
        ids = self._plain_ids(self._gap + text) if text else []
        return [*ids, self.eos_id][:MAX_ANSWER_TOKENS]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens, stripped."""
        if self.vicuna:
            ids = [self.eos_id if i < 2 else i for i in ids]  # MA-LMM: <unk> and <s> read as </s>
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

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
    """MA-LMM's beam search. ``max_new_tokens`` replaces its ``max_length``, which counted one start token."""
    settings: dict[str, object] = {"length_penalty": cfg.length_penalty} if cfg.num_beams > 1 else {}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=cfg.max_new_tokens,
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
