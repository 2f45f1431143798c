"""Augmentation draws what the papers say, and does to each image what was drawn for it, as Pillow and NumPy would."""

import math
import re
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, chisquare, ks_2samp, kstest  # type: ignore[import-untyped]
from torch import Tensor

from vitrail.errors import BadInput
from vitrail.input import operations
from vitrail.input.augment import (
    Draws,
    Rows,
    apply_policy,
    augment,
    choices,
    draw,
    erase,
    mix,
    normalise,
    places,
    reframe,
    rotate,
)  # fmt: skip
from vitrail.settings import Recipe

SIZE = 16
GEOMETRY = Recipe(image_size=SIZE, flip="random", rotate=15.0, crop=3)


def photos(count: int) -> torch.Tensor:
    """Smooth random images, uint8 (count, 3, SIZE, SIZE): where they are sampled between pixels hardly matters."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 255
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).to(torch.uint8)


def moved(images: torch.Tensor, mirrored: list[bool], by: list[list[int]], recipe: Recipe) -> torch.Tensor:
    """The images, mirrored, then shifted."""
    count = len(images)
    draws = Draws(torch.zeros(count, 2), torch.tensor(mirrored), torch.zeros(count), torch.tensor(by).float())
    found = places(draws, SIZE, recipe)
    assert found is not None
    return torch.stack([image[:, rows][:, :, columns] for image, rows, columns in zip(images, *found, strict=True)])


def test_flips_are_pillows() -> None:
    images, which = photos(4), [True, False, True, False]
    flipped = moved(images, which, [[0, 0]] * 4, Recipe(image_size=SIZE, flip="random"))
    for image, result, mirrored in zip(images, flipped, which, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
        np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("most", [3, SIZE - 1])
@pytest.mark.parametrize("mirrored", [False, True])
def test_shifts_are_reflected_crops_of_numpy(most: int, mirrored: bool) -> None:
    images = photos(5)
    by = [[0, 0], [most, -most], [-2, 1], [-most, -most], [1, most]]
    shifted = moved(images, [mirrored] * 5, by, Recipe(image_size=SIZE, flip="random", crop=most))
    for image, result, (down, right) in zip(images.numpy(), shifted, by, strict=True):
        padded = np.pad(image[:, :, ::-1] if mirrored else image, ((0, 0), (most, most), (most, most)), mode="reflect")
        expected = padded[:, most - down : most - down + SIZE, most - right : most - right + SIZE]
        np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("angle", [-30.0, -7.5, 0.0, 10.0, 90.0])
def test_rotations_are_pillows(angle: float) -> None:
    images = photos(3)
    rotated = rotate(images.float(), torch.full((3,), angle))
    for image, result in zip(images, rotated, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR), dtype=np.float32)
        # Pillow takes a position just outside for black, where we fade into black: the rim is left out.
        inner = slice(4, -4)
        difference = np.abs(result.permute(1, 2, 0).numpy() - expected)[inner, inner]
        assert difference.max() <= 1.01  # Pillow rounds to whole levels


def test_corners_become_black() -> None:
    turned = rotate(torch.full((1, 3, SIZE, SIZE), 200.0), torch.tensor([45.0]))
    assert not turned[..., 0, 0].any()
    assert (turned[..., SIZE // 2, SIZE // 2] > 199).all()


def test_pixels_are_normalised_as_in_the_official_code() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 3, 3)
    torch.testing.assert_close(normalise(levels)[0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_what_is_drawn_stays_in_its_range_and_fills_it() -> None:
    draws = draw(GEOMETRY, 4000, torch.Generator().manual_seed(0))
    assert 0.45 < draws.mirrored.float().mean() < 0.55
    assert draws.angle.abs().max() <= 15
    assert draws.angle.min() < -14
    assert draws.angle.max() > 14
    assert set(draws.shift.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert draws.window.min() >= 0
    assert draws.window.max() < 1


def test_what_a_recipe_leaves_out_is_left_alone() -> None:
    plain = Recipe(image_size=SIZE, rotate=15.0)
    one = draw(GEOMETRY, 8, torch.Generator().manual_seed(0))
    other = draw(plain, 8, torch.Generator().manual_seed(0))
    assert torch.equal(one.angle, other.angle)  # the other settings do not move its numbers
    assert not other.mirrored.any()
    assert not other.shift.any()
    assert places(other, SIZE, plain) is None


# Draws


def simulated_rectangles(
    count: int, area: tuple[float, float], ratio: tuple[float, float], tall: bool, most: float, whole: bool
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Heights and widths as torchvision's RandomResizedCrop and RandomErasing draw them, one by one."""
    random, found = np.random.default_rng(1), []
    for _ in range(count):
        sides = [float(SIZE)] * 2 if whole else [0.0] * 2
        for _ in range(10):
            pixels = SIZE**2 * random.uniform(*area)
            shape = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
            tried = [math.sqrt(pixels * shape), math.sqrt(pixels / shape)]
            tried = tried if tall else tried[::-1]
            tried = tried if whole else [float(round(side)) for side in tried]
            if max(tried) <= most:
                sides = tried
                break
        found.append(sides)
    return np.array(found)


