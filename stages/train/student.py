"""The trainable student: ln_vision, PE(t), Q-Former with memory banks, llm_proj (§3.1; MA-LMM).

Three evaluations give equal results (``student.evaluation``, D38): ``reference`` runs one frame after another, as the
paper describes it; ``lean`` does too, but differentiates nothing through the detached past; ``parallel`` runs layer by
layer over all frames.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from stages import weights
from stages.config import StudentConfig
from stages.train import parallel
from stages.train.memory import MemoryBank
from stages.train.noise import Noise
from stages.train.plan import MergePlan, PlanCache, merge_plan
from stages.train.qformer import QFormer, init_like_bert
from stages.types import StudentOutput

LN_VISION_EPS = 1e-5  # LAVIS; the vision tower inside InstructBLIP uses 1e-6 for the same tensor

# Where the parts of an InstructBLIP checkpoint go: its prefix -> ours.
INSTRUCTBLIP_PARTS = {
    "qformer.": "qformer.",
    "query_tokens": "query_tokens",
    "language_projection.": "llm_proj.",
    "vision_model.post_layernorm.": "ln_vision.",
}

DEC = "[DEC]"  # the token that MA-LMM's release (LAVIS) adds to BERT's; no prompt holds it
BERT_WORDS = 30_522  # bert-base-uncased

TIED_TO_OTHER_WIDTHS = re.compile(r"llm_proj\.|ln_vision\.|.*\.crossattention\.attention\.(key|value)\.weight")

Frames = Literal["all", "last"] | int


def num_aligned_frames(frames: Frames, num_frames: int) -> int:
    """How many of the last frames an ``align.frames`` setting means (D9)."""
    if frames == "all":
        return num_frames
    return min(1 if frames == "last" else frames, num_frames)


def last_frames(x: Shaped[Tensor, "B T *rest"], lengths: Sequence[int], count: int) -> Shaped[Tensor, "B F *rest"]:
    """The last ``count`` = F of each sample's own frames; a shorter sample's first one is repeated in front."""
    if all(length == x.shape[1] for length in lengths):
        return x[:, -count:]
    ends = torch.tensor(lengths, device=x.device)[:, None]
    steps = ends - count + torch.arange(count, device=x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], steps.clamp_min(0)]


class Student(nn.Module):
    """CLIP tokens of T frames and an instruction in, Q visual tokens for the language model out.

    Args:
        cfg: sizes and switches.
        tokenizer: BERT tokenizer of the instruction.
        clip_width: C.
        llm_width: V.
    """

    def __init__(self, cfg: StudentConfig, tokenizer: Any, *, clip_width: int, llm_width: int) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.ln_vision = nn.LayerNorm(clip_width, eps=LN_VISION_EPS)
        self.image_pe = nn.Embedding(cfg.max_frames, clip_width)
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.num_queries, cfg.hidden_size))
        self.qformer = QFormer(
            vocab_size=len(tokenizer),
            hidden_size=cfg.hidden_size,
            num_layers=cfg.num_layers,
            num_heads=cfg.num_heads,
            intermediate_size=cfg.intermediate_size,
            frame_size=clip_width,
            cross_attention_every=cfg.cross_attention_every,
        )
        self.llm_proj = nn.Linear(cfg.hidden_size, llm_width)
        self.image_pe.weight.requires_grad_(cfg.pe == "learned")
        self.ln_vision.requires_grad_(cfg.train_ln_vision)
        # What the visual bank holds is a constant of the video where nothing before it is trained.
        self.visual_plans = PlanCache() if cfg.pe == "frozen_zero" and not cfg.train_ln_vision else None

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Instruction ids [CLS] … [SEP], padded to the longest, and True where they are not padding."""
        encoded = self.tokenizer(
            list(prompts), padding="longest", truncation=True, max_length=self.cfg.max_text_tokens, return_tensors="pt"
        )
        device = self.query_tokens.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].bool().to(device)

    def frame_features(self, tokens: Float[Tensor, "B P C"], t: int) -> Float[Tensor, "B P C"]:
        """f_t = ln_vision(s_t) + PE(t) (Eq. 1), in float32 whatever the cache holds."""
        tokens = tokens.to(device=self.query_tokens.device, dtype=self.ln_vision.weight.dtype)
        return self.look(tokens) + self.image_pe.weight[t]

    def look(self, tokens: Float[Tensor, "*batch P C"]) -> Float[Tensor, "*batch P C"]:
        """ln_vision, and the code of each token's place where ``spatial_std`` asks for one (D53)."""
        out: Tensor = self.ln_vision(tokens)
        if self.cfg.spatial_std:
            out = out + self.cfg.spatial_std * spatial_code(*out.shape[-2:]).to(out)
        return out

    def check(self, num_frames: int, levels: Sequence[int]) -> None:
        """Raise ValueError for more frames than PE has rows, or a level that does not exist."""
        if num_frames > self.cfg.max_frames:
            raise ValueError(f"{num_frames} frames, but student.max_frames is {self.cfg.max_frames}; raise it")
        if any(u > self.cfg.num_layers + 1 for u in levels):
            raise ValueError(f"align.levels {tuple(levels)}: this student has levels 1 to {self.cfg.num_layers + 1}")

    def forward(
        self,
        f: Float[Tensor, "V T P C"],
        prompts: Sequence[str],
        *,
        levels: Iterable[int] = (),
        frames: Frames = "last",
        windows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        names: Sequence[Hashable] | None = None,
    ) -> StudentOutput:
        """Run the frames in order and read the last one's queries.

        Args:
            f: CLIP tokens as cached, before ln_vision. T may differ from call to call, up to ``max_frames``.
            prompts: one instruction per sample.
            levels: 1-based levels whose query states are wanted (13 = last block).
            frames: at which frames they are wanted: all, last, or the last k. Earlier frames are run without a graph:
                the banks are detached, so nothing could flow back from them.
            windows: which row of ``f`` each sample asks about, where several ask about one; default row b for sample b.
            lengths: frames of each row of ``f``, where they differ. What follows a row's last frame is padding: later
                frames reach nothing earlier, so no number depends on it. ``hidden`` holds as many frames as the longest
                sample wants, each sample's last one at the end.
            names: one per row of ``f``, equal where video and frames are: with frozen PE and ``ln_vision`` the merges
                of the visual bank are decided once per name.

        Raises:
            ValueError: more frames than PE has rows, a level that does not exist, or samples without frames.
        """
        num_frames, levels = f.shape[1], tuple(levels)
        windows = range(len(f)) if windows is None else windows
        self.check(num_frames, levels)
        if len(windows) != len(prompts) or sorted(set(windows)) != list(range(len(f))):
            raise ValueError(f"{len(prompts)} prompts, windows {list(windows)}: each of {len(f)} must be asked about")
        if lengths is not None and (len(lengths) != len(f) or not all(1 <= n <= num_frames for n in lengths)):
            raise ValueError(f"lengths {list(lengths)}: each of {len(f)} windows has 1 to {num_frames} frames")
        own = [num_frames if lengths is None else lengths[window] for window in windows]
        wanted = [num_aligned_frames(frames, n) for n in own]
        first = min(n - k for n, k in zip(own, wanted, strict=True))
        text_ids, text_keep = self.tokenize(prompts)
        noise = Noise.draw(len(prompts), self.cfg.dropout) if self.training and self.cfg.dropout else None
        evaluate = self._parallel if self.cfg.evaluation == "parallel" else self._sequential
        hidden = evaluate(f, text_ids, text_keep, windows, first, noise, names)
        ends = [n - first for n in own]
        states = {u: last_frames(hidden[u - 1].transpose(0, 1), ends, max(wanted)) for u in levels}
        last = last_frames(hidden[-1].transpose(0, 1), ends, 1)[:, 0]
        return StudentOutput(self.llm_proj(last), states)

    def _parallel(
        self,
        f: Float[Tensor, "V T P C"],
        text_ids: Int[Tensor, "B L"],
        text_keep: Bool[Tensor, "B L"],
        windows: Sequence[int],
        first_wanted: int,
        noise: Noise | None,
        names: Sequence[Hashable] | None,
    ) -> list[Float[Tensor, "F B Q E"]]:
        """All frames at once; query states of every level from the first wanted frame on."""
        f = f.transpose(0, 1).to(device=self.query_tokens.device, dtype=self.ln_vision.weight.dtype)
        first = first_wanted if self.cfg.bank_detach else 0
        positions = self.image_pe.weight[: len(f), None, None]
        with torch.no_grad():
            past = self.look(f[:first]) + positions[:first]
        now = self.look(f[first:]) + positions[first:]
        plan = self._visual_plan(torch.cat([past, now.detach()]), names)
        frames = parallel.Frames(past, now, plan, parallel.Questions.group(windows, f.device))
        hidden = parallel.hidden_states(
            self.qformer,
            frames,
            self.query_tokens.expand(len(text_ids), -1, -1),
            text_ids,
            text_keep,
            noise=noise,
            detach=self.cfg.bank_detach,
            recompute=self.cfg.recompute_layers,
        )
        return [states[first_wanted - first :] for states in hidden]

    def _visual_plan(self, frames: Float[Tensor, "T V P C"], names: Sequence[Hashable] | None) -> MergePlan:
        if self.visual_plans is None or names is None:
            return merge_plan(frames, self.cfg.memory_len)
        return self.visual_plans.plan(names, frames, self.cfg.memory_len)

    def _sequential(
        self,
        f: Float[Tensor, "V T P C"],
        text_ids: Int[Tensor, "B L"],
        text_keep: Bool[Tensor, "B L"],
        windows: Sequence[int],
        first_wanted: int,
        noise: Noise | None,
        _: Sequence[Hashable] | None,
    ) -> list[Float[Tensor, "F B Q E"]]:
        """One frame after another; query states of every level from the first wanted frame on."""
        f, cfg = f[list(windows)], self.cfg
        queries = self.query_tokens.expand(len(f), -1, -1)
        visual = MemoryBank.empty(cfg.memory_len, detach=cfg.bank_detach)
        banks = self.qformer.empty_banks(cfg.memory_len, detach=cfg.bank_detach)
        kept: list[list[Tensor]] = [[] for _ in range(cfg.num_layers + 1)]
        for t in range(f.shape[1]):
            graph = t >= first_wanted or not cfg.bank_detach
            with torch.set_grad_enabled(torch.is_grad_enabled() and graph):
                f_t = self.frame_features(f[:, t], t)
                here = None if noise is None else noise.at(first=t)
                lean = cfg.evaluation == "lean"
                hidden, banks = self.qformer.step(
                    queries, text_ids, text_keep, f_t, visual, banks, noise=here, lean=lean
                )
                visual = visual.append(f_t)
            if t >= first_wanted:
                for states, level in zip(hidden, kept, strict=True):
                    level.append(states[:, : cfg.num_queries])
        return [torch.stack(states) for states in kept]


