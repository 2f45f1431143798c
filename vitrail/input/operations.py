"""Operations on batches of images, each image with a magnitude of its own.

Pixels are levels from 0 to 255 in floating point, and so are the results: clipped to that range, but not rounded.
Each operation is Pillow's; where Pillow cuts its result off to a whole level, the fraction is kept here. There is no
loop over images and no shape depends on what an image shows, so that all of them run on any device and can be compiled.
Sums over an image are of whole numbers, and thus exact: what becomes of an image does not depend on those beside it.

    B batch    S side of the image, in pixels
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Levels = Float[Tensor, "B 3 S S"]
PerImage = Float[Tensor, " B"]  # a magnitude

# Shares of red, green and blue in a gray level (ITU-R 601-2), in 65536ths as in Pillow's Convert.c: of whole levels,
# products and sums are exact in float32, in whatever order.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)

# Levels


def gray_level(pixels: Levels) -> Float[Tensor, "B 1 S S"]:
    """What each pixel is without its colour, in whole levels, as Pillow's `convert("L")`."""
    red, green, blue = pixels.unbind(1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).add_(0.5).floor_()[:, None]


def mean_level(gray: Float[Tensor, "B 1 S S"]) -> Float[Tensor, "B 1 1 1"]:
    """The mean of whole levels, rounded to a whole level."""
    count = gray.shape[2] * gray.shape[3]
    total = gray.to(torch.int32).sum((1, 2, 3), keepdim=True)
    return ((2 * total + count) // (2 * count)).to(gray.dtype)


def blend(other: Float[Tensor, "B #C #S #S"], pixels: Levels, factor: PerImage) -> Levels:
    """From `other` (factor 0) to the image (1), and beyond: Pillow's ImageEnhance."""
    factor = factor[:, None, None, None]
    return (pixels * factor).add_(other * (1 - factor)).clamp_(0, 255)


def brightness(pixels: Levels, factor: PerImage) -> Levels:
    """ImageEnhance.Brightness: black at factor 0."""
    return (pixels * factor[:, None, None, None]).clamp_(0, 255)


def contrast(pixels: Levels, factor: PerImage) -> Levels:
    """ImageEnhance.Contrast: the gray of the mean at factor 0."""
    return blend(mean_level(gray_level(pixels)), pixels, factor)


def colour(pixels: Levels, factor: PerImage) -> Levels:
    """ImageEnhance.Color, also called saturation: black and white at factor 0."""
    return blend(gray_level(pixels), pixels, factor)


def sharpness(pixels: Levels, factor: PerImage) -> Levels:
    """ImageEnhance.Sharpness: at factor 0, each pixel is averaged with its eight neighbours, itself counting five
    times (ImageFilter.SMOOTH). The outermost pixels have no eight neighbours and stay."""
    inner = (..., slice(1, -1), slice(1, -1))
    smooth = F.avg_pool2d(pixels, 3, stride=1, divisor_override=1).add_(4 * pixels[inner])
    result = pixels.clone()
    result[inner] = blend(smooth.div_(13).add_(0.5).floor_(), pixels[inner], factor)
    return result


def jitter(pixels: Levels, factors: Float[Tensor, "B 3"]) -> Levels:
    """Brightness, contrast and colour by those factors, at once.

    All three are linear, and commute but for the clipping: as one they take a third of the time. torchvision's
    ColorJitter does them one by one, in random order, and clips after each; here it is done once, at the end.
    """
    light, spread, tint = factors[:, :, None, None, None].unbind(1)
    gray = gray_level(pixels)
    rest = gray * (light * spread * (1 - tint)) + mean_level(gray) * (light * (1 - spread))
    return (pixels * (light * spread * tint)).add_(rest).clamp_(0, 255)


def grayscale(pixels: Levels) -> Levels:
    """ImageOps.grayscale, in three equal channels."""
    return gray_level(pixels).repeat(1, 3, 1, 1)


def invert(pixels: Levels) -> Levels:
    """ImageOps.invert: the negative."""
    return 255 - pixels


def solarize(pixels: Levels, threshold: PerImage) -> Levels:
    """ImageOps.solarize: levels from the threshold up are inverted; none at 256."""
    return torch.where(pixels < threshold[:, None, None, None], pixels, 255 - pixels)


def posterize(pixels: Levels, bits: PerImage) -> Levels:
    """ImageOps.posterize: of each level the highest bits, 1 to 8, are kept. What is not whole is rounded."""
    step = (1 << (8 - bits.round().int()))[:, None, None, None]
    return (pixels + 0.5).div_(step).floor_().mul_(step)


def autocontrast(pixels: Levels) -> Levels:
    """ImageOps.autocontrast: each channel stretched so that its darkest level becomes 0 and its lightest 255."""
    least, most = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    flat = most <= least
    scale = torch.where(flat, 1.0, 255 / (most - least).clamp(min=1))
    return (pixels - torch.where(flat, 0.0, least)).mul_(scale)


def equalize(pixels: Levels) -> Levels:
    """ImageOps.equalize: each channel's levels are spread so that about as many pixels have each.

    Level v becomes (n / 2 + pixels below v) / n in whole numbers, where n is a 255th of the pixels that are darker than
    the lightest level; a channel of too few levels for that stays.
    """
    levels = (pixels + 0.5).long().flatten(2)  # (B, 3, S·S)
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    lightest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - lightest) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device)).to(pixels.dtype)
    return table.gather(2, levels).view_as(pixels)