CHANCE = 1e-4  # of a difference as large as that found, where there is none: there are some sixty comparisons


def alike(found: Tensor, expected: np.ndarray[Any, Any]) -> bool:
    """Whether two samples may well be of the same distribution: of 10,000 each, a difference of 0.03 would show."""
    return bool(ks_2samp(found.numpy(), expected).pvalue > CHANCE)


def drawn(count: int, **settings: Any) -> Draws:
    return draw(Recipe(**{"image_size": SIZE, "batch_size": 200} | settings), count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("least", [0.08, 0.5, 1.0])
def test_resized_crops_are_drawn_as_torchvision_does(least: float) -> None:
    box = drawn(10000, resized_crop=least).box
    assert box is not None
    top, left, height, width = box.unbind(1)
    expected = simulated_rectangles(10000, (least, 1), (3 / 4, 4 / 3), tall=False, most=SIZE, whole=True)
    assert alike(height, expected[:, 0])
    assert alike(width, expected[:, 1])
    assert alike(height * width, expected.prod(1))
    assert alike(width / height, expected[:, 1] / expected[:, 0])
    if least == 1:  # of the whole area, only the square fits
        assert torch.equal(box, torch.tensor([0.0, 0, SIZE, SIZE]).expand(10000, 4))
        return
    for start, side in ((top, height), (left, width)):
        assert alike((start / (SIZE - side))[side < SIZE], np.random.default_rng(2).random(10000))
        assert (start >= 0).all()
        assert (start + side <= SIZE + 1e-4).all()


def test_erased_rectangles_are_drawn_as_torchvision_does() -> None:
    erase = drawn(10000, erase=0.3).erase
    assert erase is not None
    assert 0.28 < erase.erased.mean() < 0.32
    corner, sides = erase.box[:, :2], erase.box[:, 2:] - erase.box[:, :2]
    assert torch.equal(erase.box, erase.box.round())
    assert erase.box.min() == 0
    assert erase.box.max() == SIZE
    expected = simulated_rectangles(10000, (0.02, 0.33), (0.3, 3.3), tall=True, most=SIZE - 1, whole=False)
    assert alike(sides[:, 0], expected[:, 0])
    assert alike(sides[:, 1], expected[:, 1])
    assert alike(sides.prod(1), expected.prod(1))
    few = (sides == 4).all(1)  # where there is room for 13 positions each way
    assert set(corner[few].flatten().long().tolist()) == set(range(13))
    assert len(erase.key.unique()) > 9900


def test_colour_factors_are_drawn_evenly() -> None:
    factors = drawn(10000, jitter=0.4).factors
    assert factors is not None
    for column in factors.unbind(1):
        assert alike(column, np.random.default_rng(2).uniform(0.6, 1.4, 10000))
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.04
    of_paper = drawn(10000, policy="3-augment").factors
    assert of_paper is not None
    assert alike(of_paper.flatten(), np.random.default_rng(2).uniform(0.7, 1.3, 30000))
    set_otherwise = drawn(10000, policy="3-augment", jitter=0.4).factors
    assert set_otherwise is not None
    assert torch.equal(set_otherwise, factors)
    assert drawn(10, policy="rand-augment").factors is None


# What each operation's magnitude is at least and at most, and how many different ones there are (0: any number).
BOTH = ((operations.brightness, operations.colour, operations.contrast, operations.sharpness),
        (operations.shear_x, operations.shear_y), (operations.translate_x, operations.translate_y))  # fmt: skip
MAGNITUDES: dict[str, dict[Any, tuple[float, float, int]]] = {
    "3-augment": {operations.solarize: (128, 128, 1), operations.gaussian_blur: (0.1, 2.0, 0)},
    "rand-augment": {
        **dict.fromkeys(BOTH[0], (1 - 0.81, 1 + 0.81, 2)),
        **dict.fromkeys(BOTH[1], (-0.27, 0.27, 2)),
        **dict.fromkeys(BOTH[2], (-0.9 * 150 / 331 * SIZE, 0.9 * 150 / 331 * SIZE, 2)),
        operations.rotate: (-27, 27, 2),
        operations.posterize: (4.4, 4.4, 1),
        operations.solarize: (25.6, 25.6, 1),
    },
    "trivial-augment": {
        **dict.fromkeys(BOTH[0], (0.01, 1.99, 61)),
        **dict.fromkeys(BOTH[1], (-0.99, 0.99, 61)),
        **dict.fromkeys(BOTH[2], (-32, 32, 61)),
        operations.rotate: (-135, 135, 61),
        operations.posterize: (2, 8, 31),
        operations.solarize: (0, 256, 31),
    },
}


@pytest.mark.parametrize("policy", MAGNITUDES)
def test_policies_draw_each_operation_as_often_and_as_strong_as_the_paper(policy: str) -> None:
    draws = drawn(14000, policy=policy).policy
    assert draws is not None
    there = choices(Recipe(image_size=SIZE, policy=policy))  # type: ignore[arg-type]
    assert len(there) == (3 if policy == "3-augment" else 14)
    assert draws.chosen.shape[1] == draws.magnitude.shape[1] == (2 if policy == "rand-augment" else 1)
    for chosen in draws.chosen.T:
        assert chisquare(np.bincount(chosen, minlength=len(there))).pvalue > CHANCE
    if policy == "rand-augment":
        assert abs(np.corrcoef(draws.chosen.T)[0, 1]) < 0.03
    for number, choice in enumerate(there):
        found = draws.magnitude[torch.from_numpy(draws.chosen == number)]
        if choice.apply in MAGNITUDES[policy]:
            least, most, different = MAGNITUDES[policy][choice.apply]
            assert found.min().item() == pytest.approx(least, abs=0.02 if not different else 1e-4)
            assert found.max().item() == pytest.approx(most, abs=0.02 if not different else 1e-4)
            values = found.mul(1e4).round().unique()  # 0 and -0, and what float32 rounds either way, are one
            assert len(values) == different or not different
            if different == 2:
                assert 0.45 < (found == found.max()).float().mean() < 0.55
            if not different:
                assert alike(found, np.random.default_rng(2).uniform(least, most, len(found)))
    assert {choice.apply for choice in there} >= set(MAGNITUDES[policy])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_of_mixed_images_are_of_the_beta_distribution(alpha: float) -> None:
    blended, pasted = drawn(20000, mixup=alpha).mix, drawn(20000, cutmix=alpha).mix
    assert blended is not None
    assert pasted is not None
    assert blended.box is None
    assert torch.equal(blended.share[::2], blended.share[1::2])
    assert kstest(blended.share[::2].numpy(), beta(alpha, alpha).cdf).pvalue > CHANCE
    assert pasted.box is not None
    assert torch.equal(pasted.box[::2], pasted.box[1::2])
    top, left, bottom, right = pasted.box.double().unbind(1)
    share = 1 - (bottom - top) * (right - left) / SIZE**2
    torch.testing.assert_close(pasted.share.double(), share, atol=1e-6, rtol=0)
    random, expected = np.random.default_rng(3), []
    for _ in range(10000):  # one by one, as timm does
        cut = int(SIZE * math.sqrt(1 - random.beta(alpha, alpha)))
        middle = random.integers(0, SIZE, 2)
        begin, end = np.clip(middle - cut // 2, 0, SIZE), np.clip(middle + (cut + 1) // 2, 0, SIZE)
        expected.append([*begin, *end])
    for found, column in zip(pasted.box[::2].unbind(1), np.array(expected).T, strict=True):
        assert alike(found, column)


def test_with_both_each_batch_is_blended_or_pasted() -> None:
    recipe = Recipe(image_size=SIZE, mixup=0.2, cutmix=1.0)
    mixes = [draw(recipe, 4, torch.Generator().manual_seed(seed)).mix for seed in range(200)]
    pasted = sum(mix is not None and mix.box is not None for mix in mixes)
    assert 70 < pasted < 130


SETTINGS: list[dict[str, Any]] = [
    {"flip": "random"}, {"rotate": 15.0}, {"crop": 3}, {"resized_crop": 0.3}, {"policy": "3-augment"},
    {"policy": "rand-augment"}, {"policy": "trivial-augment"}, {"jitter": 0.3}, {"erase": 0.5}, {"mixup": 0.2},
    {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0},
]  # fmt: skip
ALL: dict[str, Any] = {"flip": "random", "rotate": 15.0, "crop": 3, "resized_crop": 0.3, "policy": "rand-augment",
                       "jitter": 0.3, "erase": 0.5, "mixup": 0.2, "cutmix": 1.0}  # fmt: skip


def flat(draws: Rows) -> dict[str, Any]:
    """Draws by name, those within others too."""
    found: dict[str, Any] = {}
    for name, value in vars(draws).items():
        found |= {f"{name}.{n}": v for n, v in flat(value).items()} if isinstance(value, Rows) else {name: value}
    return found


@pytest.mark.parametrize("left_out", [*ALL])
def test_what_a_recipe_leaves_out_moves_nothing_else(left_out: str) -> None:
    changes = {"flip": {"mirrored"}, "rotate": {"angle"}, "crop": {"shift"}, "resized_crop": {"box"},
               "policy": {"policy.chosen", "policy.magnitude", "policy"}, "jitter": {"factors"},
               "erase": {"erase.erased", "erase.box", "erase.key", "erase"},
               "mixup": {"mix.share", "mix.box"}, "cutmix": {"mix.share", "mix.box"}}  # fmt: skip
    whole = flat(drawn(12, **ALL))
    less = flat(drawn(12, **{name: value for name, value in ALL.items() if name != left_out}))
    for name in whole.keys() | less.keys():
        if name not in changes[left_out]:
            assert np.array_equal(np.asarray(whole[name]), np.asarray(less[name])), name


def test_first_draws_are_those_of_the_first_release() -> None:
    """Recorded before anything but flips, shifts and rotation was there: runs of then can still be repeated."""
    recorded: dict[str, dict[str, Any]] = {
        "0ee59b3a26ca48ec863fc5b0c1aa4d2a396001af905d4b88257a74c2ae77a3bc": {"rotate": 15.0, "crop": 1},
        "222c3ad72bd009162310918fac646a5fe258b69202f8261cc6ec898dd5329f82": {
            "flip": "random",
            "rotate": 10.0,
            "crop": 4,
        },
    }
    for digest, settings in recorded.items():
        for recipe in (Recipe(image_size=16, **settings), Recipe(image_size=16, **ALL | {"flip": "none"} | settings)):
            found = sha256()
            for seed in range(3):
                draws = draw(recipe, 12, torch.Generator().manual_seed(seed))
                for tensor in (draws.window, draws.mirrored, draws.angle, draws.shift):
                    found.update(tensor.numpy().tobytes())
            assert found.hexdigest() == digest


# Doing


def on_its_own(images: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    return torch.cat([augment(images[n : n + 1], draws.part(slice(n, n + 1)), recipe) for n in range(len(images))])


@pytest.mark.parametrize("settings", [*SETTINGS, ALL], ids=str)
def test_a_part_is_augmented_as_within_the_whole(settings: dict[str, Any]) -> None:
    recipe, images = Recipe(image_size=SIZE, **settings), photos(24)
    draws = draw(recipe, 24, torch.Generator().manual_seed(1))
    whole = augment(images, draws, recipe)
    for size in (2, 6, 8):
        rows = [slice(start, start + size) for start in range(0, 24, size)]
        assert torch.equal(torch.cat([augment(images[part], draws.part(part), recipe) for part in rows]), whole)
    if not recipe.mixes:
        assert torch.equal(on_its_own(images, draws, recipe), whole)


def test_what_is_drawn_for_a_part_goes_to_the_device_but_for_what_the_processor_needs() -> None:
    draws = drawn(6, **ALL)
    moved_there = flat(draws.part(slice(2, 4)).to(torch.device("meta")))
    for name, value in moved_there.items():
        if name in ("policy.chosen", "erase.erased"):
            assert isinstance(value, np.ndarray)
            assert len(value) == 2
        elif value is not None:
            assert (value.device.type, len(value)) == ("meta", 2)


@pytest.mark.parametrize("policy", MAGNITUDES)
def test_each_image_gets_its_own_operations_one_after_the_other(policy: str) -> None:
    recipe, images = Recipe(image_size=SIZE, policy=policy), photos(60).float()  # type: ignore[arg-type]
    draws, there = draw(recipe, 60, torch.Generator().manual_seed(0)).policy, choices(recipe)
    assert draws is not None
    assert set(draws.chosen.flatten()) == set(range(len(there)))
    result = images.clone()
    apply_policy(result, draws, there)
    for image, found, chosen, magnitudes in zip(images, result, draws.chosen, draws.magnitude, strict=True):
        expected = image[None]
        for number, magnitude in zip(chosen, magnitudes, strict=True):
            operation = there[number].apply
            expected = operation(expected, magnitude[None]) if operation is not None else expected
        assert torch.equal(found, expected[0])


def test_rotation_and_resized_crop_are_one_interpolation_of_pillows() -> None:
    recipe = Recipe(image_size=SIZE, rotate=15.0, resized_crop=0.3)
    images, draws = photos(8), draw(recipe, 8, torch.Generator().manual_seed(0))
    assert draws.box is not None
    found = reframe(images.float(), draws, recipe)
    for image, result, angle, (top, left, height, width) in zip(
        images, found, draws.angle.double().tolist(), draws.box.double().numpy(), strict=True
    ):
        radians = math.radians(angle)
        turn = np.array([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]])
        matrix = turn * np.array([width, height]) / SIZE
        shift = turn @ (np.array([left, top]) - SIZE / 2) + SIZE / 2
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        entries = tuple(np.column_stack([matrix, shift]).ravel())
        pillow = picture.transform((SIZE, SIZE), Image.Transform.AFFINE, entries, Image.Resampling.BILINEAR)
        difference = result.permute(1, 2, 0).numpy() - np.asarray(pillow, dtype=np.float32)
        assert difference.min() >= -0.01
        assert difference.max() <= 1.01  # Pillow cuts off the fraction of a level


def test_rectangles_are_filled_with_noise() -> None:
    recipe, images = Recipe(image_size=SIZE, erase=0.5), photos(12)
    draws = draw(recipe, 12, torch.Generator().manual_seed(0))
    assert draws.erase is not None
    assert 0 < draws.erase.erased.sum() < 12
    found = ((augment(images, draws, recipe) + 1) * 127.5).round().numpy()
    noise = operations.noise(draws.erase.key, SIZE).numpy()
    for n, (top, left, bottom, right) in enumerate(draws.erase.box.int().tolist()):
        expected = images[n].float().numpy()
        if draws.erase.erased[n]:
            expected[:, top:bottom, left:right] = noise[n, :, top:bottom, left:right]
        np.testing.assert_array_equal(found[n], expected)


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}], ids=str)
def test_pairs_are_mixed_as_by_numpy(settings: dict[str, float]) -> None:
    recipe, images = Recipe(image_size=SIZE, **settings), photos(10)  # type: ignore[arg-type]
    draws = draw(recipe, 10, torch.Generator().manual_seed(0))
    assert draws.mix is not None
    found = ((augment(images, draws, recipe) + 1) * 127.5).numpy()
    pixels = images.double().numpy()
    for n in range(10):
        partner, share = n + 1 if n % 2 == 0 else n - 1, draws.mix.share[n].item()
        if draws.mix.box is None:
            expected = share * pixels[n] + (1 - share) * pixels[partner]
        else:
            top, left, bottom, right = draws.mix.box[n].int().tolist()
            expected = pixels[n].copy()
            expected[:, top:bottom, left:right] = pixels[partner, :, top:bottom, left:right]
            changed = (bottom - top) * (right - left) / SIZE**2
            assert share == pytest.approx(1 - changed)
        np.testing.assert_allclose(found[n], expected, atol=1e-3)