@functools.lru_cache(maxsize=4)
def spatial_code(num_tokens: int, width: int) -> Float[Tensor, "P C"]:
    """A fixed standard normal vector per token place; the same for everyone."""
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(0))


def load_tokenizer(cfg: StudentConfig) -> Any:
    """The instruction tokenizer: ``student.tokenizer``, or ``qformer_tokenizer/`` of the InstructBLIP checkpoint."""
    from transformers import AutoTokenizer

    if cfg.tokenizer:
        folder = weights.resolve(cfg.tokenizer, cfg.revision, patterns=["tokenizer*"])
    elif weights.parse_seed(cfg.init) is not None:
        raise ValueError("student.init is a seed, so student.tokenizer must name a folder with a BERT tokenizer")
    else:
        folder = weights.resolve(cfg.init, cfg.revision, patterns=["qformer_tokenizer/*"]) / "qformer_tokenizer"
    return AutoTokenizer.from_pretrained(folder)


def build(cfg: StudentConfig, *, clip_width: int, llm_width: int, kind: type[Student] = Student) -> Student:
    """A student with seeded weights, or with those of an InstructBLIP checkpoint (D19).

    ``kind`` is the class to make: all have the same parameters and start from the same values.

    Raises:
        ValueError: settings that do not fit together.
        stages.weights.WeightsMissing: the checkpoint is not here; names the command that fetches it.
    """
    tokenizer = load_tokenizer(cfg)
    seed = weights.parse_seed(cfg.init)
    tensors: dict[str, Tensor] = {}
    if seed is None:
        folder = weights.resolve_weights(cfg.init, cfg.revision, prefixes=tuple(INSTRUCTBLIP_PARTS))
        tensors = read_instructblip(folder)
        _match_tokenizer(cfg, tokenizer, tensors)
    student = kind(cfg, tokenizer, clip_width=clip_width, llm_width=llm_width)
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    init_like_bert(student.qformer, generator, cfg.hidden_size)
    init_like_bert(student.llm_proj, generator, cfg.hidden_size)
    student.query_tokens.data.normal_(0.0, 0.02 * (768 / cfg.hidden_size) ** 0.5, generator=generator)
    nn.init.zeros_(student.image_pe.weight)  # MA-LMM: PE starts at zero
    if seed is None:
        load_instructblip(student, tensors, source=cfg.init)
    return student


