"""Each operation does to photographs what Pillow does, or SciPy where Pillow only comes near."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage  # type: ignore[import-untyped]
from scipy.stats import chisquare  # type: ignore[import-untyped]
from sklearn.datasets import load_sample_image
from torch import Tensor

from vitrail.input import operations

SIDES = (32, 45)  # an odd one too: its centre is a pixel's
Batched = Callable[[Tensor, Tensor], Tensor]
Pillow = Callable[[Image.Image, float], Image.Image]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@cache
def photos(side: int) -> tuple[Image.Image, ...]:
    """Two photographs, whole and in detail, one of them dark and flat; and two images of hardly any levels."""
    temple, flower = (Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    dark = flower.point(lambda level: 40 + level // 6)
    halves = Image.new("RGB", (side, side), (90, 200, 7))
    halves.paste((91, 100, 255), (0, 0, side // 2, side))
    return (
        temple.resize((side, side), Image.Resampling.BICUBIC),
        flower.crop((200, 100, 200 + side, 100 + side)),
        dark.resize((side, side)),
        temple.crop((300, 200, 300 + side, 200 + side)),
        Image.new("RGB", (side, side), (255, 0, 128)),
        halves,
    )


def levels(images: tuple[Image.Image, ...], device: str = "cpu") -> Tensor:
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)


def spread(magnitudes: tuple[float, ...], side: int) -> tuple[tuple[Image.Image, ...], tuple[float, ...]]:
    """Every photograph with every magnitude."""
    there = photos(side)
    return there * len(magnitudes), tuple(np.repeat(magnitudes, len(there)).tolist())


def sheared(x: float, y: float) -> Pillow:
    def pillow(image: Image.Image, by: float) -> Image.Image:
        matrix = (1, x * by, 0, y * by, 1, 0)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    return pillow


def translated(x: float, y: float) -> Pillow:
    def pillow(image: Image.Image, by: float) -> Image.Image:
        matrix = (1, 0, x * by, 0, 1, y * by)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    return pillow


FACTORS = (0.0, 0.1, 0.7, 1.0, 1.3, 1.99)
SHARES = (0.0, 0.123, -0.3, 0.99)
# The operation, Pillow's, magnitudes, and by how much ours may lie above Pillow's: it cuts off the fraction of a level
# where it blends, stretches or interpolates, and has whole levels everywhere else.
LIKE_PILLOW: dict[str, tuple[Batched, Pillow, tuple[float, ...], int]] = {
    "brightness": (operations.brightness, lambda i, f: ImageEnhance.Brightness(i).enhance(f), FACTORS, 1),
    "contrast": (operations.contrast, lambda i, f: ImageEnhance.Contrast(i).enhance(f), FACTORS, 1),
    "colour": (operations.colour, lambda i, f: ImageEnhance.Color(i).enhance(f), FACTORS, 1),
    "sharpness": (operations.sharpness, lambda i, f: ImageEnhance.Sharpness(i).enhance(f), FACTORS, 1),
    "posterize": (operations.posterize, lambda i, bits: ImageOps.posterize(i, int(bits)), tuple(range(1, 9)), 0),
    "solarize": (operations.solarize, lambda i, t: ImageOps.solarize(i, int(t)), (0, 1, 128, 255, 256), 0),
    "autocontrast": (lambda p, _: operations.autocontrast(p), lambda i, _: ImageOps.autocontrast(i), (0,), 1),
    "equalize": (lambda p, _: operations.equalize(p), lambda i, _: ImageOps.equalize(i), (0,), 0),
    "invert": (lambda p, _: operations.invert(p), lambda i, _: ImageOps.invert(i), (0,), 0),
    "grayscale": (lambda p, _: operations.grayscale(p), lambda i, _: ImageOps.grayscale(i), (0,), 0),
    "shear_x": (operations.shear_x, sheared(1, 0), SHARES, 1),
    "shear_y": (operations.shear_y, sheared(0, 1), SHARES, 1),
    "translate_x": (operations.translate_x, translated(1, 0), (0, 3, -2.5, 7.3, -40, 100), 1),
    "translate_y": (operations.translate_y, translated(0, 1), (0, 3, -2.5, 7.3, -40, 100), 1),
    "rotate": (operations.rotate, lambda i, a: i.rotate(a, Image.Resampling.BILINEAR), (0, 7.5, -30, 61, 135), 1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", LIKE_PILLOW)
def test_operations_are_pillows(name: str, side: int, device: str) -> None:
    operation, pillow, magnitudes, above = LIKE_PILLOW[name]
    images, each = spread(tuple(map(float, magnitudes)), side)
    result = operation(levels(images, device), torch.tensor(each, device=device)).cpu()
    expected = levels(tuple(pillow(image, by) for image, by in zip(images, each, strict=True)))
    difference = result - expected
    rounding = (
        0.01 if above else 0.0
    )  # of float32: coordinates are exact to 1e-5 pixels, and pixels differ by up to 255
    assert difference.min() >= -rounding
    assert difference.max() <= above + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", SIDES)
def test_the_blur_is_scipys(side: int, device: str) -> None:
    images, each = spread((0.0, 0.1, 0.5, 1.0, 2.0, 5.0), side)
    blurred = operations.gaussian_blur(levels(images, device), torch.tensor(each, device=device)).cpu()
    for image, result, sigma in zip(levels(images).double().numpy(), blurred, each, strict=True):
        expected = ndimage.gaussian_filter(image, (0, sigma, sigma), mode="nearest", truncate=8)
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-3)


def test_the_blur_is_as_wide_as_pillows_of_that_radius() -> None:
    """Pillow approximates the Gaussian by three means over boxes: of ours, that of the same sigma is the nearest."""
    for sigma in (0.5, 1.0, 2.0):
        pillows = levels(tuple(image.filter(ImageFilter.GaussianBlur(sigma)) for image in photos(45)))
        tried = [operations.gaussian_blur(levels(photos(45)), torch.full((6,), sigma * f)) for f in (1.0, 0.8, 1.25)]
        apart = [(blurred - pillows).square().mean().sqrt() for blurred in tried]
        assert apart[0] < 1
        assert apart[0] < min(apart[1:])


@pytest.mark.parametrize("order", ["bcs", "bsc", "cbs", "csb", "sbc", "scb"])
def test_jitter_is_pillows_three_in_any_order(order: str) -> None:
    """On levels that none of the three clips; Pillow then cuts off a fraction three times, and twice the next makes
    that up to 1.2 times as large; in the mean gray, too."""
    enhance = {"b": ImageEnhance.Brightness, "c": ImageEnhance.Contrast, "s": ImageEnhance.Color}
    images = tuple(image.convert("RGB").point(lambda level: 70 + level // 4) for image in photos(32))
    factors = torch.tensor([[0.8, 1.2, 0.9], [1.2, 0.8, 1.2], [1.0, 1.0, 1.0], [1.1, 1.2, 0.8], [0.9] * 3, [1.2] * 3])
    result = operations.jitter(levels(images), factors)
    for image, found, each in zip(images, result, factors.tolist(), strict=True):
        expected = image
        for letter in order:
            expected = enhance[letter](expected).enhance(each["bcs".index(letter)])
        difference = found - levels((expected,))[0]
        assert difference.abs().max() < 1 + 1.2 + 1.2**2 + 0.5


def test_jitter_is_its_formula() -> None:
    pixels, factors = levels(photos(45)), torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) * 2
    for image, found, (light, spread_, tint) in zip(
        pixels.double().numpy(), operations.jitter(pixels, factors), factors.double().tolist(), strict=True
    ):
        gray = np.floor(image.transpose(1, 2, 0) @ np.array([19595, 38470, 7471]) / 65536 + 0.5)
        coloured = tint * image + (1 - tint) * gray
        expected = light * (spread_ * coloured + (1 - spread_) * np.floor(gray.mean() + 0.5))
        np.testing.assert_allclose(found.numpy(), expected.clip(0, 255), atol=1e-3)


def test_what_comes_from_outside_has_the_level_asked_for() -> None:
    images = photos(32)
    for operation, by in ((operations.shear_x, 0.3), (operations.translate_y, -9.0), (operations.rotate, 20.0)):
        result = operation(levels(images), torch.full((6,), by), 124.0)
        black = operation(levels(images) * 0 + 1, torch.full((6,), by)) == 0
        assert black.any()
        assert (result[black] == 124).all()
        assert torch.equal(result[~black], operation(levels(images), torch.full((6,), by))[~black])
    pillow = images[0].rotate(20, Image.Resampling.BILINEAR, fillcolor=(124, 124, 124))
    found = operations.rotate(levels(images), torch.full((6,), 20.0), 124.0)[0]
    assert (found - levels((pillow,))[0]).min() >= -0.01
    assert (found - levels((pillow,))[0]).max() <= 1.01


def test_boxes_are_enlarged_as_pillow_does() -> None:
    side, images = 45, photos(45)
    boxes = torch.tensor(
        [[0, 0, 45, 45], [3.5, 10, 20.25, 31], [0, 44, 1, 1], [25, 0, 20, 20], [1, 1, 43, 44], [9] * 4]
    )
    where = operations.positions(operations.cropping(boxes, side), side)
    for image, found, (top, left, height, width) in zip(
        images, operations.sample(levels(images), where), boxes.tolist(), strict=True
    ):
        box = (left, top, left + width, top + height)
        pillow = image.transform((side, side), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        difference = found - levels((pillow,))[0]  # Pillow cuts off the fraction
        assert difference.min() >= -0.01
        assert difference.max() <= 1.01


def test_matrices_are_put_together_in_order() -> None:
    random = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 5, 2, 3, generator=random)
    last = torch.tensor([0.0, 0.0, 1.0])
    both = operations.then(first, second)
    for one, two, found in zip(first, second, both, strict=True):
        product = np.vstack([one, last]).astype(float) @ np.vstack([two, last])
        np.testing.assert_allclose(found.numpy(), product[:2], atol=1e-6)
    # Turning an image and enlarging its upper left quarter, at once, is doing so one after the other but for what the
    # first of two interpolations takes away: of a plane that rises evenly, nothing.
    slope = torch.arange(32.0).expand(1, 3, 32, 32) * 4 + torch.arange(32.0)[:, None]
    turn, crop = operations.turning(torch.tensor([20.0]), 32), operations.cropping(torch.tensor([[8.0, 8, 12, 12]]), 32)
    at_once = operations.affine(slope, operations.then(turn, crop))
    torch.testing.assert_close(at_once, operations.affine(operations.affine(slope, turn), crop), atol=0.02, rtol=0)


def test_noise_is_evenly_spread_and_of_the_image_alone() -> None:
    keys = torch.tensor([0, 1, 2, 2**31 - 1, 0])
    noise = operations.noise(keys, 64)
    assert torch.equal(noise[0], noise[4])
    assert torch.equal(noise[1:2], operations.noise(keys[1:2], 64))
    assert chisquare(torch.bincount(noise[:4].long().flatten(), minlength=256).numpy()).pvalue > 1e-4
    ways = [
        noise[0, 0],
        noise[1, 0],
        noise[2, 0],
        noise[3, 0],
        noise[0, 1],
        noise[0, 0].roll(1, 0),
        noise[0, 0].roll(1),
    ]
    correlation = np.corrcoef(np.stack([way.flatten().numpy() for way in ways])) - np.eye(len(ways))
    assert np.abs(correlation).max() < 4 / 64  # its standard deviation is 1 / 64 for 64 × 64 independent pixels


def test_boxes_hold_the_pixels_between_their_edges() -> None:
    boxes = torch.tensor([[0, 0, 8, 8], [2, 3, 5, 4], [4, 4, 4, 4], [7, 0, 8, 8]])
    for found, (top, left, bottom, right) in zip(operations.within(boxes.float(), 8), boxes.tolist(), strict=True):
        expected = np.zeros((1, 8, 8), bool)
        expected[0, top:bottom, left:right] = True
        np.testing.assert_array_equal(found.numpy(), expected)


ALL: dict[str, tuple[Batched, tuple[float, ...]]] = {name: (o, m) for name, (o, _, m, _) in LIKE_PILLOW.items()} | {
    "gaussian_blur": (operations.gaussian_blur, (0.3, 2.0)),
    "jitter": (lambda pixels, by: operations.jitter(pixels, torch.stack([by, by + 0.3, by / 2], 1)), (0.3, 1.4)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ALL)
def test_an_image_becomes_the_same_whatever_is_beside_it(name: str, side: int, device: str) -> None:
    operation, magnitudes = ALL[name]
    images, each = spread(tuple(map(float, magnitudes)), side)
    pixels, by = levels(images, device), torch.tensor(each, device=device)
    together = operation(pixels, by)
    for rows in (slice(0, 1), slice(1, 4), slice(5, 6)):
        assert torch.equal(operation(pixels[rows], by[rows]), together[rows])


@pytest.mark.parametrize("name", ALL)
def test_no_shape_depends_on_what_the_image_shows(name: str) -> None:
    """On the device `meta` there are shapes, but no values that something could be made to depend on."""
    pixels, by = torch.empty(4, 3, 32, 32, device="meta"), torch.empty(4, device="meta")
    assert ALL[name][0](pixels, by).shape == pixels.shape


def test_operations_are_compiled_whole() -> None:
    """Without what checks shapes in tests, which cannot be: in a process of its own."""
    program = """
import torch
from vitrail.input import operations as o

pixels, by = (torch.rand(4, 3, 32, 32) * 255).round(), torch.tensor([1.0, 2.0, 0.5, 3.0])
plain = (o.invert, o.grayscale, o.autocontrast, o.equalize)
others = (o.brightness, o.contrast, o.colour, o.sharpness, o.posterize, o.solarize, o.gaussian_blur, o.shear_x,
          o.shear_y, o.translate_x, o.translate_y, o.rotate)
for operation in (*plain, *others):
    given = (pixels,) if operation in plain else (pixels, by)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), operation(*given)), operation
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
