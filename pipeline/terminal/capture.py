"""What is drawn, as text."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable

from rich.console import Console


def as_text(draw: Callable[[Console], None]) -> str:
    """What `draw` draws, as wide as the terminal, with colours only on one."""
    width = shutil.get_terminal_size((110, 40)).columns
    console = Console(file=io.StringIO(), width=width, force_terminal=sys.stdout.isatty(), no_color=None)
    with console.capture() as text:
        draw(console)
    return "\n".join(line.rstrip() for line in text.get().splitlines())
