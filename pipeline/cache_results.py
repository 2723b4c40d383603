"""What a finished ``pipeline cache`` command says on stdout, for people."""

from __future__ import annotations

import shlex

from pipeline.printing import Result, cell, first_line, in_words, new_table, say, say_all, show_table, size, to_type
from pipeline.progress import printable


def show_ls(result: Result) -> None:
    """One table of all modalities of all stores."""
    if not result["stores"]:
        say("no store there")
        return
    shown = new_table("store", "modality", "videos", "failed", "planned", "frames", "size", "digest")
    for store in result["stores"]:
        path = printable(store["path"])
        for part in store["modalities"]:
            counts = [cell(part.get(key)) for key in ("videos", "failed", "planned", "frames")]
            shown.add_row(path, part["modality"], *counts, size(part["bytes"]), part["digest"][:12])
            path = ""
        if path:
            shown.add_row(path)
    show_table("Feature stores:", shown)
    for store in result["stores"]:
        for part in (store, *store["modalities"]):
            if error := part.get("error"):
                say(f"damaged: {first_line(error)}")
                to_type(f"pipeline cache verify --cache {shlex.quote(store['path'])}")


def show_verify(result: Result) -> None:
    """Counts per modality, the first problems, and what to type about them."""
    shown = new_table("modality", "shards", "problems", "largest error")
    for part in result["modalities"]:
        error = part.get("largest_error")
        shown.add_row(
            part["modality"], cell(part["shards"]), cell(part["problems"]), "" if error is None else f"{error:.2g}"
        )
    show_table(f"{result['cache']}, checked ({', '.join(result['checks'])}):", shown)
    problems = result["problems"]
    say_all([f"{p['kind']}: {p['modality']}: {first_line(p['message'])}" for p in problems])
    if problems:
        say("What to do:" if result["next"] else "No command mends this; the messages say what happened.")
        for command in result["next"]:
            to_type(command)
    else:
        say("no problem found")


def show_repair(result: Result) -> None:
    """What was damaged, what was made anew, and what was left."""
    damaged = result["damaged"]
    if result["index_damaged"]:
        say(f"the index of the store {'does not fit' if result['dry_run'] else 'was made again'}")
    elif not damaged:
        say("no damaged shard; nothing to do")
    if not damaged:
        return
    state = "damaged" if result["dry_run"] else "was damaged"
    say_all([f"{state}: {shard['modality']}, shard {shard['shard']}" for shard in damaged])
    if result["changed_videos"]:
        say(f"{len(result['changed_videos'])} videos have another file than the one that was extracted")
    if result["dry_run"]:
        return
    say(f"{result['repaired']} of {len(damaged)} shards made anew")
    for shard in result["left"]:
        say(f"left as it is: {shard['modality']}, shard {shard['shard']}: {shard['reason']}")


def show_gc(result: Result) -> None:
    """Every orphan, and whether it goes."""
    would = "would be removed" if result["dry_run"] else "removed"
    for orphan in result["orphans"]:
        fate = would if orphan["removed"] else "kept"
        say(f"{fate}: {orphan['path']} ({orphan['kind']} of {size(orphan['bytes'])}: {orphan['why']})")
    say(f"{result['removed']} {would}, {size(result['bytes'])}" if result["orphans"] else "nothing left over")
    if any(o["kind"] == "unplanned" and not o["removed"] for o in result["orphans"]):
        say("Files that are no part of the store go with --unplanned; look at them first.")
    if any(o["kind"] == "partial" and not o["removed"] for o in result["orphans"]):
        say("What belongs to a machine that is gone for good goes with --host NAME.")


def show_copy(result: Result) -> None:
    """Shards per modality, and those that were not copied because they are damaged."""
    shown = new_table("modality", "to copy" if result["dry_run"] else "copied", "there before", "size")
    for part in result["modalities"]:
        shown.add_row(part["modality"], cell(part["copied"]), cell(part["present"]), size(part["bytes"]))
    show_table(f"Shards of {result['from']} for {result['to']}:", shown)
    say_all([f"not copied: {message}" for message in result["damaged"]])
    if result["damaged"]:
        say("What to do:")
        for command in result["next"]:
            to_type(command)
    elif not any(part["copied"] for part in result["modalities"]):
        say("every shard is there; nothing to do")


def show_inspect(result: Result) -> None:
    """One table a modality."""
    for part in result["modalities"]:
        shown = new_table("", "")
        for key, value in part.items():
            if key == "source":
                for name, fact in value.items():
                    shown.add_row(f"source {in_words(name)}", cell(fact))
            elif key == "rows":
                shown.add_row("rows", ", ".join(f"{first}..{stop - 1}" for first, stop in value))
            elif key == "shards":
                shown.add_row("shards", "..".join(map(str, dict.fromkeys(value))))
            elif key != "modality":
                shown.add_row(in_words(key), cell(value))
        show_table(f"{result['video']}, {part['modality']}:", shown)


def show_export(result: Result) -> None:
    """What was written, and what could not be."""
    pieces = "tars" if result["format"] == "webdataset" else "shards"
    say(
        f"{result['videos']} videos, {result['frames']:,} frames of {', '.join(result['modalities'])} in "
        f"{result['files']} {pieces} ({size(result['bytes'])}) in {result['out']}"
    )
    say_all([f"left out: {skipped['video']}: {skipped['reason']}" for skipped in result["skipped"]])
