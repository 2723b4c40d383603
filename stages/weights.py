"""Frozen weights: where they are, what is read of them, and what they hash to.

One loader serves every frozen model here. It reads the layouts that model hubs use (one safetensors file or shards
with an index; ``.bin`` files in the same two forms), takes only the tensors that are asked for, and never runs code
that a file brings along.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stages.urls import without_credentials

Module = TypeVar("Module", bound=nn.Module)

# File names by library: transformers, diffusers. Safetensors of either before .bin of either.
SAFETENSORS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".gguf")  # weights, configs, vocabularies
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
EMBEDDED = "miniature:"  # names the small models that come with this package, wherever it is installed
SEED = re.compile(r"seed:(\d+)")


class WeightsMissing(ValueError):
    """A model folder, file or tensor that is not on this machine. The message names it and how to get it."""


class WeightsRefused(ValueError):
    """A weights file that cannot be used: unsafe, damaged, or made for another model."""


def parse_seed(weights: str) -> int | None:
    """``"seed:3"`` -> 3; None for any other setting. Raises ValueError for a malformed seed."""
    if not weights.startswith("seed:"):
        return None
    match = SEED.fullmatch(weights)
    if match is None:
        raise ValueError(f"seeded random weights are written seed:<n> with n >= 0, such as seed:0; got {weights!r}")
    return int(match[1])


# ---------------------------------------------------------------- finding


def local_path(name: str) -> Path:
    """Where a model's files would be on this machine: ``miniature:<name>`` is inside this package, else a path."""
    part = name.removeprefix(EMBEDDED)
    if part != name and part.isidentifier():
        return Path(__file__).parent / "miniature" / part
    return Path(name).expanduser()


def fetch_command(name: str, revision: str, patterns: Iterable[str]) -> str:
    """The shell command that brings these files of a hub repository into the local cache."""
    parts = ["hf", "download", name, *(["--revision", revision] if revision else [])]
    for pattern in patterns:
        parts += ["--include", pattern]
    return shlex.join(parts)


def resolve(
    name: str, revision: str = "", *, patterns: Sequence[str], advise: Sequence[str] = (), local_only: bool = False
) -> Path:
    """The folder that holds a model: a local folder as it is, a hub id through the hub's local cache or a download.

    Args:
        name: a folder, or a hub id such as ``facebook/DiT-XL-2-256``.
        revision: branch, tag or commit of a hub id; "" is the default branch.
        patterns: files needed, relative to the folder. A plain name must be there afterwards; a glob may match nothing.
        advise: patterns named in the fetch command, where more will be needed than ``patterns``.
        local_only: never use the network.

    What the cache holds is used before the network is asked, so a cached branch does not move under a run.
    Raises WeightsMissing.
    """
    folder = local_path(name)
    if name and folder.is_dir():
        lacking = _lacking(folder, patterns)
        if lacking:
            raise WeightsMissing(f"{folder} has no {', '.join(lacking)}. Put it there, or name a hub id instead.")
        return folder
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise WeightsMissing(f"{name!r} is not a folder on this machine and not a hub id (owner/name).")
    globs = [pattern for pattern in patterns if _is_glob(pattern)]
    plain = [pattern for pattern in patterns if not _is_glob(pattern)]
    cached, reason = _snapshot(name, revision, plain, offline=True)
    if cached is not None and (local_only or all(any(cached.glob(pattern)) for pattern in globs)):
        return cached
    if not local_only:
        fetched, reason = _snapshot(name, revision, list(patterns), offline=False)
        cached = fetched or cached
    if cached is None:
        raise WeightsMissing(
            f"{name} is not a folder, and the hub cannot give it: {reason}.\n"
            f"Needed: {', '.join(patterns)}\n"
            f"Fetch it where there is a network:  {fetch_command(name, revision, advise or patterns)}"
        )
    return cached


