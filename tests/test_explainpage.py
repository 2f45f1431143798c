"""`vitrail explain`: its page and pictures of a run, of weights from elsewhere, and of what has learnt no classes."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import SMALL, imported, written
from pages import Page, assert_self_contained
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.explanation.looks import Look, lightest, look, open_model
from vitrail.pages import explainpage, panes
from vitrail.pages.explainpage import called_apart, pane_side, share
from vitrail.vit.model import VisionTransformer
from vitrail.vit.resnet import ResNetClassifier, ResNetConfig
from vitrail.vit.variants import VARIANTS
from vitrail.weights.checkpoint import Run

GOLDEN = Path(__file__).parent / "golden"
ALL_LAYERS = pytest.mark.skipif("LARGE_TESTS" not in os.environ, reason="takes 10 s; LARGE_TESTS=1 has it run")
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
    before = (run / "explain" / "explain.html").read_bytes()
    page = Page(run / "explain" / "explain.html")
    assert_self_contained(page)
    assert "What run looks at" in page.text
    assert "It was made for" not in page.text
    assert "what the filters are to images without colour" in page.text
    assert "16 × 16 pixels as 4 × 4 patches, with 2 heads of attention in each of 2 layers" in page.text
    assert "8 images of digits, test" in page.text
    assert len(page.values("img", "src")) == 8 * 4 + 3  # with heads; filters, similarities and their scale
    assert page.text.count("what speaks for") == 8
    assert page.text.count("layer 2") == 8 + 2  # beside the heads, and the dots of two heads
    assert "would be 6.2% if all 16 had as much" in page.text
    shares = [float(share) for share in re.findall(r"lightest patch (\d+\.\d)%", page.text)]
    assert len(shares) + page.text.count("no patch") == 8 * 2
    assert all(6.2 <= share <= 100 for share in shares)
    pictures = sorted((run / "explain").glob("*.png"))
    assert len(pictures) == 8
    assert main(["explain", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'explain-2' / 'explain.html'}\n"
    assert (run / "explain" / "explain.html").read_bytes() == before
    with Image.open(pictures[0]) as picture:
        assert picture.size == (3 * 448 + 4 * 6, 448 + 2 * 6 + 50)


def test_images_of_ones_own_and_a_class(
    run: Path, scans: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "seen"
    for again in (False, True):  # the second time in the place of the first
        assert main(["explain", str(run), *scans, "--class", "7", "--output", str(folder)]) == 0
        assert (f"what an earlier call wrote in {folder} gives way" in capsys.readouterr().err) == again
        assert sorted(path.name for path in folder.iterdir()) == ["a_b-2.png", "a_b.png", "explain.html"]
    page = Page(folder / "explain.html")
    assert "2 images Where it looks" in page.text
    assert page.text.count("what speaks for 7") == 2
    lists = re.findall(r'<dl class="guesses">(.*?)</dl>', page.html, re.DOTALL)
    assert [len(re.findall("<dt[^>]*>7</dt>", each)) for each in lists] == [1, 1]  # with its probability
    for each in lists:  # a class that is none of the likeliest is not the next after them
        *_, last = named = re.findall("<dt[^>]*>([^<]*)</dt>", each)
        assert len(named) in (3, 5)
        assert (len(named) == 5) == ("… asked for:" in named) == (last == "7" and named[-2] == "… asked for:")
    for name in scans:  # two of one name are told apart
        assert f'<small class="whole" title="{name}">{name}</small>' in page.html
    assert "the colours here are chance" in page.text
    assert main(["explain", str(run), scans[0], "--output", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a_b.png", "explain.html"]


def test_what_systems_and_killed_calls_leave_is_in_nobodys_way(run: Path, scans: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "seen"
    words = ["explain", str(run), scans[0], "--output", str(folder)]
    assert main(words) == 0
    (folder / ".DS_Store").write_bytes(b"of the system")
    (folder / ".mine.png.7").write_bytes(b"somebody's own")
    for name in ("explain.html", "a_b.png"):
        (folder / f".{name}.123").write_bytes((folder / name).read_bytes()[:3000])
    assert main(words) == 0
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", ".mine.png.7", "a_b.png", "explain.html"]


def test_images_of_one_name_are_told_apart() -> None:
    assert called_apart(["in/fish.jpg", "in2/fish.jpg", "in/cat.jpg"]) == ["in/fish.jpg", "in2/fish.jpg", "cat.jpg"]


def test_a_run_that_is_not_finished(scans: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = vitrail.train("digits", output=tmp_path / "run", stop_after=1, **(TINY | {"epochs": 3})).run
    (run / "results.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert main(["explain", str(run), scans[0]]) == 0
    assert f"{run} is not finished: it has done 1 of its 3 epochs" in capsys.readouterr().err
    page = Page(run / "explain" / "explain.html")
    assert "Its training is not finished: these weights are those after 1 of 3 epochs." in page.text


def test_weights_from_elsewhere(scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "vit", "timm", imported(SMALL))
    assert main(["explain", "vit", scans[0]]) == 0
    page = Page(tmp_path / "vit-explain" / "explain.html")
    assert "dög" in page.text  # named, escaped and all
    assert_self_contained(page)


def test_data_of_other_classes_and_images_of_another_size(
    scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "vit", "timm", imported(SMALL))
    assert main(["explain", "vit", "--data", "digits"]) == 0
    page = Page(tmp_path / "vit-explain" / "explain.html")
    assert "8 images of digits, test" in page.text
    assert "is 3" not in page.text  # which the model has never heard of
    official = str(GOLDEN / "token.npz")
    size = vitrail.load(official).config.image_size
    for more in (size, 2 * size):
        words = ["--image-size", str(more)] * (more != size)
        assert main(["explain", official, scans[0], "--output", "seen", *words]) == 0
        text = Page(tmp_path / "seen" / "explain.html").text
        assert f"It sees images of {more} × {more} pixels" in text
        assert (f"made for images of {size} × {size} pixels, and sees larger ones here" in text) == (more != size)


def test_a_model_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = vitrail.pretrain("digits", output=tmp_path / "run", objective="patches", **TINY).run
    assert main(["explain", str(run)]) == 0
    page = Page(run / "explain" / "explain.html")
    assert "It has not learnt classes" in page.text
    assert "what speaks for" not in page.text
    assert len(page.values("img", "src")) == 8 * 3 + 3
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
        (["nothing.png"], "nothing.png: there is no such file in"),
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


MEMORY = """
import sys
from pathlib import Path
from vitrail.pages.explainpage import explain_run
from vitrail.process import resident
before = resident()[0]
explain_run(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]))
added = resident()[1] - before
print(added)
"""


@pytest.mark.parametrize("layers", [2, pytest.param(12, marks=ALL_LAYERS)])
def test_memory_is_bounded(layers: int, scans: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = replace(VARIANTS["ViT-B/16"], image_size=384, num_classes=3, num_layers=layers)
    model = VisionTransformer(config)
    torch.nn.init.normal_(model.head.weight)
    Run.create(tmp_path / "run").save_model(model, ("a", "b", "c"))
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "run"), scans[0], str(tmp_path / "seen")]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    added = int(done.stdout)
    assert 4 * sum(weight.numel() for weight in model.parameters()) < added
    layer = sum(weight.numel() for weight in model.blocks[0].parameters()) + config.num_tokens * config.hidden_size
    assert added + (12 - layers) * 4 * layer < 2e9  # each layer more adds its weights, and what enters it


def test_an_image_goes_through_the_model_once(
    run: Path, scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, seen = VisionTransformer.embed, list[int]()

    def count(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return embed(model, images)

    monkeypatch.setattr(VisionTransformer, "embed", count)
    assert main(["explain", str(run), *scans, "--output", str(tmp_path / "seen")]) == 0
    assert seen == [1, 1]


def test_many_panes_are_small(run: Path, scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pane_side(8, 12 * 12) == 64
    for images, heads in ((64, 12 * 12), (64, 32 * 16), (64, 10**6)):
        assert images * heads * pane_side(images, heads) ** 2 <= max(explainpage.PANES, images * heads)
    sizes = []
    for most in (explainpage.PANES, 2 * 4 * 3**2):  # two images of four heads
        monkeypatch.setattr(explainpage, "PANES", most)
        assert main(["explain", str(run), *scans, "--output", str(tmp_path / "seen")]) == 0
        sizes.append((tmp_path / "seen" / "explain.html").stat().st_size)
        width = 2 * (64 if most > 100 else 3) + 3 * 2
        assert f'width="{width}" height="{width}"' in (tmp_path / "seen" / "explain.html").read_text("utf-8")
    assert sizes[1] < sizes[0]


def test_how_much_the_lightest_patch_has() -> None:
    values = np.full((2, 2), 0.1, np.float32)
    assert lightest(values) == pytest.approx(0.25)
    values[0, 1] = 0.7
    assert lightest(values) == pytest.approx(0.7)
    assert lightest(np.zeros((2, 2), np.float32)) == 0


def test_what_is_nearly_sure_is_not_rounded_to_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    plain = panes.side_by_side

    def keep(row: list[tuple[Any, str]]) -> Image.Image:
        words.extend(said for _, said in row)
        return plain(row)

    monkeypatch.setattr(panes, "side_by_side", keep)
    values, other = np.array([[[1, 1], [1, 7]], [[1, 1], [1, 2]]], np.float32)
    looked = "where run looks\nlightest patch 70.0%, 25.0% if even"
    guesses = ((3, 0.9997), (8, 0.0002), (5, 0.0001))
    one = Look("a.png", np.zeros((16, 16, 3), np.uint8), 3, guesses, 3, values, other, values[None, None])
    most = "lightest patch 40.0%, 25.0% if even"
    for seen, image, speaks in [
        (one, "is 3, recognised (>99%)", f"3 (>99%)\n{most}"),
        (replace(one, label=8, target=8), "is 8, mistaken for 3 (>99%)", f"8 (<1%)\n{most}"),
        (replace(one, label=-1, gradient=other * 0), "taken for 3 (>99%)", "3 (>99%)\nno patch"),
    ]:
        words.clear()
        share(tmp_path, seen, open_model(run), "a")
        assert words == [f"a\n{image}", looked, f"what speaks for {speaks}"]
    share(tmp_path, replace(one, guesses=(), gradient=None), open_model(run, 32), "a")
    assert words[3:] == ["a\n", looked.replace("looks", "looks, at 32 pixels instead of 16")]
    words.clear()
    share(tmp_path, one, replace(open_model(run), done="1 of 3 epochs"), "a")
    assert words[1] == looked.replace("looks", "looks, after 1 of 3 epochs")


def test_a_mistake_is_said_in_words(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def all_for_seven(*given: Any) -> Any:
        looks, distances = look(*given)
        return [replace(one, guesses=((7, 0.6), (1, 0.3)), target=7) for one in looks], distances

    monkeypatch.setattr(explainpage, "look", all_for_seven)
    page = Page(explainpage.explain_run(run, [], tmp_path / "seen"))
    said = re.findall(r"is (\d)(?: ?, mistaken for (\d))?", page.text)
    assert len(said) == 8
    assert all(taken == ("" if label == "7" else "7") for label, taken in said)


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
    dim = [panes.light(np.full((2, 2), each, np.float32), 8, 8) for each in (0, 0.7)]
    assert [(flat.min(), flat.max()) for flat in dim] == [(0, 0), (0.5, 0.5)]


def test_light_goes_as_far_apart_as_the_map() -> None:
    image, values = np.full((32, 32, 3), 128, np.uint8), np.full((4, 4), 1.0, np.float32)
    apart = []
    for most in (1.0, 1.05, 2.0, 4.0, 1000.0):
        values[1, 2] = most
        found = panes.light(values, 4, 4)
        assert found.mean(where=values == 1).item() == pytest.approx(1 / most / 2, abs=1e-6)
        assert found[1, 2] == pytest.approx(1 - 1 / most / 2)
        lit = panes.shine(image, values).astype(int).sum(2)
        apart.append(lit.max() - lit.min())
    assert apart == sorted(apart)
    assert apart[0] == 0
    assert apart[1] < 0.1 * apart[-1]


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
    assert panes.enlarge(np.zeros((20, 32, 3), np.uint8), 16).shape == (10, 16, 3)
