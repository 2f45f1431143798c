"""Batched augmentation on the training device: what happens to each image is drawn first, then done to all at once.

Flips and shifts only pick pixels and are done while the bytes are read (`places`); the rest works on the pixels
(`augment`). Drawing is separate from doing so that the numbers come from the processor's generator whatever the device,
and so that a part of a batch (a micro-batch, another process's share) is augmented exactly as it would be within the
whole.

    B batch    S side of the image, in pixels
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitrail.input import operations
from vitrail.input.operations import Levels, PerImage
from vitrail.settings import Recipe

TRIES = 10  # rectangles drawn for each image, of which the first that fits is taken: as torchvision does
RAND_AUGMENT = (2, 9)  # operations on each image, and how far each goes, of 10: the paper's for ImageNet, and DeiT's

Kind = TypeVar("Kind", bound="Rows")
Places = tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]  # rows and columns of squares, to be shown in that order


@dataclass(frozen=True)
class Rows:
    """Draws whose tensors and arrays have a row for each image of a batch."""

    def _each(self: Kind, do: Callable[[Any], Any]) -> Kind:
        drawn = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: do(part) for name, part in drawn.items() if part is not None})

    def part(self: Kind, rows: slice) -> Kind:
        """The draws of some of the images."""
        return self._each(lambda drawn: drawn.part(rows) if isinstance(drawn, Rows) else drawn[rows])

    def to(self: Kind, device: torch.device) -> Kind:
        """The same on a device, but for NumPy's arrays: they say which images have something done to them, and the
        processor must know that to ask for it."""

        def move(drawn: Any) -> Any:
            if isinstance(drawn, Rows):
                return drawn.to(device)
            return send(drawn, device) if isinstance(drawn, Tensor) else drawn

        return self._each(move)


@dataclass(frozen=True)
class PolicyDraws(Rows):
    """The operations done to each image, one after the other."""

    chosen: Int[np.ndarray, "B rounds"]  # which of the policy's choices
    magnitude: Float[Tensor, "B rounds"]


@dataclass(frozen=True)
class EraseDraws(Rows):
    """The rectangles that noise is put into."""

    erased: Bool[np.ndarray, " B"]  # whether there is one
    box: Float[Tensor, "B 4"]  # top, left, bottom and right, in whole pixels
    key: Int[Tensor, " B"]  # what the noise is made from


@dataclass(frozen=True)
class MixDraws(Rows):
    """How each image is mixed with its partner: the same for both."""

    share: Float[Tensor, " B"]  # of the image itself
    box: Float[Tensor, "B 4"] | None  # what is pasted from the partner, as in EraseDraws; None: they are blended


@dataclass(frozen=True)
class Draws(Rows):
    """What is to be done to each image of a batch; None for what the recipe leaves out."""

    window: Float[Tensor, "B 2"]  # where to cut the square out of a larger image: 0 top or left … 1 bottom or right
    mirrored: Bool[Tensor, " B"]
    angle: Float[Tensor, " B"]  # degrees, counter-clockwise
    shift: Float[Tensor, "B 2"]  # whole pixels, down and right
    box: Float[Tensor, "B 4"] | None = None  # what is enlarged to fill the image: top, left, height, width in pixels
    policy: PolicyDraws | None = None
    factors: Float[Tensor, "B 3"] | None = None  # of brightness, contrast and colour
    erase: EraseDraws | None = None
    mix: MixDraws | None = None


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one of the processor's gets there without waiting for what the device still has to do: CUDA
    copies from pinned memory behind that, and from other memory only after it."""
    to_send = device.type == "cuda" and drawn.device.type == "cpu"
    return drawn.pin_memory().to(device, non_blocking=True) if to_send else drawn.to(device)


# Drawing. Everything is drawn, used or not, so that no setting moves another's numbers; what is new is drawn last.


