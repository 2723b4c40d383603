"""Loading: folders, seeds, Vicuna's checks, and errors that name the next command."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import weights
from stages.config import DecodeConfig
from stages.decode import llm
from tests.decode.conftest import WIDTH, byte_tokenizer, save_llama_tokenizer, save_model, save_vicuna, tiny_config


def build(**settings: Any) -> llm.CausalLM:
    return llm.build(DecodeConfig(**settings), device="cpu")


@pytest.fixture(scope="module")
def vicuna_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "vicuna-7b-v1.1"
    save_vicuna(folder)
    return folder


@pytest.fixture
def damaged(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny LLaMA to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_a_folder_is_loaded_as_it_is(tiny_folder: Path, make: Any) -> None:
    stored = load_file(tiny_folder / "model.safetensors")
    held = make().model.state_dict()
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[name], held[name]) for name in stored)


def test_the_dtype_is_the_one_asked_for_and_the_loss_is_float32(make: Any) -> None:
    decoder = make(dtype="bfloat16")
    assert {p.dtype for p in decoder.model.parameters()} == {torch.bfloat16}
    prefix = torch.randn(1, 3, WIDTH, requires_grad=True)
    loss, _ = decoder.loss_sum(prefix, ["who?"], ["a"])
    loss.backward()
    assert loss.dtype == prefix.grad.dtype == torch.float32
    assert prefix.grad.isfinite().all()


def test_a_seed_gives_the_same_random_llm_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    digests = [
        weights.weights_digest(build(llm=seed, llm_config=str(tmp_path)).model)
        for seed in ("seed:4", "seed:4", "seed:5")
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_needs_a_config_folder() -> None:
    with pytest.raises(ValueError, match=r"decode\.llm_config"):
        build(llm="seed:1")


def test_an_absent_llm_is_named_with_the_command_that_fetches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(weights.WeightsMissing, match="hf download some-owner/absent-llm"):
        build(llm="some-owner/absent-llm")


def test_an_llm_without_a_tokenizer_is_refused_by_name(damaged: Path) -> None:
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(weights.WeightsMissing, match="no tokenizer"):
        build(llm=str(damaged))


def test_a_missing_tensor_is_never_filled_with_random_numbers(damaged: Path) -> None:
    stored = load_file(damaged / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(weights.WeightsRefused, match=r"layers\.1\.mlp\.up_proj"):
        build(llm=str(damaged))


def test_a_cut_off_file_is_refused(damaged: Path) -> None:
    os.truncate(damaged / "model.safetensors", 3000)
    with pytest.raises(weights.WeightsRefused, match="cannot be loaded"):
        build(llm=str(damaged))


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_brings_code_is_refused_and_not_run(damaged: Path, tmp_path: Path) -> None:
    (damaged / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(tmp_path / "trace")}, damaged / "pytorch_model.bin")
    with pytest.raises(weights.WeightsRefused):
        build(llm=str(damaged))
    assert not (tmp_path / "trace").exists()


def test_quantising_without_bitsandbytes_names_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"pip install diff-lmm\[quantize\]"):
        make(quantize="nf4")


def test_random_weights_cannot_be_quantised(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="random weights"):
        build(llm="seed:1", llm_config=str(tiny_folder), quantize="int8")


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_llm_still_gives_the_prefix_its_gradient(tmp_path: Path, quantize: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantize)")
    save_model(tmp_path, tiny_config(hidden_size=64, intermediate_size=128, initializer_range=0.1))
    byte_tokenizer().save_pretrained(tmp_path)
    exact, rough = build(llm=str(tmp_path)), build(llm=str(tmp_path), quantize=quantize)
    prefix = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    grads = []
    for decoder in (exact, rough):
        decoder.generate(prefix, ["who?", "where is it"])  # a call without gradients must not spoil those after it
        mine = prefix.clone().requires_grad_()
        decoder.loss_sum(mine, ["who?", "where is it"], ["friend", "a"])[0].backward()
        assert mine.grad is not None
        grads.append(mine.grad.flatten())
    assert not torch.equal(*grads)
    assert torch.cosine_similarity(*grads, dim=0) > 0.9


def test_vicuna_loads_from_pickled_shards_and_a_sentencepiece_model(vicuna_folder: Path) -> None:
    decoder = build(llm=str(vicuna_folder), max_new_tokens=6)
    assert {p.dtype for p in decoder.model.parameters()} == {torch.float32}
    answers = decoder.generate(torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0)), ["what", "is the"])
    assert [len(beams) for beams in answers] == [5, 5]


def test_a_vicuna_prompt_starts_with_the_end_token_as_in_malmm(vicuna_folder: Path) -> None:
    text = build(llm=str(vicuna_folder), max_prompt_tokens=4).text
    tokens = text.tokenizer.convert_ids_to_tokens(text.prompt_ids("what is the movie"))
    assert tokens == ["</s>", "▁is", "▁the", "▁movie"]
    assert text.prompt_ids("what")[0] == 2


def test_a_vicuna_answer_equals_what_malmm_trains_on(vicuna_folder: Path) -> None:
    text = build(llm=str(vicuna_folder)).text
    ids = text.answer_ids("husband wife")
    assert text.tokenizer.convert_ids_to_tokens(ids) == ["▁husband", "▁wife", "</s>"]
    assert text.decode([0, *ids, 1, 2]) == "husband wife"


def test_ids_below_two_read_as_the_end_in_vicuna(vicuna_folder: Path) -> None:
    text = build(llm=str(vicuna_folder)).text
    seen: list[list[int]] = []

    class Recorder:
        def decode(self, ids: list[int], **_options: object) -> str:
            seen.append(list(ids))
            return ""

    text.tokenizer = Recorder()
    text.decode([0, 1, 2, 3])
    assert seen == [[2, 2, 2, 3]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("vicuna-7b-v1.5", {}), ("vicuna-7b-v0", {}), ("my-vicuna", {"max_position_embeddings": 4096})],
)
def test_another_version_of_vicuna_is_refused(tmp_path: Path, name: str, changes: dict[str, int]) -> None:
    save_vicuna(tmp_path / name, **changes)
    with pytest.raises(ValueError, match=r"decode\.llm=lmsys/vicuna-7b-v1\.1"):
        build(llm=str(tmp_path / name))


def test_a_vicuna_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_vicuna(tmp_path / "vicuna-7b-v1.1", vocab_size=31_000)
    with pytest.raises(ValueError, match="31000 embeddings"):
        build(llm=str(tmp_path / "vicuna-7b-v1.1"))


def test_a_padded_vicuna_is_accepted(tmp_path: Path) -> None:
    save_vicuna(tmp_path / "vicuna-7b-v1.1", vocab_size=32_001)
    assert build(llm=str(tmp_path / "vicuna-7b-v1.1")).text.start_ids == [2]


def test_only_the_own_name_of_a_model_makes_it_vicuna(tmp_path: Path) -> None:
    config = tiny_config()
    assert llm.is_vicuna("lmsys/vicuna-7b-v1.1", config)
    assert llm.is_vicuna("/cache/models--lmsys--vicuna-7b-v1.1/snapshots/0a1b2c/", config)
    assert not llm.is_vicuna("/home/vicuna-project/llama-2", config)
    folder = tmp_path / "llama"
    folder.mkdir()
    save_vicuna(folder)
    text = build(llm=str(folder)).text
    assert text.prompt_ids("what")[0] == 1  # LLaMA's own <s>


def test_the_hub_layout_of_the_clone_is_vicunas(vicuna_folder: Path, tmp_path: Path) -> None:
    names = {path.name for path in vicuna_folder.iterdir()}
    assert "tokenizer.json" not in names
    assert "tokenizer.model" in names
    assert json.loads((vicuna_folder / "config.json").read_text())["torch_dtype"] == "float16"
    save_llama_tokenizer(tmp_path, ("what",))
    assert (tmp_path / "tokenizer.model").stat().st_size > 100_000
