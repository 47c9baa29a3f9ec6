"""Every way in which a shard can be refused, each with a hint that says what to do."""

from __future__ import annotations


class ShardError(Exception):
    """Root of all errors raised by `shards`."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Corrupt(ShardError):
    """Bytes differ from the checksum that was written with them."""


class Truncated(ShardError):
    """The file ends before its contents do."""


class UnknownVersion(ShardError):
    """Written by a format or codec version that this reader does not know."""


class ContractMismatch(ShardError):
    """Two contracts that should agree do not; the message names the field and both values."""


class Incomplete(ShardError):
    """A shard set whose manifest is not published yet: what makes it has not finished."""


class InvalidRecord(ShardError):
    """A record that must not be written: ids outside the vocabulary, NaN, unsorted ids, mass above one."""


class InvalidRequest(ShardError):
    """What was asked of a set can be done with it by nobody: a sample that it lacks, more ids than it keeps."""


class StorageFailed(ShardError):
    """The disk or the store refused (full, quota, I/O error, no access); what was published before is intact."""


def unreadable(called: str, error: OSError, *, missing: str) -> Incomplete | StorageFailed:
    """What a file that does not open is: one that is not there, with the hint `missing`, or one that may be intact."""
    if isinstance(error, FileNotFoundError):
        return Incomplete(f"{called} cannot be opened: {error.strerror}", hint=missing)
    return StorageFailed(
        f"{called} cannot be read: {error.strerror}", hint="check the disk and who may read the file, and try again"
    )
