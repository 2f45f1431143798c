"""Figures in the README are those of runs in results/."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import vitrail
from vitrail.cli import main
from vitrail.recipes import RECIPES
from vitrail.settings import Recipe
from vitrail.training.train import model_config
from vitrail.weights.card import measured
from vitrail.weights.checkpoint import Run
from vitrail.weights.exchange import record

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
RUNS = sorted(path.parent for path in (ROOT / "results").glob("*/results.json"))


def results(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "results.json").read_text("utf-8"))
    return content


def changes(run: Path) -> tuple[str, ...]:
    """Settings of a run that are not its recipe's, but for where it ran, on what copy of the data, and the seed."""
    resolved = Run(run).recipe()
    changed = {name for name, value in vars(RECIPES[resolved.name]).items() if getattr(resolved.recipe, name) != value}
    return tuple(sorted(changed - {"data", "seed", "device", "precision"}))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_is_kept_with_all_that_it_takes_to_repeat_it(run: Path) -> None:
    assert {file.name for file in run.iterdir()} == {"recipe.yaml", "environment.json", "metrics.jsonl", "results.json"}
    found, resolved = results(run), Run(run).recipe()
    assert (resolved.name, resolved.recipe.seed) == (found["recipe"], found["seed"])
    launches = Run(run).launches()
    assert all(re.fullmatch("[0-9a-f]{40}", launch["commit"]) for launch in launches)
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert (last["epoch"], last["val_top1"]) == (found["epochs"], found["top1"])


@pytest.mark.parametrize(("kept_in", "of"), [("laptop", "laptop-128-wide-seed-0"), ("laptop-stem", "laptop-seed-0")])
def test_the_model_that_is_kept_is_that_of_its_run(kept_in: str, of: str) -> None:
    """Its card has the run's figures; the weights are loaded by the command that the README gives."""
    run, folder = ROOT / "results" / of, ROOT / "models" / kept_in
    found, model = results(run), vitrail.load(folder)
    assert isinstance(model, vitrail.VisionTransformer)
    assert sum(weight.numel() for weight in model.parameters()) == found["parameters"]
    assert model_config(Run(run).recipe().recipe, 200) == model.config
    card = (folder / "README.md").read_text("utf-8")
    kept = record(Run(run))
    assert kept is not None
    assert measured(kept) in card
    for name in changes(run):  # from today's recipe of that name: the card has it, unless it is the default
        value = getattr(Run(run).recipe().recipe, name)
        assert f" {name} {value}" in card or value == getattr(Recipe, name)
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 20e6


def test_the_first_epochs_beside_the_original() -> None:
    """Accuracy and training loss of each epoch, in the table whose rows link to runs, and to the original's log."""
    rows = re.findall(r"^\| \[.*\]\((results/.*)\) \|(.*)\|$", README, flags=re.MULTILINE)
    assert len(rows) == 4
    for path, cells in rows:
        if path.endswith(".json"):
            log = json.loads((ROOT / path).read_text("utf-8"))
            epochs = list(zip(log["val_accuracy"], log["train_loss"], strict=True))[:3]
        else:
            lines = map(json.loads, (ROOT / path / "metrics.jsonl").read_text("utf-8").splitlines())
            epochs = [(line["val_top1"], line["train_loss"]) for line in lines]
        assert [cell.strip() for cell in cells.split("|")] == [f"{top1:.3f}, {loss:.3f}" for top1, loss in epochs]


COMPARISONS = re.findall(r"^`vitrail (compare results/.*)` says:$", README, flags=re.MULTILINE)


def test_the_readme_compares() -> None:
    assert COMPARISONS


@pytest.mark.parametrize("typed", COMPARISONS)
def test_the_comparison_is_what_the_command_says(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*typed.split(), "--output", str(tmp_path / "page.html")]) == 0
    tables = re.findall(r"(?:^\|.*\n)+", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(tables) == 2  # the runs, and what differs between their settings
    for table in tables:
        assert table in README


@pytest.mark.parametrize(
    ("recipe", "changed"), sorted({(results(run)["recipe"], changes(run)) for run in RUNS}, key=str), ids=str
)
def test_the_readme_has_the_mean_and_the_spread(recipe: str, changed: tuple[str, ...]) -> None:
    """In the row that links to the runs, which names what they have otherwise than their recipe."""
    kept = [run for run in RUNS if results(run)["recipe"] == recipe and changes(run) == changed]
    (row,) = (
        line for line in README.splitlines() if f"(results/{kept[0].name})" in line and line.startswith(f"| `{recipe}`")
    )
    assert all(f"(results/{run.name})" in row for run in kept)
    for name in changed:
        assert f"`{name}={getattr(Run(kept[0]).recipe().recipe, name)}`" in row, row
    runs = [results(run) for run in kept]
    top1 = [run["top1"] for run in runs]
    figure = f"{statistics.mean(top1):.3f}"
    if len(top1) > 1:
        figure += f" ± {statistics.stdev(top1):.3f}"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert figure in cells, f"{figure} is not in: {row}"
    assert any(f"{statistics.mean(run['train_seconds'] for run in runs):,.0f} s" in cell for cell in cells), row
