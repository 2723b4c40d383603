"""``--set key=value``: typed changes to a configuration, with errors that say what was expected."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConfigError
from stages.config import SECRETS, PipelineConfig

SPEED_ONLY = ("data.io", "data.reader_threads", "data.allow_changed", "extract.")  # beginnings; no number
# Where things lie. What lies there is known by content (provenance.py), so a move changes no run.
PLACES = (
    *("data.videos", "data.annotations", "clip.weights", "teacher.model", "teacher.weights"),
    *("student.init", "student.tokenizer", "decode.llm", "decode.llm_config"),
)
DRAWN = "cache/miniature/world/"  # where `pipeline synth` draws videos and annotations that belong together
TEACHER_ONLY = ("align.", "teacher.")  # what does nothing where train.lambda_kd is 0
Schema = Mapping[str, Any]  # a JSON schema, as pydantic writes it


def apply(config: PipelineConfig, sets: Sequence[str]) -> PipelineConfig:
    """``config`` with every ``section.key=value`` of ``sets`` applied, in order.

    A value is read as JSON where it is JSON and as text otherwise; where the setting is text, only a quoted JSON
    string is unquoted, so that ``--set decode.revision=12e4567`` stays what it is. ``teacher.layer`` alone also makes
    that layer the extracted one, unless it is among ``teacher.layers`` already; ``data.videos`` alone leaves the drawn
    annotations of the miniature behind, so that other videos are without any.

    Raises:
        ConfigError: no such key (the nearest are named), a value of another kind (the message says what is expected),
            or values that contradict each other.
    """
    values = config.model_dump(mode="json", context=SECRETS)
    fields = _fields()
    for item in sets:
        key, equals, raw = item.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {item}: expected key=value.\nFor example:  --set train.lr=3e-4")
        if key not in fields:
            raise ConfigError(_unknown(key, fields))
        section, name = key.split(".")
        values[section][name] = _parse(raw, fields[key])
    changed = {item.partition("=")[0].strip() for item in sets}
    if config.preset == "miniature" and "data.annotations" not in changed:
        before, now = config.data, values["data"]
        if now["videos"] != before.videos and before.annotations.startswith(DRAWN):
            now["annotations"] = ""  # what was drawn says nothing about other videos
    if "teacher.layer" in changed and "teacher.layers" not in changed:
        layer = values["teacher"]["layer"]
        if layer not in values["teacher"]["layers"]:
            values["teacher"]["layers"] = [layer]
    return validate(values)


def validate(values: Mapping[str, Any]) -> PipelineConfig:
    """The configuration that ``values`` (sections of keys, as in config.json) describe. Raises ConfigError."""
    try:
        config = PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, values)) from error
    for key, value in flatten(config).items():
        if any(isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)):
            raise ConfigError(f"{key}: expected a finite number, got {value}")
    _consistent(config)
    return config


def flatten(config: PipelineConfig) -> dict[str, Any]:
    """Dotted key -> value as in JSON, for every setting."""
    sections = config.model_dump(mode="json")
    flat: dict[str, Any] = {"preset": sections.pop("preset")}
    for section, values in sections.items():
        flat.update({f"{section}.{name}": value for name, value in values.items()})
    return flat


def deciding(config: PipelineConfig) -> dict[str, Any]:
    """As ``flatten``, without what changes speed and no number: how the cache is read may differ within one run."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(SPEED_ONLY)}


def effective(config: PipelineConfig) -> dict[str, Any]:
    """As ``deciding``, without the teacher's settings where there is none: equal for runs that give equal numbers."""
    without = TEACHER_ONLY if config.train.lambda_kd == 0 else ()
    return {key: value for key, value in deciding(config).items() if not key.startswith(without)}


