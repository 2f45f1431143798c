"""One training step: the gradient of a batch, in as many parts as memory asks for, and an update of the weights."""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.input.batches import Targets, TrainingBatches, generator, stream_seed
from vitrail.progress import counted, say
from vitrail.settings import Recipe
from vitrail.training.optimize import learning_rate, measured
from vitrail.training.parallel import synchronised
from vitrail.training.pretraining import Masks, draw_masks
from vitrail.vit.additions import BATCH_NORM_MOMENTUM


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: TrainingBatches, step: int
) -> Float[Tensor, "2"]:
    """One step: the learning rates, the gradient of the mean loss over the batch, an update of the weights. What
    BatchNorm has measured is from then on the mean over all processes.

    The model is a `Trainee`, or one that shares the work with other processes (`parallel.replicate`).

    Returns the loss and the number of images recognised (none in pre-training), still on the device, so that nothing
    waits for them.

    Raises:
        BadInput: the device's memory does not hold what one image takes.
    """
    recipe = batches.recipe
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step, batches.steps, group["peak"])
    averages = list(measured(model).values())
    known = [average.clone() for average in averages]
    outcome = None
    while outcome is None:
        with contextlib.suppress(torch.OutOfMemoryError):  # which holds on to what was computed, until it is gone
            outcome = gradient(model, batches, step)
        if outcome is None:
            optimizer.zero_grad(set_to_none=True)
            for average, before in zip(averages, known, strict=True):
                average.copy_(before)
            torch.cuda.empty_cache()
            batches.divide()
            size = counted(recipe.batch_size // batches.divided_by, "image")
            say(f"out of memory: each batch is now worked through in {batches.divided_by} parts of {size}")
    if recipe.clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    catch_up(averages, known, step, batches.divided_by)
    batches.world.mean(averages)
    return batches.world.total(outcome)


def catch_up(averages: Sequence[Tensor], known: Sequence[Tensor], step: int, parts: int) -> None:
    """In the first steps, make BatchNorm's averages, which the step's parts have moved from `known` by their momentum,
    plain means of the steps so far: a run of few steps would be evaluated by what they begin with."""
    taken = 1 - (1 - BATCH_NORM_MOMENTUM) ** parts
    share = 1 / (step + 1)
    if share > taken:
        for average, before in zip(averages, known, strict=True):
            average.copy_(before.lerp(average, share / taken))


def gradient(model: nn.Module, batches: TrainingBatches, step: int) -> Float[Tensor, "2"]:
    """Leave the gradient of the mean loss over the step's batch in the weights; it does not depend on how many parts
    the batch is divided into, but for rounding, for what dropout, stochastic depth and patch dropout draw anew for each
    part, and for BatchNorm, which normalises each part by itself.

    Returns this process's share of the loss, and the number of its images recognised; a mixed image is, where its own
    class, not its partner's, is.
    """
    recipe, device, world = batches.recipe, batches.pixels.device, batches.world
    torch.manual_seed(stream_seed(recipe.seed, "dropout", step * world.size + world.rank))
    outcome = torch.zeros(2, device=device)
    masks = step_masks(batches, step) if recipe.self_supervised else None
    every = batches.rows()
    for rows, (images, targets) in zip(every, batches.parts(step), strict=True):
        hidden = () if masks is None else (masks.part(rows),)
        with synchronised(model, last=rows == every[-1]):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                answers = model(images, *hidden).float()  # a loss for each image in pre-training, else logits
            loss = (answers.mean() if hidden else mean_loss(answers, targets, recipe)) / batches.divided_by
            loss.backward()
        correct = outcome.new_zeros(()) if hidden else (answers.detach().argmax(1) == targets.labels).sum()
        outcome += torch.stack([loss.detach() / world.size, correct])
    return outcome


def step_masks(batches: TrainingBatches, step: int) -> Masks:
    """What a step of pre-training hides of its whole batch: a function of the seed and the step."""
    recipe = batches.recipe
    patches, random = (batches.stretch(step).side // recipe.patch_size) ** 2, generator(recipe.seed, "masks", step)
    return draw_masks(recipe, recipe.batch_size, patches, random).to(batches.pixels.device)


def mean_loss(logits: Float[Tensor, "b classes"], targets: Targets, recipe: Recipe) -> Float[Tensor, ""]:
    """The cross-entropy of the classes that each image shows, by their shares, meaned over the images.

    Label smoothing (1512.00567, section 7) takes its share from each label and spreads it over all classes, the label's
    own included.
    """
    smoothing = recipe.label_smoothing
    if not recipe.mixes:
        return F.cross_entropy(logits, targets.labels, label_smoothing=smoothing)
    own = F.cross_entropy(logits, targets.labels, label_smoothing=smoothing, reduction="none")
    other = F.cross_entropy(logits, targets.others, label_smoothing=smoothing, reduction="none")
    return (targets.share * own + (1 - targets.share) * other).mean()
