"""Small language models on disk, in the layouts that hubs use."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from stages.config import DecodeConfig
from stages.decode import llm

WIDTH = 24
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = ("<|user|>", "<|model|>")
FILLER_START = 0x4E00  # single CJK characters fill the LLaMA vocabulary up


@pytest.fixture(scope="package", autouse=True)
def _quiet_and_single_threaded() -> Iterator[None]:
    """No progress bars; one thread, since matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.enable_progress_bar()


def byte_tokenizer(*, pad: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and a few specials; no start token."""
    specials = ["<unk>", "<|end|>", *CHAT, *(["<pad>"] if pad else [])]
    vocabulary = {token: i for i, token in enumerate([*specials, *BYTES])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=list(CHAT),
        **({"pad_token": "<pad>"} if pad else {}),
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers, grouped heads; weights large enough that no two logits are nearly the same."""
    settings: dict[str, Any] = {
        "vocab_size": 4 + len(BYTES),
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaConfig(**(settings | changes))


def save_model(folder: Path, config: LlamaConfig, *, seed: int = 0) -> None:
    """Config and seeded weights as safetensors, with a generation config that must not leak."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    GenerationConfig(do_sample=True, temperature=0.1, top_p=0.3, max_length=3, no_repeat_ngram_size=1).save_pretrained(
        folder
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llm")
    save_model(folder, tiny_config())
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tiny_folder: Path) -> Any:
    """Build the tiny LLaMA with the given settings."""

    def build(**settings: Any) -> llm.CausalLM:
        return llm.build(DecodeConfig(**({"llm": str(tiny_folder)} | settings)), device="cpu")

    return build


def llama_pieces(words: tuple[str, ...]) -> list[str]:
    """32,000 pieces as LLaMA orders them: specials, bytes, then pieces that build these words letter by letter."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    for word in words:
        pieces += [piece for end in range(2, len(word) + 2) if (piece := f"▁{word}"[:end]) not in pieces]
    pieces += ["▁", *string.ascii_letters, *string.digits, *"?.,'-"]
    return pieces + [chr(FILLER_START + i) for i in range(32_000 - len(pieces))]


def save_llama_tokenizer(folder: Path, words: tuple[str, ...]) -> None:
    """``tokenizer.model`` alone: all that Vicuna's hub folder has."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = 32_000
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    for i, text in enumerate(llama_pieces(words)):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        proto.pieces.add(piece=text, score=0.0 if i < 259 else -float(i - 259), type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )


def save_vicuna(folder: Path, **changes: Any) -> None:
    """A tiny clone of the Vicuna v1.1 folder: two pickled shards with an index, ``tokenizer.model``, an old config."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"vocab_size": 32_000, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2} | changes
    config = tiny_config(**settings)
    torch.manual_seed(1)
    state = LlamaForCausalLM(config).state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # in the released files, used by nobody
    names = sorted(state)
    weight_map = {}
    for shard, part in enumerate((names[:7], names[7:]), start=1):
        file = f"pytorch_model-{shard:05d}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    raw = config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6})
    )
    save_llama_tokenizer(folder, ("what", "is", "the", "friend", "husband", "wife", "of", "movie"))
