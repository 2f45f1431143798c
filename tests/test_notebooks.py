"""The notebooks run from top to bottom, and what is kept in them comes from the cells that they have."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks import FOLDER, digest, execute

NAMES = [path.name for path in sorted(FOLDER.glob("*.ipynb"))]
BYTES = 300_000  # that one may take in the repository, pictures included


def shown(book: NotebookNode) -> list[set[str]]:
    """What each cell of code shows: text, pictures and so on."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {output.get("name"): ""})}
        for cell in book.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):  # nothing lands in the user's
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("VITRAIL_NOTEBOOK_EPOCHS", "1")
    kept = nbformat.read(FOLDER / name, as_version=4)
    assert shown(execute(FOLDER / name, tmp_path)) == shown(kept)
    assert not any("stderr" in kinds for kinds in shown(kept))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_was_shown_by_these_cells(name: str) -> None:
    book = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(book)
    assert book.metadata["ran"] == digest(book), f"its cells have changed since it was run: make notebooks ARGS={name}"
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert (FOLDER / name).stat().st_size < BYTES
