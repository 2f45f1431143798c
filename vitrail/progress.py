"""What is going on, on stderr: live bars on a terminal, and elsewhere a plain line now and then.

No thread draws: each call of `advance` or `update` redraws when the last redraw is 0.1 s old, so that a bar that stands
still means work that stands still.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitrail.errors import speaks

REDRAW = 0.1  # seconds between two redraws on a terminal
REPORT = 10.0  # seconds between two lines elsewhere, of work that is counted
TRAINING_REPORT = 60.0  # and of training, which leaves a line an epoch anyway
NOTE = 1.0  # and between two notes in a file, for who watches from elsewhere


class Advance(Protocol):
    """What `track` yields."""

    def __call__(self, n: int = 1) -> None:
        """Count `n` more images or bytes as done."""


def on_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be redrawn."""
    return speaks() and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def say(text: str) -> None:
    """One plain line on stderr, above what is live there."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def counted(number: int, one: str, several: str = "") -> str:
    """`1 image`, `1,438 images`; `several` is the plural of a word that has none in -s: `1 class`, `200 classes`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def duration(seconds: float) -> str:
    """A time for people: `1.5 s`, `35 s`, `1 min 59 s`, `2 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min"


class _Screen:
    """The live part at the bottom of the terminal: what is shown at once shares it, one row under another."""

    def __init__(self) -> None:
        self.rows: list[Callable[[], RenderableType]] = []
        self.live: Live | None = None
        self.drawn = 0.0

    def add(self, row: Callable[[], RenderableType]) -> None:
        self.rows.append(row)
        if self.live is None:
            # stdout is left alone: results may be piped to a file while bars show.
            self.live = Live(
                get_renderable=lambda: Group(*(row() for row in self.rows)), console=Console(stderr=True),
                auto_refresh=False, transient=True, redirect_stdout=False,
            )  # fmt: skip
            self.live.start()
        self.redraw(at_once=True)

    def remove(self, row: Callable[[], RenderableType]) -> None:
        self.rows.remove(row)
        if self.live is not None and not self.rows:
            self.live.stop()
            self.live = None
        self.redraw(at_once=True)

    def redraw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.live is not None and (at_once or now - self.drawn >= REDRAW):
            self.drawn = now
            self.live.refresh()


_screen = _Screen()


@contextmanager
def track(total: int | None, what: str, unit: Literal["images", "bytes"] = "images") -> Iterator[Advance]:
    """Shows how far a piece of work is, until the block ends; on a terminal the bar then goes away.

    `total` counts images or bytes; None when it is not known. The block calls the yielded `advance(n)`.
    """
    count = _Count(total, what, unit)
    if not on_terminal():
        yield count.report
        count.close()
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[pace]}", style="progress.remaining"), auto_refresh=False,
    )  # fmt: skip
    task = bar.add_task(what, total=total, pace="")

    def advance(n: int = 1) -> None:
        count.done += n
        bar.update(task, completed=count.done, pace=count.pace())
        _screen.redraw()

    _screen.add(bar.get_renderable)
    try:
        yield advance
    finally:
        _screen.remove(bar.get_renderable)


class _Count:
    """How much is done, since when, and how that is put in words."""

    def __init__(self, total: int | None, what: str, unit: Literal["images", "bytes"]) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self.started = self.reported = time.monotonic()

    def amount(self, n: float) -> str:
        return f"{n / 1e6:,.1f} MB" if self.unit == "bytes" else f"{n:,.0f} images"

    def pace(self) -> str:
        """Rate and time left, as far as they are known."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        left = f", {duration(max(self.total - self.done, 0) / rate)} left" if self.total and rate else ""
        return f"{self.amount(rate)}/s{left}"

    def report(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.reported >= REPORT:
            self.reported = now
            amount = self.amount(self.done)
            if self.total:
                amount = f"{amount.rpartition(' ')[0]} of {self.amount(self.total)}"
            say(f"{self.what}: {amount}, {self.pace()}")

    def close(self) -> None:
        if self.reported > self.started:
            say(f"{self.what}: {self.amount(self.done)} in {duration(time.monotonic() - self.started)}")


class TrainingDisplay:
    """The state of a training run, live: where it is, how well it does, how fast, and when it will be done. A file
    `noted` has the same words while the run goes on, and the share of it that is done, as JSON."""

    def __init__(self, noted: Path | None = None) -> None:
        self.noted, self.noted_at = noted, -NOTE
        self.live = on_terminal()
        self.text = "starting"
        self.step, self.steps = 0, 1
        self.reported = time.monotonic()
        self.row = self._row  # one object, for a bound method is a new one each time

    def __enter__(self) -> Self:
        if self.live:
            _screen.add(self.row)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live:
            _screen.remove(self.row)
        if self.noted is not None:
            with suppress(OSError):
                self.noted.unlink(missing_ok=True)

    def update(
        self, step: int, steps: int, epoch: float, epochs: int, learnt: str, images_per_second: float, left: float
    ) -> None:
        """After a step: `step` of `steps`, `epoch` with its fraction, in words what the latest steps gave, how fast
        they were, and how many seconds are `left` at that rate."""
        now = time.monotonic()
        self.step, self.steps = step, steps
        to_note = self.noted is not None and now - self.noted_at >= NOTE
        to_show = now - self.reported >= (REDRAW if self.live else TRAINING_REPORT)
        if not to_note and not to_show:
            return
        self.text = (
            f"step {step:,}/{steps:,} · epoch {epoch:.1f}/{epochs} · {learnt}"
            f" · {images_per_second:,.0f} images/s · {duration(left)} left"
        )
        if to_note:
            self.note(now)
        if not to_show:
            return
        self.reported = now
        if self.live:
            _screen.redraw()
        else:
            say(self.text)

    def note(self, now: float) -> None:
        """Write the state into the file, in one step. It is there to be looked at: where there is no space left, that
        is said when something has to be saved."""
        assert self.noted is not None
        self.noted_at, partial = now, self.noted.with_name(f".{self.noted.name}")
        with suppress(OSError):
            partial.write_text(json.dumps({"words": self.text, "share": self.step / self.steps}), encoding="utf-8")
            partial.replace(self.noted)

    def line(self, text: str) -> None:
        """Leaves a line behind, above the live part."""
        say(text)

    def _row(self) -> RenderableType:
        grid = Table.grid(expand=True)
        grid.add_row(ProgressBar(total=self.steps, completed=self.step))
        grid.add_row(Text(self.text, no_wrap=True, overflow="ellipsis"))
        return grid
