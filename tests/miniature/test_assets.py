"""Configs and tokenizers of the small models: what is shipped is what is made, and real libraries load and run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.miniature import CLIP_FOLDER, CLIP_MODEL, DIT_FOLDER, FOLDER, LLM_FOLDER, QFORMER_TOKENIZER
from stages.miniature.assets import cased_words, files, write


def test_the_shipped_files_are_those_that_this_code_makes() -> None:
    for name, text in files().items():
        shipped = (FOLDER / name).read_text(encoding="utf-8")
        if name.endswith(".json"):
            assert json.loads(shipped) == json.loads(text), f"{name}: run python -m stages.miniature.assets"
        else:
            assert shipped == text, f"{name}: run python -m stages.miniature.assets"


def test_writing_elsewhere_gives_the_same_files_below_300_kb(tmp_path: Path) -> None:
    write(tmp_path)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)) for path in written} == set(files())
    assert sum(path.stat().st_size for path in written) < 300_000


@pytest.mark.slow
def test_open_clip_makes_the_image_tower_and_gives_37_tokens() -> None:
    import open_clip

    open_clip.add_model_config(CLIP_FOLDER)
    visual = open_clip.create_model(CLIP_MODEL).visual.eval()
    with torch.inference_mode():
        seen = visual.forward_intermediates(
            torch.zeros(2, 3, 48, 48), indices=[4], output_fmt="NLC", output_extra_tokens=True
        )
        embedding = visual(torch.zeros(3, 3, 48, 48))
    assert len(visual.transformer.resblocks) == 6
    assert seen["image_intermediates"][0].shape == (2, 36, 96)
    assert seen["image_intermediates_prefix"][0].shape == (2, 1, 96)
    assert embedding.shape == (3, 64)


@pytest.mark.slow
def test_diffusers_makes_vae_and_dit_and_they_fit_each_other() -> None:
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(DIT_FOLDER / "vae")).eval()
    dit = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(DIT_FOLDER / "transformer")).eval()
    null_class = dit.config.num_embeds_ada_norm
    with torch.inference_mode():
        latent = vae.encode(torch.zeros(2, 3, 32, 32)).latent_dist.mode() * vae.config.scaling_factor
        step, label = torch.zeros(2, dtype=torch.long), torch.full((2,), null_class)
        out = dit(latent, timestep=step, class_labels=label).sample
    assert latent.shape == (2, 4, 8, 8)
    assert out.shape == (2, 4, 8, 8)
    assert dit.config.sample_size == latent.shape[-1]
    assert (len(dit.transformer_blocks), dit.inner_dim) == (12, 96)
    assert dit.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.shape[0] == null_class + 1


def test_transformers_makes_the_llm_with_the_vocabulary_of_its_tokenizer() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(LLM_FOLDER)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = llm_tokenizer()
    ids = tokenizer(["what is the scene of the movie?", "red"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**{name: ids[name] for name in ("input_ids", "attention_mask")}).logits
    assert type(model).__name__ == "LlamaForCausalLM"
    assert logits.shape == (*ids["input_ids"].shape, len(tokenizer))
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (96, 4, True)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def llm_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(LLM_FOLDER)


def test_the_llm_tokenizer_starts_with_bos_and_knows_the_world_word_by_word() -> None:
    tokenizer = llm_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("chase").input_ids[0] == tokenizer.bos_token_id
    for word in cased_words():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    question = tokenizer("Question: what is the color of the circle? Short answer:", add_special_tokens=False)
    assert len(question.input_ids) == 13  # 10 words, two colons and a question mark


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llm_tokenizer()


def test_any_text_comes_back_from_the_llm_tokenizer(tokenizer: Any) -> None:
    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=40))
    def comes_back(text: str) -> None:
        if any(special in text for special in tokenizer.all_special_tokens):
            return
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()

    comes_back()
    for text in ("Ünï ▁ <0x41> 'quote'  x 🎬\n tab\t. Ġ", "don't , do not .", "ex-boyfriend ex-girlfriend", "\u2028a"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()


@pytest.mark.parametrize("loader", ["AutoTokenizer", "BertTokenizerFast"])
def test_the_qformer_tokenizer_is_a_lower_casing_word_piece_one(loader: str) -> None:
    import transformers

    tokenizer = getattr(transformers, loader).from_pretrained(QFORMER_TOKENIZER)
    assert tokenizer.tokenize("What is the Relationship of the movie?") == [
        "what", "is", "the", "relationship", "of", "the", "movie", "?",
    ]  # fmt: skip
    assert tokenizer.tokenize("xyz 42") == ["x", "##y", "##z", "4", "##2"]
    ids = tokenizer("red").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "red", "[SEP]"]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id not in tokenizer('Question: "who"; (a)~#1 Short answer:').input_ids
    assert tokenizer.unk_token_id in tokenizer("映画").input_ids
