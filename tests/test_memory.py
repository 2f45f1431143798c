"""What a training step takes of memory is counted right, and a batch that is too large for it is divided beforehand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitrail
from vitrail.data import cache
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import predict_split
from vitrail.input import memory
from vitrail.input.pixels import pixels_of
from vitrail.recipes import resolve
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer
from vitrail.weights.checkpoint import Run

GAP = ViTConfig(32, 4, 64, 256, 4, 6, 10, classifier="gap")
MEMINFO = "MemTotal:       24684092 kB\nMemAvailable:   20000000 kB\n"


def recipe(**settings: Any) -> Any:
    return resolve("digits", **settings).recipe


def kept(config: ViTConfig, *, images: int = 4, checkpointed: bool = False, bf16: bool = False) -> float:
    """Bytes that autograd keeps of each image between the passes, the weights left out."""
    model = VisionTransformer(config).train()
    model.checkpoint_activations = checkpointed
    blocks = {weight.untyped_storage().data_ptr(): 0 for weight in model.parameters()}
    held: list[Tensor] = []  # lest another takes its place

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        blocks.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    size = config.image_size
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(torch.zeros(images, 3, size, size))
    return sum(blocks.values()) / images


@pytest.mark.parametrize(
    "config",
    [
        GAP,
        replace(GAP, classifier="token"),
        replace(GAP, image_size=72),  # 324 tokens, for which attention is not written down
        replace(GAP, dropout=0.1),
        replace(GAP, layer_scale=0.1),
        replace(GAP, num_layers=12, num_heads=8),
        replace(GAP, num_layers=1, stem="convolutions"),
        replace(GAP, num_layers=1, stem="convolutions", stem_units=4),
    ],
    ids=["gap", "token", "long", "dropout", "additions", "deep", "stem", "units"],
)
def test_what_is_counted_is_what_autograd_keeps(config: ViTConfig) -> None:
    plain = recipe()
    image = 4 * 3 * config.image_size**2
    attention = config.num_heads * config.num_tokens**2 if config.num_tokens <= 256 else 0
    beside = 4 * 2 * max(config.num_tokens * config.mlp_dim, attention) + (memory.COPIES - 1) * image
    counted = memory.activation_bytes(config, plain) - beside  # the one copy of the image is its patches
    assert counted == pytest.approx(kept(config), rel=0.05)


def test_half_precision_and_checkpoints_are_counted_as_less() -> None:
    plain, half = memory.activation_bytes(GAP, recipe()), memory.activation_bytes(GAP, recipe(precision="bf16"))
    assert half / plain == pytest.approx(kept(GAP, images=8, bf16=True) / kept(GAP), rel=0.15)  # of it, weights in bf16
    again = recipe(checkpoint_activations=True)
    deeper = replace(GAP, num_layers=16)
    each = (memory.activation_bytes(deeper, again) - memory.activation_bytes(GAP, again)) / 10
    assert each == pytest.approx((kept(deeper, checkpointed=True) - kept(GAP, checkpointed=True)) / 10, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_step_takes_what_is_counted_and_checkpoints_are_worth_it() -> None:
    """In a process of its own, as training sets it up; memory that glibc keeps would be three times as much."""
    script = """
