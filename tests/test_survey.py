"""What `vitrail data` finds, in data sets with everything wrong that it looks for."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitrail import workers
from vitrail.errors import BadInput
from vitrail.survey import Inspection, inspect, show


def put(path: Path, seed: int, size: tuple[int, int] = (10, 8), mode: str = "RGB") -> None:
    """An image that differs with `seed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    root = tmp_path / "bad"
    for i in range(4):
        put(root / "train" / "ant" / f"{i}.png", i)
    put(root / "train" / "bee" / "0.png", 10, mode="L")
    put(root / "train" / "bee" / "1.bmp", 2)  # train/ant/2.png in another format
    put(root / "train" / "cat" / "0.png", 20, size=(50, 40))
    (root / "train" / "dog").mkdir()
    put(root / "val" / "ant" / "0.png", 0)  # train/ant/0.png
    put(root / "val" / "ant" / "1.png", 30)
    put(root / "val" / "bee" / "0.png", 31)
    put(root / "val" / "emu" / "0.png", 32)
    (root / "train" / "ant" / "words.png").write_text("words")
    (root / "train" / "ant" / "half.png").write_bytes((root / "train" / "ant" / "0.png").read_bytes()[:100])
    (root / "train" / "ant" / "notes.txt").write_text("words")
    put(root / "train" / "loose.png", 33)
    return str(root)


def printed(inspection: Inspection) -> str:
    file = io.StringIO()
    show(inspection, Console(file=file, width=200))
    return file.getvalue()


@pytest.mark.parametrize("patience", [0.0, 60.0], ids=["on all cores", "in this process"])
def test_everything_that_is_wrong_is_found(patience: float, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", patience)
    monkeypatch.setattr("vitrail.survey.AT_ONCE", 3)
    found = inspect(bad)
    names = {problem.kind: problem.names for problem in found.problems}
    assert list(names) == ["unreadable", "empty", "untrained", "untested", "leaked", "ambiguous"]
    assert [name.partition(": ")[0] for name in names["unreadable"]] == ["train/ant/half.png", "train/ant/words.png"]
    assert names["empty"] == ("dog",)
    assert names["untrained"] == ("emu",)
    assert names["untested"] == ("cat",)
    assert names["leaked"] == ("train/ant/0.png = val/ant/0.png",)
    assert names["ambiguous"] == ("train/ant/2.png = train/bee/1.bmp",)
    assert found.left_out == ("train/ant/notes.txt", "train/loose.png")
    text = printed(found)
    for shown in (*(name for some in names.values() for name in some), "2 images that cannot be read"):
        assert shown in text


def test_what_is_there_is_counted(bad: str) -> None:
    found = inspect(bad)
    train, val = found.splits["train"], found.splits["val"]
    assert (train.images, train.classes, train.fewest, train.median, train.most) == (9, 3, 1, 2, 6)
    assert (val.images, val.classes, val.fewest, val.median, val.most) == (4, 3, 1, 1, 2)
    assert found.classes == ("ant", "bee", "cat", "emu")
    assert found.sizes == {"10 × 8": 10, "50 × 40": 1}
    assert (found.smallest, found.largest) == (8, 50)
    assert found.modes == {"RGB": 10, "L": 1}
    assert found.formats == {"PNG": 10, "BMP": 1}
    assert found.bytes == sum(
        path.stat().st_size for path in Path(bad).rglob("*") if path.suffix in (".png", ".bmp")
    ) - (Path(bad) / "train" / "loose.png").stat().st_size  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["splits"]["val"]["images"] == 4


def test_a_good_data_set_is_called_so() -> None:
    found = inspect("digits")
    assert not found.problems
    assert found.divided
    assert (found.splits["train"].images, found.splits["test"].images) == (1438, 359)
    text = printed(found)
    assert "Nothing is wrong" in text
    assert "20% of each class is test" in text


def test_without_train_it_can_only_be_measured_on(tmp_path: Path) -> None:
    put(tmp_path / "val" / "ant" / "0.png", 0)
    put(tmp_path / "test" / "ant" / "0.png", 1)
    (tmp_path / "train").mkdir()
    found = inspect(str(tmp_path))
    assert [problem.kind for problem in found.problems] == ["no train"]
    assert list(found.splits) == ["val", "test"]
    assert "2 images of 1 class\n" in printed(found)


def test_one_class_is_a_problem_and_no_image_an_error(tmp_path: Path) -> None:
    put(tmp_path / "one" / "ant" / "0.png", 0)
    assert [problem.kind for problem in inspect(str(tmp_path / "one")).problems] == ["one class"]
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="has no images"):
        inspect(str(tmp_path / "none"))
