"""Batches on the training device. Order and augmentation are pure functions of (seed, step): nothing has to be saved
to go on in the middle of an epoch, and none of it depends on how a batch is divided.

    B batch    S side of the image, in pixels
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import BadInput
from vitrail.input.augment import Draws, augment, draw, normalise, partners, places, send
from vitrail.input.pixels import Pixels
from vitrail.settings import Recipe
from vitrail.vit.config import HALF, Colours
from vitrail.world import ALONE, World

Stream = Literal["order", "augmentation", "dropout", "directions", "masks", "judged masks"]
STREAMS: dict[Stream, int] = {
    "order": 0, "augmentation": 1, "dropout": 2, "directions": 3, "masks": 4, "judged masks": 5,
}  # fmt: skip


def first_step(epoch: int, images: int, batch_size: int) -> int:
    """The first step that belongs to the epoch (from 0): the one before it saw the last epoch's last image. Of the
    epoch behind the last, it is how many steps there are."""
    return -(-epoch * images // batch_size)


def equal_parts(most: int, least: int) -> int:
    """The least divisor of `most` from `least` up; itself, if it is less."""
    return next((n for n in range(least, most) if most % n == 0), most)


def stream_seed(seed: int, stream: Stream, number: int) -> int:
    """A seed of its own for each use of randomness and each step or epoch `number`."""
    return int(np.random.SeedSequence([seed, STREAMS[stream], number]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, stream: Stream, number: int) -> torch.Generator:
    """A fresh generator, on the processor whatever the device, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, number))


@dataclass(frozen=True)
class Stretch:
    """Steps, one behind the other, in which images are shrunk to `whole` pixels a side where they are larger, and in
    which the model sees squares of `side` pixels in the middle of them."""

    steps: range
    whole: int
    side: int


