"""Every knob of the pipeline, typed and frozen; nothing here imports torch.

A knob exists because the paper, a user or a measurement needs it. The comment beside each names its source:
"§" is a section of the Diff-LMM paper, "MA-LMM" its base code, "D<n>" an entry of stages/DECISIONS.md.
The defaults of this file are the paper's; the presets in pipeline/presets.py change sizes, names and paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
)

from stages.urls import without_credentials

SECRETS = "with the credentials of URLs"  # a dump that stays in this process
NUM_HIDDEN_STATES = 13  # embedding output + 12 blocks: the only count that makes "the 13th layer" exist (D1)


class Config(BaseModel):
    """Base of every section: immutable, and an unknown key is an error.

    What is dumped leaves the process sooner or later (config.json, pages, hints, digests), so a dump holds no URL's
    credentials; only the attributes do, and ``model_dump(context=SECRETS)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    @field_serializer("*", mode="wrap")
    def _without_credentials(self, value: object, plain: Callable[[Any], Any], info: Any) -> Any:
        dumped = plain(value)
        return without_credentials(dumped) if isinstance(value, str) and info.context != SECRETS else dumped


def parse_levels(value: object) -> object:
    """Level lists as a user types them: ``13``, ``"8-13"``, ``"1,5,9"``, ``"all"``, or a sequence of ints."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    if value.strip() == "all":
        return tuple(range(1, NUM_HIDDEN_STATES + 1))
    levels: list[int] = []
    for part in value.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"levels are numbers, ranges such as 8-13, or 'all'; got {value!r}")
        levels.extend(range(int(first), int(last or first) + 1))
    return tuple(levels)


def parse_names(value: object) -> object:
    """Lists of names as a user types them: ``rank,constrained``; nothing is the empty list."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


ClosedSetWays = Annotated[tuple[Literal["rank", "constrained"], ...], BeforeValidator(parse_names)]
Levels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(parse_levels), Field(min_length=1)]


class DataConfig(Config):
    """Which videos, which questions, which frames."""

    name: str = "lvu"  # a key of pipeline.registry.DATASETS
    videos: str = ""  # folder of video files, folder of frame folders, or a WebDataset tar (path or URL)
    annotations: str = ""  # one annotation file, or a folder with one file per split
    source: Literal["files", "frame_folders", "webdataset"] = "files"
    task: str = "relationship"  # LVU layout: the label key (MA-LMM); several with commas: one student for all of them
    allow_leak: bool = False  # D49: several tasks, though a test video of one is a training video of another
    prompt_style: Literal["malmm", "paper"] = "malmm"  # D16: raw key in lower case, or the words of §4.2
    fps: float = Field(10.0, gt=0)  # the grid that frame indices count on (MA-LMM extracts at 10 fps)
    num_frames: int = Field(100, ge=1)  # T; §4.2 "the frame length is 100"
    history_s: int = Field(100, ge=1)  # LVU window length in seconds (MA-LMM `history`)
    stride_s: int = Field(20, ge=1)  # LVU window stride in seconds (MA-LMM `stride`)
    draws: int = Field(1, ge=1)  # K cached random draws per segment for MSVD-QA training (D23)
    draw_seed: int = 0  # seed of those draws; the cache holds exactly these frames
    allow_missing: bool = False  # train or score on what the cache has, and say what is missing
    io: Literal["auto", "mmap", "pread", "direct"] = "auto"  # how the cache is read: auto measures the disk. Speed only
    reader_threads: int = Field(2, ge=1)  # threads that read the next batches ahead. Speed only
    follow_symlinks: bool = False  # a link that leaves the videos folder is refused unless set
    allow_changed: bool = False  # D84: train on features of videos that were replaced since
    around_damage: bool = False  # D81: use the frames before and after a damaged spot; off: the video is refused
    max_pixels: int = Field(50_000_000, ge=1)  # width × height of one frame; 8K is 33 M
    max_duration_s: float = Field(4 * 3600.0, gt=0)  # refused before decoding
    decode_timeout_s: float = Field(600.0, gt=0)  # wall clock for one video in the child process


