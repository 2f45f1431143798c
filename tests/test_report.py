"""The report: its figures against independent ones, its page in a parser and, where there is one, in a browser."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import CHROMIUM, Browser, Page, assert_self_contained
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vitrail import __version__, pictures, report, scores
from vitrail.cache import Dataset, Images
from vitrail.checkpoint import write_tensors
from vitrail.errors import BadInput
from vitrail.evaluate import Predictions, figures
from vitrail.recipes import RECIPES, resolve
from vitrail.views import samples

EPOCHS = RECIPES["digits"].epochs

# Run folders as training writes them, of real digits or of noise, the predictions made by the nearest class mean.


def images(pixels: Any, labels: Any, prefix: str = "image") -> Images:
    """One split out of an array of uint8 (N, h, w, 3)."""
    count, height, width, _ = pixels.shape
    sizes = np.tile(np.array([height, width], np.int32), (count, 1))
    return Images(
        pixels.reshape(-1), np.arange(count) * height * width * 3, sizes,
        labels.astype(np.int64), tuple(f"{prefix}-{i}.png" for i in range(count)),
    )  # fmt: skip


def digits(classes: int = 10) -> Dataset:
    """The scans of the first few digits; every fifth one is for testing."""
    scans, labels = load_digits(return_X_y=True)
    scans, labels = scans[labels < classes], labels[labels < classes]
    pixels = (scans.reshape(-1, 8, 8, 1) * 15.9).astype(np.uint8).repeat(3, axis=3)
    test = np.arange(len(labels)) % 5 == 0
    return Dataset(
        "digits", tuple(f"digit {k}" for k in range(classes)),
        {"train": images(pixels[~test], labels[~test]), "test": images(pixels[test], labels[test])},
    )  # fmt: skip


def noise(count: int, classes: int, side: int) -> Dataset:
    """What compresses worst. The many images share a few hundred images' pixels."""
    generator = np.random.default_rng(0)
    few = images(generator.integers(0, 256, (300, side, side, 3), dtype=np.uint8), np.zeros(300))
    split = replace(few.take(np.arange(count) % 300), labels=np.arange(count) % classes)
    return Dataset("noise", tuple(f"class {k}" for k in range(classes)), {"train": split, "val": split})


