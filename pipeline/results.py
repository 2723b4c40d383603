"""What a finished command says on stdout, for people. ``--json`` prints the same dictionary as one line instead."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.printing import (
    SHOWN,
    Result,
    cell,
    in_words,
    new_table,
    percent,
    say,
    say_all,
    show_table,
    size,
    to_type,
)
from pipeline.progress import clock, printable

if TYPE_CHECKING:
    from rich.table import Table

FREQUENT = "most frequent"  # column: always giving the answer that is most frequent among the very questions
MATRIX = 8  # classes up to which the confusion matrix is printed


def show_estimate(command: str, result: Result) -> None:
    """``--dry-run``: what would be done, and what it needs."""
    table = new_table("", "")
    for key, value in result.items():
        if key == "bytes":
            table.add_row("disk", size(value))
        elif key == "bytes_per_modality":
            for modality, count in value.items():
                table.add_row(f"  {printable(str(modality))}", size(count))
        elif not isinstance(value, Mapping | list | tuple) and value is not None:
            table.add_row(in_words(key), size(value) if key.startswith("bytes_") else cell(value))
    show_table(f"{command} would do this:", table)


def show_extraction(result: Result) -> None:
    """Counts, coverage per split, and the videos that failed with their reasons."""
    table = new_table("", "")
    for key in ("videos", "frames", "failed", "skipped"):
        table.add_row(in_words(key), cell(result[key]))
    table.add_row("time", clock(result["seconds"]))
    show_table("In the cache now:", table)
    if coverage := result.get("coverage"):
        show_table("Videos per split:", _coverage(coverage))
    failures = result["failures"]
    say_all([f"failed: {failure['video']}: {failure['reason']}" for failure in failures])
    if failures:
        say("Once they are mended, the same command with --retry-failed tries these videos again.")
    say_all([f"left out: {entry['video']}: {entry['reason']}" for entry in result["left_out"]])
    say_all([f"length: {entry['video']}: {entry['reason']}" for entry in result["length_differs"]])
    if hdr := result["hdr"]:
        video, kind = next(iter(hdr.items()))
        say(f"HDR: {len(hdr)} videos, such as {video} ({kind}), are read as if their colours were ordinary ones (D82).")
    say_all([f"replaced: {entry['video']}: {entry['reason']}" for entry in result["changed"]])
    if result["changed"]:
        say(f"The cache holds features of the old files. Make them anew:  {result['repair']}")
    if result["touched"]:
        say(
            f"{result['touched']} videos were modified after extraction, too many to compare at every start. "
            "pipeline cache verify --sources compares them."
        )
    number, parts = result.get("part", (1, 1))
    if parts > 1:
        say(_other_parts(number, parts, result["other_parts_lack"], complete=not failures))
    elif result["skipped"] == result["videos"]:
        say(f"{result['skipped']} of {result['videos'] + result['failed']} videos cached; nothing to do")


def _other_parts(number: int, parts: int, lacking: int, *, complete: bool) -> str:
    other = "1 other part" if parts == 2 else f"{parts - 1} other parts"
    videos = "1 video" if lacking == 1 else f"{lacking} videos"
    are, lack = ("is", "lacks") if parts == 2 else ("are", "lack")
    what = f"{other} still {lack} {videos}" if lacking else f"so {are} {other}"
    return f"part {number} of {parts} is {'complete' if complete else 'finished, with failures'}; {what}"


def show_training(result: Result) -> None:
    """The last losses, and where the run is. What is logged per level (``kd/8``) is in metrics.jsonl."""
    table = new_table("", "")
    for key, value in result.items():
        if key == "seconds":
            table.add_row("time", clock(value))
        elif "/" not in key and not isinstance(value, Mapping | list | tuple):
            table.add_row(in_words(key), cell(value))
    show_table("The student:", table)
    if result.get("first_step") == result.get("steps") is not None:
        say(f"{result['steps']} of {result['steps']} steps were done before; nothing to do")


def show_evaluation(result: Result) -> None:
    """The result table: accuracy with its interval beside the majority baseline, per class and per question type.

    Below the line of the paper's exact match stand its other readings: closed label sets, one answer per video.
    """
    _held_out(result)
    table = new_table("", "n", "correct", "top-1", "95 % interval", "top-5", FREQUENT)
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
    show_table("Accuracy in %:", table)
    if confusion := result.get("confusion"):
        _confusion(confusion)
    if (normalised := result.get("normalised")) and normalised["more"]:
        say(f"{normalised['more']} more would be right after normalisation (case, punctuation, articles, two = 2).")
    if answers := result.get("answers"):
        say(f"Given most often: {_counts(answers)}.")
    if result.get("macro") is not None:
        say(f"Mean recall over the classes {percent(result['macro'])}, macro-F1 {percent(result.get('macro_f1'))}.")
    if "seed" in result:
        say(f"One seed ({result['seed']}), {result['videos']} videos; {_how(result)}")
    _protocol(result)
    if (before := result.get("resumed", 0)) and before == result["n"]:
        say(f"{before} of {before} answers were there before; nothing to do")


def show_baselines(result: Result) -> None:
    """One row per baseline, in the order of fitting."""
    _held_out(result)
    if result["baselines"]:
        table = new_table("", "n", "correct", "top-1", "95 % interval", "top-5", FREQUENT)
        for name, part in result["baselines"].items():
            _tally(table, name, part)
        show_table(f"Accuracy in % on {printable(result['split'])}:", table)
        say(
            f"Column {FREQUENT!r}: always the most frequent answer of the {printable(result['split'])} questions. "
            "Row 'majority': that of the training questions, per kind of question."
        )
    for name, part in result["baselines"].items():
        if unfit := part["not_fitted"]:
            count = sum(task["samples"] for task in unfit.values())
            say(
                f"{name} could not be fitted to {count} of {part['n']} questions and gives the most frequent training "
                f"answer there: {'; '.join(dict.fromkeys(task['reason'] for task in unfit.values()))}"
            )
    for name, reason in result["refused"].items():
        say(f"{name} was left out: {reason}")
    for part in list(result["baselines"].values())[:1]:
        say(f"{part['videos']} videos; {_how({**part, 'interval': None})}")
        _protocol(part)
    say(f"Fitted on {result['train_samples']} samples, chosen on {result['val_samples']} of val; in {result['out']}")
    if not result["fitted"]:
        say(f"{len(result['baselines'])} of {len(result['baselines'])} were there before; nothing to do")


def show_ablation_plan(result: Result) -> None:
    """``ablate --dry-run``."""
    show_estimate("ablate", result)
    names = [printable(name) for name in result["names"]]
    more = f", … ({len(names) - SHOWN} more; --json lists all)" if len(names) > SHOWN else ""
    say(f"Variants: {', '.join(names[:SHOWN])}{more}")


def show_ablation(result: Result) -> None:
    """One line an arm over its seeds, then what is not done, and why."""
    _held_out(result)
    table = new_table("arm", "seeds", "correct", "n", "top-1", "95 % interval", "sd")
    for arm, part in result["arms"].items():
        low, high = part["interval"] or (None, None)
        span = f"{percent(low)} to {percent(high)}" if low is not None else ""
        counts = (str(len(part["seeds"])), cell(part["k"]), cell(part["n"]), percent(part["accuracy"]))
        table.add_row(printable(arm), *counts, span, percent(part["seed_sd"]))
    show_table("Accuracy in % on test; intervals draw whole videos of the seeds' average, sd is over seeds:", table)
    for row in result["variants"]:
        if row["status"] == "dropped":
            say(f"dropped: {row['variant']}: {row['reason']}")
        elif row["status"] == "waiting":
            say(f"waiting: {row['variant']}: {row.get('step', 0)} of {row.get('steps', '?')} steps")
    if result.get("done_before") == len(result["variants"]):
        say(f"{result['done_before']} of {len(result['variants'])} variants were done before; nothing to do")


def show_tour(result: Result) -> None:
    """One line a model, one column a task: right of all, in %, with its interval."""
    tasks: Mapping[str, Mapping[str, Result]] = result["table"]
    table = new_table("top-1 on test, in %", *(f"{task} (n = {_n(rows)})" for task, rows in tasks.items()))
    for row in next(iter(tasks.values())):
        table.add_row(printable(row), *(_with_interval(rows[row]) for rows in tasks.values()))
    show_table("A coarse task that captions mention, and a fine one that they never do:", table)
    say("Every run is an ordinary run folder. What to open next:")
    for folder in result["runs"].values():
        pages = [f"{folder}/lambda-0", f"{folder}/lambda-1", "--out", f"{folder}/report.html"]
        to_type(shlex.join(["pipeline", "report", *pages]))
    say(f"Seed {result['seed']} alone: a difference between two lines may be the seed's. Intervals: 95 %, over videos.")
    if result["done_before"] == result["jobs"]:
        say(f"{result['jobs']} of {result['jobs']} were done before; nothing to do")


def _n(rows: Mapping[str, Result]) -> int:
    return int(next(iter(rows.values()))["n"])


def _with_interval(part: Result) -> str:
    low, high = part["by_video"]["interval"]
    return f"{100 * part['top1']:.1f}  ({100 * low:.1f} to {100 * high:.1f})"


def show_diagnosis(result: Result) -> None:
    """Cosine, centred cosine and constant per level."""
    if result["cosine"]:
        table = new_table("level", "cosine", "above constant", "centred")
        for level, cosine in result["cosine"].items():
            above = cosine - result["constant"]
            table.add_row(level, f"{cosine:.3f}", f"{above:+.3f}", f"{result['centred'][level]:.3f}")
        show_table(f"Alignment of {printable(result['checkpoint'])} on {result['samples']} samples:", table)
        say(f"One constant vector gets a cosine of {result['constant']:.3f}.")
    say(f"Mean similarity between levels (linear CKA): {cell(result['similarity_of_levels'])}")
    say(f"In {result['diagnostics']}; pipeline report draws it.")


def show_report(result: Result) -> None:
    """The answer of every study, what is missing, and where the page is."""
    for answer, held in zip(result["answers"], result["held_out"], strict=True):
        say(answer)
        if held["message"]:
            say(held["message"])
    for lack in result["missing"]:
        say(f"missing: {lack['what']} of {len(lack['runs'])} runs")
        if lack["command"]:
            to_type(lack["command"])
    runs = "1 run" if result["runs"] == 1 else f"{result['runs']} runs"
    say(f"{runs} on one page: {result['page']} ({size(result['bytes'])})")


def show_comparison(result: Result) -> None:
    """Every variant, then every pair, then what this many videos and seeds can show.

    Where the questions are not held out, that comes first, and no test is printed: p speaks of new videos.
    """
    _held_out(result)
    new = result["held_out"]["held_out"] is not False
    table = new_table("", "n", "correct", "top-1", "95 % interval", "seeds", "sd over seeds")
    for part in result["variants"]:
        row = [cell(result["n"]), f"{part['correct']:.6g}", percent(part["top1"]), _span(part["interval"])]
        table.add_row(printable(part["name"]), *row, cell(len(part["seeds"])), percent(part["seed_sd"]))
    show_table("Accuracy in % on the samples that all have answered:", table)
    for key, values in result["differing"].items():
        say(f"{key}: {' | '.join('-' if value is None else str(value) for value in values)}")
    pairs = new_table("b minus a", "difference", "95 % interval", *(("p", "p (Holm)", "p over seeds") if new else ()))
    for part in result["pairs"]:
        numbers = [f"{100 * part['difference']:+.1f}", _span(part["interval"], sign=True)]
        tests = ["" if part[key] is None else f"{part[key]:.2g}" for key in ("p", "p_holm", "seed_p")] if new else []
        pairs.add_row(f"{printable(part['b'])} minus {printable(part['a'])}", *numbers, *tests)
    show_table("Differences in points:" if new else "Differences on questions that are not held out, in points:", pairs)
    say(f"{result['n']} samples of {result['videos']} videos, paired. Intervals draw whole videos (BCa, 10,000 draws).")
    if new:
        say("p: exact sign-flip test over videos, of the seeds' averages; p over seeds flips the seeds that both have.")
        _power(result)
    if result["left_out"]:
        say(f"{result['left_out']} samples are left out: not every run has answered them.")


def show_synth(result: Result) -> None:
    """What was drawn, and where."""
    now = f"{result['written']} drawn now" if result["written"] else "all drawn before; nothing to do"
    say(f"{result['videos']} videos, {result['frames']:,} frames in {result['folder']} ({now})")


def show_doctor(result: Result) -> None:
    """One line per thing that was looked at."""
    table = new_table("", "", "")
    for column in table.columns:
        column.justify = "left"
    for check in result["checks"]:
        table.add_row(check["name"], "ok" if check["ok"] else "NO", printable(check["detail"]))
    show_table("What is here:", table)


# ---------------------------------------------------------------- parts


def _held_out(result: Result) -> None:
    """First of all: whether the questions are new to the student."""
    if message := (result.get("held_out") or {}).get("message"):
        say(message)


def _power(result: Result) -> None:
    """What each pair can show, and what other differences would take."""
    pairs = [part for part in result["pairs"] if part["power"]]
    if not pairs:
        return
    first = pairs[0]["power"]
    table = new_table("", "over videos", "over seeds", *(f"for {points} points" for points in first["wanted"]))
    for part in pairs:
        power = part["power"]
        shown = [_points(power["detectable_over_videos"]), _points(power["detectable_over_seeds"])]
        needs = [_needs(need) for need in power["wanted"].values()]
        table.add_row(f"{printable(part['b'])} minus {printable(part['a'])}", *shown, *needs)
    show_table(
        f"The smallest difference that such a comparison finds in {100 * first['power']:.0f} % of repetitions "
        f"(p < {first['alpha']:g}, before Holm's correction), and the videos / seeds that other differences take:",
        table,
    )
    floor = max((part["power"]["smallest_seed_p"] or 0 for part in pairs), default=0)
    if floor >= first["alpha"]:
        say(
            f"p over seeds cannot fall below {floor:g} with so few seeds; "
            f"it takes {first['fewest_seeds']} to fall below {first['alpha']:g}."
        )


def _points(value: float | None) -> str:
    return "nothing" if value is None else f"{100 * value:.1f} points"


def _needs(wanted: Result) -> str:
    videos, seeds = wanted["videos"], wanted["seeds"]
    return " / ".join("-" if number is None else f"{number:,}" for number in (videos, seeds))


def _tally(table: Table, name: str, part: Result) -> None:
    by_video = part.get("by_video") or {}
    shares = [percent(part.get(key)) for key in ("top1", "top5", "majority")]
    span = _span(by_video.get("interval") or part.get("interval"))
    table.add_row(name, cell(part["n"]), cell(part["correct"]), shares[0], span, *shares[1:])


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
    table = new_table("true, said:", *map(printable, labels))
    for name, row in zip(labels, confusion["counts"], strict=False):
        table.add_row(printable(name), *map(cell, row))
    show_table("Answers:", table)
    for name, said in confusion.get("other", {}).items():
        say(f"{labels[-1]} for {name}: {_counts(said)}")


def _counts(answers: Sequence[Sequence[object]]) -> str:
    return ", ".join(f"{str(answer)!r} ({cell(count)})" for answer, count in answers)


def _protocol(result: Result) -> None:
    """Whether n is the published one; what is missing, by name; and what the score is if all of that is wrong."""
    if missing := result.get("missing_samples"):
        worst = result["worst_case"]
        say(
            f"{missing} of {worst['n']} samples are missing. If all of them were wrong: "
            f"{worst['correct']} of {worst['n']}, {percent(worst['top1'])} %."
        )
        say_all([f"missing: {video}: {reason}" for video, reason in result["missing_videos"].items()])
    if published := result.get("published_n"):
        same = "that of the published figures" if published == result["n"] else f"not the published {published}"
        say(f"n = {result['n']} is {same}.")


def _coverage(coverage: Mapping[str, Result]) -> Table:
    table = new_table("", *next(iter(coverage.values())))
    for split, counts in coverage.items():
        table.add_row(
            printable(split), *(str(len(part) if hasattr(part, "__len__") else part) for part in counts.values())
        )
    return table
