"""Runs side by side: those in results/ and variations of them; as Markdown, as a page in a parser and in a browser."""

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from pages import Page, assert_self_contained

from vitrail.cli import main
from vitrail.errors import BadInput
from vitrail.pages import compare, runs
from vitrail.recipes import resolve
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run

RESULTS = Path(__file__).parent.parent / "results"
SEEDS = [RESULTS / f"digits-seed-{seed}" for seed in range(3)]
VIT_12, LOG = RESULTS / "vit-12-3-epochs", RESULTS / "original-vit-12.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def change(path: Path, **values: Any) -> None:
    content = read(path) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), "utf-8")


def variant(run: Path, seed: int = 0, *, top1: float = 0.9, **settings: Any) -> Path:
    """A run of `digits` as training leaves it now, with other settings and another result."""
    shutil.copytree(SEEDS[0], run)
    Run(run).write_recipe(resolve("digits", seed=seed, **settings))
    change(run / "results.json", top1=top1, seed=seed)
    return run


def cells(*rows: runs.Row) -> list[dict[str, str]]:
    return [dict(zip((c.removeprefix(">") for c in compare.COLUMNS), compare.cells(row), strict=True)) for row in rows]


def page_of(path: Path, *named: Path) -> Page:
    compare.write_page(path, runs.load(named))
    page = Page(path)
    assert_self_contained(page)
    return page


# Rows


def test_seeds_are_one_row() -> None:
    (row,) = runs.load(SEEDS)
    each = [read(run / "results.json") for run in SEEDS]
    mean, spread = (of([result["top1"] for result in each]) for of in (statistics.mean, statistics.stdev))
    seconds = statistics.mean(result["train_seconds"] for result in each)
    (cell,) = cells(row)
    assert cell == {
        "run": "`digits`", "data": "digits, 359 test images", "parameters": "204,874", "epochs": "80",
        "samples seen": "115,040", "top-1": f"{mean:.3f} ± {spread:.3f}", "training": f"{seconds:,.0f} s",
        "images/s": f"{statistics.mean(result['images_per_second'] for result in each):,.0f}",
        "hardware": "Intel Xeon Processor, 2 cores, fp32",
        "runs": " ".join(f"[{seed}]({run.as_posix()})" for seed, run in enumerate(SEEDS)),
    }  # fmt: skip


def test_seeds_of_several_versions_are_told(tmp_path: Path) -> None:
    same = [variant(tmp_path / f"run-{seed}", seed) for seed in range(2)]
    told = "The runs of run were trained by several versions of the program, not only from several seeds."
    assert told not in compare.remarks(runs.load(same))
    environment = read(same[1] / "environment.json")
    environment["launches"][0]["commit"] = "0" * 40
    change(same[1] / "environment.json", **environment)
    assert told in compare.remarks(runs.load(same))


def test_what_else_differs_makes_another_row(tmp_path: Path) -> None:
    base = [variant(tmp_path / f"base-{seed}", seed) for seed in range(2)]
    assert [row.name for row in runs.load([*base, SEEDS[2]])] == ["digits"]  # which has no settings of later versions
    others = [variant(tmp_path / "lr", 2, lr=0.01), variant(tmp_path / "short", 3), variant(tmp_path / "gpu", 4)]
    change(others[1] / "results.json", epochs=40)
    launches = read(others[2] / "environment.json")["launches"]
    change(others[2] / "environment.json", launches=[launches[0] | {"gpu": "NVIDIA H100"}])
    again = variant(tmp_path / "again", 1)  # a seed that is there already says nothing of the spread
    rows = runs.load([*base, *others, again, base[0] / ".." / "base-0"])
    assert [(row.name, len(row.entries)) for row in rows] == [
        ("base", 2), ("lr", 1), ("short", 1), ("gpu", 1), ("again", 1)
    ]  # fmt: skip
    assert [row.letter for row in rows] == list("ABCDE")
    assert [entry.where for entry in rows[0].entries] == base
    assert rows[3].first.hardware == "NVIDIA H100, fp32"
    assert rows[2].epochs == "40 of 80"