import torch
from vitrail.data import cache
from vitrail.input import memory
from vitrail.input.batches import TrainingBatches
from vitrail.training.optimize import build_optimizer
from vitrail.input.pixels import pixels_of
from vitrail.process import keep_freed_memory, resident
from vitrail.recipes import resolve
from vitrail.training.step import train_step
from vitrail.training.train import build_model
recipe = resolve("digits", image_size=64, num_layers=12, batch_size=16, checkpoint_activations=True).recipe
keep_freed_memory(not recipe.checkpoint_activations)
model = build_model(recipe, 10).train()
pixels = pixels_of(cache.load("digits", 64).splits["train"], 64, torch.device("cpu"))
batches, optimizer = TrainingBatches(pixels, recipe), build_optimizer(model, recipe)
before = resident()[0]
train_step(model, optimizer, batches, 0)
print((resident()[1] - before) / (16 * memory.activation_bytes(model.config, recipe)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert 0.5 < float(done.stdout) < 1.5


# A batch that does not fit


def free(amount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: int(amount))


def test_a_batch_that_does_not_fit_is_divided(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(batch_size=96)
    enough = memory.needed(asked, GAP, 96)
    free(enough + 1e6, monkeypatch)
    assert memory.fit(asked, GAP) == asked
    assert capsys.readouterr().err == ""
    free(memory.needed(asked, GAP, 31) + 1e4, monkeypatch)
    assert memory.fit(asked, GAP) == replace(asked, accumulate=4)  # 3 parts would be of 32
    err = capsys.readouterr().err
    assert err.startswith(f"96 images of 64 tokens at a time would need {enough / 1e9:,.1f} GB of memory, and 0.")
    assert err.endswith(" GB are free: each batch is worked through in 4 parts of 24 images\n")
    assert memory.fit(replace(asked, accumulate=8), GAP).accumulate == 8
    free(memory.needed(asked, GAP, 3) + 1e4, monkeypatch)
    assert memory.fit(replace(asked, mixup=0.2), GAP).accumulate == 48  # pairs
    assert "48 parts of 2 images" in capsys.readouterr().err


def test_where_not_one_image_fits_it_is_said_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(GAP, image_size=384)
    fine = resolve("fine-tune", data="x").recipe
    lean = replace(fine, checkpoint_activations=True)
    free(memory.needed(lean, config, 1) + 1e4, monkeypatch)
    with pytest.raises(BadInput, match=r"384 pixels, .* 9,216 tokens, .* --checkpoint-activations or") as caught:
        memory.fit(fine, config)
    size = int(str(caught.value).split("--image-size ")[1].split()[0])
    fitting = replace(config, image_size=size)
    assert memory.fit(replace(fine, image_size=size), fitting).accumulate == 512
    with pytest.raises(BadInput):
        memory.fit(fine, replace(config, image_size=size + 4))
    assert memory.fit(lean, config).accumulate == 512
    free(1e6, monkeypatch)
    with pytest.raises(BadInput, match="are free; a smaller model would do"):
        memory.fit(fine, config)


def test_training_divides_its_batches_and_says_so_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 1, "num_layers": 1, "batch_size": 128, "device": "cpu", "holdout": 0.8}
    config = ViTConfig(16, 4, 64, 256, 4, 1, 10, classifier="gap")
    divided = vitrail.train("digits", output=tmp_path / "asked", accumulate=4, **settings).run
    free(memory.needed(recipe(**settings), config, 40), monkeypatch)
    run = vitrail.train("digits", output=tmp_path / "run", **settings).run
    kept = Run(run).recipe()
    assert (kept.recipe.accumulate, kept.set_by["accumulate"]) == (4, "machine")
    weights = Path("model/model.safetensors")
    assert (run / weights).read_bytes() == (divided / weights).read_bytes()
    free(1e6, monkeypatch)
    with pytest.raises(BadInput, match="--image-size 8 would do"):
        vitrail.train("digits", output=tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()


# What is free


def test_what_is_free_is_what_the_system_and_its_groups_leave(tmp_path: Path) -> None:
    assert memory.free_memory(tmp_path) is None
    (own := tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    assert memory.free_memory(tmp_path) == 20_000_000 * 1024
    (own / "cgroup").write_text("9:memory:/jobs/one\n3:cpuset:/\n0::/user/session\n")
    top, inner = tmp_path / "sys/fs/cgroup", tmp_path / "sys/fs/cgroup/user/session"
    inner.mkdir(parents=True)
    for group, limit, taken in ((top, "max", 5), (top / "user", "9000", 5000), (inner, "max", 3)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{taken}\n")
        (group / "memory.stat").write_text("anon 4000\ninactive_file 600\nactive_file 100\n")
    assert memory.free_memory(tmp_path) == 9000 - 5000 + 700
    (jobs := top / "memory" / "jobs").mkdir(parents=True)  # of the first version; its own group is not seen
    (jobs / "memory.limit_in_bytes").write_text("3000\n")
    (jobs / "memory.usage_in_bytes").write_text("2000\n")
    (jobs / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n")
    assert memory.free_memory(tmp_path) == 3000 - 2000 + 500


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says it")
def test_something_is_free_here() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = 1024 * int(next(line for line in lines if line.startswith("MemTotal")).split()[1])
    found = memory.free_memory()
    assert found is not None
    assert 0 < found < total


def test_evaluation_takes_fewer_images_of_many_tokens_at_a_time() -> None:
    with torch.device("meta"):
        sizes = [memory.images_at_once(VisionTransformer(replace(GAP, image_size=size))) for size in (64, 384, 1024)]
    assert sizes[0] == memory.EVALUATED
    assert sizes[0] > sizes[1] > sizes[2] >= 1
    model, split = VisionTransformer(replace(GAP, image_size=16)), cache.load("digits", 16).splits["test"]
    found = predict_split(model, pixels_of(split, 16, torch.device("cpu")))
    assert len(found.label) == 359
