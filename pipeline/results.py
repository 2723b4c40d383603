"""What a finished command says on stdout, for people. ``--json`` prints the same dictionary as one line instead."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.progress import clock, printable

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]
SHOWN = 20  # failures, classes or missing videos listed before "and n more"
MATRIX = 8  # classes up to which the confusion matrix is printed
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def as_json(result: Result) -> str:
    """One line of strict JSON: numbers that are not finite become null."""
    return json.dumps(_strict(result), default=str, allow_nan=False)


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold: ``20.3 GB``."""
    unit = 0
    while count >= 999.95 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit else f"{count:.0f} bytes"


def parse_size(text: str) -> int:
    """Bytes of ``800MB``, ``1.5 TB`` or ``4096``, the inverse of ``size``. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bytes|[kKMGT]?B)?\s*", text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size: expected a number with kB, MB, GB or TB, such as 50GB")
    unit = (match[2] or "bytes").replace("K", "k")
    return int(float(match[1]) * 1000 ** (0 if unit == "B" else UNITS.index(unit)))


def show_estimate(command: str, result: Result) -> None:
    """``--dry-run``: what would be done, and what it needs."""
    table = _table("", "")
    for key, value in result.items():
        if key == "bytes":
            table.add_row("disk", size(value))
        elif key == "bytes_per_modality":
            for modality, count in value.items():
                table.add_row(f"  {printable(str(modality))}", size(count))
        elif not isinstance(value, Mapping | list | tuple) and value is not None:
            table.add_row(_words(key), size(value) if key.startswith("bytes_") else _cell(value))
    _print(f"{command} would do this:", table)


def show_extraction(result: Result) -> None:
    """Counts, coverage per split, and the videos that failed with their reasons."""
    table = _table("", "")
    for key in ("videos", "frames", "failed", "skipped"):
        table.add_row(_words(key), _cell(result[key]))
    table.add_row("time", clock(result["seconds"]))
    _print("In the cache now:", table)
    if coverage := result.get("coverage"):
        _print("Videos per split:", _coverage(coverage))
    failures = result["failures"]
    for failure in failures[:SHOWN]:
        _say(f"failed: {failure['video']}: {failure['reason']}")
    if len(failures) > SHOWN:
        _say(f"… and {len(failures) - SHOWN} more; --json lists all")
    if failures:
        _say("Once they are mended, the same command with --retry-failed tries these videos again.")
    if result["skipped"] == result["videos"]:
        _say(f"{result['skipped']} of {result['videos'] + result['failed']} videos cached; nothing to do")


def show_training(result: Result) -> None:
    """The last losses, and where the run is. What is logged per level (``kd/8``) is in metrics.jsonl."""
    table = _table("", "")
    for key, value in result.items():
        if key == "seconds":
            table.add_row("time", clock(value))
        elif "/" not in key and not isinstance(value, Mapping | list | tuple):
            table.add_row(_words(key), _cell(value))
    _print("The student:", table)
    if result.get("first_step") == result.get("steps") is not None:
        _say(f"{result['steps']} of {result['steps']} steps were done before; nothing to do")


def show_evaluation(result: Result) -> None:
    """The result table: accuracy with its interval beside the majority baseline, per class and per question type.

    Below the line of the paper's exact match stand its other readings: closed label sets, one answer per video.
    """
    table = _table("", "n", "correct", "top-1", "95 % interval", "top-5", "majority")
    _tally(table, "all", result)
    readings = {"ranked": "best of the label set", "constrained": "label set only"}
    for name, part in result.get("closed", {}).items():
        _tally(table, readings.get(name, name), part)
    for name, part in result.get("video_level", {}).items():
        _tally(table, f"per video, by {name}", part)
    for title in ("per_group", "per_class"):
        parts: Mapping[str, Result] = result.get(title, {})
        if len(parts) < 2 and title == "per_group":
            continue  # one task: the same line again
        table.add_section()
        for name, part in list(parts.items())[:SHOWN]:
            _tally(table, printable(name), part)
        if len(parts) > SHOWN:
            table.add_row(f"… and {len(parts) - SHOWN} more")
    _print("Accuracy in %:", table)
    if confusion := result.get("confusion"):
        _confusion(confusion)
    if result.get("macro") is not None:
        _say(f"Mean recall over the classes {_percent(result['macro'])}, macro-F1 {_percent(result.get('macro_f1'))}.")
    if "seed" in result:
        _say(f"One seed ({result['seed']}), {result['videos']} videos; {_how(result)}")
    _protocol(result)
    if (before := result.get("resumed", 0)) and before == result["n"]:
        _say(f"{before} of {before} answers were there before; nothing to do")


def show_baselines(result: Result) -> None:
    """One row per baseline, in the order of fitting."""
    table = _table("", "n", "correct", "top-1", "95 % interval", "top-5", "majority")
    for name, part in result["baselines"].items():
        _tally(table, name, part)
    _print(f"Accuracy in % on {printable(result['split'])}:", table)
    for name, reason in result["refused"].items():
        _say(f"{name} was left out: {reason}")
    for part in list(result["baselines"].values())[:1]:
        _say(f"{part['videos']} videos; {_how({**part, 'interval': None})}")
        _protocol(part)
    _say(f"Fitted on {result['train_samples']} samples, chosen on {result['val_samples']} of val; in {result['out']}")
    if not result["fitted"]:
        _say(f"{len(result['baselines'])} of {len(result['baselines'])} were there before; nothing to do")


def show_ablation_plan(result: Result) -> None:
    """``ablate --dry-run``."""
    show_estimate("ablate", result)
    names = [printable(name) for name in result["names"]]
    more = f", … ({len(names) - SHOWN} more; --json lists all)" if len(names) > SHOWN else ""
    _say(f"Variants: {', '.join(names[:SHOWN])}{more}")


def show_ablation(result: Result) -> None:
    """One line an arm over its seeds, then what is not done, and why."""
    table = _table("arm", "seeds", "correct", "n", "top-1 in %", "95 % interval", "sd over seeds")
    for arm, part in result["arms"].items():
        low, high = part["interval"] or (None, None)
        span = f"{_percent(low)} to {_percent(high)}" if low is not None else ""
        counts = (str(len(part["seeds"])), _cell(part["k"]), _cell(part["n"]), _percent(part["accuracy"]))
        table.add_row(printable(arm), *counts, span, _percent(part["seed_sd"]))
    _print("Test split; intervals draw whole videos, answers are averaged over seeds:", table)
    for row in result["variants"]:
        if row["status"] == "dropped":
            _say(f"dropped: {row['variant']}: {row['reason']}")
        elif row["status"] == "waiting":
            _say(f"waiting: {row['variant']}: {row.get('step', 0)} of {row.get('steps', '?')} steps")
    if result.get("done_before") == len(result["variants"]):
        _say(f"{result['done_before']} of {len(result['variants'])} variants were done before; nothing to do")


def show_tour(result: Result) -> None:
    """One line a model, one column a task: right of all, in %, with its interval."""
    tasks: Mapping[str, Mapping[str, Result]] = result["table"]
    table = _table("top-1 on test, in %", *(f"{task} (n = {_n(rows)})" for task, rows in tasks.items()))
    for row in next(iter(tasks.values())):
        table.add_row(printable(row), *(_with_interval(rows[row]) for rows in tasks.values()))
    _print("A coarse task that captions mention, and a fine one that they never do:", table)
    _say("Every run is an ordinary run folder. What to open next:")
    for folder in result["runs"].values():
        _say(f"pipeline report {folder}/lambda-0 {folder}/lambda-1 --out {folder}/report.html")
    _say(
        f"Seed {result['seed']} alone: a difference between two lines may be the seed's. Intervals: 95 %, over videos."
    )


def _n(rows: Mapping[str, Result]) -> int:
    return int(next(iter(rows.values()))["n"])


def _with_interval(part: Result) -> str:
    low, high = part["by_video"]["interval"]
    return f"{100 * part['top1']:.1f}  ({100 * low:.1f} to {100 * high:.1f})"


def show_diagnosis(result: Result) -> None:
    """Cosine, centred cosine and constant per level."""
    if result["cosine"]:
        table = _table("level", "cosine", "above constant", "centred")
        for level, cosine in result["cosine"].items():
            above = cosine - result["constant"]
            table.add_row(level, f"{cosine:.3f}", f"{above:+.3f}", f"{result['centred'][level]:.3f}")
        _print(f"Alignment of {printable(result['checkpoint'])} on {result['samples']} samples:", table)
        _say(f"One constant vector gets a cosine of {result['constant']:.3f}.")
    _say(f"Mean similarity between levels (linear CKA): {_cell(result['similarity_of_levels'])}")
    _say(f"In {result['diagnostics']}; pipeline report draws it.")


def show_report(result: Result) -> None:
    """The answer of every study, what is missing, and where the page is."""
    for answer in result["answers"]:
        _say(answer)
    for lack in result["missing"]:
        _say(f"missing: {lack['what']} of {len(lack['runs'])} runs; {lack['command']}")
    _say(f"{result['runs']} runs on one page: {result['page']} ({size(result['bytes'])})")


def show_comparison(result: Result) -> None:
    """Every variant, then every pair."""
    table = _table("", "n", "correct", "top-1", "95 % interval", "seeds", "sd over seeds")
    for part in result["variants"]:
        row = [_cell(result["n"]), f"{part['correct']:.6g}", _percent(part["top1"]), _span(part["interval"])]
        table.add_row(printable(part["name"]), *row, _cell(len(part["seeds"])), _percent(part["seed_sd"]))
    _print("Accuracy in % on the samples that all have answered:", table)
    for key, values in result["differing"].items():
        _say(f"{key}: {' | '.join('-' if value is None else str(value) for value in values)}")
    pairs = _table("b minus a", "difference", "95 % interval", "p", "p (Holm)", "p over seeds")
    for part in result["pairs"]:
        numbers = [f"{100 * part['difference']:+.1f}", _span(part["interval"], sign=True)]
        tests = ["" if part[key] is None else f"{part[key]:.2g}" for key in ("p", "p_holm", "seed_p")]
        pairs.add_row(f"{printable(part['b'])} minus {printable(part['a'])}", *numbers, *tests)
    _print("Differences in points:", pairs)
    _say(
        f"{result['n']} samples of {result['videos']} videos, paired. Intervals draw whole videos (BCa, 10,000 draws). "
        "p: exact sign-flip test over videos, of the seeds' averages; p over seeds flips the seeds that both have."
    )
    if result["left_out"]:
        _say(f"{result['left_out']} samples are left out: not every run has answered them.")


def show_synth(result: Result) -> None:
    """What was drawn, and where."""
    now = f"{result['written']} drawn now" if result["written"] else "all drawn before; nothing to do"
    _say(f"{result['videos']} videos, {result['frames']:,} frames in {result['folder']} ({now})")


def show_doctor(result: Result) -> None:
    """One line per thing that was looked at."""
    table = _table("", "", "")
    for check in result["checks"]:
        table.add_row(check["name"], "ok" if check["ok"] else "NO", printable(check["detail"]))
    _print("What is here:", table)


# ---------------------------------------------------------------- pipeline cache


def show_cache_ls(result: Result) -> None:
    """One table of all modalities of all stores."""
    if not result["stores"]:
        _say("no store there")
        return
    shown = _table("store", "modality", "videos", "failed", "planned", "frames", "size", "digest")
    for store in result["stores"]:
        path = printable(store["path"])
        for part in store["modalities"]:
            counts = [_cell(part.get(key)) for key in ("videos", "failed", "planned", "frames")]
            shown.add_row(path, part["modality"], *counts, size(part["bytes"]), part["digest"][:12])
            path = ""
        if path:
            shown.add_row(path)
    _print("Feature stores:", shown)
    for store in result["stores"]:
        for part in (store, *store["modalities"]):
            if error := part.get("error"):
                _say(f"damaged: {_first_line(error)}")
                _say(f"  pipeline cache verify --cache {store['path']}")


def show_cache_verify(result: Result) -> None:
    """Counts per modality, the first problems, and what to type about them."""
    shown = _table("modality", "shards", "problems", "largest error")
    for part in result["modalities"]:
        error = part.get("largest_error")
        shown.add_row(
            part["modality"], _cell(part["shards"]), _cell(part["problems"]), "" if error is None else f"{error:.2g}"
        )
    _print(f"{result['cache']}, checked ({', '.join(result['checks'])}):", shown)
    problems = result["problems"]
    for problem in problems[:SHOWN]:
        _say(f"{problem['kind']}: {problem['modality']}: {_first_line(problem['message'])}")
    if len(problems) > SHOWN:
        _say(f"… and {len(problems) - SHOWN} more; --json lists all")
    if problems:
        _say("What to do:" if result["next"] else "No command mends this; the messages say what happened.")
        for command in result["next"]:
            _say(f"  {command}")
    else:
        _say("no problem found")


def show_cache_repair(result: Result) -> None:
    """What was damaged, what was made anew, and what was left."""
    damaged = result["damaged"]
    if result["index_damaged"]:
        _say(f"the index of the store {'does not fit' if result['dry_run'] else 'was made again'}")
    elif not damaged:
        _say("no damaged shard; nothing to do")
    if not damaged:
        return
    for shard in damaged[:SHOWN]:
        _say(f"{'damaged' if result['dry_run'] else 'was damaged'}: {shard['modality']}, shard {shard['shard']}")
    if len(damaged) > SHOWN:
        _say(f"… and {len(damaged) - SHOWN} more; --json lists all")
    if result["changed_videos"]:
        _say(f"{len(result['changed_videos'])} videos have another file than the one that was extracted")
    if result["dry_run"]:
        return
    _say(f"{result['repaired']} of {len(damaged)} shards made anew")
    for shard in result["left"]:
        _say(f"left as it is: {shard['modality']}, shard {shard['shard']}: {shard['reason']}")


def show_cache_gc(result: Result) -> None:
    """Every orphan, and whether it goes."""
    would = "would be removed" if result["dry_run"] else "removed"
    for orphan in result["orphans"]:
        fate = would if orphan["removed"] else "kept"
        _say(f"{fate}: {orphan['path']} ({orphan['kind']} of {size(orphan['bytes'])}: {orphan['why']})")
    _say(f"{result['removed']} {would}, {size(result['bytes'])}" if result["orphans"] else "nothing left over")
    if any(o["kind"] == "unplanned" and not o["removed"] for o in result["orphans"]):
        _say("Files that are no part of the store go with --unplanned; look at them first.")
    if any(o["kind"] != "unplanned" and not o["removed"] for o in result["orphans"]):
        _say("What belongs to a machine that is gone for good goes with --host NAME.")


def show_cache_inspect(result: Result) -> None:
    """One table a modality."""
    for part in result["modalities"]:
        shown = _table("", "")
        for key, value in part.items():
            if key == "source":
                for name, fact in value.items():
                    shown.add_row(f"source {_words(name)}", _cell(fact))
            elif key == "rows":
                shown.add_row("rows", ", ".join(f"{first}..{stop - 1}" for first, stop in value))
            elif key == "shards":
                shown.add_row("shards", "..".join(map(str, dict.fromkeys(value))))
            elif key != "modality":
                shown.add_row(_words(key), _cell(value))
        _print(f"{result['video']}, {part['modality']}:", shown)


def show_cache_export(result: Result) -> None:
    """What was written, and what could not be."""
    pieces = "tars" if result["format"] == "webdataset" else "shards"
    _say(
        f"{result['videos']} videos, {result['frames']:,} frames of {', '.join(result['modalities'])} in "
        f"{result['files']} {pieces} ({size(result['bytes'])}) in {result['out']}"
    )
    for skipped in result["skipped"][:SHOWN]:
        _say(f"left out: {skipped['video']}: {skipped['reason']}")
    if len(result["skipped"]) > SHOWN:
        _say(f"… and {len(result['skipped']) - SHOWN} more; --json lists all")


# ---------------------------------------------------------------- parts


def _tally(table: Table, name: str, part: Result) -> None:
    by_video = part.get("by_video") or {}
    shares = [_percent(part.get(key)) for key in ("top1", "top5", "majority")]
    span = _span(by_video.get("interval") or part.get("interval"))
    table.add_row(name, _cell(part["n"]), _cell(part["correct"]), shares[0], span, *shares[1:])


def _span(interval: Sequence[float] | None, *, sign: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (f"{100 * end:+.1f}" if sign else f"{100 * end:.1f}" for end in interval)
    return f"{low} to {high}"


def _how(part: Result) -> str:
    """How the interval of an evaluation was made, and what the usual one would have been."""
    by_video = part.get("by_video")
    if by_video is None:
        return "the interval takes samples for independent (Wilson); windows or questions of one video are not."
    made = {"bca": "BCa bootstrap, 10,000 draws", "wilson": "Wilson over videos, since all are alike"}
    few = f" {by_video['videos']} videos are few: the true interval is wider." if by_video["few"] else ""
    usual = f" As if samples were independent (Wilson): {_span(part['interval'])}." if part.get("interval") else ""
    return f"intervals draw whole videos ({made.get(by_video['method'], by_video['method'])}).{few}{usual}"


def _confusion(confusion: Result) -> None:
    labels: Sequence[str] = confusion["labels"]
    if len(labels) > MATRIX + 1:
        return  # --json has it
    table = _table("true, said:", *map(printable, labels))
    for name, row in zip(labels, confusion["counts"], strict=False):
        table.add_row(printable(name), *map(_cell, row))
    _print("Answers:", table)


def _protocol(result: Result) -> None:
    """Whether n is the published one; what is missing, by name; and what the score is if all of that is wrong."""
    if missing := result.get("missing_samples"):
        worst = result["worst_case"]
        _say(
            f"{missing} of {worst['n']} samples are missing. If all of them were wrong: "
            f"{worst['correct']} of {worst['n']}, {_percent(worst['top1'])} %."
        )
        videos = list(result["missing_videos"].items())
        for video, reason in videos[:SHOWN]:
            _say(f"missing: {video}: {reason}")
        if len(videos) > SHOWN:
            _say(f"… and {len(videos) - SHOWN} more; --json lists all")
    if published := result.get("published_n"):
        same = "that of the published figures" if published == result["n"] else f"not the published {published}"
        _say(f"n = {result['n']} is {same}.")


def _coverage(coverage: Mapping[str, Result]) -> Table:
    table = _table("", *next(iter(coverage.values())))
    for split, counts in coverage.items():
        table.add_row(
            printable(split), *(str(len(part) if hasattr(part, "__len__") else part) for part in counts.values())
        )
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _print(title: str, table: Table) -> None:
    from rich.console import Console

    _say(title)
    # Off a terminal the width is fixed, so that a log does not depend on who reads it.
    width = None if sys.stdout.isatty() else 100
    Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False).print(table)


def _say(text: str) -> None:
    print(" ".join(printable(text).split()))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _words(key: str) -> str:
    return printable(key.replace("_", " "))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))


def _strict(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(part) for part in value]
    return value
