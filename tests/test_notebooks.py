"""The notebooks run from top to bottom, and what is kept in them comes from the cells that they have."""

import io
import json
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

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


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):  # nothing lands in the user's
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("VITRAIL_NOTEBOOK_EPOCHS", "1")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
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


def changed(name: str, folder: Path, words: dict[str, str]) -> Path:
    """A notebook in that folder with other words in place of some, each of which it has once."""
    source = (FOLDER / name).read_text("utf-8")
    for old, new in words.items():
        old, new = (json.dumps(text)[1:-1] for text in (old, new))
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / name).write_text(source, "utf-8")
    return folder / name


def test_on_tiny_imagenet_and_where_a_model_makes_no_mistakes_or_knows_nothing(tmp_path: Path) -> None:
    archive = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        names = [f"train/{wnid}/images/{wnid}_{n}.JPEG" for wnid in ("n01", "n02") for n in range(10)]
        for name in (*names, "val/images/val_0.JPEG"):
            image = io.BytesIO()
            Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(image, "JPEG")
            file.writestr(f"tiny-imagenet-200/{name}", image.getvalue())
        file.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn02\t0\t0\t62\t62\n")
        file.writestr("tiny-imagenet-200/words.txt", "n01\tant\nn02\tbee\n")
    small = '"--hidden-size=48", "--mlp-dim=48", "--num-layers=1", "--batch-size=10", "--epochs", f"{EPOCHS}"'
    words = {'DATA = "digits"': f'DATA = "{archive}"', '"--epochs", f"{EPOCHS}"': small}
    done = execute(changed("train.ipynb", tmp_path, words), tmp_path)
    said = "".join(output.text for cell in done.cells for output in cell.get("outputs", ()) if "text" in output)
    assert "20 images to train on, 1 to judge by, 2 classes\n" in said
    assert f"vitrail train vit-12 --data {archive}" in said
    assert said.count("there is none") == 1  # its one image is either mistaken or known


def test_where_there_is_nothing_to_install_a_notebook_says_what_to_do(tmp_path: Path) -> None:
    hide = """find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "vitrail" else find(name)
"""
    with pytest.raises(CellExecutionError, match=r"There is no Vitrail in '\.\.'\. Put where its checkout is"):
        execute(changed("train.ipynb", tmp_path, {'SOURCE = "..': f'{hide}SOURCE = "..'}), tmp_path)
    installing = {
        cell.source
        for name in NAMES
        for cell in nbformat.read(FOLDER / name, as_version=4).cells
        if "SOURCE" in cell.source
    }
    assert len(installing) == 1  # all have the same cell