def gaussian_blur(pixels: Levels, sigma: PerImage) -> Levels:
    """Blur by a Gaussian of `sigma` pixels, the image going on beyond its edge with the edge's own colours.

    Done as two matrix products, one along each axis. Pillow's ImageFilter.GaussianBlur approximates it by three means
    over boxes; this is the Gaussian itself, cut off S pixels from its centre.
    """
    side = pixels.shape[-1]
    along = torch.arange(-side, 2 * side, device=pixels.device, dtype=pixels.dtype)
    away = along[side : 2 * side, None] - along  # (S, 3 S): of each pixel, those before, in and after the image
    weights = torch.exp(-0.5 * (away / sigma.clamp(min=0.01)[:, None, None]) ** 2)
    before, within, after = (weights / weights.sum(2, keepdim=True)).chunk(3, 2)  # (B, S, S)
    within[:, :, 0] += before.sum(2)
    within[:, :, -1] += after.sum(2)

    def blurred(images: Tensor) -> Tensor:
        return (images.reshape(-1, 3 * side, side) @ within.mT).view(-1, 3, side, side)

    return blurred(blurred(pixels).mT).mT


# Positions: where in the image, in pixels from its top left corner, the colour of each output pixel is taken from.
# A matrix gives that position for the output's, as Pillow's Image.Transform.AFFINE does: x' = a x + b y + c,
# y' = d x + e y + f, pixel centres lying at halves.


def positions(matrix: Float[Tensor, "B 2 3"], side: int) -> Float[Tensor, "B S S 2"]:
    """The position, x before y, that each output pixel's centre has in the input."""
    centre = torch.arange(side, device=matrix.device, dtype=matrix.dtype) + 0.5
    a, b, c, d, e, f = matrix.flatten(1)[:, :, None, None].unbind(1)  # (B, 1, 1) each
    down = centre[:, None]
    # x and y apart, for a CPU is slow along a dimension of two: a quarter of the time.
    return torch.stack([a * centre + (b * down + c), d * centre + (e * down + f)], -1)


def sample(pixels: Levels, where: Float[Tensor, "B S S 2"]) -> Levels:
    """The colours at those positions, bilinearly; nearer to the rim than half a pixel, and beyond it, those there."""
    side = pixels.shape[-1]
    scaled = where.clamp(0.5, side - 0.5).mul_(2 / side).sub_(1)
    return F.grid_sample(pixels, scaled, mode="bilinear", padding_mode="zeros", align_corners=False)


