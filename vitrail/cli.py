"""`vitrail` as it is typed: a command, its arguments, and an exit status."""

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence

from vitrail import __version__
from vitrail.commands.arguments import Parser
from vitrail.commands.commands import COMMANDS
from vitrail.errors import BadInput, Diverged, Partial, Stopped, nearest, speaks


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say. Results go to stdout, all else to stderr.

    Returns:
        0 done, 1 failed, 2 bad usage or bad input, 3 diverged, 130 or 143 interrupted or terminated after saving.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a file's name may hold what the terminal cannot show
    if sys.platform == "win32":
        return failed("it runs on Linux and macOS, and not on Windows; Windows has a Linux in it, WSL.", 1)
    try:
        respond(sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        return failed(error, 2)
    except Diverged as error:
        return failed(error, 3, of_all=True)
    except Stopped as error:
        return failed(error, error.status, of_all=True)
    except KeyboardInterrupt:
        return failed("interrupted", 130)
    except Exception as error:
        return broken(error)
    return 0


def respond(argv: Sequence[str]) -> None:
    """Print what the arguments ask for; where it can be had in part only, that part before the reason is raised."""
    try:
        print_result(answer(argv))
    except Partial as some:
        print_result(some.result)
        raise


def answer(argv: Sequence[str]) -> str:
    """The text that the arguments ask for: a command's result, help, or the version."""
    if not argv:
        raise BadInput(f"which command? There are: {', '.join(COMMANDS)}. `vitrail -h` tells more.")
    if argv[0] in ("-h", "--help"):
        return overview()
    if argv[0] in ("-V", "--version"):
        return f"vitrail {__version__}"
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise BadInput(f"there is no command {name!r}{nearest(name, COMMANDS)} There are: {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    parser = Parser(f"vitrail {name}", f"{command.summary[0].upper()}{command.summary[1:]}.", command.examples)
    command.take(parser, rest)
    if {"-h", "--help"} & set(rest):
        return parser.format_help().rstrip()
    return command.do(parser.read(rest))


def overview() -> str:
    """What `vitrail -h` says."""
    lines = ["usage: vitrail COMMAND [ARGUMENT ...]", "", "Train Vision Transformers on the images that you have.", ""]
    lines += ["commands:", *(f"  {name:10}{command.summary}" for name, command in COMMANDS.items()), ""]
    lines += ["examples:", *(f"  {command.examples[0]}" for command in COMMANDS.values()), ""]
    return "\n".join([*lines, "`vitrail COMMAND -h` tells more of a command, `vitrail -V` the version."])


def print_result(text: str) -> None:
    """Print to stdout, by one process of many. A reader that has had enough (`| head`) is no failure."""
    if not speaks():
        return
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes stdout once more as it ends, and would fail on the same text again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def failed(reason: object, status: int, *, of_all: bool = False) -> int:
    """Say why on stderr. Of processes that train together, one says what is the failure `of_all`, and one on each
    machine while they have not met; else each speaks for itself."""
    met = together()
    if speaks(of="RANK" if met else "LOCAL_RANK"):
        print(f"vitrail: {reason}", file=sys.stderr)
    elif met and not of_all:
        print(f"vitrail, process {os.environ['RANK']}: {reason}", file=sys.stderr)
    return status


def together() -> bool:
    """Whether this process has met others."""
    distributed = sys.modules.get("torch.distributed")  # which nobody has met without
    return distributed is not None and distributed.is_initialized()


def broken(error: Exception) -> int:
    """The machine's failures in a sentence; a failure of Vitrail's own with its traceback, which is worth reporting."""
    if isinstance(error, OSError):
        return failed(system_error(error), 1)
    if together():
        from vitrail.world import abandoned

        if abandoned(error):
            return failed("another process of this training is gone; what was saved before is whole.", 1, of_all=True)
    if out_of_memory(error):
        return failed("memory is full. In training, a smaller --batch-size or --accumulate 2 and up needs less.", 1)
    traceback.print_exception(error)
    return failed("this is a mistake in Vitrail, not in what you typed. Please report it with the lines above.", 1)


def out_of_memory(error: Exception) -> bool:
    """Whether memory is what was lacking. Torch has an exception of its own for that only on CUDA."""
    words = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def system_error(error: OSError) -> str:
    """What the operating system refused, in a sentence; the one that the place of the failure wrote, where it did."""
    reason = error.strerror if error.errno else str(error)
    if reason and (error.errno is None or reason != os.strerror(error.errno)):
        return reason if reason.endswith(".") else f"{reason}."
    where = f" for {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left{where}. What was saved before is whole; make room, then try again."
    return f"{str(reason).lower()}{where}."