@pytest.mark.parametrize("settings", [*SETTINGS, ALL], ids=str)
def test_all_that_was_drawn_is_done_in_order(settings: dict[str, Any]) -> None:
    recipe, images = Recipe(image_size=SIZE, **settings), photos(24)
    draws = draw(recipe, 24, torch.Generator().manual_seed(2))
    pixels = reframe(images.float(), draws, recipe).contiguous()
    if "policy" in settings:
        assert draws.policy is not None
        apply_policy(pixels, draws.policy, choices(recipe))
    if "jitter" in settings or settings.get("policy") == "3-augment":
        assert draws.factors is not None
        pixels = operations.jitter(pixels, draws.factors)
    if "erase" in settings:
        assert draws.erase is not None
        erase(pixels, draws.erase)
    if recipe.mixes:
        assert draws.mix is not None
        pixels = mix(pixels, draws.mix)
    changed = settings.keys() - {"flip", "crop"}  # which are done while the bytes are read
    assert torch.equal(pixels, images.float()) == (not changed)
    assert torch.equal(augment(images, draws, recipe), pixels / 127.5 - 1)


def test_everything_at_once_stays_in_range() -> None:
    recipe = Recipe(image_size=SIZE, **ALL)
    for seed in range(5):
        found = augment(photos(24), draw(recipe, 24, torch.Generator().manual_seed(seed)), recipe)
        assert found.shape == (24, 3, SIZE, SIZE)
        assert found.is_contiguous()
        assert found.abs().max() <= 1 + 1e-5


# Settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"flip": "sometimes"}, "flip is 'sometimes'; it must be one of none, random, alternate"),
        ({"policy": "randaugment"}, "did you mean 'rand-augment'?"),
        ({"resized_crop": 1.5}, "resized_crop is 1.5; it must be from 0 to 1."),
        ({"jitter": -0.1}, "jitter is -0.1; it must be from 0 to 1."),
        ({"erase": 2.0}, "erase is 2.0; it must be from 0 to 1."),
        ({"mixup": -1.0}, "mixup is -1.0; it must not be negative."),
        ({"cutmix": float("nan")}, "cutmix is nan; it must not be negative."),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and below 1."),
        ({"repeats": 0}, "repeats is 0; it must be at least 1."),
        ({"batch_size": 200, "repeats": 3}, "does not hold each image 3 times; take a multiple of 3 for batch_size."),
        ({"batch_size": 7, "mixup": 0.2}, "has 7 in each; take a multiple of 2 for batch_size."),
        ({"batch_size": 50, "accumulate": 10, "cutmix": 1.0}, "has 5 in each; take a multiple of 20 for batch_size."),
    ],
)
def test_settings_that_do_not_do_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)):
        Recipe(**settings)


def test_settings_at_their_limits_do() -> None:
    Recipe(resized_crop=1.0, jitter=1.0, erase=1.0, batch_size=12, repeats=3, accumulate=3, cutmix=1.0)
    Recipe(batch_size=7)
    then: list[Any] = [True, False]  # as the first run folders have it
    assert [Recipe(flip=flip).flip for flip in then] == ["random", "none"]
