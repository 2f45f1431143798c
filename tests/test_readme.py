"""What the README says can be typed."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from vitrail.commands.arguments import Parser
from vitrail.commands.commands import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
TYPED = [line.partition("#")[0].strip() for _, block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in TYPED if line.startswith(("vitrail ", "torchrun "))])
def test_commands_are_understood(line: str) -> None:
    _, name, *words = shlex.split(line[line.index("vitrail ") :])
    parser = Parser(f"vitrail {name}", "", ())
    COMMANDS[name].take(parser, words)
    parser.read(words)


@pytest.mark.parametrize("line", [line for line in TYPED if line.startswith("make ")])
def test_verbs_are_there(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)


def test_python_runs() -> None:
    (code,) = (block for language, block in BLOCKS if language == "python")
    names: dict[str, torch.Tensor] = {}
    exec(code, names)  # noqa: S102
    assert names["logits"].shape == (2, 10)
    torch.testing.assert_close(names["weights"].sum(-1), torch.ones(2, 3, 197))


def test_files_are_there() -> None:
    for name in re.findall(r"\]\(([^):]+)\)|src=\"([^\":]+)\"", README):
        assert (ROOT / "".join(name)).exists(), name


def test_the_tree_is_the_package() -> None:
    (tree,) = (block for _, block in BLOCKS if block.startswith("vitrail/\n"))
    folders = {path.parent.name for path in (ROOT / "vitrail").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE)) == folders
    named = set(re.findall(r"(\w+)\.py\b", tree))
    assert named <= {file.stem for file in (ROOT / "vitrail").rglob("*.py")}
    beside = {file.stem for file in (ROOT / "vitrail").glob("*.py")} - {"__init__", "__main__"}
    assert beside - named <= {"errors", "progress", "process", "environment"}  # what serves all, and no step of the way