def test_names(tmp_path: Path) -> None:
    def names(*folders: str) -> list[str]:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return [row.name for row in runs.load([variant(place / name, seed) for seed, name in enumerate(folders)])]

    assert names("a-seed-0", "a-seed-1") == ["a"]
    assert names("photos", "photos-2") == ["photos"]
    assert names("run10", "run11") == ["digits"]  # not run1
    assert names("seed-0", "seed-1") == ["digits"]
    assert names("my_linseed.0", "my_linseed.1") == ["my_linseed"]
    place = tmp_path / "same"
    alike = [variant(place / "x" / "run", lr=0.1), variant(place / "y" / "run", lr=0.2)]
    assert [row.name for row in runs.load(alike)] == [str(path) for path in alike]


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    one = variant(tmp_path / "one", data=str(tmp_path), device="cpu")  # other words for the same
    two = variant(tmp_path / "two", lr=0.0012345678, clip=None, compile=True)
    having, differing = compare.differences(runs.load([one, two, LOG]))
    assert [row.name for row in having] == ["one", "two"]
    assert differing == {"lr": ["0.003", "0.0012345678"], "clip": ["1", "none"], "compile": ["false", "true"]}
    assert compare.differences(runs.load(SEEDS))[1] == {}


# What is said before anything is compared


def test_other_images_cannot_be_ranked(tmp_path: Path) -> None:
    rows = runs.load([*SEEDS, VIT_12])
    assert list(compare.remarks(rows)) == [
        "These runs were not judged by the same images, and cannot be ranked: digits by the 359 test images of digits; "
        "vit-12-3-epochs by the 10,000 validation images of tiny-imagenet-200."
    ]
    assert compare.on_a_scale(rows) == ([], [])
    tuned = variant(tmp_path / "tuned", holdout=0.2)
    change(tuned / "results.json", split="holdout")
    (remark,) = compare.remarks(runs.load([SEEDS[0], tuned]))
    assert "cannot be ranked" in remark
    assert "tuned by the 359 held-out images of digits" in remark


def test_another_name_of_the_same_images_does_no_harm(tmp_path: Path) -> None:
    moved = variant(tmp_path / "moved")
    change(moved / "results.json", dataset="scans")
    (remark,) = compare.remarks(runs.load([SEEDS[0], moved]))
    assert remark == (
        "digits and scans have the same classes, with as many images in each, and are taken for the same data."
    )
    assert len(compare.on_a_scale(runs.load([SEEDS[0], moved]))[1]) == 2


def test_unfinished(tmp_path: Path) -> None:
    run = variant(tmp_path / "going")
    (run / "results.json").unlink()
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + '{"epoch": 4, "st', "utf-8")
    rows = runs.load([SEEDS[0], run, SEEDS[1]])
    assert list(compare.remarks(rows)) == [
        "going is not finished: its figures are those after epoch 3 of 80, and are no result yet."
    ]
    cell = cells(*rows)[1]
    assert (cell["run"], cell["epochs"], cell["data"]) == ("`going`, not finished", "3 of 80", "digits")
    small = json.dumps(json.loads(lines[2]) | {"val_image_size": 8}) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + small, "utf-8")
    (remark,) = compare.remarks(runs.load([run]))
    assert "are those after epoch 3 of 80, by images of 8 pixels, and are no result yet." in remark
    assert cell["parameters"] == "–"  # there is no model in it
    model = VisionTransformer(ViTConfig(16, 4, 64, 256, 4, 4, 10, classifier="gap"))
    Run(run).save_model(model, tuple("0123456789"))
    assert cells(*runs.load([run]))[0]["parameters"] == cells(rows[0])[0]["parameters"] == "204,874"
    assert cell["top-1"] == f"{json.loads(lines[2])['val_top1']:.3f}"
    assert len(compare.charts(rows)[0].curves) == 2
    assert len(compare.on_a_scale(rows)[1]) == 1  # it is no result that could be ranked
    (run / "metrics.jsonl").write_text("", "utf-8")
    with pytest.raises(BadInput, match="nothing to compare yet: no epoch is complete"):
        runs.load([run])


