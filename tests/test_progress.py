"""Progress goes to stderr: bars on a terminal, lines elsewhere."""

import os
import pty
import subprocess
import sys

import pytest

from vitrail import progress
from vitrail.progress import TrainingDisplay, duration, track

SCRIPT = """
import time
from vitrail import progress
progress.REDRAW = 0
with progress.track(3, "decoding") as advance:
    for _ in range(3):
        advance()
with progress.TrainingDisplay() as display:
    for step in range(1, 5):
        display.update(step, 4, step / 2, 2, "loss 1.250 · accuracy 0.500", 1234.0, 4.0 - step)
        if step % 2 == 0:
            with progress.track(2_000_000, "loading", "bytes") as advance:
                advance(1_000_000)
            display.line(f"epoch {step // 2} [done]")
print("result")
"""


def on_terminal(**environment: str) -> tuple[str, str]:
    """stdout, and what a terminal was sent on stderr."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=theirs, text=True,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux says so when the other end is closed
            pass
        os.close(ours)
        stdout, _ = process.communicate()
    assert process.returncode == 0, shown.decode()
    return stdout, shown.decode()


def test_terminal() -> None:
    stdout, shown = on_terminal()
    assert stdout == "result\n"
    assert "decoding" in shown
    assert "3/3" in shown
    assert "1.0/2.0 MB" in shown
    assert "step 4/4 · epoch 2.0/2 · loss 1.250 · accuracy 0.500 · 1,234 images/s" in shown
    assert "epoch 2 [done]\r\n" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_no_color() -> None:
    _, shown = on_terminal(NO_COLOR="1")
    assert "\x1b[3" not in shown
    assert "\x1b[9" not in shown


def test_dumb_terminal() -> None:
    _, shown = on_terminal(TERM="dumb")
    assert shown == "epoch 1 [done]\r\nepoch 2 [done]\r\n"


def test_what_is_quick_says_nothing_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with track(10, "decoding") as advance, TrainingDisplay() as display:
        advance(10)
        display.update(1, 2, 0.5, 1, "loss 1.000", 100.0, 1.0)
        display.line("epoch 1")
    assert capsys.readouterr() == ("", "epoch 1\n")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_takes_long_leaves_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("vitrail.progress.time.monotonic", clock)
    with track(100, "decoding") as advance:
        for _ in range(25):
            clock.now += 1
            advance(4)
    with track(10_000_000, "downloading", "bytes") as advance:
        clock.now += 11
        advance(5_000_000)
    with TrainingDisplay() as display:
        for step in range(1, 100):
            clock.now += 1
            display.update(step, 1000, step / 100, 10, "loss 2.000", 40.0, 1000.0 - step)
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 40 of 100 images, 4 images/s, 15 s left",
        "decoding: 80 of 100 images, 4 images/s, 5.0 s left",
        "decoding: 100 images in 25 s",
        "downloading: 5.0 of 10.0 MB, 0.5 MB/s, 11 s left",
        "downloading: 5.0 MB in 11 s",
        "step 60/1,000 · epoch 0.6/10 · loss 2.000 · 40 images/s · 15 min 40 s left",
    ]


def test_a_failure_ends_the_bar() -> None:
    with pytest.raises(ValueError, match="no"), track(1, "decoding"), TrainingDisplay():
        raise ValueError("no")
    assert not progress._screen.rows


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (48.2, "48 s"), (59.6, "1 min 00 s"),
        (119, "1 min 59 s"), (725, "12 min 05 s"), (3599, "59 min 59 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min"),
        (3600 * 1027 + 65, "1,027 h 01 min"),
    ],
)  # fmt: skip
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
