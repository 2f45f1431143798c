"""`vitrail explain`: its page and pictures of a run, of weights from elsewhere, and of what has learnt no classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import SMALL, imported, written
from pages import Page, assert_self_contained
from PIL import Image

import vitrail
from vitrail import panes
from vitrail.checkpoint import Run
from vitrail.cli import main
from vitrail.resnet import ResNetClassifier, ResNetConfig

TINY: dict[str, Any] = {"epochs": 1, "hidden_size": 16, "mlp_dim": 16, "num_heads": 2, "num_layers": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vitrail.train("digits", output=tmp_path_factory.mktemp("runs") / "run", **TINY).run


@pytest.fixture
def scans(tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    names = [tmp_path / "a b.png", tmp_path / "more" / "a b.png"]
    names[1].parent.mkdir()
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(name)
    return [str(name) for name in names]


def test_a_run_is_explained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'explain' / 'explain.html'}\n"
    page = Page(run / "explain" / "explain.html")
    assert_self_contained(page)
    assert "What run looks at" in page.text
    assert "16 × 16 pixels as 4 × 4 patches, with 2 heads of attention in each of 2 layers" in page.text
    assert "8 images of digits, test" in page.text
    assert len(page.values("img", "src")) == 8 * 4 + 3  # with heads; filters, similarities and their scale
    assert page.text.count("what speaks for") == 8
    assert page.text.count("layer 2") == 8 + 2  # beside the heads, and the dots of two heads
    pictures = sorted((run / "explain").glob("*.png"))
    assert len(pictures) == 8
    with Image.open(pictures[0]) as picture:
        assert picture.size == (3 * 448 + 4 * 6, 448 + 2 * 6 + 28)


def test_images_of_ones_own_and_a_class(run: Path, scans: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "seen"
    for _ in range(2):  # the second time in the place of the first
        assert main(["explain", str(run), *scans, "--class", "7", "--output", str(folder)]) == 0
        assert sorted(path.name for path in folder.iterdir()) == ["a_b-2.png", "a_b.png", "explain.html"]
    page = Page(folder / "explain.html")
    assert "2 images Where it looks" in page.text
    assert page.text.count("what speaks for 7") == 2
    assert main(["explain", str(run), scans[0], "--output", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a_b.png", "explain.html"]


def test_weights_from_elsewhere(scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "vit", "timm", imported(SMALL))
    assert main(["explain", "vit", scans[0]]) == 0
    page = Page(tmp_path / "vit-explain" / "explain.html")
    assert "dög" in page.text  # named, escaped and all
    assert_self_contained(page)


def test_a_model_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = vitrail.pretrain("digits", output=tmp_path / "run", objective="patches", positions="rotary", **TINY).run
    assert main(["explain", str(run)]) == 0
    page = Page(run / "explain" / "explain.html")
    assert "It has not learnt classes" in page.text
    assert "what speaks for" not in page.text
    assert "None: the model's positions are rotary" in page.text
    assert len(page.values("img", "src")) == 8 * 3 + 1
    assert main(["explain", str(run), "--class", "7"]) == 2
    assert "run has learnt no classes; leave out --class 7." in capsys.readouterr().err


def test_what_cannot_be_explained_is_said(
    run: Path, scans: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "explain.html").write_text("my own page")
    for words, says in [
        (["--class", "seven"], "the model has no class 'seven'"),
        (["--output", str(tmp_path / "mine")], "mine has explain.html in it, which this command did not write"),
        (["--output", scans[0]], "is a file; name a folder"),
        ([*scans, "--data", "digits"], "--data is where images are taken from if none are named"),
        ([scans[0]] * 65, "a page has room for 64 images, not for 65"),
        (["nothing.png"], "nothing.png: No such file or directory"),
    ]:
        assert main(["explain", str(run), *words]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "mine" / "explain.html").read_text() == "my own page"
    written(tmp_path / "vit", "timm", imported(SMALL))
    assert main(["explain", str(tmp_path / "vit")]) == 2
    assert "has no images of its own. Name some to look at" in capsys.readouterr().err
    Run.create(tmp_path / "cnn").save_model(ResNetClassifier(ResNetConfig(32, 2, 32, (1,))), ("cat", "dog"))
    assert main(["explain", str(tmp_path / "cnn"), scans[0]]) == 2
    assert "cnn is a run of a ResNet, which has no attention to look at" in capsys.readouterr().err


def test_light_falls_where_the_map_is_high() -> None:
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 0.3
    for grey in (0, 128, 255):
        image = np.full((32, 32, 3), grey, np.uint8)
        lit = panes.shine(image, values).astype(int).sum(2)
        middle, others = lit[8:16, 16:24].mean(), lit[:, :8].mean()
        assert lit.shape == (32, 32)
        assert middle > others + 60
        assert others > 0 or grey == 0  # dimmed, not hidden
        assert np.unravel_index(lit.argmax(), lit.shape) in [(y, x) for y in range(8, 16) for x in range(16, 24)]
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    flat = panes.light(np.full((2, 2), 0.7, np.float32), 8, 8)
    assert flat.min() == flat.max() == 1


def test_colours_of_numbers() -> None:
    found = panes.heat(np.array([[-1, 0, 0.5, 1, 9]], np.float32), 0.0, 1.0).astype(int).sum(2)[0]
    assert found[0] == found[1] < found[2] < found[3] == found[4]
    components = np.zeros((3, 2, 2), np.float32)
    components[0, 0, 0], components[2, 1, 1] = -2, 1
    seen = panes.signed(components)
    np.testing.assert_array_equal(seen[[0, 1, 0], [0, 1, 1]], [[0, 128, 128], [128, 128, 191], [128, 128, 128]])


def test_panes_stand_in_lead() -> None:
    panes_of = [np.full((2, 2, 3), shade, np.uint8) for shade in (100, 150, 200)]
    found = panes.window(panes_of, 2, lead=1)
    assert found.shape == (7, 7, 3)
    np.testing.assert_array_equal(found[[1, 1, 4], [1, 4, 1], 0], [100, 150, 200])
    np.testing.assert_array_equal(found[[0, 3, 5], [0, 1, 5]], [panes.LEAD] * 3)


def test_small_images_stay_squares() -> None:
    image = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    large = panes.enlarge(image, 10)
    assert large.shape == (6, 8, 3)
    np.testing.assert_array_equal(large[::2, ::2], image)
    assert panes.enlarge(np.zeros((40, 64, 3), np.uint8), 128).shape == (80, 128, 3)
    assert panes.enlarge(np.zeros((400, 640, 3), np.uint8), 128).shape == (80, 128, 3)
