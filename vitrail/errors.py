"""What can go wrong in a way that the user can mend. The command line turns each into a sentence and an exit status;
where several processes do one thing, one of them says it."""

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any


class BadInput(Exception):
    """Bad usage or bad input (exit status 2). The message names the thing, says what is wrong and what would do."""


class Partial(BadInput):
    """Some of what was given is bad; `result` is what the rest of it gave."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class Diverged(Exception):
    """The loss is no longer finite (exit status 3). The message names the metric and the step."""


class Stopped(Exception):
    """A signal ended the run after its state was saved. `status` is 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def wrong_shape(size: int, shape: Sequence[int], mend: str) -> BadInput:
    """Images of a shape that is not the model's; `mend` is what to do about their size."""
    if shape[1] != 3:
        mend = "repeat a grey channel three times, or drop transparency"
    return BadInput(f"the model takes images of shape (batch, 3, {size}, {size}), not {tuple(shape)}: {mend}.")


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known word nearest to a mistyped one, or a full stop."""
    known = {each.lower(): each for each in words}
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {known[close[0]]!r}?" if close else "."


def first_of(names: Sequence[str], most: int) -> str:
    """`a, b and 5 more`: the first `most` names, and how many others there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def of_many() -> bool:
    """Whether torchrun started this process, together with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks(*, of: str = "RANK") -> bool:
    """Whether this process speaks for all: it is alone, or the first of those that torchrun started together; `of`
    LOCAL_RANK, of those on this machine."""
    return not of_many() or os.environ[of] == "0"