def draw(recipe: Recipe, batch: int, generator: torch.Generator) -> Draws:
    """Draw what the recipe asks for. With `flip` alternate, which images are mirrored is not drawn here."""
    window = torch.rand(batch, 2, generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    angle = torch.rand(batch, generator=generator) * 2 - 1
    shift = torch.randint(-recipe.crop, recipe.crop + 1, (batch, 2), generator=generator).float()
    return Draws(
        window, mirrored & (recipe.flip == "random"), angle * recipe.rotate, shift,
        draw_box(recipe, batch, generator), draw_policy(recipe, batch, generator),
        draw_factors(recipe, batch, generator), draw_erase(recipe, batch, generator),
        draw_mix(recipe, batch, generator),
    )  # fmt: skip


def first_fitting(
    height: Float[Tensor, "B tries"], width: Float[Tensor, "B tries"], most: int, otherwise: int
) -> Float[Tensor, "B 2"]:
    """Height and width of each image's first rectangle with no side longer than `most`; a square of side `otherwise`
    where there is none."""
    fits = (height <= most) & (width <= most)
    first = fits.int().argmax(1, keepdim=True)
    sides = torch.cat([height.gather(1, first), width.gather(1, first)], 1)
    return torch.where(fits.any(1, keepdim=True), sides, float(otherwise))


def draw_box(recipe: Recipe, batch: int, generator: torch.Generator) -> Float[Tensor, "B 4"] | None:
    """Random resized crop (Inception, 1409.4842): a share of the area from `resized_crop` to 1, a ratio of width to
    height from 3/4 to 4/3, evenly in its logarithm, anywhere. As torchvision's, but the edges need not lie between
    pixels, and it is cut from the square that was cut from the image: the same where images are square."""
    drawn = torch.rand(batch, TRIES, 2, generator=generator)
    place = torch.rand(batch, 2, generator=generator)
    if not recipe.resized_crop:
        return None
    area = (recipe.resized_crop + (1 - recipe.resized_crop) * drawn[:, :, 0]) * recipe.image_size**2
    ratio = ((drawn[:, :, 1] * 2 - 1) * math.log(4 / 3)).exp()
    whole = recipe.image_size
    sides = first_fitting((area / ratio).sqrt(), (area * ratio).sqrt(), whole, otherwise=whole)
    return torch.cat([place * (whole - sides), sides], 1)


class Choice(NamedTuple):
    """An operation of a policy, and its magnitude where it goes least and most far."""

    apply: Callable[[Tensor, Tensor], Tensor] | None  # None: the image is left as it is
    least: float = 0.0
    most: float = 0.0
    either_way: bool = False  # half of the images as far in the other direction from `least`


def choices(recipe: Recipe) -> tuple[Choice, ...]:
    """What the recipe's policy chooses from.

    3-Augment (DeiT III, 2204.07118) as in its code. RandAugment's 14 operations (1909.13719) go as far as AutoAugment's
    (1805.09501, table 6), brightness and its like both ways from 1; TrivialAugment's (2103.10158) are the same in the
    paper's wide space, as torchvision has it. Both papers' codes take the nearest pixel's colour; here it is bilinear.
    """
    if recipe.policy == "3-augment":
        gray = Choice(lambda pixels, _: operations.grayscale(pixels))
        return gray, Choice(operations.solarize, 128, 128), Choice(operations.gaussian_blur, 0.1, 2)
    narrow = (0.3, 150 / 331 * recipe.image_size, 30.0, 0.9, 4)
    shear, move, turn, enhance, bits = narrow if recipe.policy == "rand-augment" else (0.99, 32.0, 135.0, 0.99, 2)
    moving = (
        (operations.shear_x, shear), (operations.shear_y, shear), (operations.translate_x, move),
        (operations.translate_y, move), (operations.rotate, turn),
    )  # fmt: skip
    enhancing = (operations.brightness, operations.colour, operations.contrast, operations.sharpness)
    return (
        Choice(None),
        *(Choice(operation, 0, most, either_way=True) for operation, most in moving),
        *(Choice(operation, 1, 1 + enhance, either_way=True) for operation in enhancing),
        Choice(operations.posterize, 8, bits),
        Choice(operations.solarize, 256, 0),
        Choice(lambda pixels, _: operations.autocontrast(pixels)),
        Choice(lambda pixels, _: operations.equalize(pixels)),
    )


def draw_policy(recipe: Recipe, batch: int, generator: torch.Generator) -> PolicyDraws | None:
    """Which operations each image gets, and how far they go: 3-Augment anywhere from least to most, RandAugment always
    by the same share of the way, TrivialAugment by one of 31 steps."""
    which, share, side = torch.rand(3, batch, RAND_AUGMENT[0], generator=generator)
    if recipe.policy == "none":
        return None
    if recipe.policy == "rand-augment":
        share = torch.full_like(share, RAND_AUGMENT[1] / 10)
    else:
        which, share, side = which[:, :1], share[:, :1], side[:, :1]
        share = (share * 31).floor() / 30 if recipe.policy == "trivial-augment" else share
    there = choices(recipe)
    chosen = (which * len(there)).long()
    least, most, either_way = (torch.tensor(column)[chosen] for column in list(zip(*there, strict=True))[1:])
    sign = torch.where(either_way & (side < 0.5), -1.0, 1.0)
    return PolicyDraws(chosen.numpy(), least + sign * share * (most - least))


def draw_factors(recipe: Recipe, batch: int, generator: torch.Generator) -> Float[Tensor, "B 3"] | None:
    """Colour jitter: factors of brightness, contrast and colour from 1 - `jitter` to 1 + `jitter`; 3-Augment brings
    0.3, if the recipe does not say otherwise."""
    drawn = torch.rand(batch, 3, generator=generator)
    strength = recipe.jitter or (0.3 if recipe.policy == "3-augment" else 0.0)
    return 1 + strength * (drawn * 2 - 1) if strength else None


def draw_erase(recipe: Recipe, batch: int, generator: torch.Generator) -> EraseDraws | None:
    """Random erasing (1708.04896): for a share `erase` of the images, a rectangle of 0.02 to 0.33 of the area, its
    ratio of height to width from 0.3 to 3.3, evenly in its logarithm, anywhere: as torchvision draws it."""
    chance = torch.rand(batch, generator=generator)
    drawn = torch.rand(batch, TRIES, 2, generator=generator)
    place = torch.rand(batch, 2, generator=generator)
    key = torch.randint(2**31, (batch,), generator=generator)
    if not recipe.erase:
        return None
    whole = recipe.image_size
    area = (0.02 + (0.33 - 0.02) * drawn[:, :, 0]) * whole**2
    ratio = (math.log(0.3) + (math.log(3.3) - math.log(0.3)) * drawn[:, :, 1]).exp()
    sides = first_fitting((area * ratio).sqrt().round(), (area / ratio).sqrt().round(), whole - 1, otherwise=0)
    corner = (place * (whole - sides + 1)).floor()
    return EraseDraws((chance < recipe.erase).numpy(), torch.cat([corner, corner + sides], 1), key)


def draw_mix(recipe: Recipe, batch: int, generator: torch.Generator) -> MixDraws | None:
    """Mixup (1710.09412) or CutMix (1905.04899), one of them for the whole batch where the recipe has both: for each
    pair a share from Beta(alpha, alpha), and where the rectangle is of which the partners are pasted.

    Both papers' codes draw one share for a whole batch and mix it with a permutation of itself; pairs, each with its
    own, are timm's mode `pair`. The rectangle is timm's: cut off at the image's edges, and the share then put right.
    """
    pairs = -(-batch // 2)
    cut = bool(torch.rand((), generator=generator) < 0.5)
    seed = int(torch.randint(2**62, (), generator=generator))
    middle = (torch.rand(pairs, 2, generator=generator) * recipe.image_size).floor()
    if not recipe.mixes:
        return None
    cut = recipe.cutmix > 0 and (cut or not recipe.mixup)
    alpha = recipe.cutmix if cut else recipe.mixup
    share = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, pairs))
    if not cut:
        return MixDraws(share.float().repeat_interleave(2)[:batch], None)
    sides = (recipe.image_size * (1 - share).sqrt()).float().floor()[:, None]
    begin, end = middle - (sides / 2).floor(), middle + (sides / 2).ceil()
    box = torch.cat([begin, end], 1).clamp(0, recipe.image_size)
    left = 1 - (box[:, 2:] - box[:, :2]).prod(1) / recipe.image_size**2
    return MixDraws(left.repeat_interleave(2)[:batch], box.repeat_interleave(2, 0)[:batch])


