"""What `vitrail bench` found → a table, a plot, and a page that keeps what was found on each machine."""

import itertools
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

from vitrail.errors import BadInput
from vitrail.pages.pictures import moment
from vitrail.progress import counted
from vitrail.speed.bench import FLOORS, TASKS, Session
from vitrail.speed.rounds import MODELS, OURS, Row
from vitrail.vit.floor import forward_flops, training_flops
from vitrail.weights.files import write_text

COLUMNS = ("", "contender", ">median", ">lowest to highest", ">× best peer", ">of the floor", ">of the matrix rate")
# FLOP/s of dense products: NVIDIA's data sheets of the H100 SXM and the H200 SXM.
DATA_SHEETS = {("NVIDIA H100 80GB HBM3", "bf16"): 989.4e12, ("NVIDIA H200", "bf16"): 989.4e12}
HEAD = "# Speed beside peers\nWhat `vitrail bench` measured; `make bench` makes all it takes, and measures here.\n"

# Of the plot, in pixels
WIDTH, ROW, HEADING, LABELS, VALUES = 720, 24, 44, 150, 80
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.heading { font-weight: 600 }
.peer { fill: #8c959f } .ours { fill: #0969da } .limit { fill: #bc4c00 }
.floor { stroke: #bc4c00; stroke-width: 2; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.peer { fill: #6e7681 } .ours { fill: #4493f8 } .limit { fill: #f0883e }
.floor { stroke: #f0883e }
}
"""


def group(row: Row) -> tuple[int, str, int, str, str]:
    """What a row is compared within; groups are in the order of tasks, models, batches."""
    return list(TASKS).index(row.task), row.model, row.batch, row.precision, row.device


def in_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that are compared with one another, as they were measured."""
    return [list(rows) for _, rows in itertools.groupby(sorted(rows, key=group), key=group)]


def heading(row: Row) -> str:
    """What a group of rows is about: `training, VIT-12, batch 128, fp32`."""
    parts = (
        row.task,
        row.model,
        f"batch {row.batch}" if row.batch else "",
        "" if row.task == "input" else row.precision,
    )
    return ", ".join(part for part in parts if part)


def table_rows(session: Session) -> list[tuple[str, ...]]:
    """The cells below COLUMNS."""
    found: list[tuple[str, ...]] = []
    for rows in in_groups(session.rows):
        rated = [row for row in rows if row.unit in ("images/s", "MB")]
        peers = [row.median for row in rated if not _ours(row) and row.contender not in FLOORS]
        best = (min if rows[0].unit == "MB" else max)(peers, default=None)
        floor = next((row.median for row in rows if row.contender in FLOORS), None)
        for place, row in enumerate(rows):
            low, high = row.spread
            compared = best is not None and row.contender not in FLOORS
            found.append((
                "" if place else heading(row), row.contender, f"{amount(row.median)} {row.unit}",
                "" if len(row.values) == 1 else f"{amount(low)} – {amount(high)}",
                f"{(best / row.median if row.unit == 'MB' else row.median / best):.2f}" if compared and best else "",
                f"{row.median / floor:.0%}" if floor and row.contender not in FLOORS else "",
                utilisation(row, session),
            ))  # fmt: skip
    return found


def utilisation(row: Row, session: Session) -> str:
    """Model FLOPs utilisation: the operations that the model needs, as a share of what a square product would do, and,
    of a GPU whose data sheet is known, as a share of what that promises."""
    flops = {"training": training_flops, "inference": forward_flops}.get(row.task)
    if flops is None or row.model not in MODELS or row.precision not in session.matrix_rate:
        return ""
    done = flops(MODELS[row.model]) * row.median
    promised = DATA_SHEETS.get((session.environment["gpu"] or "", row.precision))
    sheet = f"; {done / promised:.0%} of the data sheet" if promised else ""
    return f"{done / session.matrix_rate[row.precision]:.0%}{sheet}"


def notes(rows: Iterable[Row]) -> list[str]:
    """What rows say of themselves, each thing once."""
    said = {f"{row.contender}: {row.note}" if row.contender not in FLOORS else f"{heading(row)}: {row.note}": None
            for row in rows if row.note}  # fmt: skip
    return list(said)


def amount(value: float) -> str:
    """Three significant figures or all before the point: `41,700`, `119`, `33.1`, `0.284`."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ours(row: Row) -> bool:
    return row.contender.startswith(OURS)


# The page


def slug(environment: dict[str, Any]) -> str:
    """A name for the hardware: `nvidia-h100-80gb-hbm3`, `amd-epyc-9565-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", hardware(environment).lower()).strip("-")


def hardware(environment: dict[str, Any]) -> str:
    """The GPU, or the processor and how many cores of it there are."""
    return environment["gpu"] or f"{environment['cpu']}, {counted(environment['cores'], 'core')}"


def record(page: Path, environment: dict[str, Any]) -> Path:
    """Where the rows of a machine are kept: for `docs/speed.md`, in `results/speed`."""
    return page.resolve().parent.parent / "results" / "speed" / f"{slug(environment)}.json"


def read_record(path: Path) -> list[Session]:
    """The sessions that are kept there; none if there is no such file.

    Raises:
        BadInput: it is not what `write_page` wrote.
    """
    if not path.exists():
        return []
    try:
        return [
            Session(**kept | {"rows": tuple(Row(**row | {"values": tuple(row["values"])}) for row in kept["rows"])})
            for kept in json.loads(path.read_text("utf-8"))
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is not as vitrail bench wrote it ({error}): move it away, and measure anew.") from None


def merged(sessions: Sequence[Session], new: Session) -> list[Session]:
    """The sessions with a new one, whose groups of rows take the place of the same in earlier ones."""
    measured = {group(row) for row in new.rows}
    left = [replace(old, rows=tuple(row for row in old.rows if group(row) not in measured)) for old in sessions]
    return [*(session for session in left if session.rows), new]


def read_page(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after the block of a machine.

    Raises:
        BadInput: the block has no end.
    """
    text = page.read_text("utf-8") if page.exists() else HEAD
    before, begin, rest = text.partition(f"<!-- bench {name} -->\n")
    if not begin:
        return f"{text.rstrip()}\n\n", ""
    _, end, after = rest.partition(f"<!-- end {name} -->\n")
    if not end:
        raise BadInput(f"{page} has {begin.strip()}, and no <!-- end {name} --> on a line behind it: put it back.")
    return before, after


def check_page(page: Path, environment: dict[str, Any]) -> None:
    """Make sure that what is found on this machine can be put there.

    Raises:
        BadInput: the page, or the record behind it, is not as it was written.
    """
    if page.is_dir():
        raise BadInput(f"{page} is a folder; name a file, such as {page / 'speed.md'}.")
    read_record(record(page, environment))
    read_page(page, slug(environment))


def write_page(page: Path, session: Session) -> None:
    """Put what was found into the block of this machine, and its plot into `images/` beside the page. Blocks of other
    machines, and what stands outside of blocks, stay as they are; what was measured earlier and is not measured
    again stays in the block.

    Raises:
        BadInput: the page, or the record behind it, is not as it was written.
    """
    session = replace(session, environment=session.environment | {"command": public(session.environment["command"])})
    name, kept = slug(session.environment), record(page, session.environment)
    before, after = read_page(page, name)
    sessions = merged(read_record(kept), session)
    picture = plot([row for each in sessions for row in each.rows], hardware(session.environment))
    if picture:
        write_text(page.parent / "images" / f"speed-{name}.svg", picture)
    lines = block(sessions, f"images/speed-{name}.svg" if picture else None)
    content = "\n".join([*lines, "", f"Every value of every round is in [{kept.name}](../results/speed/{kept.name})."])
    write_text(kept, json.dumps([asdict(each) for each in sessions], indent=1, ensure_ascii=False) + "\n")
    write_text(page, f"{before}<!-- bench {name} -->\n{content}\n<!-- end {name} -->\n{after}")


def add_record(page: Path, path: Path) -> int:
    """Put rows that were kept on another machine on the page, as `write_page` would have; how many they are.

    Raises:
        BadInput: there is no such record, or it or the page is not as it was written.
    """
    sessions = read_record(path)
    if not sessions:
        raise BadInput(f"{path} has no rows; name a file that vitrail bench --output has written, in results/speed.")
    for session in sessions:
        write_page(page, session)
    return sum(len(session.rows) for session in sessions)


def public(command: str) -> str:
    """A command as everybody may read it: of files elsewhere on the machine, the names alone."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in shlex.split(command))


def block(sessions: Sequence[Session], picture: str | None) -> list[str]:
    """The Markdown lines of a machine: heading, plot, table, and what it was measured with.

    What a square product does is the machine's, not the session's: the highest that any of them measured counts.
    """
    rates = {precision: max(each.matrix_rate.get(precision, 0.0) for each in sessions)
             for precision in {precision for each in sessions for precision in each.matrix_rate}}  # fmt: skip
    lines = [f"## {hardware(sessions[-1].environment)}", ""]
    if picture:
        lines += [f"![Images/s of each contender, and the floor]({picture})", ""]
    lines += [f"| {' | '.join(column.removeprefix('>') for column in COLUMNS)} | run |"]
    lines += [f"|{'|'.join(' ---: ' if column.startswith('>') else ' --- ' for column in COLUMNS)}| ---: |"]
    alike = [replace(each, matrix_rate=rates) for each in sessions]
    cells = [(key, number, row) for number, each in enumerate(alike, 1) for key, row in _keyed(each)]
    lines += [f"| {' | '.join(row)} | {number} |" for _, number, row in sorted(cells, key=lambda cell: cell[0])]
    said = notes(row for each in sessions for row in each.rows)
    lines += ["", *(f"- {note}" for note in said), *([""] if said else [])]
    return [*lines, *(f"{number}. {conditions(each)}" for number, each in enumerate(sessions, 1))]


def _keyed(session: Session) -> list[tuple[tuple[Any, ...], tuple[str, ...]]]:
    rows = [row for rows in in_groups(session.rows) for row in rows]
    return [
        ((*group(row), place), cells) for place, (row, cells) in enumerate(zip(rows, table_rows(session), strict=True))
    ]


def conditions(session: Session) -> str:
    """When and with what a session was measured, in a line."""
    about = session.environment
    versions = {"Python": about["python"], "torch": about["torch"], **about["peers"]}
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in session.matrix_rate.items())
    return (
        f"{moment(about['started'])}, `{about['command']}`, commit {about['commit']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}, {about['platform']}. "
        f"Threads: {about['threads']}. "
        f"A square product does {rates}, a copy {session.bandwidth / 1e9:,.1f} GB/s."
    )


# The plot


def plot(rows: Sequence[Row], title: str) -> str | None:
    """An SVG of bars: training steps and inference (the largest batch) of the first model, a part for each precision;
    the floor is a line. None where neither was measured."""
    timed = [row for row in rows if row.task in ("training", "inference")]
    model = next((name for name in MODELS if any(row.model == name for row in timed)), timed[0].model if timed else "")
    largest = {task: max((row.batch for row in timed if (row.task, row.model) == (task, model)), default=0)
               for task in ("training", "inference")}  # fmt: skip
    parts = in_groups(row for row in timed if row.model == model and row.batch == largest[row.task])
    if not parts:
        return None
    drawn, top = [], 0
    for part in parts:
        drawn += bars(part, top)
        top += HEADING + ROW * len([row for row in part if row.contender not in FLOORS]) + 12
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}">',
        f"<title>Images/s on {escape(title)}</title>", f"<style>{STYLE}</style>", *drawn, "</svg>\n",
    ])  # fmt: skip


def bars(rows: Sequence[Row], top: int) -> list[str]:
    """One part of the plot, its upper edge at `top`."""
    contenders = [row for row in rows if row.contender not in FLOORS]
    floor = next((row.median for row in rows if row.contender in FLOORS), None)
    scale = (WIDTH - LABELS - VALUES) / max(row.median for row in rows)
    drawn = [f'<text class="heading" x="0" y="{top + 16}">{escape(heading(rows[0]))}: images/s</text>']
    for place, row in enumerate(contenders):
        y = top + HEADING + ROW * place
        drawn += [
            f'<text x="{LABELS - 10}" y="{y + 16}" text-anchor="end">{escape(row.contender)}</text>',
            f'<rect class="{"ours" if _ours(row) else "peer"}" x="{LABELS}" y="{y + 3}" '
            f'width="{row.median * scale:.1f}" height="{ROW - 6}" rx="2"/>',
            f'<text x="{WIDTH}" y="{y + 16}" text-anchor="end">{amount(row.median)}</text>',
        ]
    if floor is not None:
        x, bottom = LABELS + floor * scale, top + HEADING + ROW * len(contenders)
        drawn += [
            f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top + HEADING - 4}" y2="{bottom}"/>',
            f'<text class="limit" x="{x:.1f}" y="{top + HEADING - 8}" text-anchor="end">floor {amount(floor)}</text>',
        ]
    return drawn
