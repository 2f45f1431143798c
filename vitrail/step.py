"""One training step: the gradient of a batch, in as many parts as memory asks for, and an update of the weights."""

import contextlib

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.batches import Targets, TrainingBatches, generator, stream_seed
from vitrail.optimize import learning_rate
from vitrail.pretraining import Masks, Pretraining, Trainee, draw_masks
from vitrail.progress import say
from vitrail.settings import Recipe


def train_step(
    model: Trainee, optimizer: torch.optim.Optimizer, batches: TrainingBatches, step: int
) -> Float[Tensor, "2"]:
    """One step: the learning rates, the gradient of the mean loss over the batch, an update of the weights.

    Returns the loss and the number of images recognised (none in pre-training), still on the device, so that nothing
    waits for them.

    Raises:
        BadInput: the device's memory does not hold what one image takes.
    """
    recipe = batches.recipe
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step, batches.steps, group["peak"])
    outcome = None
    while outcome is None:
        with contextlib.suppress(torch.OutOfMemoryError):  # which holds on to what was computed, until it is gone
            outcome = gradient(model, batches, step)
        if outcome is None:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            batches.divide()
            size = recipe.batch_size // batches.divided_by
            say(f"out of memory: each batch is now worked through in {batches.divided_by} parts of {size} images")
    if recipe.clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outcome


def gradient(model: Trainee, batches: TrainingBatches, step: int) -> Float[Tensor, "2"]:
    """Leave the gradient of the mean loss over the step's batch in the weights; it does not depend on how many parts
    the batch is divided into, but for rounding, and for what dropout, stochastic depth and patch dropout draw anew for
    each part.

    Returns the loss and the number of images recognised; a mixed image is, where its own class, not its partner's, is.
    """
    recipe, device = batches.recipe, batches.pixels.device
    torch.manual_seed(stream_seed(recipe.seed, "dropout", step))
    outcome = torch.zeros(2, device=device)
    masks = step_masks(batches, step) if isinstance(model, Pretraining) else None
    size = recipe.batch_size // batches.divided_by
    for part, (images, targets) in enumerate(batches.parts(step)):
        hidden = () if masks is None else (masks.part(slice(part * size, (part + 1) * size)),)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            answers = model(images, *hidden).float()  # a loss for each image in pre-training, else logits
        loss = (answers.mean() if hidden else mean_loss(answers, targets, recipe)) / batches.divided_by
        loss.backward()
        correct = outcome.new_zeros(()) if hidden else (answers.detach().argmax(1) == targets.labels).sum()
        outcome += torch.stack([loss.detach(), correct])
    return outcome


def step_masks(batches: TrainingBatches, step: int) -> Masks:
    """What a step of pre-training hides of its whole batch: a function of the seed and the step."""
    recipe = batches.recipe
    patches, random = (batches.size(step) // recipe.patch_size) ** 2, generator(recipe.seed, "masks", step)
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
