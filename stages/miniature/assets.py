"""Makes the configs and tokenizers of the small seeded models: ``python -m stages.miniature.assets`` rewrites them.

Every class is a real library class; only sizes are small. The files are text, so they are shipped; a test holds them
to this module. The weights are seeded where a model is built, or trained in a later step.
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from stages.data.lvu import PAPER_WORDS, PUBLISHED_TEST_WINDOWS, lvu_prompt
from stages.data.msvd import PROMPT
from stages.miniature import CLIP_MODEL, FOLDER
from stages.miniature.draw import (
    COLORS,
    DAYTIMES,
    DECADES,
    FRAMES,
    SHAPES,
    TEXTURES,
    TINTS,
    VOICES,
    WEATHER,
)
from stages.miniature.sayings import fine_questions, questions, statements
from stages.miniature.videos import AXES, CONTACT, FINE_TASKS, MOTIONS, SPOTS, specs

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2 of the small LLM
# Words that people ask with, so that they are one token each. Anything else is spelled.
COMMON_WORDS = (
    "a an and are as at before after between big by can describe did do does doing during each first for from has have "
    "he her his how i in is it its last left like long many more most movie near no not of on one or other over right "
    "shape short show shown small than that the their then there these they this three to two under up video was what "
    "when where which while who why with yes you man woman person people someone play playing walk walking run running"
)


def files() -> dict[str, str]:
    """Path below ``stages/miniature`` -> content of every asset."""
    tokenizer = llm_tokenizer()
    contents: dict[str, object] = {
        f"clip/{CLIP_MODEL}.json": clip_config(),
        "dit/transformer/config.json": dit_config(),
        "dit/vae/config.json": vae_config(),
        "llm/config.json": llm_config(tokenizer.get_vocab_size()),
        "llm/tokenizer.json": json.loads(tokenizer.to_str()),
        "llm/tokenizer_config.json": _llm_tokenizer_config(),
        "llm/special_tokens_map.json": {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        "qformer_tokenizer/tokenizer_config.json": _qformer_tokenizer_config(),
    }
    texts = {path: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for path, content in contents.items()}
    return {**texts, "qformer_tokenizer/vocab.txt": "".join(f"{piece}\n" for piece in wordpieces())}


def write(folder: Path = FOLDER) -> None:
    """Write every asset below ``folder``."""
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def clip_config() -> dict[str, object]:
    """open_clip: 48 px in patches of 8 = 36 tokens and the class token, width 96, 6 blocks.

    The text tower knows the words of captions only (stages/miniature/train_clip.py), not open_clip's tokenizer.
    """
    vision = {"image_size": 48, "patch_size": 8, "width": 96, "layers": 6, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2}
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


def dit_config() -> dict[str, object]:
    """diffusers: 12 blocks of 4 heads × 24 on 8 × 8 latents in patches of 2; one class a scene, and the null class."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 24,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 4,
        "num_embeds_ada_norm": len(TEXTURES),
        "num_layers": 12,
        "out_channels": 4,  # no learned variance: nothing here samples from it
        "patch_size": 2,
        "sample_size": 8,
        "upcast_attention": False,
    }


def vae_config() -> dict[str, object]:
    """diffusers: 32 × 32 pixels to 8 × 8 × 4 latents, in the block layout of the Stable Diffusion VAE."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "out_channels": 3,
        "sample_size": 32,
        "scaling_factor": 1.0,  # the trained weights give latents of unit variance themselves
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }


def llm_config(vocab_size: int) -> dict[str, object]:
    """transformers: LLaMA with 4 layers of width 96."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.1,  # at 0.02 random weights hardly react to a prefix
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def llm_tokenizer() -> Tokenizer:
    """One token per known word, bytes for everything else: any text comes back as it was, but for outer spaces.

    A byte-level BPE without merges; ``ignore_merges`` lets a whole word match before it falls apart into bytes. Words
    carry their leading space, which is put before the first word too, so "red" is one token wherever it stands.
    """
    vocab = {token: number for number, token in enumerate((PAD, BOS, EOS))}
    for piece in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{word}" for word in cased_words())):
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    return tokenizer


def wordpieces() -> list[str]:
    """The vocabulary of the Q-Former's tokenizer: BERT's special pieces, words, and every ASCII character."""
    characters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *characters]
    pieces += [f"##{character}" for character in characters]
    return list(dict.fromkeys([*pieces, *sorted({word.lower() for word in cased_words()})]))


def cased_words() -> list[str]:
    """Every word of the world, of the prompts, and some common ones, in the cases they are written in; sorted."""
    looks = [*COLORS, *SHAPES, *TEXTURES, *TINTS, *WEATHER, *DAYTIMES, *FRAMES, *VOICES]
    labels = [*looks, *MOTIONS, *SPOTS, *CONTACT, *AXES, "early", "late", "nothing", "space"]
    asked = [question for spec in specs(60, 0) for _, question, _ in (*questions(spec), *fine_questions(spec))]
    told = [words for spec in specs(60, 0) for words in statements(spec).values()]
    tasks = [*PUBLISHED_TEST_WINDOWS, *PAPER_WORDS, *FINE_TASKS]
    prompts = [prompt for task in tasks for prompt in (lvu_prompt(task, "malmm"), lvu_prompt(task, "paper"))]
    text = " ".join([*labels, *asked, *told, *prompts, PROMPT, COMMON_WORDS])
    return sorted({*re.findall(r"[A-Za-z]+", text), *DECADES})


def _llm_tokenizer_config() -> dict[str, object]:
    return {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 512,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _qformer_tokenizer_config() -> dict[str, object]:
    return {
        "cls_token": "[CLS]",
        "do_lower_case": True,
        "mask_token": "[MASK]",
        "model_max_length": 512,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "tokenizer_class": "BertTokenizer",
        "unk_token": "[UNK]",
    }


if __name__ == "__main__":
    write()
