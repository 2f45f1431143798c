"""The report: its figures against independent ones, its page in a parser, and the picture of it."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import Page, assert_self_contained
from PIL import Image, ImageColor, ImageFont
from run_folders import EPOCHS, add_weights, answer, begin, digits, finish, noise
from safetensors.numpy import save_file
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vitrail import __version__
from vitrail.data.cache import Dataset
from vitrail.errors import BadInput
from vitrail.evaluation import scores
from vitrail.explanation.explain import attended
from vitrail.pages import curves, gallery, panes, pictures, report, snapshot, views
from vitrail.pages.panes import enlarge, shine
from vitrail.pages.record import read
from vitrail.pages.views import samples
from vitrail.recipes import resolve
from vitrail.vit.config import HALF
from vitrail.vit.resnet import ResNetClassifier, ResNetConfig
from vitrail.weights.checkpoint import Run
from vitrail.weights.files import write_tensors

RESULTS = Path(__file__).parent.parent / "results"


def pictured(page: Page, section: str) -> list[Any]:
    """The images of a section, decoded."""
    html = re.search(f'<section id="{section}">(.*?)</section>', page.html, flags=re.DOTALL)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', html[1] if html else "")
    ]


def has_font(name: str) -> bool:
    try:
        ImageFont.truetype(name, 10)
    except OSError:
        return False
    return True


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
    assert len(page.values("img", "alt")) == len(page.values("img", "src")) >= 8 + min(16, count - right)
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
    before = {name: (run / name).read_bytes() for name in ("report.html", "results.png")}
    for data, why in ((shuffled, "the data set is no longer the one that was scored"), (None, "photos are gone")):
        with pytest.raises(BadInput, match=f"report.html has pictures that a new page would be without.*{why}"):
            report.write_report(run, data, why)
    assert {name: (run / name).read_bytes() for name in before} == before
    (run / "report.html").unlink()
    page = Page(report.write_report(run, shuffled))
    assert page.values("img", "src") == []
    assert "the data set is no longer the one that was scored" in page.text


def test_where_the_model_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, split = digits(), digits().splits["test"]
    run = finish(tmp_path / "run", dataset)
    model = add_weights(run, dataset)
    page = Page(report.write_report(run, dataset))
    assert_self_contained(page)
    assert page.text.count("lit where the model looked") == 1
    pairs = re.findall(r'<div class="pair">\s*<img src="([^"]+)"[^>]*>\s*<img src="([^"]+)"', page.html)
    told = gallery.scored(read(run), dataset, "test")
    assert told is not None
    shown = [*told["mistakes"], *told["rightest"]]
    assert len(pairs) == len(shown) == 24
    for (plain, lit), image in zip(pairs, shown, strict=True):
        pixels = split.image(split.names.index(image["name"]))
        (looked,) = attended(model, [pixels], HALF, HALF)
        assert plain == pictures.thumbnail(pixels).uri
        assert lit == pictures.thumbnail(shine(enlarge(pixels, gallery.LIT), looked)).uri
    monkeypatch.setattr(gallery, "MOST_FLOPS", 2 * 3 * sum(w.numel() for w in model.parameters()) * 17)
    few = Page(report.write_report(run, dataset))  # what takes longer than that is not looked at
    assert few.html.count('<div class="pair">') == 3
    Run(run).save_model(ResNetClassifier(ResNetConfig(8, 10)), dataset.classes)
    assert '<div class="pair">' not in Page(report.write_report(run, dataset)).html  # which has no attention


def test_figures_in_a_sentence_agree(tmp_path: Path) -> None:
    dataset = digits()
    record = read(finish(tmp_path / "run", dataset))
    told = gallery.scored(record, dataset, "test")
    assert told is not None
    for confidence, right, says in (
        (0.99051, 0.98349, "claims 99.1% and is right 98.3% of the time: it is surer than it should be, by 0.8 points"),
        (0.98349, 0.99051, "claims 98.3% and is right 99.1% of the time: it is more modest than it need be, by 0.8 po"),
    ):
        html = report.render(record, dataset, told | {"confidence": confidence, "accuracy": right})
        assert says in " ".join(re.sub("<[^>]*>", "", html).split())
    assert "the image it was surest of, for 8 of 10 classes" in html
    all_ten = told["rightest"] + told["rightest"][:2]
    html = report.render(record, dataset, told | {"rightest": all_ten})
    assert "the image it was surest of, for each class" in html


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
    for images, there in ((digits(9).digest(), False), (dataset.digest(), True)):
        write_tensors(run / "last" / "state.safetensors", {"x": torch.zeros(1)}, {"images": images, "step": 3})
        page = Page(report.write_report(run, dataset))
        assert ("What the model saw" in page.text) == there
        assert bool(page.values("img", "src")) == there
    with pytest.raises(BadInput, match=r"left as it is.* The data set is another than the run was trained on\."):
        report.write_report(run, digits(9))


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
    (run / "report.html").unlink()  # which has pictures
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
    assert [row["epoch"] for row in read(run).epochs] == [1, 2]


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
    finish(tmp_path / "other", digits(2))
    (tmp_path / "other" / "predictions.safetensors").write_bytes(b"cut off")
    with pytest.raises(BadInput, match=r"predictions\.safetensors is damaged"):
        report.write_report(tmp_path / "other", None)
    assert (run / "report.html").read_bytes() == before


# The original's curves, and the gap


def test_the_original_is_behind_what_can_be_compared_with_it(tmp_path: Path) -> None:
    assert curves.ORIGINAL.parent == Path(report.__file__).parent  # which is what is installed
    assert not curves.ORIGINAL.is_symlink()
    accuracies = [row["val_top1"] for row in curves.original()]
    assert len(accuracies) == 150
    assert [round(accuracies[epoch], 3) for epoch in (0, 1, 2, -1)] == [0.073, 0.139, 0.177, 0.383]
    run = tmp_path / "run"
    shutil.copytree(RESULTS / "vit-12-3-epochs", run)
    page = Page(report.write_report(run, None))
    assert "38.3% after its 150 epochs" in page.text
    accuracy, loss = (json.loads(hover)["curves"][0] for hover in page.values("div", "data-hover")[:2])
    assert accuracy["text"] == ["7.3%", "13.9%", "17.7%"]  # as far as ours has come
    assert (accuracy["name"], loss["name"]) == ("original, val", "original, val")
    record = read(run)
    assert len(curves.compared(record, "val")) == 3
    for other in (
        replace(record, name="vit-10"),
        replace(record, results=None, settings={}),
        replace(record, epochs=[]),
    ):
        assert curves.compared(other, "val") == ()
    assert curves.compared(record, "holdout") == ()
    assert "The dashed curve" not in Page(report.write_report(begin(tmp_path / "digits"), None)).text


def test_the_gap(tmp_path: Path) -> None:
    record = read(begin(tmp_path / "run"))
    accuracy, loss, *_ = curves.charts(record, "test")
    assert accuracy.unit == "train and test end 3.3 points apart"
    assert loss.unit == "cross-entropy, nats, train and test end 0.06667 apart"
    train, held = accuracy.curves
    assert train.area == ""
    there, back = (
        held.area.removeprefix("M").removesuffix("Z").split("L")[:3],
        held.area.removesuffix("Z").split("L")[3:],
    )
    assert ["M" + "L".join(there), "M" + "L".join(reversed(back))] == [train.path, held.path]
    partly = replace(record, epochs=[{k: v for k, v in row.items() if k != "train_accuracy"} for row in record.epochs])
    assert [curve.area for curve in curves.charts(partly, "test")[0].curves] == [""]


# The picture


def test_a_run_in_one_picture(tmp_path: Path) -> None:
    dataset = digits()
    run = finish(tmp_path / "run", dataset)
    add_weights(run, dataset)
    report.write_report(run, dataset)
    with Image.open(run / "results.png") as file:
        picture = np.asarray(file.convert("RGB")).astype(int)
    assert picture.shape == (900, 1600, 3)
    told = gallery.scored(read(run), dataset, "test")
    assert told is not None
    side = snapshot.SIDE
    for place, image in enumerate((told["rightest"][0], told["mistakes"][0])):
        left = snapshot.MARGIN + place * (2 * side + snapshot.SEAM + snapshot.BETWEEN)
        for pixels, at in ((image["pixels"], left), (image["light"], left + side + snapshot.SEAM)):
            drawn, meant = picture[674 : 674 + side, at : at + side], Image.fromarray(pixels).resize((side, side))
            assert np.corrcoef(drawn.ravel(), np.asarray(meant).ravel())[0, 1] > 0.9
    words = "chosen, not typical: where it was surest and right, and surest and wrong"
    assert snapshot.how_chosen(read(run), told) == f"{words}; it is wrong on {told['mistaken']} of 360"
    beside = picture[635:660, 580:1300]  # it is written beside what they are
    assert (np.abs(beside - ImageColor.getrgb(snapshot.SOFT)).max(2) < 40).sum() > 500
    for colour in ("#2348b0", "#a4570a"):  # both curves, in both plots
        is_it = (picture == ImageColor.getrgb(colour)).all(2)
        assert is_it[180:560, 700:1000].any()
        assert is_it[180:560, 1140:1400].any()
    assert (run / "results.png").stat().st_size < 500_000
    for noted in ("tracked.json", "progress.json"):
        (run / noted).write_text("{}")
    Run(run).go_back(20)  # as resuming does
    there = {path.name for path in run.iterdir()}
    assert there == {"recipe.yaml", "environment.json", "metrics.jsonl", "model", "report.html", "tracked.json"}


def test_its_colours_are_the_pages() -> None:
    html = (Path(report.__file__).parent / "templates" / "page.html").read_text("utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w+);", html[: html.index("prefers-color-scheme: dark")]))
    assert light["paper"] == snapshot.PAPER
    assert light["ink"] == snapshot.INK == views.INK
    assert light["soft"] == snapshot.SOFT == snapshot.KINDS["plain"] == views.SOFT
    assert light["rule"] == snapshot.RULE
    assert light["lead"] == snapshot.LEAD
    assert ImageColor.getrgb(light["lead"]) == panes.LEAD
    assert {name: light[name] for name in ("held", "train")} | {"plain": light["soft"]} == snapshot.KINDS
    assert (light["bad"], light["good"]) == (snapshot.WRONG, snapshot.RIGHT)
    glass = re.search(r"set glass = \[(.*?)\]", html, flags=re.DOTALL)
    assert glass is not None
    assert set(snapshot.GLASS) <= set(re.findall("#[0-9a-f]{6}", glass[1]))


def test_curves_of_growing_images_say_why_they_leap(tmp_path: Path) -> None:
    record = read(finish(tmp_path / "run", digits(2)))
    assert "which it had not met" not in report.render(record, None)
    grew = {"first_size": {"value": 4, "set_by": "recipe"}, "first_share": {"value": 0.6, "set_by": "recipe"}}
    page = report.render(replace(record, settings=record.settings | grew), None)
    size = record.settings["image_size"]["value"]
    assert f"For the first 60% of its steps it saw images of 4 pixels, and was judged by images of {size}," in page
    rows = [row | {"val_image_size": 4} for row in record.epochs]  # as runs have it since they are judged by such
    page = report.render(replace(record, settings=record.settings | grew, epochs=rows), None)
    assert "it saw images of 4 pixels, and was judged by images of that size." in page
    cut = {"crop_size": {"value": 6, "set_by": "recipe"}, "last_share": {"value": 0.1, "set_by": "recipe"}}
    page = " ".join(report.render(replace(record, settings=record.settings | grew | cut), None).split())
    cut_out = f"it saw squares of 6 pixels cut out of images of {size}, and in the last 10% of its steps whole ones."
    assert f". From there on {cut_out}" in page
    squares = report.render(replace(record, settings=record.settings | cut), None)
    assert f" At first {cut_out}" in " ".join(squares.split())
    rows = [row | {"val_image_size": size} for row in record.epochs]  # one epoch, whose last steps are of whole images
    page = report.render(replace(record, settings=record.settings | grew, epochs=rows), None)
    assert "it saw images of 4 pixels." in page
    page = report.render(replace(record, results=None, epochs=rows), None)
    assert f"images of {size} pixels after epoch" in page


def test_a_picture_of_what_there_is(tmp_path: Path) -> None:
    dataset = digits(2)
    assert not (report.write_report(begin(tmp_path / "running"), dataset).parent / "results.png").exists()
    for path, data in ((finish(tmp_path / "plain", dataset), dataset), (finish(tmp_path / "nothing", dataset), None)):
        report.write_report(path, data)
        assert (path / "results.png").is_file()  # without weights, and without images
    record = replace(read(tmp_path / "plain"), settings={
        "data": {"value": "../my photos.zip", "set_by": "command line"},
        "batch_size": {"value": 50, "set_by": "command line"}, "flip": {"value": False, "set_by": "command line"},
        "lr": {"value": 0.1, "set_by": "recipe"}, "device": {"value": "cpu", "set_by": "command line"},
    })  # fmt: skip
    assert snapshot.asked_for(record) == "vitrail train digits --data '../my photos.zip' --batch-size 50 --no-flip"
    assert snapshot.made_by(record).startswith(snapshot.asked_for(record))
    at_home = replace(record, settings={"data": {"value": "/home/me/photos", "set_by": "command line"}})
    assert snapshot.asked_for(at_home) == "vitrail train digits --data photos"
    long = replace(record, settings={"data": {"value": "long/" * 40, "set_by": "command line"}})
    assert snapshot.made_by(long).startswith("Vitrail ")  # half a command is none


@pytest.mark.parametrize(("words", "font"), [("9 · 50% ± 1…", "Aileron"), ("名前 žlutý", "DejaVu Sans")])
def test_fonts(words: str, font: str) -> None:
    if not pictures.EMBEDDED.fullmatch(words) and not any(map(has_font, pictures.FONTS)):
        pytest.skip("there is no font here but Pillow's own")
    found = pictures.font_for(words, 20)
    assert isinstance(found, ImageFont.FreeTypeFont)
    assert (found.getname()[0] == "Aileron") == (font == "Aileron")


def test_words_that_are_fitted() -> None:
    assert pictures.fitted("goldfish", 13, 100)[0] == "goldfish"
    room = pictures.font_for("", 13).getlength("golden …")
    assert pictures.fitted("golden retriever", 13, room)[0] == "golden…"  # it ends in a letter
    assert pictures.fitted("golden retriever", 13, room - 0.1)[0] == "golden…"
    assert pictures.fitted("golden retriever", 13, room / 2)[0] == "go…"
    assert pictures.fitted("golden", 13, 1)[0] == "…"


@pytest.mark.skipif(not any(map(has_font, pictures.FONTS)), reason="there is no font here but Pillow's own")
def test_pictures_show_names_that_the_font_of_pillow_lacks() -> None:
    pane, scan = np.zeros((40, 40, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    for name, other in (("ž", "ř"), ("д", "ж")):  # which are the same box in Pillow's
        beside = [np.asarray(panes.side_by_side([(pane, words)])) for words in (name, other)]
        assert (beside[0] != beside[1]).any()
        sample = views.Sample(scan, "scan", 0, (views.View(scan, 0, 0, 1.0),))
        sheets = [np.asarray(views.sheet("", [sample], [words])) for words in (name, other)]
        assert (sheets[0] != sheets[1]).any()
