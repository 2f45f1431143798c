"""Flags and what may stand behind them. A word that is not known is answered with the nearest one that is."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from vitrail.errors import BadInput, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises BadInput where the standard one prints its usage and leaves. `no_flags` are some
    that might be looked for, and why they are not there."""

    no_flags: Mapping[str, str] = MappingProxyType({})

    def __init__(self, prog: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog, description=description, epilog="\n  ".join(["examples:", *examples]), allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Raise BadInput, with what tells more."""
        message = message.removeprefix("argument ").replace("unrecognized arguments:", "there is no place for")
        raise BadInput(f"{message}{'' if message.endswith('?') else '.'} `{self.prog} -h` tells more.")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, with flags and names in any order.

        Raises:
            BadInput: one is missing, unknown, or not of its type.
        """
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in argv[: argv.index("--") if "--" in argv else None]:
            flag = word.partition("=")[0]
            if re.match(r"-[^\d.]", word) and flag not in flags:
                why = self.no_flags.get(flag) or f"{nearest(flag, flags)} `{self.prog} -h` lists them."
                raise BadInput(f"{self.prog} has no flag {flag}{why}")
        return self.parse_intermixed_args(argv)

    def first_name(self, argv: Sequence[str]) -> str | None:
        """The first of the arguments that is neither a flag nor what stands behind one, whatever the others are."""
        taking = [flag for action in self._actions if action.nargs != 0 for flag in action.option_strings]
        words = iter(argv)
        for word in words:
            if word == "--":
                return next(words, None)
            if not word.startswith("-"):
                return word
            if word in taking:
                next(words, None)
        return None


def whole(text: str) -> int:
    """A whole number; 10_000 is one too."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def at_least_one(text: str) -> int:
    """A whole number from 1 up."""
    if (number := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}, and must be at least 1")
    return number


def real(text: str) -> float:
    """A number that is not infinite."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite")
    return number


def one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    """One of the choices; another word is answered with the nearest."""

    def check(text: str) -> str:
        if text not in choices:
            near = nearest(text, choices).rstrip(".")
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{near}")
        return text

    return check


def or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """What `parse` takes, or the word `none`."""
    return lambda text: None if text == "none" else parse(text)


def add_setting(group: argparse._ArgumentGroup, setting: dataclasses.Field[Any], kind: Any) -> argparse.Action:
    """The flag of one field of `Recipe`, of type `kind`."""
    flag = "--" + setting.name.replace("_", "-")
    text = setting.metadata["help"].replace("%", "%%")
    if kind is bool:
        return group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    optional = NoneType in get_args(kind)
    if optional:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    parse: Callable[[str], Any]
    if get_origin(kind) is Literal:
        parse, metavar = one_of(get_args(kind)), "{" + ",".join(get_args(kind)) + "}"
    elif kind is int:
        parse, metavar = whole, "N"
    elif kind is float:
        parse, metavar = real, "X"
    else:
        parse, metavar = str, setting.name[0].upper()
    return group.add_argument(flag, type=or_none(parse) if optional else parse, metavar=metavar, help=text)


def shown(value: Any) -> str:
    """A setting's value, as one would say it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == "":
        return "to be named"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def add_run(parser: Parser) -> None:
    """The run folder that a command works on."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as runs/digits")


def add_weights(parser: Parser) -> None:
    """The weights that a command works on: a run's, or others."""
    what = "a run folder, such as runs/digits, or anything else that vitrail import takes"
    parser.add_argument("run", type=Path, metavar="RUN", help=what)


def add_data(parser: Parser) -> None:
    """Where the images are, if not where the run had them."""
    parser.add_argument("--data", metavar="D", help="where the images are (where they were in training)")


def add_json(parser: Parser) -> None:
    """For programs to read."""
    parser.add_argument("--json", action="store_true", help="print JSON")
