"""Shards looked at from the command line: the plain facts of `shards.inspect`, with tokens turned into text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import UsageError
