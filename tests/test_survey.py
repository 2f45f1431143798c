"""What `vitrail data` finds, in data sets with everything wrong that it looks for; and how it shows augmentation."""

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vitrail.cli import main
from vitrail.data import cache, workers
from vitrail.data.survey import Inspection, inspect, show
from vitrail.errors import BadInput
from vitrail.input.batches import TrainingBatches
from vitrail.input.pixels import pixels_of
from vitrail.pages.views import Sample, View, samples, sheet
from vitrail.settings import Recipe


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
    monkeypatch.setattr("vitrail.data.survey.AT_ONCE", 3)
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


# How a recipe shows training images

PLAIN = Recipe(image_size=16, patch_size=4, batch_size=32)


def shown(count: int = 4, views: int = 4, **settings: Any) -> list[Sample]:
    train = cache.load("digits", 16).splits["train"]
    return samples(train, replace(PLAIN, **settings), count, views)


def test_views_are_those_of_training_and_stay_with_their_image() -> None:
    for row in shown():
        assert [view.pixels.tolist() for view in row.views] == [row.pixels.tolist()] * 4
        assert {(view.label, view.other, view.share) for view in row.views} == {(row.label, row.label, 1.0)}
    for row in shown(flip="alternate"):
        for now, then in pairwise(row.views):
            np.testing.assert_array_equal(now.pixels, then.pixels[:, ::-1])
    first = cache.load("digits", 16).splits["train"]
    order = TrainingBatches(pixels_of(first, 16, torch.device("cpu")), PLAIN).order(0)
    assert [row.name for row in shown()] == [first.names[i] for i in order[:4]]  # those that training begins with


def test_views_are_of_each_stretch_of_a_run() -> None:
    growing: dict[str, Any] = {"first_size": 4, "first_share": 0.5, "crop_size": 8, "last_share": 0.1, "epochs": 20}
    for row in shown(views=5, **growing):
        assert [len(view.pixels) for view in row.views] == [4, 4, 8, 8, 16]
    for row in shown(views=5, **growing | {"epochs": 2}):
        assert [len(view.pixels) for view in row.views] == [4, 4, 8, 8, 16]


def test_views_are_a_function_of_the_seed() -> None:
    settings: dict[str, Any] = {"rotate": 30.0, "policy": "rand-augment", "erase": 0.5, "mixup": 1.0, "cutmix": 1.0}
    once, again, other = (shown(seed=seed, **settings) for seed in (5, 5, 6))
    assert repr(once) == repr(again) != repr(other)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal([view.pixels for view in a.views], [view.pixels for view in b.views])
    assert len(shown(5, mixup=1.0)) == 4  # pairs
    assert len(shown(5)) == 5


@pytest.mark.parametrize("setting", ["mixup", "cutmix"])
def test_what_a_mix_shows_is_what_is_said_of_it(setting: str) -> None:
    rows = shown(6, 6, **{setting: 1.0})
    names = [f"digit {k}" for k in range(10)]
    for row in rows:
        for view in row.views:
            assert view.label == row.label
            mixes = []
            for other in (other for other in rows if other.label == view.other and other is not row):
                own, its = row.pixels.astype(float), other.pixels.astype(float)
                if setting == "mixup":
                    mixes.append(np.abs(view.share * own + (1 - view.share) * its - view.pixels).max() <= 0.51)
                else:
                    pasted = (view.pixels == own).all(2) | (view.pixels == its).all(2)
                    kept = (view.pixels == own).all(2).mean()
                    mixes.append(pasted.all() and kept >= view.share - 1e-6)
            assert any(mixes)
            if view.label != view.other and 0.01 < view.share < 0.99:
                shares = [f"{100 * share:.0f}%" for share in (view.share, 1 - view.share)]
                assert view.shows(names) == [f"{shares[0]} digit {view.label}", f"{shares[1]} digit {view.other}"]
    whole = View(np.zeros((1, 1, 3), np.uint8), 3, 4, 0.0)
    assert (whole.shows(names), replace(whole, share=1.0).shows(names)) == (["digit 4"], ["digit 3"])


def test_images_that_grow_are_shown_small_and_large() -> None:
    (row, *_) = shown(views=6, first_size=8, epochs=20)
    assert [view.pixels.shape[0] for view in row.views] == [8, 8, 8, 16, 16, 16]
    (row, *_) = shown(views=6, first_size=8, epochs=2)  # no more epochs than that
    assert [view.pixels.shape[0] for view in row.views] == [8, 8, 8, 16, 16, 16]


def test_the_sheet_has_every_image_in_its_place() -> None:
    rows = shown(3, 4, rotate=20.0)
    picture = np.asarray(sheet("title", rows, [str(k) for k in range(10)]))
    side, gap, line = 128, 8, 16
    for y, row in enumerate(rows):
        top = 2 * gap + 2 * line + y * (side + gap + line)
        for x, pixels in enumerate([row.pixels, *(view.pixels for view in row.views)]):
            left = gap + (gap if x else 0) + x * (side + gap)
            tile = picture[top : top + side, left : left + side]
            np.testing.assert_array_equal(tile, pixels.repeat(8, 0).repeat(8, 1))


def test_a_wide_image_is_shown_whole(tmp_path: Path) -> None:
    for k in range(4):
        put(tmp_path / "photos" / "ab"[k % 2] / f"{k}.png", k, size=(60, 20))
    train = cache.load(str(tmp_path / "photos"), 16).splits["train"]
    rows = samples(train, PLAIN, 8, 2)
    assert len(rows) == len(train) == 2
    assert rows[0].pixels.shape == (18, 54, 3)
    picture = np.asarray(sheet("", rows, ["a" * 99, "一"]))
    tile = picture[48 : 48 + 128, 8 : 8 + 128]
    white = (tile == 255).all((1, 2))
    assert white[:42].all()
    assert not white[43:85].any()
    assert white[86:].all()


def test_augmented_as_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data", "digits", "--augmented"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("digits-augmented.png", "")
    assert "8 views of each (--recipe and --image-size choose others). digits at 16 × 16 pixels by the" in out
    assert "by the recipe digits, seed 0: rotate 15, crop 1" in out
    first = Path("digits-augmented.png").read_bytes()
    assert main(words) == 0  # it gives way to itself, and is the same
    assert Path("digits-augmented.png").read_bytes() == first
    assert main([*words, "--seed", "1", "--cutmix", "1", "--output", "new/other.png"]) == 0
    with Image.open("new/other.png") as picture:
        assert picture.size == (1248, 1392)  # room for two lines below each
    Path("mine.png").write_bytes(b"mine")
    for more, says in (
        (["--output", "mine.png"], "was not written by this command"),
        (["--output", "new"], "is a folder; name a file, such as new/augmented.png"),
        (["--json"], "nothing to say in JSON"),
        (["--policy", "4-augment"], "did you mean '3-augment'?"),
        (["--recipe", "vit-13"], "did you mean 'vit-12'?"),
        (["--erase", "2"], "erase is 2.0; it must be from 0 to 1."),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert says in capsys.readouterr().err
    assert main(["data", "digits", "--resized-crop", "0.5"]) == 2
    assert "--resized-crop is for the picture that --augmented draws; add that." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-augmented.png", "mine.png", "new"]
