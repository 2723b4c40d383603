"""Rebuilds every frozen model of the miniature on two cores: ``python -m stages.miniature.train_frozen`` (< 1 hour).

Two processes of one thread each: language model, CLIP and then the Q-Former that needs both; VAE and DiT. The weights
go to the folders beside this file as float16 safetensors, what was measured to ``recipe.json``. A test holds the
shipped weights to this recipe by ``digest``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.miniature import FOLDER
from stages.miniature.assets import clip_config, files

STEPS = {"llm": 1700, "clip": 1400, "vae": 1200, "dit": 2500, "qformer": 1400}
RECIPE = FOLDER / "recipe.json"
SOURCES = {  # modules that decide a model's weights
    "llm": ("train_llm", "sayings", "draw", "videos"),
    "clip": ("train_clip", "pictures", "draw", "videos"),
    "vae": ("train_teacher", "pictures", "draw", "videos"),
    "dit": ("train_teacher", "pictures", "draw", "videos"),
    "qformer": ("train_qformer", "pictures", "draw", "sayings", "videos"),
}
WEIGHTS = {
    "clip": "clip/open_clip_model.safetensors",
    "vae": "dit/vae/diffusion_pytorch_model.safetensors",
    "dit": "dit/transformer/diffusion_pytorch_model.safetensors",
    "llm": "llm/model.safetensors",
    "qformer": "qformer/model.safetensors",
}
CONFIGS = {
    "llm": "llm/",
    "clip": "clip/",
    "vae": "dit/vae/",
    "dit": "dit/transformer/",
    "qformer": "qformer_tokenizer/",
}
MADE_FROM = {"dit": ("vae",), "qformer": ("llm", "clip")}
LANES = (("llm", "clip", "qformer"), ("vae", "dit"))
Log = Callable[[str], None]


def digest(name: str) -> str:
    """sha256 of all of ours that decides a model's weights: code without comments and docstrings, steps, configs."""
    facts = {
        "code": {source: _code(FOLDER / f"{source}.py") for source in SOURCES[name]},
        "steps": STEPS[name],
        "configs": {path: text for path, text in files().items() if path.startswith(CONFIGS[name])},
        "from": [digest(other) for other in MADE_FROM.get(name, ())],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Train what is asked for; without arguments everything, two lanes at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Example: --only clip qformer")
    parser.add_argument("--only", nargs="+", choices=sorted(STEPS), help="these models, in this process, in this order")
    asked = parser.parse_args()
    if asked.only:
        for name in asked.only:
            _train(name)
        return
    started = time.monotonic()
    lanes = [subprocess.Popen([sys.executable, "-m", __spec__.name, "--only", *lane]) for lane in LANES]
    codes = [lane.wait() for lane in lanes]
    if any(codes):
        sys.exit("a lane failed; see above")
    _note("all", {"seconds": round(time.monotonic() - started)})
    print(f"{sum((FOLDER / file).stat().st_size for file in WEIGHTS.values()) / 1e6:.1f} MB of weights")


def _train(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started, recipe = time.monotonic(), digest(name)  # as the code is that was imported, whatever is written meanwhile

    def log(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    facts = {"llm": _llm, "clip": _clip, "vae": _vae, "dit": _dit, "qformer": _qformer}[name](log)
    _note(name, {"steps": STEPS[name], "seconds": round(time.monotonic() - started), "digest": recipe, **facts})


def _llm(log: Log) -> dict[str, Any]:
    from stages.miniature.train_llm import accuracy_from_descriptions, train_llm

    model = train_llm(steps=STEPS["llm"], log=log)
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}  # tied
    _save("llm", tensors)
    return {"accuracy_from_gold_descriptions": accuracy_from_descriptions(model)}


def _clip(log: Log) -> dict[str, Any]:
    from stages.miniature.train_clip import MEAN, STD, train_clip

    model = train_clip(steps=STEPS["clip"], videos=6000, log=log)
    _save("clip", model.state_dict())
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash", "size": [48, 48]}
    described = {"model_cfg": clip_config(), "preprocess_cfg": preprocess}
    (FOLDER / "clip" / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n")
    return {}


def _vae(log: Log) -> dict[str, Any]:
    from stages.miniature.pictures import pictures
    from stages.miniature.train_teacher import latents_of, train_vae

    vae = train_vae(pictures(21, videos=6000, per_video=4).sized(32), steps=STEPS["vae"], log=log)
    _save("vae", vae.state_dict())
    unseen = pictures(22, videos=100, per_video=2).sized(32)
    back = vae.decode(latents_of(vae, unseen)).sample
    return {"reconstruction_l1_of_255": round(float((back - unseen.float() / 127.5 + 1).abs().mean()) * 127.5, 2)}


def _dit(log: Log) -> dict[str, Any]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from stages.miniature.pictures import pictures
    from stages.miniature.train_teacher import train_dit

    vae: Any = AutoencoderKL.from_pretrained(FOLDER / "dit" / "vae")
    seen = pictures(21, videos=6000, per_video=4)
    _save("dit", train_dit(vae.eval(), seen, seen.sized(32), steps=STEPS["dit"], log=log).state_dict())
    return {}


def _qformer(log: Log) -> dict[str, Any]:
    from stages.config import PipelineConfig
    from stages.decode.llm import build as build_llm
    from stages.extract.clip import build as build_clip
    from stages.miniature import configs
    from stages.miniature.train_qformer import coarse_accuracy, instructblip_tensors, train_qformer

    config = PipelineConfig(preset="miniature", clip=configs.clip())
    encoder = build_clip(config, frame_rule="", decoder="")
    decoder = build_llm(configs.decode(), device="cpu")
    cfg = configs.student().model_copy(update={"init": "seed:41"})
    student = train_qformer(cfg, encoder, decoder, steps=STEPS["qformer"], videos=3000, log=log)
    _save("qformer", instructblip_tensors(student))
    return {"accuracy_coarse_questions": coarse_accuracy(student, encoder, decoder)}


def _save(name: str, tensors: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    path = FOLDER / WEIGHTS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {
        key: (value.to(torch.float16) if value.is_floating_point() else value).contiguous()
        for key, value in tensors.items()
    }
    save_file(half, path, metadata={"format": "pt"})


def _note(name: str, facts: dict[str, Any]) -> None:
    """Add what was measured to the recipe file, with the hash of the weights file."""
    known = json.loads(RECIPE.read_text()) if RECIPE.exists() else {}
    if name in WEIGHTS:
        facts |= {"sha256": hashlib.sha256((FOLDER / WEIGHTS[name]).read_bytes()).hexdigest()}
    known[name] = facts
    RECIPE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _code(path: Path) -> str:
    """A module without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


if __name__ == "__main__":
    main()
