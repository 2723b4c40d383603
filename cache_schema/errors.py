"""What can be wrong with a cache, each with the command that helps.

All are ``ValueError``: the user gave a folder that does not hold what this run needs.
``SegmentFailed`` is not one of them: it is the signal of a producer that one video cannot be used.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Self

from cache_schema.objects import ObjectPath, StorePath


class CacheError(ValueError):
    """Base of all cache errors. The message ends with the command that helps, when the caller gave one."""

    def __init__(self, message: str, *, help_command: str = "") -> None:
        super().__init__(message)
        self.help_command = ""
        self.with_help(help_command)

    def with_help(self, help_command: str) -> Self:
        """End the message with this command, unless it ends with one already. Returns the error itself."""
        if help_command and not self.help_command:
            self.help_command = help_command
            self.args = (f"{self.args[0]}\n  {help_command}",)
        return self


class CacheMissing(CacheError):
    """Something that was asked for is not in the cache (no store, no modality, or frames not extracted)."""


class CacheMismatch(CacheError):
    """The cache is sound but was made with other settings, or by a newer format.

    Attributes:
        differences: field -> (cached value, wanted value); empty when the difference is not one of settings.
    """

    def __init__(
        self, message: str, *, help_command: str = "", differences: Mapping[str, tuple[object, object]] | None = None
    ) -> None:
        super().__init__(message, help_command=help_command)
        self.differences = dict(differences or {})

    @classmethod
    def between(cls, where: str, differences: Mapping[str, tuple[object, object]]) -> CacheMismatch:
        """The list of differing fields as a table (cached, wanted) and the two ways out."""
        rows = [("field", "cached", "wanted")]
        rows += [(field, _show(cached), _show(wanted)) for field, (cached, wanted) in differences.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = "\n".join(f"  {name:<{widths[0]}}  {cached:<{widths[1]}}  {wanted}" for name, cached, wanted in rows)
        return cls(
            f"{where} was made with other settings than this run wants.\n{table}\n"
            "Use it as it is, with the cached values above, or make another in a new folder:",
            differences=differences,
        )


class CacheCorrupt(CacheError):
    """A file of the cache is damaged or is not the file that belongs there.

    Attributes:
        file: the damaged file.
        kind: short class of the damage, such as ``truncated`` or ``frame_crc``.
        video_id, frame_index: set when one frame is known to be hit.
    """

    def __init__(
        self,
        message: str,
        *,
        help_command: str = "",
        file: StorePath | None = None,
        kind: str = "corrupt",
        video_id: str | None = None,
        frame_index: int | None = None,
    ) -> None:
        super().__init__(message, help_command=help_command)
        self.file, self.kind = file, kind
        self.video_id, self.frame_index = video_id, frame_index

    @classmethod
    def of_shard(
        cls,
        file: StorePath,
        what: str,
        *,
        kind: str,
        video_id: str | None = None,
        frame_index: int | None = None,
    ) -> CacheCorrupt:
        """A damaged shard file: it is named, and removing it makes its task pending again."""
        remove = file.remove_command if isinstance(file, ObjectPath) else f"rm -- {shlex.quote(str(file))}"
        return cls(
            f"{file} {what}.\nRemove that file and extract again; only its own videos are redone:\n  {remove}",
            file=file,
            kind=kind,
            video_id=video_id,
            frame_index=frame_index,
        )


class SegmentFailed(Exception):
    """Raised by a producer (or its iterator): this video gives no trustworthy features and is quarantined.

    Args:
        kind: short machine-readable class, such as ``truncated`` or ``non_finite``.
        reason: one sentence a user can act on. It is stored, so it must not hold times or random names.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def _show(value: object) -> str:
    return value if isinstance(value, str) and value else repr(value)
