"""A step's gradient is that of the whole batch, however memory divides it and whatever is computed twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.data.cache import Images
from vitrail.errors import BadInput
from vitrail.input.batches import Targets, TrainingBatches
from vitrail.input.pixels import Pixels
from vitrail.progress import counted
from vitrail.settings import Recipe
from vitrail.training.optimize import build_optimizer
from vitrail.training.step import gradient, mean_loss, train_step
from vitrail.training.train import model_config
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import VisionTransformer

CPU = torch.device("cpu")
RECIPE = Recipe(
    image_size=8, patch_size=4, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=2, batch_size=12, epochs=2,
    flip="random", crop=1, rotate=5.0, clip=1.0,
)  # fmt: skip


class Cramped(VisionTransformer):
    """A model on a device whose memory holds the activations of `room` images."""

    room = 12

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B C"]:
        logits = super().forward(images)
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits


def setting(recipe: Recipe) -> tuple[Cramped, TrainingBatches]:
    """A model with weights that are not zero, and its batches of random images."""
    torch.manual_seed(0)
    config = model_config(recipe, 3)
    assert isinstance(config, ViTConfig)
    model = Cramped(config)
    torch.nn.init.normal_(model.head.weight)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = replace(Images.pack(list(pixels), [str(n) for n in range(20)]), labels=np.arange(20) % 3)
    return model, TrainingBatches(Pixels(images, 8, CPU), recipe)


def gradients(model: VisionTransformer) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("accumulate", "mixup"), [(2, 0.0), (3, 0.0), (12, 0.0), (2, 0.5), (6, 0.5)])
def test_parts_add_up_to_the_gradient_of_the_whole(accumulate: int, mixup: float) -> None:
    recipe = replace(RECIPE, mixup=mixup)
    model, batches = setting(recipe)
    outcome = gradient(model, batches, 1)
    again, divided = setting(replace(recipe, accumulate=accumulate))
    torch.testing.assert_close(gradient(again, divided, 1), outcome)
    found, whole = gradients(again), gradients(model)
    assert found.keys() == whole.keys()
    for name, weight in whole.items():  # what sums are rounded by hangs on the largest of them: one of -0.02 is of 6
        assert (found[name] - weight).abs().max() <= 3e-6 * weight.abs().max(), name


def some_logits() -> tuple[Tensor, Targets]:
    """Of seven images and five classes."""
    random = torch.Generator().manual_seed(0)
    labels, others = torch.randint(5, (2, 7), generator=random)
    return torch.randn(7, 5, generator=random) * 3, Targets(labels, others, torch.rand(7, generator=random))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [{}, {"mixup": 0.8}, {"cutmix": 1.0}], ids=["plain", "mixup", "cutmix"])
def test_the_loss_is_that_of_soft_labels_by_numpy(smoothing: float, mixes: dict[str, float]) -> None:
    logits, targets = some_logits()
    if not mixes:
        targets = Targets(targets.labels, targets.labels, torch.ones(7))
    one_hot, share = np.eye(5), targets.share.double().numpy()[:, None]
    wanted = share * one_hot[targets.labels] + (1 - share) * one_hot[targets.others]
    wanted = (1 - smoothing) * wanted + smoothing / 5
    exact = logits.double().numpy()
    logs = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    loss = mean_loss(logits, targets, Recipe(label_smoothing=smoothing, **mixes))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(-(wanted * logs).sum(1).mean(), rel=1e-6)


def test_the_loss_of_images_that_are_not_mixed_has_the_bits_of_torchs() -> None:
    logits, targets = some_logits()
    assert torch.equal(mean_loss(logits, targets, Recipe()), F.cross_entropy(logits, targets.labels))


def test_a_mixed_image_is_recognised_by_its_own_class() -> None:
    model, batches = setting(replace(RECIPE, mixup=0.5))
    _, correct = gradient(model, batches, 1)
    ((images, targets),) = batches.parts(1)
    assert not torch.equal(targets.labels, targets.others)
    assert correct == (model(images).argmax(1) == targets.labels).sum()


@pytest.mark.parametrize(("room", "parts"), [(11, 2), (5, 3), (1, 12)])
def test_where_memory_runs_out_the_step_is_done_in_parts(
    room: int, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(RECIPE, optimizer="sgd")  # Adam makes whole steps of gradients that are rounding errors
    (model, batches), (again, divided) = setting(recipe), setting(recipe)
    again.room = room
    optimizer, other = build_optimizer(model, recipe), build_optimizer(again, recipe)
    for step in range(3):
        outcome = train_step(model, optimizer, batches, step)
        torch.testing.assert_close(train_step(again, other, divided, step), outcome)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), atol=1e-5, rtol=1e-4)
    assert divided.divided_by == parts
    said = capsys.readouterr().err.splitlines()
    assert (
        said[-1]
        == f"out of memory: each batch is now worked through in {parts} parts of {counted(12 // parts, 'image')}"
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_steps_averages_of_batch_norm_are_plain_means(parts: int) -> None:
    recipe = replace(RECIPE, stem="convolutions", accumulate=parts, epochs=15)
    model, batches = setting(recipe)
    optimizer, met, expected = build_optimizer(model, recipe), [], torch.zeros(())
    norm = model.get_submodule("patch_embedding.layers.1")
    norm.register_forward_pre_hook(lambda norm, given: met.append(given[0].double().mean((0, 2, 3))))
    taken = 1 - 0.95**parts
    for step in range(25):
        met.clear()
        train_step(model, optimizer, batches, step)
        of_step = met[0] if parts == 1 else (0.95 * met[0] + met[1]) / 1.95
        expected = expected + max(taken, 1 / (step + 1)) * (of_step - expected)
        if step in (0, 1, 5, 24):  # from the twentieth on they are those of their momentum
            torch.testing.assert_close(norm.get_buffer("running_mean").double(), expected, atol=1e-5, rtol=1e-4)


def test_where_memory_runs_out_batch_norm_does_not_measure_twice() -> None:
    recipe = replace(RECIPE, stem="convolutions", optimizer="sgd")
    (again, divided), (model, batches) = setting(recipe), setting(replace(recipe, accumulate=3))
    again.room = 5
    optimizer, other = build_optimizer(model, recipe), build_optimizer(again, recipe)
    for step in range(2):
        train_step(model, optimizer, batches, step)
        train_step(again, other, divided, step)
    assert divided.divided_by == 3
    for name in ("running_mean", "running_var"):
        name = f"patch_embedding.layers.1.{name}"
        assert torch.equal(again.get_buffer(name), model.get_buffer(name))


def test_each_weight_is_trained_at_its_own_rate() -> None:
    recipe = replace(RECIPE, optimizer="muon", lr=0.01, muon_lr=0.5, layer_decay=0.5, warmup=0.5)
    model, batches = setting(recipe)
    optimizer = build_optimizer(model, recipe)
    train_step(model, optimizer, batches, 0)  # in the middle of the warm-up
    assert {group["lr"] for group in optimizer.param_groups} == {0.125, 0.0625, 0.005, 0.0025, 0.00125, 0.000625}


def test_where_not_even_one_image_fits_it_says_what_to_do() -> None:
    model, batches = setting(RECIPE)
    model.room = 0
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(BadInput, match="set --checkpoint-activations"):
        train_step(model, build_optimizer(model, RECIPE), batches, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def kept(model: VisionTransformer, batches: TrainingBatches) -> int:
    """Numbers that the forward pass keeps for the backward pass, those of the weights left out."""
    held: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if not isinstance(saved, torch.nn.Parameter):
            held[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() // 4
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        gradient(model, batches, 0)
    return sum(held.values())


def test_activations_computed_twice_give_the_same_gradient_from_less_memory() -> None:
    recipe = replace(RECIPE, dropout=0.2, num_layers=6)
    (model, batches), (again, same) = setting(recipe), setting(recipe)
    again.checkpoint_activations = True
    outcome = gradient(model, batches, 1)
    assert torch.equal(gradient(again, same, 1), outcome)  # the same noise of dropout too
    assert all(torch.equal(weight, gradients(model)[name]) for name, weight in gradients(again).items())
    assert kept(again, same) < 0.3 * kept(model, batches)
