"""How a model is trained by several processes: each has all of it (DDP), or a part of each block's weights (FSDP2).
Both are torch's; here is which process has what, and how the weights come together again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.errors import BadInput
from vitrail.progress import say
from vitrail.settings import Recipe
from vitrail.vit import models
from vitrail.vit.additions import ConvolutionalStem
from vitrail.vit.model import TransformerEncoderBlock
from vitrail.vit.models import Model
from vitrail.world import World


def check_shares(recipe: Recipe, world: World) -> None:
    """See whether the processes can share a batch, and the model, evenly; say so where there is nobody to share with.

    Raises:
        BadInput: they cannot.
    """
    least = world.size * recipe.accumulate * recipe.least_images
    if recipe.batch_size % least:
        of = f"{world.size} processes" + (f" with --accumulate {recipe.accumulate}" if recipe.accumulate > 1 else "")
        pairs = ", whose images are mixed in pairs," if recipe.mixes else ""
        raise BadInput(
            f"a batch of {recipe.batch_size}{pairs} does not divide evenly among {of}: it is that of all processes "
            f"together. Take a multiple of {least} for --batch-size."
        )
    if recipe.parallel == "fsdp" and recipe.optimizer == "muon":
        raise BadInput("muon needs whole matrices, of which fsdp leaves each process a part; take --optimizer adamw.")
    if recipe.parallel == "fsdp" and world.size == 1:
        say("this process is alone and has all of the model: --parallel fsdp is for several, started by torchrun")


def shard(model: nn.Module, recipe: Recipe, world: World) -> None:
    """Where the recipe asks for it, leave each process its part of the weights, in place, before the optimizer is made:
    block by block, so that a process has one whole block at a time. With bf16, blocks are gathered in that, and
    gradients are added up in float32; a stem is gathered in float32, which BatchNorm measures in."""
    if recipe.parallel != "fsdp" or world.size == 1:
        return
    # They take 0.8 s, which who is alone need not wait for.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if recipe.precision == "bf16" else MixedPrecisionPolicy()
    for module in model.modules():
        if isinstance(module, TransformerEncoderBlock):
            fully_shard(module, mp_policy=policy)
        if isinstance(module, ConvolutionalStem):
            fully_shard(module)
    fully_shard(model, mp_policy=policy, reshard_after_forward=True)  # else its own weights stay behind an evaluation
    if hasattr(model, "reconstruct"):  # what pre-training calls beside `forward`
        register_fsdp_forward_method(model, "reconstruct")


def replicate(model: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """What training steps call: the model itself where a process is alone or has a part of it; else one that averages
    the gradients of all processes while they are computed."""
    if world.size == 1 or recipe.parallel == "fsdp":
        return model
    # Of a model that is pre-trained, nothing reads the head.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=recipe.self_supervised)


def is_part(tensor: Tensor) -> bool:
    """Whether it is what this process has of a larger tensor: a DTensor, with what that has beside a Tensor."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # which takes as long to import

    return isinstance(tensor, DTensor)


@contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """A backward pass in the block adds up the gradients of all processes only if it is the `last` of a step."""
    if isinstance(model, DistributedDataParallel):
        with nullcontext() if last else model.no_sync():
            yield
        return
    if (set_sync := getattr(model, "set_requires_gradient_sync", None)) is not None:  # FSDP2's
        set_sync(last)
    yield


def whole(tensors: Mapping[str, Any], world: World) -> dict[str, Tensor]:
    """The tensors with all their parts, for the first process; all of them have to ask for it. What was in parts comes
    one after the other, and is put into the processor's memory: a device need not hold all of it."""
    complete = {}
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if is_part(tensor) else tensor
        if world.first:
            complete[name] = found.cpu() if is_part(tensor) else found
    return complete


def finite(tensor: Any) -> bool:
    """Whether all numbers are, of the part that this process has."""
    return bool((tensor.to_local() if is_part(tensor) else tensor).isfinite().all())


def like(tensor: Tensor, other: Any) -> Tensor:
    """The tensor as the other is: on its device, and of it only the part that this process has of the other."""
    tensor = tensor.to(other.device)
    if not is_part(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)


def ordinary(model: Model, world: World) -> Model:
    """The model as it is in a process that is alone: itself, or, where it is in parts, another with all its weights, on
    the processor. It is for the first process; all of them have to ask for it."""
    if not any(map(is_part, model.parameters())):
        return model
    weights = whole(model.state_dict(), world)
    if not world.first:
        return model
    with torch.device("meta"):
        copy = models.build(model.config)
    copy.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()}, assign=True)
    return copy