# Doing


def places(draws: Draws, size: int, recipe: Recipe) -> Places | None:
    """Flips and shifts: which row, and which column, of the square cut out of an image each row and column of the
    augmented image shows. None where the recipe asks for neither.

    A shift moves the image, mirrored or not, down and right; what comes in is the reflection of the edge: the same as
    padding and cutting a random square. All of it is picking pixels, so that one read of the bytes does it.
    """
    if recipe.flip == "none" and not recipe.crop:
        return None
    along = torch.arange(size, device=draws.shift.device)
    last = size - 1
    moved = along - draws.shift.long()[:, :, None]  # (B, 2, S)
    rows, columns = (last - (last - moved.abs()).abs()).unbind(1)  # reflected at 0, then at `last`
    return rows, torch.where(draws.mirrored[:, None], last - columns, columns)


def normalise(pixels: Float[Tensor, "B 3 S S"] | UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Pixels from 0…255 to -1…1, as the official code feeds them (input_pipeline.py)."""
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)  # of bytes, dividing at once takes twice as long


def augment(images: UInt8[Tensor, "B 3 S S"], draws: Draws, recipe: Recipe) -> Float[Tensor, "B 3 S S"]:
    """All that is more than picking pixels, in the order of the settings, and then normalised."""
    drawn = (draws.box, draws.policy, draws.factors, draws.erase, draws.mix)
    if not recipe.rotate and all(part is None for part in drawn):
        return normalise(images)
    pixels = reframe(images.float(), draws, recipe).contiguous()
    if draws.policy:
        apply_policy(pixels, draws.policy, choices(recipe))
    if draws.factors is not None:
        pixels = operations.jitter(pixels, draws.factors)
    if draws.erase:
        erase(pixels, draws.erase)
    if draws.mix:
        pixels = mix(pixels, draws.mix)
    return normalise(pixels)


def reframe(pixels: Levels, draws: Draws, recipe: Recipe) -> Levels:
    """Rotate, and enlarge what was cut out: the pixels are interpolated once, whatever the recipe asks for."""
    side = pixels.shape[-1]
    if draws.box is None:
        return rotate(pixels, draws.angle) if recipe.rotate else pixels
    crop = operations.cropping(draws.box, side)
    if not recipe.rotate:
        return operations.sample(pixels, operations.positions(crop, side))  # which is all within the image
    return operations.affine(pixels, operations.then(operations.turning(draws.angle, side), crop))


def rotate(pixels: Levels, angle: PerImage) -> Levels:
    """Rotate each image about its centre by `angle` degrees counter-clockwise, bilinearly; corners become black.

    As `operations.rotate`, which is Pillow's, but that the image fades into the black where it ends.
    """
    side = pixels.shape[-1]
    where = operations.positions(operations.turning(angle, side), side).mul_(2 / side).sub_(1)
    return F.grid_sample(pixels, where, mode="bilinear", padding_mode="zeros", align_corners=False)


def apply_policy(pixels: Levels, draws: PolicyDraws, there: tuple[Choice, ...]) -> None:
    """Do to each image, in place, what was chosen for it: images of the same operation are gathered, so that each is
    worked on once in a round. The processor knows which they are, and the device is not waited for."""
    for chosen, magnitude in zip(draws.chosen.T, draws.magnitude.unbind(1), strict=True):
        order = send(torch.from_numpy(np.argsort(chosen, kind="stable")), pixels.device)
        groups = order.split(np.bincount(chosen, minlength=len(there)).tolist())
        for (apply, *_), rows in zip(there, groups, strict=True):
            if apply is not None and len(rows):
                pixels[rows] = apply(pixels[rows], magnitude[rows])


def erase(pixels: Levels, draws: EraseDraws) -> None:
    """Fill the boxes of the images that have one with noise, in place: of the paper's fillings, the best (RE-R)."""
    rows = send(torch.from_numpy(np.flatnonzero(draws.erased)), pixels.device)
    if len(rows):
        side = pixels.shape[-1]
        inside, fill = operations.within(draws.box[rows], side), operations.noise(draws.key[rows], side)
        pixels[rows] = torch.where(inside, fill, pixels[rows])


def partners(rows: Tensor) -> Tensor:
    """For each image, what belongs to the one it is mixed with: images 2i and 2i + 1 are a pair. So every part of a
    batch that holds an even number of images is mixed within itself, as it would be within the whole."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(pixels: Levels, draws: MixDraws) -> Levels:
    """Blend each image with its partner, or paste the partner's box into it."""
    others = partners(pixels)
    if draws.box is not None:
        return torch.where(operations.within(draws.box, pixels.shape[-1]), others, pixels)
    share = draws.share[:, None, None, None]
    return (pixels * share).add_(others.mul_(1 - share))
