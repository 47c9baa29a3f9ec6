"""A comparison of student and teacher, drawn: the response coloured by KL, and its worst tokens as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.compare import FULL_KL, summary, visible
from pipeline.terminal.capture import as_text
from stages.distill.compare import ComparedToken, Likely

_WORST = 12
_COLD, _WARM = (0x30, 0x3A, 0x38), (0xC0, 0x50, 0x10)


def rendered(title: str, prompt: str, compared: Sequence[ComparedToken]) -> str:
    """The comparison as text, with colours only on a terminal."""

    def draw(console: Console) -> None:
        console.print(Text(title, style="bold"))
        console.print(Text(summary(compared)))
        console.print(Text(f"\n{prompt.strip()}\n", style="dim"))
        console.print(Text.assemble(*((token.label, f"white on {_colour(token.kl)}") for token in compared)))
        console.print()
        console.print(_table(compared))

    return as_text(draw)


def _colour(kl: float) -> str:
    heat = min(max(kl, 0.0) / FULL_KL, 1.0)
    red, green, blue = (round(cold + heat * (warm - cold)) for cold, warm in zip(_COLD, _WARM, strict=True))
    return f"rgb({red},{green},{blue})"


def _table(compared: Sequence[ComparedToken]) -> Table:
    worst = sorted(compared, key=lambda token: -token.kl)[:_WORST]
    attention = any(token.teacher_looks for token in worst)
    table = Table(
        title=f"the {len(worst)} tokens that are furthest apart", title_justify="left", box=None, pad_edge=False
    )
    looking = ("teacher looks at", "student looks at") if attention else ()
    for name in ("at", "label", "KL", "teacher", "student", *looking):
        table.add_column(name, justify="right" if name in ("at", "KL") else "left")
    for token in sorted(worst, key=lambda token: token.position):
        looks = (_likely(token.teacher_looks), _likely(token.student_looks)) if attention else ()
        kl = Text(f"{token.kl:.2f}", style=f"white on {_colour(token.kl)}")
        label = Text(visible(token.label))
        table.add_row(str(token.position), label, kl, _likely(token.teacher), _likely(token.student), *looks)
    return table


def _likely(tokens: Sequence[Likely]) -> Text:
    return Text("  ".join(f"{visible(token.text)} {token.share:.0%}" for token in tokens))