class Stopwatch:
    """Seconds that a device spends in stretches of work, taken without waiting for it: on CUDA between two events."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the block takes."""
        if self.cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self.events.append(events)
        else:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since it was last read. The device must have done the work."""
        seconds = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.events) / 1e3
        self.seconds = 0.0
        self.events.clear()
        return seconds


@dataclass(frozen=True)
class Targets:
    """What each image of a batch shows: `share` of the class `labels`, and the rest of the class `others`."""

    labels: Int[Tensor, " b"]
    others: Int[Tensor, " b"]
    share: Float[Tensor, " b"]


class TrainingBatches:
    """The endless, shuffled and augmented sequence of batches that a recipe trains on.

    Epochs follow one another without a gap: step s takes the images from s·B to (s + 1)·B of that sequence, so that
    every image is seen as often as every other, and all batches have the same size. With R repeats (1901.09335), it
    takes those from s·B/R to (s + 1)·B/R, each R times: an epoch is still as many images as there are, now some of them
    R times, and all have been seen after R epochs. DeiT counts so too, but has the copies on as many GPUs.

    Images are normalised by `mean` and `std`, of pixels from 0 to 1. Of each batch, the processes of a `world` make
    equal parts; the whole does not depend on how many they are.
    """

    def __init__(
        self, pixels: Pixels, recipe: Recipe, mean: Colours = HALF, std: Colours = HALF, world: World = ALONE
    ) -> None:
        self.pixels = pixels
        self.recipe = recipe
        self.mean, self.std = mean, std
        self.world = world
        self.divided_by = recipe.accumulate
        self.watch = Stopwatch(pixels.device)  # of what making batches takes
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.first_step(self.recipe.epochs)

    def first_step(self, epoch: int) -> int:
        """The first step that belongs to the epoch."""
        return first_step(epoch, len(self.pixels), self.recipe.batch_size)

    def _permutation(self, epoch: int) -> Int[Tensor, " images"]:
        return torch.randperm(len(self.pixels), generator=generator(self.recipe.seed, "order", epoch))

    def order(self, step: int) -> Int[Tensor, " B"]:
        """Which images the step takes. Copies of an image are not neighbours, for neighbours are mixed."""
        passes, places = self._positions(step)
        order = [self.permutation(int(p))[torch.from_numpy(places[passes == p])] for p in np.unique(passes)]
        return torch.cat(order).repeat(self.recipe.repeats)

    def _positions(self, step: int) -> tuple[Int[np.ndarray, " distinct"], Int[np.ndarray, " distinct"]]:
        """Of each different image of the step: in which pass over all images it comes, and at which place there."""
        distinct = self.recipe.batch_size // self.recipe.repeats
        return np.divmod(np.arange(step * distinct, (step + 1) * distinct), len(self.pixels))

    def directions(self, step: int) -> Bool[Tensor, " B"]:
        """Whether each image of the step is mirrored where flips alternate (2404.00498): at random when the image first
        comes, and from then on as it was not the time before. There, an image comes once an epoch."""
        repeats = self.recipe.repeats
        passes = torch.from_numpy(self._positions(step)[0])
        times = passes.repeat(repeats) * repeats + torch.arange(repeats).repeat_interleave(len(passes))
        return self.first_directions[self.order(step)] ^ (times % 2 == 1)

    @cached_property
    def first_directions(self) -> Bool[Tensor, " images"]:
        """Whether each image is mirrored the first time."""
        return torch.rand(len(self.pixels), generator=generator(self.recipe.seed, "directions", 0)) < 0.5

    def divide(self) -> None:
        """Divide each batch into more parts from now on, as few more as make equal parts.

        Raises:
            BadInput: the parts are single images already, or single pairs where pairs are mixed; or other processes
                are in the middle of the same batch.
        """
        if self.divided_by == self.most_parts:
            what = "a single image takes" if self.recipe.least_images == 1 else "a pair of images takes"
            raise BadInput(
                f"the device's memory does not hold what {what}; set --checkpoint-activations, "
                "or take a smaller model or image."
            )
        more = self.parts_from(self.divided_by + 1)
        if self.world.size > 1:
            raise BadInput(
                f"the memory of process {self.world.rank}'s device does not hold its part of a batch; go on with "
                f"--resume --accumulate {more}, or --checkpoint-activations."
            )
        self.divided_by = more

    @property
    def most_parts(self) -> int:
        """Into how many equal parts a process can divide what it has of a batch."""
        return self.recipe.batch_size // self.world.size // self.recipe.least_images

    def parts_from(self, least: int) -> int:
        """The least number of equal parts from `least` up; the most there can be, if that is less."""
        return equal_parts(self.most_parts, least)

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The run by the size of the images that the model sees, as far as the recipe has each: small ones (2104.00298,
        section 4), squares cut out of large ones, and these at last (1906.06423, whose last steps train nothing but
        the head and the norms)."""
        recipe, steps, whole = self.recipe, self.steps, self.pixels.size
        first, last = math.ceil(recipe.first_share * steps), math.ceil(recipe.last_share * steps)
        found = []
        if recipe.first_size is not None:
            found.append(Stretch(range(first), recipe.first_size, recipe.first_size))
        if recipe.crop_size is not None:
            found.append(Stretch(range(found[-1].steps.stop if found else 0, steps - last), whole, recipe.crop_size))
        begins = max((stretch.steps.stop for stretch in found), default=0)
        return [*found, Stretch(range(begins, steps), whole, whole)]

    def stretch(self, step: int) -> Stretch:
        """That of a step; behind the run's last step, its last."""
        return next((stretch for stretch in self.stretches if step in stretch.steps), self.stretches[-1])

    def pixels_left(self, step: int) -> int:
        """Pixels of all images that the model sees from a step on."""
        left = (len(range(max(step, s.steps.start), s.steps.stop)) * s.side**2 for s in self.stretches)
        return self.recipe.batch_size * sum(left)

    def rows(self) -> list[slice]:
        """The rows of each batch that this process works through, in `divided_by` equal parts."""
        mine = self.world.rows(self.recipe.batch_size)
        size = (mine.stop - mine.start) // self.divided_by
        return [slice(start, start + size) for start in range(mine.start, mine.stop, size)]

    def read_ahead(self, step: int) -> None:
        """Have the images of the step, and of as many later ones as that is of use for, fetched or decoded ahead."""
        if not self.pixels.ahead:
            return
        rows = self.rows()
        of_step = sum(part.stop - part.start for part in rows)
        steps = range(step, min(step + 1 + -(-self.pixels.ahead // of_step), self.steps))
        self.pixels.read_ahead([self.order(s)[part] for s in steps for part in rows])

    def parts(self, step: int) -> Iterator[tuple[Float[Tensor, "b 3 S S"], Targets]]:
        """Normalised images of the step's batch and what they show, in the parts that `rows` says."""
        with self.watch.running():
            self.read_ahead(step)
            index = self.order(step)
            draws = draw(self.recipe, len(index), generator(self.recipe.seed, "augmentation", step))
            if self.recipe.flip == "alternate":
                draws = replace(draws, mirrored=self.directions(step))
        stretch = self.stretch(step)
        for rows in self.rows():
            with self.watch.running():
                images, targets = self.make(index[rows], draws.part(rows))
                images = middle(shrunk(images, stretch.whole), stretch.side)
            yield images, targets

    def make(self, index: Int[Tensor, " b"], draws: Draws) -> tuple[Float[Tensor, "b 3 S S"], Targets]:
        """Those images, on the device, augmented and normalised, and what they show."""
        window, draws = draws.window, draws.to(self.pixels.device)
        images = self.pixels.cut(index, window, places(draws, self.pixels.size, self.recipe))
        labels = self.pixels.labels[send(index, self.pixels.device)]
        if draws.mix is None:
            targets = Targets(labels, labels, torch.ones(len(labels), device=labels.device))
        else:
            targets = Targets(labels, partners(labels), draws.mix.share)
        return renormalise(augment(images, draws, self.recipe), self.mean, self.std), targets


def evaluation_batches(
    pixels: Pixels,
    batch_size: int,
    mean: Colours = HALF,
    std: Colours = HALF,
    world: World = ALONE,
    side: int | None = None,
) -> Iterator[tuple[Float[Tensor, "B 3 S S"], Int[Tensor, " b"]]]:
    """Every image once, in order, its centre cut out, normalised by `mean` and `std`, and shrunk to `side` pixels where
    that is said, as training images are while they are smaller. The last batch is filled up with its last image, for a
    compiled model wants one shape; its labels are as many as the images that count. In a `world` of several processes,
    each gets its share, which may repeat the last image."""
    share = torch.from_numpy(world.share(len(pixels)))
    batch_size = min(batch_size, len(share))
    centre = torch.full((batch_size, 2), 0.5)
    for start in range(0, len(share), batch_size):
        if pixels.ahead:
            pixels.read_ahead(share[start : start + batch_size + pixels.ahead].split(batch_size))
        index = share[torch.arange(start, start + batch_size).clamp(max=len(share) - 1)]
        images = renormalise(normalise(pixels.cut(index, centre)), mean, std)
        yield shrunk(images, side or pixels.size), pixels.labels[send(index[: len(share) - start], pixels.device)]


def shrunk(images: Float[Tensor, "B 3 _ _"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """The images `side` pixels high and wide: as they are, where they are that."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def middle(images: Float[Tensor, "B 3 _ _"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """The squares of that side in the middle of the images: themselves, where they are that."""
    edge = (images.shape[-1] - side) // 2
    return images[:, :, edge : edge + side, edge : edge + side]


def renormalise(images: Float[Tensor, "B 3 S S"], mean: Colours, std: Colours) -> Float[Tensor, "B 3 S S"]:
    """Images of -1…1 as weights from elsewhere want them: of 0…1, less the mean, over the standard deviation."""
    if (mean, std) == (HALF, HALF):
        return images
    centre, spread = (torch.tensor(row, device=images.device)[:, None, None] for row in (mean, std))
    return (images / 2 + (0.5 - centre)) / spread