def test_unfinished_on_other_images(tmp_path: Path) -> None:
    for data, differ in (("scans/digits.zip", False), ("photos.tar.gz", True)):
        run = variant(tmp_path / data.replace("/", "-"), data=data)
        (run / "results.json").unlink()
        remarks = list(compare.remarks(runs.load([SEEDS[0], run])))
        assert len(remarks) == 1 + differ
        assert (
            "digits-seed-0 by the 359 test images of digits; photos.tar.gz by the images of photos" in remarks[0]
        ) == (differ)


def test_a_log_by_itself(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", LOG)
    assert "0 runs and a log." in page.text
    assert cells(*runs.load([LOG]))[0]["top-1"] == "0.383"


def test_a_run_without_curve_has_figures(tmp_path: Path) -> None:
    run = variant(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    page = page_of(tmp_path / "page.html", run)
    assert "0.900" in page.text
    assert "Curves" not in page.text


# Bad input


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    (imported / "model").mkdir(parents=True)
    (imported / "model" / "config.json").write_text('{"classes": ["a"]}', "utf-8")
    for path, says in ((tmp_path, "is no run folder"), (tmp_path / "none", "there is no run folder"),
                       (imported, "was not trained here")):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            runs.load([SEEDS[0], path])
    for name, content, says in (
        ("results.json", '{"top1": 0.9', r"results\.json is damaged"),
        ("results.json", '{"top1": 0.9}', r"results\.json has no dataset, split, count, epochs"),
        ("metrics.jsonl", "{\n", r"metrics\.jsonl is damaged"),
        ("recipe.yaml", "recipe: x", r"recipe\.yaml is damaged"),
    ):
        run = variant(tmp_path / f"{name}-{len(content)}")
        (run / name).write_text(content, "utf-8")
        with pytest.raises(BadInput, match=says):
            runs.load([run])


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{", '{"val_accuracy": [0.1]}', '{"val_accuracy": [1], "train_loss": [], "val_loss": [1]}',
                '{"val_accuracy": ["x"], "train_loss": [1], "val_loss": [1]}', "\xff"],
)  # fmt: skip
def test_what_is_no_log(content: str, tmp_path: Path) -> None:
    file = tmp_path / "log.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=r"neither a run folder nor a log like results/original-vit-12\.json"):
        runs.load([file])


# The page


def test_page_of_seeds(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", *SEEDS)
    assert "3 runs; those that differ in nothing but the seed are one row" in page.text
    assert "Judged by the 359 test images of digits." in page.text
    each = [list(map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())) for run in SEEDS]
    hover = [json.loads(text) for text in page.values("div", "data-hover")]
    second = statistics.mean(lines[1]["train_seconds"] for lines in each)
    assert [chart["title"][1] for chart in hover] == ["epoch 2", "2,880 samples", f"{second:.1f} s", "epoch 2"]
    seconds = [statistics.mean(lines[epoch]["train_seconds"] for lines in each) for epoch in (40, 79)]
    assert hover[2]["x"][40] == pytest.approx(100 * seconds[0] / seconds[1], abs=0.01)
    for chart, figure in ((0, "val_top1"), (1, "val_top1"), (2, "val_top1"), (3, "train_loss")):
        (curve,) = hover[chart]["curves"]
        mean = [statistics.mean(lines[epoch][figure] for lines in each) for epoch in (0, 40, 79)]
        said = [f"{100 * value:.1f}%" if figure == "val_top1" else f"{value:.4g}" for value in mean]
        assert [curve["text"][epoch] for epoch in (0, 40, 79)] == said
        assert curve["name"] == "A digits"
    areas = [d for d in page.values("path", "d") if d.endswith("Z") and d.count("L") == 159]
    assert len(areas) == 4
    highest = max(lines[0]["val_top1"] for lines in each)
    assert areas[0].endswith(f"L0.00 {100 - 100 * highest:.2f}Z")
    commits = [launch["commit"][:12] for run in SEEDS for launch in Run(run).launches()]
    assert all(commit in page.text for commit in commits)
    assert "Settings that differ" not in page.text


def test_page_beside_the_original(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", VIT_12, LOG)
    assert "1 run and a log. Judged by the 10,000 validation images of tiny-imagenet-200." in page.text
    assert "original-vit-12 is a log: it has curves, and does not say by which images it was judged" in page.text
    log, lines = read(LOG), page.values("path", "class")
    assert lines.count("line plain dashed") == 2  # by epoch alone, for it has neither samples nor times
    assert lines.count("line k0") == 4
    curves = json.loads(page.values("div", "data-hover")[0])["curves"]
    assert curves[1]["text"] == [f"{100 * value:.1f}%" for value in log["val_accuracy"]]
    assert curves[0]["text"][3:] == ["–"] * 147
    assert "3 of 150" in page.text


def test_the_scale_is_true(tmp_path: Path) -> None:
    rows = runs.load([*SEEDS, variant(tmp_path / "worse", top1=0.95)])
    ticks, (strip, worse) = compare.on_a_scale(rows)
    (left, low), (right, high) = ((tick.at, float(tick.text[:-1]) / 100) for tick in (ticks[0], ticks[-1]))
    assert (left, right) == (0, 100)
    found = [low + (high - low) * at / 100 for at in strip.runs]
    assert found == pytest.approx([read(run / "results.json")["top1"] for run in SEEDS], abs=1e-4)
    assert low + (high - low) * worse.mean / 100 == pytest.approx(0.95, abs=1e-4)
    assert 0 <= worse.low < worse.mean < worse.high <= 100


def test_hostile_names(tmp_path: Path) -> None:
    run = variant(tmp_path / "<script>alert(1)<|script>")
    change(run / "results.json", dataset="<img src=x>")
    page = page_of(tmp_path / "page.html", run, SEEDS[0])
    assert page.html.count("<script") == 1
    assert "<script>alert(1)<|script>" in page.text


# As it is typed


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = [*map(str, SEEDS), str(variant(tmp_path / "a | b", lr=0.01)), str(LOG)]
    assert main(["compare", *named]) == 0
    out, err = capsys.readouterr()
    assert err == "look at  compare.html\n"
    remark, table, settings = out.rstrip("\n").split("\n\n")
    assert remark.startswith("original-vit-12 is a log")
    for lines in (table.splitlines(), settings.splitlines()):
        split = [re.split(r" (?<!\\)\| ", line.strip("|")) for line in lines]
        assert {len(cells) for cells in split} == {len(split[0])}
        assert len({len(line) for line in lines}) == 1  # aligned
    assert "| `a \\| b` " in table
    assert "(" + str(tmp_path / "a%20%7C%20b") + ")" in table
    assert re.search(r"^\| `lr` +\| 0\.003 +\| 0\.01 +\|$", settings, flags=re.MULTILINE)
    before = (tmp_path / "compare.html").read_bytes()
    assert main(["compare", named[0]]) == 0  # a page of its own gives way
    gone = "vitrail: the page that an earlier call wrote as compare.html gives way to this one's"
    assert capsys.readouterr().err == f"{gone}\nlook at  compare.html\n"
    assert (tmp_path / "compare.html").read_bytes() != before
    for place, says in (("notes.md", "was not written by this command"), (".", "is a folder")):
        (tmp_path / "notes.md").write_text("mine", "utf-8")
        capsys.readouterr()
        assert main(["compare", named[0], "--output", place]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "notes.md").read_text("utf-8") == "mine"
