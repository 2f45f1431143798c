"""The order of the house, as CONTRIBUTING.md lists it: no module imports one below it."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vitrail"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent == PACKAGE or file.stem != "__init__")


def order() -> Iterator[str]:
    """The modules as CONTRIBUTING.md lists them: `errors`, `data/cache`."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (tree,) = re.findall(r"^vitrail/\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    folder = ""
    for indent, name, kind in re.findall(r"^( +)(\w+)(/|\.py) +\S", tree, flags=re.MULTILINE):
        if kind == "/":
            folder = name
        else:
            yield name if len(indent) == 2 else f"{folder}/{name}"


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


ORDER = list(order())
PEERS = {"torchvision", "timm", "transformers", "vit_pytorch"}


def imported(file: Path, at_once: bool = False) -> Iterator[str]:
    """What a file imports, in functions and under TYPE_CHECKING too: `vitrail.data.cache.load`. With `at_once`, only
    what it imports when it is itself imported: not in functions."""
    tree = ast.parse(file.read_text("utf-8"))
    later = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if at_once and node in later:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}, line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_listed() -> None:
    assert sorted(ORDER) == sorted(map(place, FILES))
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("file", FILES, ids=place)
def test_imports_go_up(file: Path) -> None:
    above = ORDER[: ORDER.index(place(file))]
    for name in imported(file):
        package, _, rest = name.partition(".")
        if package != "vitrail" or rest == "__version__":  # the one name of the package that is there from the start
            continue
        first, _, behind = rest.partition(".")
        module = first if first in ORDER else f"{first}/{behind.partition('.')[0]}"
        assert module in above, f"{file.name} imports {name}, which stands below it or nowhere in CONTRIBUTING.md"


@pytest.mark.parametrize("file", FILES, ids=place)
def test_rules(file: Path) -> None:
    assert file.stem not in ("util", "utils", "helpers", "common")
    assert len(file.read_text("utf-8").splitlines()) <= 350
    # Asked for by `vitrail bench`, and by exports where they are there; in one place each, when they are wanted.
    asks = file.stem in ("peers", "exchange")
    assert not {name.partition(".")[0] for name in imported(file, at_once=asks)} & PEERS


def test_the_test_sees_imports_in_functions(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    code = "import a.b\ndef f():\n    from vitrail.data import cache\n    from vitrail.vit.model import X as Y\n"
    file.write_text(code)
    assert list(imported(file)) == ["a.b", "vitrail.data.cache", "vitrail.vit.model.X"]
    assert list(imported(file, at_once=True)) == ["a.b"]


def test_every_dependency_is_pinned_and_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    ranges = dict(re.split(r"(?=>=)", requirement) for requirement in named)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    reasons = re.findall(r"^\| ([a-z0-9, -]+) \| \S", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), flags=re.MULTILINE)
    assert ranges.keys() <= pins.keys()
    assert ranges.keys() == {name for row in reasons for name in row.split(", ")} - {"package", "---"}