class ClipConfig(Config):
    """The frozen image encoder whose patch tokens are cached (§3.1)."""

    source: str = "open_clip"  # a key of registry.ENCODERS; "instructblip" is the vision tower inside that checkpoint
    model: str = "EVA01-g-14"  # open_clip model name; or folder / hub id of an InstructBLIP checkpoint
    weights: str = "laion400m_s11b_b41k"  # open_clip tag, local file or folder, or "seed:<n>" for seeded random weights
    revision: str = ""  # hub revision, where `weights` or `model` names a hub repository
    layer: int = Field(39, ge=1)  # 1-based block whose output is cached: 39 of 40 (MA-LMM drops the last)
    geometry: Literal["squash", "shortest_center"] = "squash"  # MA-LMM's evaluation view; the teacher uses the same
    dtype: Literal["float16", "float32", "int8"] = "float16"  # what is stored; int8 halves it for about 1 % error
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # what the encoder runs in


class TeacherConfig(Config):
    """The frozen diffusion teacher (§3.2, §4.2)."""

    name: str = "dit"  # a key of registry.TEACHERS
    model: str = "facebook/DiT-XL-2-256"  # folder or hub id with transformer/ and vae/
    weights: str = ""  # "" = the weights of `model`; "seed:<n>" = its configs with seeded random weights
    revision: str = ""
    layers: Levels = (8,)  # every layer extracted in one pass
    layer: int = Field(8, ge=1)  # the one the student learns from; §4.2 "eighth layer"
    grid: int = Field(1, ge=1)  # 1 = token mean (Eq. 4); g = mean over a g × g grid (D3)
    timestep: int = Field(0, ge=0)  # §4.2 "timestep 0 (no noise)"
    posterior: Literal["mode", "sample"] = "mode"  # D12
    geometry: Literal["squash", "shortest_center"] = "squash"  # must equal clip.geometry (D14)
    dtype: Literal["float16", "float32"] = "float32"
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class ExtractConfig(Config):
    """Speed of extraction. Nothing in this section changes a cached number, so none of it is in the spec."""

    batch_size: int = Field(16, ge=1)  # frames per forward pass
    shard_frames: int = Field(1024, ge=1)  # frames per shard of a NEW store; an existing one keeps its own


class StudentConfig(Config):
    """The trainable part: ln_vision, PE(t), Q-Former with memory banks, llm_proj (§3.1)."""

    name: str = "malmm"  # a key of registry.STUDENTS
    init: str = "Salesforce/instructblip-vicuna-7b"  # folder or hub id; "seed:<n>" = random (D19)
    revision: str = ""
    tokenizer: str = ""  # "" = qformer_tokenizer/ of `init`; or a folder with a BERT tokenizer
    num_queries: int = Field(32, ge=1)  # Q
    hidden_size: int = Field(768, ge=1)  # E
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    cross_attention_every: int = Field(2, ge=1)  # cross-attention in blocks 1, 3, 5, … (InstructBLIP)
    dropout: float = Field(0.1, ge=0, lt=1)  # hidden and attention dropout (BERT)
    memory_len: int = Field(20, ge=1)  # K; §4.2 "memory bank length is set to 20"
    max_frames: int = Field(120, ge=1)  # rows of PE (MA-LMM max_num_frames)
    pe: Literal["learned", "frozen_zero"] = "learned"  # D11
    per_frame_pe: bool = False  # D96: whether the student per_frame adds PE(t); MA-LMM without banks does not
    spatial_std: float = Field(0.0, ge=0)  # of a fixed code per token place, beside PE(t); 0 = the paper (D53)
    train_ln_vision: bool = True  # D11
    evaluation: Literal["parallel", "reference", "lean"] = "parallel"  # D38: speed only, the results are equal
    bank_detach: bool = True  # D10: no gradient into the past (MA-LMM)
    recompute_layers: bool = False  # D42: keep the layers' inputs only and compute each again in the backward pass
    max_text_tokens: int = Field(128, ge=1)  # instruction tokens into the Q-Former (MA-LMM max_txt_len)