def read_instructblip(folder: Path) -> dict[str, Tensor]:
    """Q-Former, query tokens, ln_vision and llm_proj of an InstructBLIP checkpoint, under the student's names.

    Only the tensors under those prefixes are read.
    """
    loaded: dict[str, Tensor] = {}
    for key, tensor in weights.read_tensors(folder, tuple(INSTRUCTBLIP_PARTS)).items():
        prefix = next(p for p in INSTRUCTBLIP_PARTS if key.startswith(p))
        loaded[INSTRUCTBLIP_PARTS[prefix] + key[len(prefix) :]] = tensor
    return loaded


def load_instructblip(student: Student, tensors: Mapping[str, Tensor], *, source: object) -> None:
    """What ``read_instructblip`` gave into ``student``, in place.

    Parts that meet another width here (C of another CLIP, V of another language model) keep their seeded start, with a
    warning that names them; anything else that does not fit is an error, which ends with the settings that fit.

    Raises:
        ValueError: a tensor is missing or has a wrong shape.
    """
    ours = student.state_dict()
    wanted = set(ours) - {"image_pe.weight"}  # not in InstructBLIP; starts at zero
    missing, unexpected = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    shapes = [key for key in sorted(wanted & set(tensors)) if tensors[key].shape != ours[key].shape]
    kept_seeded = [key for key in shapes if TIED_TO_OTHER_WIDTHS.match(key)]
    wrong = [
        f"{k} is {tuple(tensors[k].shape)} there and {tuple(ours[k].shape)} here"
        for k in shapes
        if k not in kept_seeded
    ]
    wrong += [
        f"{len(keys)} {what}, such as {keys[0]}" for what, keys in (("missing", missing), ("extra", unexpected)) if keys
    ]
    if wrong:
        raise ValueError(
            f"{source} is not the Q-Former that student.* describes: {'; '.join(wrong[:4])}.\n"
            f"{settings_of(tensors, student)}"
        )
    for key in set(tensors) - set(kept_seeded):
        ours[key].copy_(tensors[key])
    if kept_seeded:
        changed = [f"{key} {tuple(tensors[key].shape)} -> {tuple(ours[key].shape)}" for key in kept_seeded]
        warnings.warn(
            "these parts of the checkpoint have another width than your CLIP or LLM and start from random weights "
            "instead: " + "; ".join(changed),
            stacklevel=2,
        )


