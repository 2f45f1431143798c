"""`vitrail bench`: the tasks that are measured, training steps and inference (`rounds.py`) among them."""

import gc
import importlib.metadata
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.data import cache
from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.input.batches import Stopwatch, TrainingBatches
from vitrail.input.pixels import pixels_of
from vitrail.process import keep_freed_memory, resident
from vitrail.progress import say
from vitrail.settings import Recipe
from vitrail.speed.operators import profiled
from vitrail.speed.peers import ANGLE, MODULES, SHIFT, TOLERANCES, image_folder_loader, require_peers, same_outputs
from vitrail.speed.rounds import (
    FLOOR,
    OURS,
    SMALLEST,
    Case,
    Row,
    Setting,
    inference,
    interleaved,
    training,
    training_unit,
)
from vitrail.vit.floor import DTYPES, bandwidth, matrix_rate, synchronise
from vitrail.vit.fused import WORTH_A_KERNEL, compiled_gelu

INPUT_FLOOR = "floor (bytes over bandwidth)"
FLOORS = (FLOOR, INPUT_FLOOR)
INPUT_SIZE = 64  # pixels, a side, as Tiny ImageNet's
INPUT_BATCH = 128
SUFFIXES = (".jpg", ".jpeg", ".png")
CLASSES, IMAGES = 20, 4000  # that are made where no data set is given


@dataclass(frozen=True)
class Session:
    """What `vitrail bench` found: where, how fast the machine itself is (FLOP/s of square matrix products by
    precision, bytes/s of a copy), and the rows."""

    environment: dict[str, Any]
    matrix_rate: dict[str, float]
    bandwidth: float
    rows: tuple[Row, ...]


def measure(tasks: Sequence[str], setting: Setting) -> Iterator[Session]:
    """Do the tasks of these names, one after another, and give what has been found so far after each. All contenders
    get the memory that Vitrail's training gets (`keep_freed_memory`), and the same arithmetic.

    Raises:
        BadInput: a library to compare with is missing, or the data will not do.
        RuntimeError: Vitrail's model and timm's, of the same weights, do not give the same logits or gradients.
    """
    require_peers()
    device = setting.device
    if device.type == "cpu":
        keep_freed_memory()
    else:  # else float32 would mean less in a convolution, as some contenders embed patches, than in a product
        torch.backends.cudnn.allow_tf32 = False
    if set(tasks) & {"training", "profile", "inference", "memory"}:
        for case in setting.cases:
            check_outputs(case, device)
    environment = describe(device) | {"peers": {name: importlib.metadata.version(name) for name in MODULES}}
    rate = matrix_rate(device, DTYPES[setting.precision])
    session = Session(environment, {setting.precision: rate}, bandwidth(device), ())
    for task in tasks:
        rows = (*session.rows, *TASKS[task](setting))
        rate = max(rate, matrix_rate(device, DTYPES[setting.precision]))  # of a moment: something may have been running
        session = replace(session, rows=rows, matrix_rate={setting.precision: rate})
        yield session


def check_outputs(case: Case, device: torch.device) -> None:
    """Compare Vitrail's logits and gradients with timm's, so that a fast wrong model cannot win.

    Raises:
        RuntimeError: they are not the same.
    """
    for what, difference in same_outputs(case.config, device, case.batch).items():
        if not difference <= TOLERANCES[what]:
            raise RuntimeError(
                f"{case.name}: with the same weights, the {what} of Vitrail and timm differ by {difference:.1e}, more "
                f"than {TOLERANCES[what]:g}. How fast a model is that computes something else means nothing."
            )
        say(f"{case.name}: with the same weights, the {what} of Vitrail and timm differ by {difference:.1e} at most")


def loading(setting: Setting) -> list[Row]:
    """The task `input`: normalised and augmented batches of the same JPEGs, from the cache of decoded images and from
    ImageFolder with a DataLoader, in this process and with two more."""
    rows = []
    with a_data_set(setting.data) as data:
        for name, rotate in (("flips and crops", False), ("flips and rotation", True)):
            units = {OURS: our_input(data, rotate, setting.device)}
            for workers in sorted({0, 2, os.cpu_count() or 2}):
                units[f"ImageFolder, {workers} workers"] = peer_input(data, workers, rotate, setting.device)
            wait, what = lambda: synchronise(setting.device), f"input, {name}"
            for contender, values in interleaved(units, setting.rounds, setting.seconds, wait, what).items():
                rows.append(_input_row(name, contender, tuple(values), setting))
            least = INPUT_SIZE**2 * 3 * 5  # bytes of an image: each of a pixel is read, and written as a float
            rows.append(_input_row(name, INPUT_FLOOR, (bandwidth(setting.device) / least,), setting))
    return rows


def _input_row(name: str, contender: str, values: tuple[float, ...], setting: Setting) -> Row:
    return Row("input", f"64 × 64, {name}", contender, setting.device.type, "", INPUT_BATCH, "images/s", values)


def our_input(data: Path, rotate: bool, device: torch.device) -> Callable[[], int]:
    """One batch, as training makes it."""
    augmentation: dict[str, Any] = {"rotate": float(ANGLE)} if rotate else {"crop": SHIFT}
    recipe = Recipe(data=str(data), image_size=INPUT_SIZE, flip="random", batch_size=INPUT_BATCH, **augmentation)
    pixels = pixels_of(cache.load(recipe.data, INPUT_SIZE).splits["train"], INPUT_SIZE, device)
    batches, steps = TrainingBatches(pixels, recipe), itertools.count()
    batches.watch = Stopwatch(torch.device("cpu"))  # on CUDA it would keep the events of every batch until it is read
    return lambda: sum(len(images) for images, _ in batches.parts(next(steps)))


