"""Runs the notebooks. `make notebooks` has it write what they then show into them, for whoever only reads them."""

import base64
import hashlib
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
SECONDS = 600  # that a cell may take


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook as it is after all its cells have run in that folder, which is the only one written to.

    Raises:
        CellExecutionError: one of them failed.
    """
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(book, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": str(folder)}})
    done = client.execute()
    done.metadata["language_info"] = {"name": "python"}  # else it has the version of whoever ran it last
    done.metadata["ran"] = digest(done)
    return done


def digest(book: NotebookNode) -> str:
    """A short text that changes with what its cells compute: by it, what it shows is known to come from them."""
    source = [cell.source for cell in book.cells if cell.cell_type == "code"]
    return hashlib.blake2b("\0".join(source).encode(), digest_size=16).hexdigest()


def shrink(book: NotebookNode) -> None:
    """Make its pictures small enough to be kept in the repository: 64 colours are plenty for them, taken so that what
    is rare keeps its own, as the ends of colour bars do."""
    for data in (output.data for cell in book.cells for output in cell.get("outputs", ()) if "data" in output):
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            file = io.BytesIO()
            picture.quantize(64, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
            data["image/png"] = base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.name for path in sorted(FOLDER.glob("*.ipynb"))]:
        with tempfile.TemporaryDirectory() as folder:
            done = execute(FOLDER / name, Path(folder))
        shrink(done)
        nbformat.write(done, FOLDER / name)
        print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size:,} bytes")
