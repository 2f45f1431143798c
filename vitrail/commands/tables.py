"""Results as text: aligned columns, and JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def as_json(content: Any) -> str:
    """For programs to read. Halves of characters, which names of files and classes may have and UTF-8 cannot say, are
    written as JSON's escapes."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; those whose heading starts with > to the right."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        grid.add_row(*map(Text, row))
    return rendered(lambda console: console.print(grid))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, as `table` has it, aligned for those who read it as it is."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in ([c.removeprefix(">") for c in columns], *rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    right = [column.startswith(">") for column in columns]
    lines.insert(1, ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)])
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in lines
    )


def rendered(draw: Callable[["Console"], None]) -> str:
    """What `draw` prints, as wide and as coloured as stdout can show: a file or a pipe gets lines of any length."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as captured:
        draw(console)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