def answer(dataset: Dataset) -> Predictions:
    """What the nearest mean of a class's training images says of the evaluated split."""

    def flat(split: Images) -> Any:
        step = split.sizes[0, 0] // 8
        return np.stack([split.image(i)[::step, ::step, 0].ravel() for i in range(len(split))]) / 255

    train, held = dataset.splits["train"], dataset.splits[dataset.evaluation]
    features = flat(train)
    means = np.stack([features[train.labels == k].mean(axis=0) for k in range(len(dataset.classes))])
    scores = 2 * flat(held) @ means.T - (means**2).sum(axis=1)  # minus the squared distance, but for a constant
    probability = np.exp(scores - scores.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    ranked = np.ascontiguousarray(np.argsort(-probability, axis=1, kind="stable")[:, :5])  # else saved wrongly
    best = np.take_along_axis(probability, ranked, axis=1).astype(np.float32)
    loss = -np.log(probability[np.arange(len(held)), held.labels])
    return Predictions(held.labels, ranked, best, loss.astype(np.float32))


def begin(run: Path, epochs: int = 3, **overrides: Any) -> Path:
    """A run that goes on: no results yet."""
    resolved = resolve("digits", **{"image_size": 8, **overrides})
    run.mkdir()
    settings = {k: {"value": v, "set_by": resolved.set_by[k]} for k, v in asdict(resolved.recipe).items()}
    (run / "recipe.yaml").write_text(json.dumps({"recipe": "digits", "settings": settings}))
    launch = {"started": "2026-01-02T03:04:05+00:00", "command": "vitrail train 'a & b'", "step": 0, "cpu": "8086",
              "cores": 2, "threads": 2, "gpu": None, "vitrail": "0.1.0",
              "commit": f"{'0123456789' * 4}+changes"}  # fmt: skip
    (run / "environment.json").write_text(json.dumps({"launches": [launch]}))
    rows = [
        {"epoch": e, "step": 10 * e, "samples_seen": 640 * e, "lr": 0.002 / e, "train_loss": 2 / e,
         "train_accuracy": 1 - 0.9 / e, "val_loss": 2.2 / e, "val_top1": 1 - 0.8 / e, "val_top5": 1.0,
         "train_seconds": 1.5 * e, "images_per_second": 426.7}
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def finish(run: Path, dataset: Dataset, epochs: int = 3) -> Path:
    """A run that is done."""
    begin(run, epochs)
    predictions = answer(dataset)
    found = asdict(figures(predictions, dataset.classes))
    results = {
        "recipe": "digits", "dataset": dataset.name, "split": dataset.evaluation, **found, "parameters": 650,
        "epochs": epochs, "samples_seen": 640 * epochs, "train_seconds": 1.5 * epochs, "wall_seconds": 95.0,
        "images_per_second": 426.7, "input_share": 0.004, "peak_memory": 1_234_000_000, "device": "cpu",
        "precision": "fp32", "seed": 0,
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps({"classes": dataset.classes}))
    save_file(predictions.arrays(), run / "predictions.safetensors")
    return run


def pictured(page: Page, section: str) -> list[Any]:
    """The images of a section, decoded."""
    html = re.search(f'<section id="{section}">(.*?)</section>', page.html, flags=re.DOTALL)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', html[1] if html else "")
    ]


# Figures


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(right: int, count: int, low: float, high: float) -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3
    assert scores.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert scores.wilson(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_confusion_as_scikit_learn_counts() -> None:
    dataset = digits()
    predictions = answer(dataset)
    label, said = predictions.label, predictions.predicted[:, 0]
    counts = scores.confusion(label, said, 10)
    np.testing.assert_array_equal(counts, confusion_matrix(label, said))
    precision, recall, _, support = precision_recall_fscore_support(label, said)
    rows = scores.per_class(counts)
    assert [row.right / row.count for row in rows] == pytest.approx(list(recall))
    assert [row.right / row.said for row in rows] == pytest.approx(list(precision))
    assert [row.count for row in rows] == list(support)


def test_worst_pairs_and_empty_classes() -> None:
    counts = np.array([[5, 2, 0], [3, 1, 0], [0, 0, 0]])
    assert scores.worst_pairs(counts, 9) == [scores.Pair(1, 0, 3, 4), scores.Pair(0, 1, 2, 7)]
    assert scores.worst_pairs(counts, 1) == [scores.Pair(1, 0, 3, 4)]
    assert scores.per_class(counts)[2] == scores.ClassRow(2, 0, 0, 0, None)


def test_picking() -> None:
    answers = scores.Answers(
        label=np.array([0, 0, 1, 1, 2]),
        said=np.array([0, 0, 0, 0, 2]),
        confidence=np.array([0.9, 0.95, 0.8, 0.99, 0.7]),
    )
    assert scores.confident_mistakes(answers.confidence, answers.right, 5) == [3, 2]
    assert scores.rightest(answers.confidence, answers.right, answers.label, 5) == [1, 4]
    assert scores.surest_of(answers, scores.Pair(1, 0, 2, 2), 1) == [3]


# Pages


def test_finished_run(tmp_path: Path) -> None:
    dataset = digits()
    predictions = answer(dataset)
    path = report.write_report(finish(tmp_path / "run", dataset), dataset)
    page = Page(path)
    assert_self_contained(page)
    assert "1 min 35 s with evaluation and saving" in page.text
    right = int((predictions.predicted[:, 0] == predictions.label).sum())
    count, train = len(predictions.label), len(dataset.splits["train"])
    low, high = scores.wilson(right, count)
    assert f"Trained on {train:,} images of 10 classes for 3 of {EPOCHS} epochs" in page.text
    assert f"recognises {right} of {count} test images" in page.text
    assert f"95% interval {low:.1%} to {high:.1%}" in page.text
    assert f"{count - right} of {count} test images are taken for another class" in page.text
    assert "0.4% of it for input" in page.text
    assert "1.2 GB" in page.text
    assert "vitrail train 'a & b'" in page.text
    assert f"Made by Vitrail {__version__}" in page.text
    matrix = [int(n) for n in re.findall(r'<td class="(?:none|hit|miss)[^>]*>(\d+)</td>', page.html)]
    np.testing.assert_array_equal(np.reshape(matrix, (10, 10)), scores.confusion(
        predictions.label, predictions.predicted[:, 0], 10
    ))  # fmt: skip
    assert len(page.values("img", "alt")) == len(page.values("img", "src")) >= 8 + min(24, count - right)
    assert all(page.values("img", "alt"))
    assert page.values("table", "data-sortable") == [""]
    assert len(page.values("th", "scope")) == sum(page.html.count(f"<th{end}") for end in (" ", ">"))
    assert [p.name for p in tmp_path.joinpath("run").iterdir() if p.name.startswith(".")] == []


def test_the_wrong_picture_is_not_shown(tmp_path: Path) -> None:
    dataset = digits()
    predictions, split = answer(dataset), dataset.splits["test"]
    run = finish(tmp_path / "run", dataset)
    page = Page(report.write_report(run, dataset))
    said, confidence = predictions.predicted[:, 0], predictions.probability[:, 0]
    worst = max(np.flatnonzero(said != split.labels), key=lambda i: confidence[i]).item()
    np.testing.assert_array_equal(pictured(page, "mistakes")[0], split.image(worst))
    sure = pictures.percent(confidence[worst], 0)
    assert f"said digit {said[worst]} {sure} is digit {split.labels[worst]}" in page.text
    shuffled = replace(dataset, splits={**dataset.splits, "test": split.take(np.arange(len(split))[::-1])})
    page = Page(report.write_report(run, shuffled))
    assert page.values("img", "src") == []
    assert "the data set is no longer the one that was scored" in page.text


def test_what_the_model_saw(tmp_path: Path) -> None:
    dataset = digits()
    train = dataset.splits["train"]
    recipe = resolve("digits", image_size=8, cutmix=1.0).recipe
    page = Page(report.write_report(begin(tmp_path / "run", cutmix=1.0), dataset))
    assert_self_contained(page)
    seen, rows = pictured(page, "seen"), samples(train, recipe, 4, 5)
    shown = [pixels for row in rows for pixels in (row.pixels, *(view.pixels for view in row.views))]
    np.testing.assert_array_equal(seen, shown)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(seen[6 * place], train.image(train.names.index(row.name)))
    share = pictures.percent(rows[0].views[0].share, 0)
    assert f"{share} {dataset.classes[rows[0].label]}" in page.text
    plain = Page(report.write_report(begin(tmp_path / "plain", rotate=0.0, crop=0), dataset))
    assert "This recipe has no augmentation" in plain.text
    np.testing.assert_array_equal(pictured(plain, "seen"), [row.pixels for row in rows])


def test_what_the_model_saw_is_not_of_other_images(tmp_path: Path) -> None:
    dataset, run = digits(), begin(tmp_path / "run")
    for images, there in ((dataset.digest(), True), (digits(9).digest(), False)):
        write_tensors(run / "last" / "state.safetensors", {"x": torch.zeros(1)}, {"images": images, "step": 3})
        page = Page(report.write_report(run, dataset))
        assert ("What the model saw" in page.text) == there
        assert bool(page.values("img", "src")) == there


def test_what_the_model_saw_is_small(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", image_size=64, resized_crop=0.1, erase=1.0)
    page = Page(report.write_report(run, noise(300, 10, 64)))
    sources = page.values("img", "src")
    assert len(sources) % 6 == 0
    assert 6 <= len(sources) < 24
    assert sum(map(len, sources)) <= 300_000


def test_running(tmp_path: Path) -> None:
    page = Page(report.write_report(begin(tmp_path / "run"), digits()))
    assert_self_contained(page)
    assert f"Not finished: 3 of {EPOCHS} epochs so far" in page.text
    assert "73.3% top-1 accuracy on 360 test images after epoch 3" in page.text
    assert len(page.values("img", "src")) == len(pictured(page, "seen")) == 24
    assert len(page.values("div", "data-hover")) == 4
    hover = json.loads(page.values("div", "data-hover")[0])
    assert hover["title"] == ["epoch 1", "epoch 2", "epoch 3"]
    assert hover["curves"][1] == {"name": "test", "kind": "held", "y": [75.0, 25.0, 8.33],
                                  "text": ["20.0%", "60.0%", "73.3%"]}  # fmt: skip


def test_a_run_that_goes_on_after_it_was_done(tmp_path: Path) -> None:
    run = finish(tmp_path / "run", digits())
    assert "epochs so far" not in Page(report.write_report(run, digits())).text
    (run / "results.json").unlink()  # as resuming does
    for left in (True, False):
        text = Page(report.write_report(run, None)).text
        assert f"Not finished: 3 of {EPOCHS} epochs so far, in 4.5 s." in text
        assert "73.3% top-1 accuracy on evaluation images after epoch 3" in text  # the page is not told which they are
        for word in ("recognises", "test images", "validation", "Calibration", "Confusion", "mistakes and"):
            assert (word in text) == (word == "mistakes and")
        if left:
            (run / "predictions.safetensors").unlink()
    tuned = begin(tmp_path / "tuned", holdout=0.2)
    assert "on held-out images after epoch 3" in Page(report.write_report(tuned, None)).text


def test_before_the_first_epoch(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", epochs=0)
    assert "Just begun" in Page(report.write_report(run, None)).text
    (run / "metrics.jsonl").unlink()
    assert "Just begun" in Page(report.write_report(run, None)).text


def test_line_still_being_written(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", epochs=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step"')
    assert [row["epoch"] for row in report.read(run).epochs] == [1, 2]


def test_without_data_set(tmp_path: Path) -> None:
    page = Page(report.write_report(finish(tmp_path / "run", digits()), None))
    assert page.values("img", "src") == []
    assert "No pictures here: the page was written without the data set." in page.text
    assert "digit 7" in page.text


def test_two_classes_one_epoch(tmp_path: Path) -> None:
    dataset = digits(2)
    page = Page(report.write_report(finish(tmp_path / "run", dataset, epochs=1), dataset))
    assert_self_contained(page)
    assert f"for 1 of {EPOCHS} epoch" in page.text
    assert "Top-5" not in page.text
    assert page.html.count('class="name"') == 2


def test_no_mistakes(tmp_path: Path) -> None:
    dataset = digits(2)
    run = finish(tmp_path / "run", dataset)
    label = dataset.splits["test"].labels
    ranked, sure = np.stack([label, 1 - label], 1), np.tile(np.array([1, 0], np.float32), (len(label), 1))
    save_file({"label": label, "predicted": ranked, "probability": sure, "loss": np.zeros(len(label), np.float32)},
              run / "predictions.safetensors")  # fmt: skip
    page = Page(report.write_report(run, dataset))
    assert "every test image is recognised" in page.text
    assert "No class was taken for another" in page.text


def test_two_hundred_classes(tmp_path: Path) -> None:
    dataset = noise(10_000, 200, 64)
    path = report.write_report(finish(tmp_path / "run", dataset, epochs=150), dataset)
    page = Page(path)
    assert_self_contained(page)
    assert path.stat().st_size < 5_000_000
    assert "matrix" not in page.values("table", "class")
    assert "The 20 most frequent confusions of 200 classes" in page.text
    assert page.text.count("class 199") >= 1
    assert "10,000 validation images" in page.text


def test_hostile_names(tmp_path: Path) -> None:
    hostile = ("<script>alert(1)</script>", "\"><img src=x onerror='alert(2)'>")
    dataset = digits(2)
    flipped = dataset.splits["test"]
    dataset = Dataset("{{ 7*7 }}<b>", hostile, {
        "train": dataset.splits["train"],
        "test": replace(flipped, labels=1 - flipped.labels, names=tuple(f"'><i onclick={i}>" for i in flipped.names)),
    })  # fmt: skip
    page = Page(report.write_report(finish(tmp_path / "run", dataset), dataset))
    assert_self_contained(page)
    assert page.html.count("<script") == 1
    assert hostile[0] in page.text
    assert "{{ 7*7 }}<b>" in page.text


def test_weights_from_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "imported"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text(json.dumps({"classes": ["a", "b"]}))
    page = Page(report.write_report(run, None))
    assert "imported · Vitrail" in page.text
    assert "not trained here" in page.text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run folder"):
        report.write_report(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_leaves_the_old_page(tmp_path: Path) -> None:
    run = finish(tmp_path / "run", digits(2))
    before = report.write_report(run, None).read_bytes()
    (run / "results.json").write_text('{"top1": 0.9')
    with pytest.raises(BadInput, match=r"results\.json is damaged"):
        report.write_report(run, None)
    assert (run / "report.html").read_bytes() == before


# In a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    dataset = digits()
    path = report.write_report(finish(tmp_path / "run", dataset), dataset)
    for width, scheme in ((1280, "light"), (360, "dark")):
        browser.open(path, width, scheme)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(250, 249, 246)" if scheme == "light" else "rgb(19, 21, 26)"
        )
        assert browser.run("""(async () => {
            for (const image of document.images) { image.loading = 'eager'; await image.decode() }
            return [...document.images].every(image => image.naturalWidth === 8)
        })()""")
        order = "[...document.querySelectorAll('#classes tbody tr')].map(row => Number(row.cells[2].dataset.value))"
        for down in (True, False):
            browser.run("document.querySelectorAll('#classes th button')[2].click()")
            assert browser.run(order) == sorted(browser.run(order), reverse=down)
        browser.run("""(() => {
            const area = document.querySelector('.area'), box = area.getBoundingClientRect()
            area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 1, clientY: box.top}))
        })()""")
        assert browser.run("document.querySelector('.tip').innerText") == "epoch 3\ntrain 70.0%\ntest 73.3%"
        events = [(event["method"], event["params"]) for event in browser.events]
        complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        assert [event for event in events if event[0] in complaints] == []
        asked = {params["request"]["url"] for method, params in events if method == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
