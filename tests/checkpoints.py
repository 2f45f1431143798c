"""The official checkpoints that the golden figures are of, as arrays; and archives of arrays."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.weights.official import RENAMED

GOLDEN = Path(__file__).parent / "golden"
Arrays = dict[str, np.ndarray[Any, Any]]


def arrays_of(case: str) -> Arrays:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return dict(file)


def save(path: Path, arrays: Arrays, compressed: bool = False) -> None:
    write = np.savez_compressed if compressed else np.savez
    write(path, **arrays)  # type: ignore[arg-type]  # it takes an option by name too, so that names look like options


def backslashes(name: str) -> str:
    return name.replace("/", "\\")


def with_optimizer(name: str) -> str:
    return f"opt/target/{name}"


def of_later_code(name: str) -> str:
    return "params/" + "/".join(RENAMED.get(part, part) for part in name.split("/"))


def add(path: Path, entry: str, content: bytes) -> None:
    """Add an entry to an archive, whether it has one of that name or not."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, content)