def affine(pixels: Levels, matrix: Float[Tensor, "B 2 3"], fill: float = 0.0) -> Levels:
    """Move each image by its matrix, bilinearly; what comes from outside is of the level `fill`."""
    where = positions(matrix, pixels.shape[-1])
    inside = ((where >= 0) & (where < pixels.shape[-1])).all(-1)
    return torch.where(inside[:, None], sample(pixels, where), fill)


def standing(magnitudes: Tensor) -> Float[Tensor, "B 2 3"]:
    """The matrices that leave images where they are, one for each row of the tensor."""
    return torch.eye(2, 3, device=magnitudes.device).repeat(len(magnitudes), 1, 1)


def turning(degrees: PerImage, side: int) -> Float[Tensor, "B 2 3"]:
    """The matrices of rotations about the centre, counter-clockwise."""
    radians = degrees * (math.pi / 180)
    cos, sin, half = radians.cos(), radians.sin(), side / 2
    entries = (cos, -sin, half - half * cos + half * sin, sin, cos, half - half * sin - half * cos)
    return torch.stack(entries, 1).view(-1, 2, 3)


def cropping(box: Float[Tensor, "B 4"], side: int) -> Float[Tensor, "B 2 3"]:
    """The matrices that make a box of each image fill it: top, left, height and width in pixels."""
    matrix = standing(box)
    matrix[:, 0, 0], matrix[:, 0, 2] = box[:, 3] / side, box[:, 1]
    matrix[:, 1, 1], matrix[:, 1, 2] = box[:, 2] / side, box[:, 0]
    return matrix


def then(first: Float[Tensor, "B 2 3"], second: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B 2 3"]:
    """The matrices that do to an image what `first` does, and to the result what `second` does."""
    matrix = first[:, :, :2] @ second
    matrix[:, :, 2] += first[:, :, 2]
    return matrix


def shear_x(pixels: Levels, share: PerImage, fill: float = 0.0) -> Levels:
    """Each row moved left by that share of its distance from the top."""
    matrix = standing(share)
    matrix[:, 0, 1] = share
    return affine(pixels, matrix, fill)


def shear_y(pixels: Levels, share: PerImage, fill: float = 0.0) -> Levels:
    """Each column moved up by that share of its distance from the left."""
    matrix = standing(share)
    matrix[:, 1, 0] = share
    return affine(pixels, matrix, fill)


def translate_x(pixels: Levels, by: PerImage, fill: float = 0.0) -> Levels:
    """The image moved left by so many pixels."""
    matrix = standing(by)
    matrix[:, 0, 2] = by
    return affine(pixels, matrix, fill)


def translate_y(pixels: Levels, by: PerImage, fill: float = 0.0) -> Levels:
    """The image moved up by so many pixels."""
    matrix = standing(by)
    matrix[:, 1, 2] = by
    return affine(pixels, matrix, fill)


def rotate(pixels: Levels, degrees: PerImage, fill: float = 0.0) -> Levels:
    """The image turned about its centre, counter-clockwise, by so many degrees."""
    return affine(pixels, turning(degrees, pixels.shape[-1]), fill)


# Rectangles


def noise(key: Int[Tensor, " B"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """Levels from 0 to 255 for each pixel and channel, equally likely, from one number for each image: a hash of that
    and of the pixel's (Mueller's, of 32 bits), so that all devices make the same without sending it."""
    number = torch.arange(3 * side * side, device=key.device)
    mixed = (key[:, None] + number * 0x9E3779B9) & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) >> 8 & 0xFF).float().view(-1, 3, side, side)


def within(box: Float[Tensor, "B 4"], side: int) -> Bool[Tensor, "B 1 {side} {side}"]:
    """Which pixels lie in each image's box: top, left, bottom and right."""
    along = torch.arange(side, device=box.device)
    inside = (along >= box[:, :2, None]) & (along < box[:, 2:, None])  # (B, 2, S)
    return (inside[:, 0, :, None] & inside[:, 1, None])[:, None]