class AlignConfig(Config):
    """Adaptive multi-level alignment (Eq. 4–7)."""

    levels: Levels = (8, 9, 10, 11, 12, 13)  # 1-based hidden_states entries; §4.4 "higher levels (8-13)" (D1)
    head: Literal["mlp", "linear", "repa"] = "mlp"  # D5: h_phi
    head_hidden: int = Field(2048, ge=1)  # width of the "repa" head
    weights: Literal["adaptive", "uniform"] = "adaptive"  # Eq. 6, or the "average" of Table 4
    uniform_weight: float = Field(1.0, ge=0)  # D7: weight of each level when uniform; 1 = where adaptive ends
    detach_weight_inputs: bool = False  # D7: False is the literal Eq. 6
    target_norm: Literal["none", "center", "whiten"] = "none"  # D4
    frames: Literal["all", "last"] | Annotated[int, Field(ge=1)] = "all"  # D9: k = the last k frames


class TrainConfig(Config):
    """§4.2 and MA-LMM's run script."""

    lambda_kd: float = Field(1.0, ge=0)  # Eq. 9; §4.2: 1 on LVU, 0.0005 on MSVD-QA
    epochs: int = Field(20, ge=1)  # §4.2
    max_steps: int = Field(0, ge=0)  # 0 = epochs decide; else stop after this many optimiser steps
    batch_size: int = Field(64, ge=1)  # §4.2
    micro_batch: int = Field(0, ge=0)  # samples per forward; 0 = batch_size. Gradients are the same either way
    memory: str = ""  # D43: budget such as 20GB; chooses micro_batch where that is 0
    group_windows: bool = False  # D41: questions about one window come together and share its frames
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, on CUDA only; plans stay float32
    lr: float = Field(1e-4, gt=0)  # §4.2
    min_lr: float = Field(0.0, ge=0)  # MA-LMM
    warmup_steps: int = Field(1000, ge=0)  # MA-LMM, inside the first epoch (D24)
    warmup_lr: float = Field(1e-8, ge=0)  # MA-LMM warmup_lr
    schedule: Literal["malmm", "cosine_steps"] = (
        "malmm"  # D24: per-epoch cosine after a first-epoch warm-up, or per step
    )
    betas: tuple[float, float] = (0.9, 0.999)  # §4.2
    weight_decay: float = Field(0.05, ge=0)  # §4.2
    drop_last: bool = True  # MA-LMM
    max_samples: int = Field(0, ge=0)  # learn from a choice of this many samples, drawn by the seed; 0 = all
    seed: int = 42  # MA-LMM
    select: Literal["last", "best_val"] = "best_val"  # D27: the epoch that evaluate reads (MA-LMM: best on val)
    save_every: int = Field(0, ge=0)  # optimiser steps between checkpoints; 0 = every epoch


class DecodeConfig(Config):
    """The frozen language model (§3.3, §4.2)."""

    name: str = "causal_lm"  # a key of registry.DECODERS
    llm: str = (
        "lmsys/vicuna-7b-v1.1"  # folder, hub id, "smollm2" (the real small one), or "seed:<n>" with a config folder
    )
    llm_config: str = ""  # folder with config.json and tokenizer files, for "seed:<n>"
    revision: str = ""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    quantize: Literal["none", "int8", "nf4"] = "none"  # bitsandbytes; for a 7B model on a small GPU
    prompt_template: str = "{prompt}"  # how a prompt is written for this LLM
    num_beams: int = Field(5, ge=1)  # §4.2
    num_return: int = Field(5, ge=1)  # beams returned, for top-5 (MA-LMM)
    max_new_tokens: int = Field(4, ge=1)  # MA-LMM max_length 5, of which 4 are new (LVU); 9 for QA
    repetition_penalty: float = Field(1.5, gt=0)  # MA-LMM default, never overridden there
    length_penalty: float = 1.0  # MA-LMM: 1 for LVU, 0 for QA
    end_cut_answers: bool = True  # D95: an answer cut off after n tokens is divided by n + 1, as if it ended (MA-LMM)
    max_prompt_tokens: int = Field(128, ge=1)  # MA-LMM max_txt_len
    closed_set: ClosedSetWays = ()  # D51: also rank the label set by likelihood, or decode labels only; beside exact
    batch_size: int = Field(16, ge=1)  # samples per generate call; speed only


class PipelineConfig(Config):
    """One run, complete: what `config.json` in a run folder holds."""

    preset: str
    data: DataConfig = DataConfig()
    clip: ClipConfig = ClipConfig()
    teacher: TeacherConfig = TeacherConfig()
    extract: ExtractConfig = ExtractConfig()
    student: StudentConfig = StudentConfig()
    align: AlignConfig = AlignConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