def peer_input(data: Path, workers: int, rotate: bool, device: torch.device) -> Callable[[], int]:
    """One batch of ImageFolder's, on the device."""
    batches = iter(image_folder_loader(data / "train", INPUT_SIZE, INPUT_BATCH, workers, rotate))

    def unit() -> int:
        images, _ = (part.to(device, non_blocking=True) for part in next(batches))
        return len(images)

    return unit


@contextmanager
def a_data_set(given: Path | None) -> Iterator[Path]:
    """The folder that is given, or while the block runs one of images that are made, with a cache of its own.

    Raises:
        BadInput: the folder has no train/CLASS/*, or its images are not squares of 64 pixels.
    """
    if given is not None:
        check_sizes(given)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("VITRAIL_CACHE")
        os.environ["VITRAIL_CACHE"] = str(Path(folder, "cache"))
        try:
            make_images(Path(folder, "images"), IMAGES)
            yield Path(folder, "images")
        finally:
            os.environ.pop("VITRAIL_CACHE")
            if before is not None:
                os.environ["VITRAIL_CACHE"] = before


def make_images(folder: Path, count: int) -> None:
    """JPEGs of smoothed noise in train/CLASS/, 1.9 KB each, as Tiny ImageNet's are; always the same."""
    noise = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8))
        file = folder / "train" / f"class-{number % CLASSES:02}" / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC).save(file, quality=75)


def check_sizes(folder: Path) -> None:
    """Look at the first image of each class.

    Raises:
        BadInput: there is none, or one is not a square of 64 pixels.
    """
    classes = sorted(path for path in folder.glob("train/*") if path.is_dir())
    if not classes:
        raise BadInput(f"{folder} has no folders train/CLASS with images, from which ImageFolder reads.")
    for label in classes:
        file = next((path for path in sorted(label.rglob("*")) if path.suffix.lower() in SUFFIXES), None)
        if file is None:
            raise BadInput(f"{label} has none of the files ({', '.join(SUFFIXES)}) that ImageFolder reads.")
        with Image.open(file) as image:
            if image.size != (INPUT_SIZE, INPUT_SIZE):
                raise BadInput(
                    f"{file} has {image.width} × {image.height} pixels. Input is compared on images of "
                    f"{INPUT_SIZE} × {INPUT_SIZE}, such as Tiny ImageNet's; without --data, some are made."
                )


def memory(setting: Setting) -> list[Row]:
    """Peak memory of two training steps, weights, gradients and optimizer included, libraries not. On a CPU it is that
    of a process of its own, on CUDA what torch has allocated."""
    rows = []
    for case in setting.cases:
        say(f"memory, {case.name}, batch {case.batch}, {setting.precision}")
        for name in setting.contenders:
            peak = (_in_own_process if setting.device.type == "cpu" else peak_bytes)(name, case, setting)
            rows.append(
                Row("memory", case.name, name, setting.device.type, setting.precision, case.batch, "MB", (peak / 1e6,))
            )
    return rows


def _in_own_process(name: str, case: Case, setting: Setting) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peak_bytes, name, case, setting).result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"the process in which {name} trained {case.name} was ended from outside. The system does that where "
                "memory is short: make some free, then try again."
            ) from None


def peak_bytes(name: str, case: Case, setting: Setting) -> int:
    """What two steps of a contender take at most, in bytes."""
    device = setting.device
    if device.type == "cpu":
        keep_freed_memory()
    # A step of a model that is next to nothing, so that libraries and their buffers are there before; and the compiler.
    _steps(name, Case("", SMALLEST, 2), setting)
    many = case.batch * case.config.num_tokens * case.config.mlp_dim >= WORTH_A_KERNEL
    if name == OURS and device.type == "cpu" and many:
        compiled_gelu(DTYPES[setting.precision])
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _steps(name, case, setting)
        return torch.cuda.max_memory_allocated(device) - before
    before = resident()[0]
    _steps(name, case, setting)
    return resident()[1] - before


def _steps(name: str, case: Case, setting: Setting) -> None:
    step = training_unit(setting.contenders[name](case.config).to(setting.device), case, setting)
    step()
    step()


def start(setting: Setting) -> list[Row]:
    """Seconds of whole processes: help, a training run of one step (its evaluation and page included: more than the
    time to the first step), and for comparison timm's import."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VITRAIL_CACHE": str(Path(folder, "cache"))}
        run = ("--output", str(Path(folder, "run")), "--device", setting.device.type)
        return started(
            {
                "vitrail -h": ("-m", "vitrail", "-h"),
                "vitrail train digits, one step": (
                    "-m", "vitrail", "train", "digits", "--epochs", "1", "--batch-size", "1438", *run,
                ),
                "import timm": (
                    "-c", "from vitrail.speed.peers import declare_operators; declare_operators(); import timm",
                ),
            },
            setting, environment,
        )  # fmt: skip


def started(
    commands: Mapping[str, Sequence[str]], setting: Setting, environment: Mapping[str, str] | None = None
) -> list[Row]:
    """The seconds that Python takes with each of these arguments, in every round.

    Raises:
        RuntimeError: one ended with another status than 0.
    """
    say(f"start: {len(commands)} commands, {setting.rounds} round{'s' * (setting.rounds > 1)}")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(setting.rounds):
        for name, words in commands.items():
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
            seconds[name].append(time.perf_counter() - begun)
            if done.returncode:
                raise RuntimeError(f"{name} ended with status {done.returncode}:\n{done.stderr}")
    return [Row("start", "", name, setting.device.type, "", 0, "s", tuple(values)) for name, values in seconds.items()]


TASKS: dict[str, Callable[[Setting], list[Row]]] = {
    "training": training, "profile": profiled, "inference": inference, "input": loading, "memory": memory,
    "start": start,
}  # fmt: skip