def describe(error: ValidationError, values: Mapping[str, Any]) -> str:
    """``train.lr: expected a number > 0, got 'fast'`` for every wrong key of a configuration, one line each."""
    fields = _fields()
    lines: dict[str, str] = {}
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"][:2])
        if key in lines:
            continue
        if key not in fields:
            lines[key] = _unknown(key, fields) if problem["type"] == "extra_forbidden" else f"{key}: {problem['msg']}"
            continue
        section, name = key.split(".")
        own_words = problem["type"] == "value_error"  # raised by a validator of stages.config
        wanted = problem["msg"].removeprefix("Value error, ") if own_words else f"expected {_expected(fields[key])}"
        lines[key] = f"{key}: {wanted}" + ("" if own_words else f", got {values[section][name]!r}")
    return "\n".join(lines.values())


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to five of ``known`` that look like ``name``; a name without its section finds every section that has it."""
    known = list(known)
    leaf = name.rpartition(".")[2]
    same = [key for key in known if key.rpartition(".")[2] == leaf]
    leaves = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in known], n=5, cutoff=0.7)
    alike = [key for key in known if key.rpartition(".")[2] in leaves]
    return list(dict.fromkeys([*same, *difflib.get_close_matches(name, known, n=5), *alike]))[:5]


def _unknown(key: str, fields: Mapping[str, Schema]) -> str:
    if key == "preset":
        return "preset: is chosen by --preset NAME, not by --set"
    sections = sorted({known.partition(".")[0] for known in fields})
    if key in sections:
        names = ", ".join(known for known in fields if known.startswith(f"{key}."))
        return f"{key}: is a section; set one of its keys: {names}"
    found = nearest(key, fields)
    hint = f"did you mean {', '.join(found)}?" if found else f"keys start with {', '.join(sections)}"
    return f"{key}: no such setting; {hint}"


def _parse(raw: str, schema: Schema) -> Any:
    try:
        value = json.loads(raw)
    except ValueError:
        return raw
    return raw if _is_text(schema) and not isinstance(value, str) else value


def _is_text(schema: Schema) -> bool:
    return schema.get("type") == "string"


def _fields() -> dict[str, Schema]:
    """Dotted key -> JSON schema of the value, for every setting of every section."""
    whole = PipelineConfig.model_json_schema()
    fields: dict[str, Schema] = {}
    for section, reference in whole["properties"].items():
        if "$ref" in reference:
            model = whole["$defs"][reference["$ref"].rpartition("/")[2]]
            fields.update({f"{section}.{name}": schema for name, schema in model["properties"].items()})
    return fields


_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}


def _expected(schema: Schema) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(str(option) for option in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} numbers such as {json.dumps(schema.get('default'))}"
    if schema.get("type") == "array":
        return f"a list, each {_expected(schema['items'])}, such as [8, 9, 10], 8-10 or all"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS if name in schema]
    return " ".join([_KINDS.get(schema.get("type", ""), "another value"), " and ".join(bounds)]).strip()


def _leaves(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else (value,)


def _consistent(config: PipelineConfig) -> None:
    """Settings that are each right and together wrong; found before anything is loaded."""
    teacher, student, train = config.teacher, config.student, config.train
    problems = []
    if teacher.layer not in teacher.layers:
        problems.append(
            f"teacher.layer: {teacher.layer} is not among the extracted teacher.layers "
            f"({', '.join(map(str, teacher.layers))}); add it:  --set teacher.layers={teacher.layer}"
        )
    if teacher.geometry != config.clip.geometry:
        problems.append(
            f"teacher.geometry: {teacher.geometry} differs from clip.geometry ({config.clip.geometry}); "
            f"student and teacher must see the same picture:  --set clip.geometry={teacher.geometry}"
        )
    if max(config.align.levels) > student.num_layers + 1:
        problems.append(
            f"align.levels: {max(config.align.levels)} is above {student.num_layers + 1}, the embedding output and "
            f"student.num_layers={student.num_layers} blocks; "
            f"take the last:  --set align.levels={student.num_layers + 1}"
        )
    if student.hidden_size % student.num_heads:
        problems.append(
            f"student.num_heads: {student.num_heads} does not divide student.hidden_size ({student.hidden_size})"
        )
    if config.data.num_frames > student.max_frames:
        problems.append(
            f"data.num_frames: {config.data.num_frames} is above student.max_frames ({student.max_frames}); "
            f"raise it:  --set student.max_frames={config.data.num_frames}"
        )
    if train.micro_batch > train.batch_size:
        problems.append(
            f"train.micro_batch: {train.micro_batch} is above train.batch_size ({train.batch_size}); "
            f"lower it:  --set train.micro_batch={train.batch_size}"
        )
    if config.decode.num_return > config.decode.num_beams:
        problems.append(
            f"decode.num_return: {config.decode.num_return} is above decode.num_beams ({config.decode.num_beams}); "
            f"lower it:  --set decode.num_return={config.decode.num_beams}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
