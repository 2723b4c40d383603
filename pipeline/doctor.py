"""Check this machine, and a folder or an object store. Of a store, only names of this command's own are used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import folder_probe
from stages.stopping import SIGNALS, STOP


def examine(store: str | None) -> dict[str, Any]:
    """``{"ok": …, "checks": [{"name", "ok", "detail"}, …]}``: the dict that ``--json`` prints.

    A check that is not ok makes the whole not ok, except for what is optional (no GPU, little disk).
    """
    checks = [_check("python", _python), _check("torch", _torch), _check("decoder", _decoder)]
    checks += [_check("cache format", _zarr), _check("disk", _disk), _check("signals", _signals)]
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
    here = Path("cache") if Path("cache").is_dir() else Path(".")
    if not os.access(here, os.W_OK):
        return False, f"{here.resolve()} cannot be written"
    probes = folder_probe.probe(here)
    lacking = [f"{one.name}: {one.detail}" for one in probes[1:-1] if one.detail != folder_probe.FINE]
    kind, space = probes[0].detail, probes[-1].detail
    return all(one.ok for one in probes), "; ".join([f"{space}, {here.resolve()} ({kind})", *lacking])


def _signals() -> tuple[bool, str]:
    """Which signals this process would hear: its parent may have it ignore some."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    names = ", ".join(signal.Signals(number).name for number in STOP if number not in ignored)
    text = f"{names}: finish the step or shard, save, exit 75; SIGINT (Ctrl-C): exit 130"
    if ignored:
        text += f"; ignored here, as nohup asks: {', '.join(signal.Signals(number).name for number in ignored)}"
    return True, text


def _store(url: str) -> list[dict[str, Any]]:
    from cache_schema.objects import ObjectPath, locate
    from cache_schema.probe import probe

    store = locate(url)
    if isinstance(store, ObjectPath):
        probes = [(one.name, one.ok, one.detail or folder_probe.FINE) for one in probe(store)]
    elif store.is_dir():
        probes = [(one.name, one.ok, one.detail) for one in folder_probe.probe(store)]
    else:
        raise FileNotFoundError(2, "No such folder", str(store))
    return [{"name": f"store: {name}", "ok": ok, "detail": detail} for name, ok, detail in probes]
