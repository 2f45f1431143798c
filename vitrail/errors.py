"""What can go wrong in a way that the user can mend. The command line turns each into a sentence and an exit status."""

import difflib
from collections.abc import Iterable, Sequence


class BadInput(Exception):
    """Bad usage or bad input (exit status 2). The message names the thing, says what is wrong and what would do."""


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
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
