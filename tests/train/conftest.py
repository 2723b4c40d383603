"""Small real students: every size differs, so that a transposed axis cannot hide."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertTokenizerFast, LlamaConfig, PreTrainedTokenizerFast

from cache_schema.plan import Segment
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult, write_task
from stages.config import DecodeConfig, StudentConfig
from stages.data.samples import CachedSamples
from stages.decode.llm import CausalLM
from stages.decode.llm import build as build_llm
from stages.train.student import Student, build
from stages.types import Sample
from tests.cache_schema.makers import TOKENS

WORDS = ["what", "is", "the", "relationship", "scene", "of", "movie", "?", "who", "runs"]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer with a dozen words."""
    folder = tmp_path_factory.mktemp("bert")
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(vocab=str(vocab)).save_pretrained(folder)
    return folder


@pytest.fixture
def make_student(bert_folder: Path) -> Callable[..., Student]:
    """A student of Q=5, E=12, 4 blocks, C=10, V=8; settings may be replaced."""

    def make(*, dtype: torch.dtype = torch.float64, **settings: object) -> Student:
        base = {
            "init": "seed:3",
            "tokenizer": str(bert_folder),
            "num_queries": 5,
            "hidden_size": 12,
            "num_layers": 4,
            "num_heads": 3,
            "intermediate_size": 20,
            "dropout": 0.0,
            "memory_len": 3,
            "max_frames": 16,
        }
        cfg = StudentConfig.model_validate(base | settings)
        student = build(cfg, clip_width=10, llm_width=8).to(dtype)
        # PE starts at zero; here it must matter.
        torch.nn.init.normal_(student.image_pe.weight, generator=torch.Generator().manual_seed(5))
        return student.eval()

    return make


@pytest.fixture
def features() -> Callable[..., torch.Tensor]:
    """CLIP-like tokens [B, T, P=6, C=10] that drift slowly, so that merges have a meaning."""

    def make(batch: int, frames: int, *, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, frames, 6, 10, dtype=torch.float64, generator=generator)
        for t in range(1, frames):
            noise[:, t] = 0.8 * noise[:, t - 1] + 0.6 * noise[:, t]
        return noise

    return make


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and word-level tokenizer of a small LLaMA, V=8."""
    folder = tmp_path_factory.mktemp("llm")
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "friend", "husband", "wife", "forest"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,  # at 0.02 so small a random model does not react to its prefix
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(llm_folder: Path) -> CausalLM:
    """A real frozen causal LM with random weights."""
    return build_llm(DecodeConfig(llm="seed:0", llm_config=str(llm_folder)), device="cpu")


ANSWERS = ["friend", "husband wife", "forest"]


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory) -> CachedSamples:
    """Seven samples on a real store: T=4 frames, P=6, C=10, D=6."""
    path = tmp_path_factory.mktemp("cache") / "store.zarr"
    rng = np.random.default_rng(0)
    shapes = {"tokens": (6, 10), "pooled/layer8": (6,)}
    stores = {}
    for modality, shape in shapes.items():
        spec = replace(TOKENS, dtype="float32", frame_shape=shape)
        stores[modality] = FeatureStore.create(path, modality, spec, shard_frames=16)
    stores["tokens"].extend_plan({f"video{i}": range(10) for i in range(4)})

    def produce(_segment: Segment) -> SegmentResult:
        batch = {name: rng.standard_normal((10, *shape)).astype(np.float32) for name, shape in shapes.items()}
        return SegmentResult(iter([batch]), facts=dict)

    for task in stores["tokens"].pending():
        write_task(stores, task, produce)
    prompt = "what is the relationship of the movie ?"
    samples = [
        Sample(
            f"s{i}",
            f"video{i % 4}",
            np.sort(rng.integers(0, 10, (2, 4)), axis=1),
            prompt if i % 2 else "who runs ?",
            ANSWERS[i % 3],
            "test",
        )
        for i in range(7)
    ]
    return CachedSamples(samples, stores["tokens"], stores["pooled/layer8"])


@pytest.fixture
def stopped() -> Iterator[type[Exception]]:
    """What SIGTERM raises during the test, as it does in the pipeline's commands."""

    class Stopped(Exception):
        pass

    def arrived(number: int, _frame: object) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, arrived)
    yield Stopped
    signal.signal(signal.SIGTERM, before)
