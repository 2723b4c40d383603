"""The table of an ablation on disk, ``OUT/ablation.json``: written whole after every change.

::

    rule        when an answer is right ("exact", "first_word")
    variants    one row per run: variant (its folder below OUT), arm, seed, settings, status, reason, step, steps,
                k, n, accuracy, interval (Wilson, per sample), by_video (drawing whole videos)
    arms        the same arm over its seeds: seeds, k, n, accuracy, interval (drawing whole videos), per_seed, seed_sd
    memory      bytes: limit, and what a student and a step were measured to take

``status`` is waiting, done or dropped. A diverged variant stays dropped, since the same run would diverge again; one
that found no memory is tried again by the next start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.locks import is_lock
from pipeline.runs import RunFolder, free_folder, write_json
from pipeline.variants import Variant

FILE = "ablation.json"


class Ledger:
    """Use ``create`` to start or go on, ``open`` to look."""

    def __init__(self, out: Path, values: Mapping[str, Any]) -> None:
        self.out = out
        self.rule: str = values["rule"]
        self.rows: dict[str, dict[str, Any]] = {row["variant"]: dict(row) for row in values["variants"]}
        self.arms: dict[str, dict[str, Any]] = dict(values["arms"])
        self.memory: dict[str, int] = dict(values["memory"])

    @classmethod
    def create(cls, out: Path, variants: Sequence[Variant], *, rule: str) -> Ledger:
        """Make the table, or open it and add what is new; rows of variants that are not asked for now stay.

        Raises ConfigError where ``out`` holds other files.
        """
        if (out / FILE).exists():
            ledger = cls.open(out)
        else:
            names = [entry.name for entry in out.iterdir()] if out.is_dir() else []
            foreign = sorted(name for name in names if name != f".{FILE}.tmp" and not is_lock(name))
            if foreign or out.is_file():
                raise ConfigError(
                    f"{out} holds other files ({', '.join(foreign[:3]) or 'it is one'}) and no ablation.\n"
                    f"Name a folder of its own:  --out {free_folder(out, '-ablation')}"
                )
            out.mkdir(parents=True, exist_ok=True)
            ledger = cls(out, {"rule": rule, "variants": [], "arms": {}, "memory": {}})
        for variant in variants:
            facts = {"arm": variant.arm, "seed": variant.seed, "settings": dict(variant.settings)}
            row = ledger.rows.setdefault(variant.name, {"variant": variant.name, **facts, "status": "waiting"})
            if not ledger.is_settled(variant.name):
                row.update({"status": "waiting", "kind": None, "reason": None})
        ledger.write()
        return ledger

    @classmethod
    def open(cls, out: Path) -> Ledger:
        """Raises ConfigError where there is no table, or one that is not ours."""
        path = out / FILE
        if not path.is_file():
            raise ConfigError(
                f"{out} holds no ablation (no {FILE}).\n"
                f"Make one:  pipeline ablate --study lambda --out {free_folder(out, '-ablation')}"
            )
        try:
            return cls(out, json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not the table of an ablation: {error!r}.\nMove it away; runs stay."
            ) from error

    def is_settled(self, name: str) -> bool:
        """Whether another start has nothing to do for it."""
        row, folder = self.rows[name], self.out / name
        if row["status"] == "dropped":
            return row.get("kind") == "diverged"
        return bool(row["status"] == "done") and (folder / "predictions.jsonl").is_file()

    def note(self, name: str, **facts: Any) -> None:
        """Change a row."""
        self.rows[name].update(facts)
        self.write()

    def drop(self, name: str, kind: str, reason: str, step: int | None = None) -> None:
        """A variant leaves; ``step`` is the number of optimiser steps it had done."""
        self.note(name, status="dropped", kind=kind, reason=reason, **({} if step is None else {"step": step}))

    def write(self) -> None:
        """Replace the file."""
        values = {"rule": self.rule, "variants": list(self.rows.values()), "arms": self.arms, "memory": self.memory}
        write_json(self.out / FILE, values)

    def result(self) -> dict[str, Any]:
        """The table so far; the steps of unfinished variants are those of their newest checkpoints."""
        for name, row in self.rows.items():
            if row["status"] == "waiting":
                config = (self.out / name / "config.json").is_file()
                row["step"] = RunFolder.open(self.out / name).step_at("latest") if config else 0
        count = {status: sum(row["status"] == status for row in self.rows.values()) for status in STATUSES}
        return {**count, "variants": list(self.rows.values()), "arms": self.arms, "memory": self.memory}


STATUSES = ("done", "waiting", "dropped")
