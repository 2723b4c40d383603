"""What this machine, and an object store, have and lack. Of a store, only keys of this command's own are used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOW_DISK = 10 * 10**9  # bytes: the miniature needs less, any real cache more


def examine(store: str | None) -> dict[str, Any]:
    """``{"ok": …, "checks": [{"name", "ok", "detail"}, …]}``: the dict that ``--json`` prints.

    A check that is not ok makes the whole not ok, except for what is optional (no GPU, little disk).
    """
    checks = [_check("python", _python), _check("torch", _torch), _check("decoder", _decoder)]
    checks += [_check("cache format", _zarr), _check("disk", _disk)]
    if store is not None:
        checks += _store(store)
    return {"ok": all(check["ok"] for check in checks), "checks": checks} | ({"store": store} if store else {})


def complaint(result: dict[str, Any]) -> str:
    """What is wrong and what to do; empty when all is well."""
    wrong = [f"  {check['name']}: {check['detail']}" for check in result["checks"] if not check["ok"]]
    if not wrong:
        return ""
    lacking = any(check["name"].startswith("store") and not check["ok"] for check in result["checks"])
    where = f"{result['store']} cannot hold a cache" if lacking else "this machine lacks something"
    todo = "Use another store, or a folder:  --cache DIR" if lacking else "Set up anew:  ./run.sh"
    return "\n".join([f"{where}:", *wrong, todo])


def _check(name: str, look: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    try:
        ok, detail = look()
    except ImportError as error:
        ok, detail = False, f"{error}. Install it:  pip install {error.name or 'diff-lmm'}"
    return {"name": name, "ok": ok, "detail": detail}


def _python() -> tuple[bool, str]:
    return (3, 11) <= sys.version_info < (3, 14), f"{platform.python_version()} on {platform.system()}"


def _torch() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return True, f"{torch.__version__}, no CUDA device: everything runs on the CPU, in float32"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return True, f"{torch.__version__}, CUDA {torch.version.cuda}: {', '.join(names)}"


def _decoder() -> tuple[bool, str]:
    import av

    version = ".".join(map(str, av.library_versions.get("libavcodec", ())))
    lacking = [codec for codec in ("h264", "hevc", "vp9", "av1", "mpeg4") if codec not in av.codecs_available]
    detail = f"PyAV {av.__version__}, libavcodec {version}"
    return not lacking, detail + (f"; it cannot decode {', '.join(lacking)}" if lacking else "")


def _zarr() -> tuple[bool, str]:
    names = ("zarr", "crc32c", "obstore")
    for name in names:
        importlib.import_module(name)
    return True, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _disk() -> tuple[bool, str]:
    from pipeline.printing import size

    here = Path("cache") if Path("cache").is_dir() else Path(".")
    if not os.access(here, os.W_OK):
        return False, f"{here.resolve()} cannot be written"
    free = shutil.disk_usage(here).free
    advice = "; a real cache needs more: see --dry-run of extract-clip" if free < LOW_DISK else ""
    return True, f"{size(free)} free at {here.resolve()}{advice}"


def _store(url: str) -> list[dict[str, Any]]:
    from cache_schema.objects import ObjectPath, locate
    from cache_schema.probe import probe

    store = locate(url)
    if not isinstance(store, ObjectPath):
        if not store.is_dir():
            raise FileNotFoundError(2, "No such folder", str(store))
        return [{"name": "store", "ok": os.access(store, os.W_OK), "detail": "a local folder; needs no probe"}]
    return [
        {"name": f"store: {one.name}", "ok": one.ok, "detail": one.detail or "as it must be"} for one in probe(store)
    ]