def load_trained(student: Student, tensors: Mapping[str, Tensor], *, source: object) -> None:
    """The weights of a student that was trained here, in place; all of them.

    Raises:
        ValueError: they are those of a student with other sizes; ends with the settings that fit.
    """
    ours = student.state_dict()
    wrong = [
        f"{key} is {tuple(tensors[key].shape)} there and {tuple(ours[key].shape)} here"
        for key in sorted(ours.keys() & tensors.keys())
        if tensors[key].shape != ours[key].shape
    ]
    wrong += [f"{key} is missing" for key in sorted(ours.keys() - tensors.keys())]
    wrong += [f"{key} has no place" for key in sorted(tensors.keys() - ours.keys())]
    if wrong:
        raise ValueError(
            f"{source} was trained with other settings: {'; '.join(wrong[:4])}.\n{settings_of(tensors, student)}"
        )
    student.load_state_dict(dict(tensors), strict=True)


def settings_of(tensors: Mapping[str, Tensor], student: Student) -> str:
    """What to type, so that a student has the sizes of these weights (under the student's names)."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layer = "qformer.encoder.layer."
    blocks = sorted({int(key.removeprefix(layer).partition(".")[0]) for key in shapes if key.startswith(layer)})
    crossing = [n for n in blocks if f"{layer}{n}.crossattention.output.dense.weight" in shapes]
    sizes: dict[str, int] = {"num_layers": len(blocks)}
    if len(query_tokens := shapes.get("query_tokens", ())) == 3:
        sizes |= {"num_queries": query_tokens[1], "hidden_size": query_tokens[2]}
    if dense := shapes.get(f"{layer}0.intermediate_query.dense.weight"):
        sizes["intermediate_size"] = dense[0]
    if crossing:
        sizes["cross_attention_every"] = crossing[1] - crossing[0] if len(crossing) > 1 else len(blocks)
    if rows := shapes.get("image_pe.weight"):
        sizes["max_frames"] = rows[0]
    sets = [f"--set student.{key}={value}" for key, value in sizes.items() if getattr(student.cfg, key) != value]
    lines = [f"Take the sizes of the checkpoint:  {' '.join(sets)}"] if sets else []
    words = shapes.get("qformer.embeddings.word_embeddings.weight", (len(student.tokenizer),))[0]
    if words != len(student.tokenizer):
        lines.append(_other_tokenizer(words, len(student.tokenizer)))
    for key, what, setting in (
        ("ln_vision.weight", "CLIP tokens", "clip.model"),
        ("llm_proj.bias", "prefix", "decode.llm"),
    ):
        if shapes.get(key, ours := tuple(student.state_dict()[key].shape)) != ours:
            lines.append(
                f"Its {what} have {shapes[key][0]} numbers, here {ours[0]}:  give the {setting} that it was made for"
            )
    return "\n".join(
        lines or ["It is the checkpoint of another model; name one of this kind:  --set student.init=NAME"]
    )


def _match_tokenizer(cfg: StudentConfig, tokenizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give BERT's tokenizer the token ``[DEC]`` where the checkpoint has a row for it, as MA-LMM does (D87)."""
    words = tensors.get("qformer.embeddings.word_embeddings.weight")
    if words is None or len(words) == len(tokenizer):
        return
    if len(words) == BERT_WORDS + 1 == len(tokenizer) + 1 and DEC not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"bos_token": DEC})
        return
    raise ValueError(
        f"{cfg.init} and student.tokenizer do not belong together.\n{_other_tokenizer(len(words), len(tokenizer))}"
    )


def _other_tokenizer(words: int, tokens: int) -> str:
    count = abs(words - tokens)
    difference = f"{count} {'token' if count == 1 else 'tokens'} {'more' if words > tokens else 'fewer'}"
    guess = f" ({DEC}?)" if words == tokens + 1 else ""
    return (
        f"The checkpoint has {difference}{guess}: {words} rows of words, the tokenizer {tokens}.\n"
        "Use the checkpoint's own tokenizer (nothing: qformer_tokenizer/ beside it):  --set student.tokenizer="
    )
