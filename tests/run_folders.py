"""Run folders as training writes them, of real digits or of noise, the predictions made by the nearest class mean."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from vitrail.data.cache import Dataset, Images, Split
from vitrail.evaluation.evaluate import Predictions, figures
from vitrail.recipes import RECIPES, resolve
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run

EPOCHS = RECIPES["digits"].epochs


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

    def flat(split: Split) -> Any:
        step = split.image(0).shape[0] // 8
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


def add_weights(run: Path, dataset: Dataset) -> VisionTransformer:
    """Give a run weights, random ones, of a model with 4 × 4 patches."""
    side = dataset.splits["train"].image(0).shape[0]
    model = VisionTransformer(
        ViTConfig(image_size=side, patch_size=side // 4, hidden_size=16, mlp_dim=16, num_heads=2, num_layers=2,
                  num_classes=len(dataset.classes))
    )  # fmt: skip
    Run(run).save_model(model, dataset.classes)
    return model