def _snapshot(name: str, revision: str, patterns: Sequence[str], *, offline: bool) -> tuple[Path | None, str]:
    """The snapshot folder of a hub repository with every plain name of ``patterns`` in it, or None and the reason."""
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(patterns), local_files_only=offline)
        )
    except Exception as error:  # the transport library's own errors; whichever it is, the user needs the command
        return None, _first_line(error)
    lacking = _lacking(folder, patterns)
    return (None, f"it has no {', '.join(lacking)}") if lacking else (folder, "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _is_glob(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def _lacking(folder: Path, patterns: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if not _is_glob(pattern) and not (folder / pattern).is_file()]


def resolve_weights(
    name: str,
    revision: str = "",
    *,
    prefixes: Sequence[str],
    configs: Sequence[str] = (),
    subfolder: str = "",
    files: Sequence[str] = ("model.safetensors", "pytorch_model.bin"),
    advise: Sequence[str] = (),
) -> Path:
    """``resolve`` for a model with weights: its configs, and of its shards only those that hold ``prefixes``.

    ``files`` are the names that an unsharded model may have at this hub, best first.
    Returns the model's folder (without ``subfolder``). Raises WeightsMissing, WeightsRefused.
    """
    inside = f"{subfolder}/" if subfolder else ""
    folder = resolve(name, revision, patterns=(*configs, f"{inside}*.index.json"), advise=advise)
    if local_path(name).is_dir() or _find_index(folder / subfolder) is not None:
        shards = [inside + file for file in weight_files(folder / subfolder, prefixes)]
        return resolve(name, revision, patterns=(*configs, *shards), advise=advise)
    choices = [inside + file for file in files]
    return resolve_any(name, revision, choices=choices, configs=configs, advise=advise)


def resolve_any(
    name: str, revision: str = "", *, choices: Sequence[str], configs: Sequence[str] = (), advise: Sequence[str] = ()
) -> Path:
    """``resolve`` for a model whose weights are one file under one of several names, best first.

    Raises WeightsMissing, about the best of them.
    """
    failure: WeightsMissing | None = None
    for file in choices:
        try:
            return resolve(name, revision, patterns=(*configs, file), advise=advise)
        except WeightsMissing as error:
            failure = failure or error
    assert failure is not None, "no choices"
    raise failure


def weight_files(folder: Path, prefixes: Sequence[str] = ("",)) -> list[str]:
    """Names of the files in a folder that hold tensors with one of these prefixes. They need not be there yet.

    Raises WeightsMissing when the folder has no weights, WeightsRefused for an index that points elsewhere.
    """
    index = _find_index(folder)
    if index is not None:
        return sorted({file for key, file in _weight_map(index).items() if key.startswith(tuple(prefixes))})
    for file in (*SAFETENSORS, *PICKLES):
        if (folder / file).is_file():
            return [file]
    raise WeightsMissing(f"{folder} has no weights: none of {', '.join((*SAFETENSORS, *PICKLES))}, and no index.")


def _find_index(folder: Path) -> Path | None:
    """The index of a sharded model, unless a whole file of the better format is there."""
    for group in (SAFETENSORS, PICKLES):
        for file in group:
            if (folder / f"{file}.index.json").is_file():
                return folder / f"{file}.index.json"
            if (folder / file).is_file():
                return None
    return None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index, with every file name checked to stay in the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsRefused(f"{index} has no weight_map")
    pairs = [(key, str(file)) for key, file in weight_map.items()]
    for _, file in pairs:
        if PurePosixPath(file).name != file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise WeightsRefused(f"{index} names {file!r}, which is not a weights file in the same folder.")
    return dict(pairs)


# ---------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, such as a model's config. Raises WeightsRefused for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsRefused(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise WeightsRefused(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


def read_tensors(
    source: Path,
    prefixes: Sequence[str] = ("",),
    *,
    keep: Callable[[str], bool] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors whose names start with one of ``prefixes`` (and pass ``keep``), under their full names, on the CPU.

    Args:
        source: a model folder, or one weights file.
        prefixes: wanted beginnings of names; each must match at least one tensor.
        keep: a further filter; what it turns down is not read from the disk.
        dtype: floating-point tensors are converted to it.

    Of safetensors only the wanted bytes are read; of ``.bin`` only the mapped pages. Pickled files go through
    ``torch.load(weights_only=True)``, which builds tensors and nothing else, or are refused.
    Raises WeightsMissing, WeightsRefused.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[str] = set()

    def wanted(key: str) -> bool:
        if not key.startswith(tuple(prefixes)):
            return False
        seen.update(prefix for prefix in prefixes if key.startswith(prefix))
        return keep is None or keep(key)

    for path, keys in _sources(source, prefixes).items():
        chosen = None if keys is None else [key for key in keys if wanted(key)]
        if chosen == []:
            continue
        if not path.is_file():
            raise WeightsMissing(f"{path} is missing: it holds {_some(chosen or [])}.")
        reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        for key, tensor in reader(path, wanted, chosen):
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            tensors[key] = tensor.to(dtype=target, copy=True)  # a copy lets go of the mapped file
    lacking = [prefix for prefix in prefixes if prefix not in seen]
    if lacking:
        raise WeightsMissing(f"{source} holds no tensor named {', '.join(f'{prefix}*' for prefix in lacking)}.")
    return tensors


def _sources(source: Path, prefixes: Sequence[str]) -> dict[Path, list[str] | None]:
    """File -> the names that an index places there, or None where the file itself must be asked."""
    if source.is_file():
        return {source: None}
    index = _find_index(source)
    if index is None:
        return {source / file: None for file in weight_files(source, prefixes)}
    placed: dict[Path, list[str] | None] = {}
    for key, file in sorted(_weight_map(index).items()):
        if key.startswith(tuple(prefixes)):
            names = placed.setdefault(source / file, [])
            assert names is not None
            names.append(key)
    return placed


def _read_safetensors(
    path: Path, wanted: Callable[[str], bool], chosen: list[str] | None
) -> Iterable[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            held = set(file.keys())
            absent = sorted(set(chosen or ()) - held)
            if absent:
                raise WeightsRefused(f"{path} lacks {_some(absent)}, which the index says it holds.")
            for key in chosen if chosen is not None else sorted(filter(wanted, held)):
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise WeightsRefused(f"{path} is not a whole safetensors file: {error}") from error


def _read_pickle(path: Path, wanted: Callable[[str], bool], chosen: list[str] | None) -> Iterable[tuple[str, Tensor]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many types, by format and version; each means that the file is not plain tensors
        raise WeightsRefused(
            f"{path} cannot be read as plain tensors, so it is refused (it may hold code).\n"
            "Take a safetensors version of it; or, if you trust where it comes from, convert it to safetensors with\n"
            f'  python -c "import sys, torch; from safetensors.torch import save_file; '
            f'save_file(dict(torch.load(sys.argv[1], weights_only=False)), sys.argv[2])" '
            f"{shlex.quote(str(path))} {shlex.quote(str(path.with_suffix('.safetensors')))}\n"
            f"Cause: {_first_line(error)}"
        ) from error
    held = _plain_state_dict(loaded)
    if held is None:
        raise WeightsRefused(f"{path} holds no table of named tensors.")
    absent = sorted(set(chosen or ()) - set(held))
    if absent:
        raise WeightsRefused(f"{path} lacks {_some(absent)}, which the index says it holds.")
    for key in chosen if chosen is not None else sorted(filter(wanted, held)):
        yield key, held[key]


def _plain_state_dict(loaded: object) -> dict[str, Tensor] | None:
    """The table of tensors in a checkpoint: itself, or under ``state_dict`` or ``model``; without ``module.``."""
    if not isinstance(loaded, Mapping):
        return None
    for key in ("state_dict", "model"):
        if isinstance(loaded.get(key), Mapping):
            return _plain_state_dict(loaded[key])
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors or None


# ---------------------------------------------------------------- into modules


def without_weights(build: Callable[[], Module]) -> Module:
    """A module whose parameters take no memory (meta device) and whose buffers are real; for ``load_strict``.

    Buffers that no checkpoint holds, such as sine tables, are therefore right. The global generator is left alone.
    """
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return build()


def seeded_init(build: Callable[[], Module], seed: int) -> Module:
    """A module with its library's own random initialisation, a function of ``seed`` only.

    The global generators are as before afterwards. Bits may differ between processor types, as torch's do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], *, source: object) -> None:
    """Give every parameter and saved buffer its tensor; nothing may be missing, left over or of another shape.

    ``source`` is named in the error. Raises WeightsRefused.
    """
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    if any(names for _, names in problems):
        told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems if names)
        raise WeightsRefused(f"{source} does not fit {type(module).__name__}: {told}")
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"no values for {left}"


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")


# ---------------------------------------------------------------- hashing


WHOLE_FILE = 64 << 20  # bytes; a larger file is hashed in BLOCKS evenly spaced blocks
BLOCKS, BLOCK = 256, 64 << 10


def files_digest(name: str, revision: str = "") -> str:
    """What identifies a frozen model's files, without loading them.

    A folder: 16 hex digits over names, sizes and contents of its weights, configs and vocabularies. Of a file above
    64 MiB 256 evenly spaced blocks are read, so that 13 GB take a fraction of a second: enough to notice other weights,
    not to prove that two files are equal. A hub id stands for itself, with its revision: its files may not be here yet.
    So does anything else, such as ``seed:<n>``.
    """
    folder = local_path(name)
    if folder.is_dir():
        return _folder_digest(folder)
    return without_credentials(f"{name}@{revision}" if revision else name)


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in MODEL_FILES):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_FILE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for block in range(BLOCKS):
                file.seek((size - BLOCK) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def tensor_digests(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> sha256 over dtype, shape and bytes, for parameters and saved buffers.

    Buffers that are recomputed from a config are left out: their last bits depend on the machine.
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {name: _tensor_digest(tensor) for name, tensor in tensors.items()}


def _tensor_digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """One sha256 over sorted (name, digest) pairs."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def weights_digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 hex over sorted (name, dtype, shape, bytes) of all weights: the same on every device."""
    return combine_digests(tensor_digests(weights))


def short_digest(facts: Mapping[str, object]) -> str:
    """Eight hex digits over an architecture's settings, for settings that leave no trace in weights or shapes."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()[:8]
