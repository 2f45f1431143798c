"""Contenders in turn, in one process: training steps and inference of the same model, data and precision.

Contenders that are compared take turns in every round, so that a machine that grows slower or faster meanwhile does so
for all of them.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vitrail.progress import duration, say
from vitrail.speed.peers import DIFFERENCES, PEERS
from vitrail.vit.config import ViTConfig
from vitrail.vit.floor import DTYPES, Precision, forward_flops, product_seconds, products, synchronise, training_flops
from vitrail.vit.model import VisionTransformer

MODELS = {
    "VIT-12": ViTConfig(
        image_size=64, patch_size=8, hidden_size=384, mlp_dim=1536, num_heads=6, num_layers=6, num_classes=200
    ),
    "ViT-B/16": ViTConfig(),
}
SMALLEST = ViTConfig(
    image_size=16, patch_size=8, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=1, num_classes=2
)  # fmt: skip
OURS = "vitrail"
COMPILED = (OURS, "timm", "vit-pytorch")  # as they are, and as torch compiles them
FLOOR = "floor (matrix products alone)"
INFERENCE_BATCHES = (1, 64)
# Small enough that hundreds of steps on the same images learn nothing: gradients keep the size of a first step's.
LEARNING_RATE = 1e-7
WARM_UPS = 5  # units at most
LEAST = 3  # units of a turn, however long they take
SETTLE = 0.1  # share of the time of a turn that goes before it, untimed; one unit at least


@dataclass(frozen=True)
class Row:
    """What one contender did: a value for each round, in `unit`. `note` says what is otherwise than in the others."""

    task: Literal["training", "profile", "inference", "input", "memory", "start"]
    model: str
    contender: str
    device: str
    precision: str
    batch: int
    unit: Literal["images/s", "%", "MB", "s"]
    values: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the rounds."""
        return min(self.values), max(self.values)


@dataclass(frozen=True)
class Case:
    """A model to train and run, and the batch to train it with."""

    name: str
    config: ViTConfig
    batch: int


def cases(device: torch.device, toy: bool = False) -> tuple[Case, ...]:
    """What is measured: the project's own model and the paper's base model, each with a batch that the device bears;
    as a toy, a model that is next to nothing."""
    if toy:
        return (Case("toy", SMALLEST, 2),)
    base = 8 if device.type == "cpu" else 128
    return tuple(Case(name, config, base if name == "ViT-B/16" else 128) for name, config in MODELS.items())


@dataclass(frozen=True)
class Setting:
    """How it is measured.

    Args:
        device: where.
        precision: of the matrix products; weights are float32 in both.
        rounds: in each, every contender has a turn.
        seconds: of a turn.
        cases: the models.
        data: a folder that has train/CLASS/* of images of 64 × 64 pixels; None makes such images.
        contenders: by name, what makes a model of a shape.
        compiled: which of them are there a second time, as torch compiles them; COMPILED, where time allows.
    """

    device: torch.device
    precision: Precision
    rounds: int
    seconds: float
    cases: tuple[Case, ...]
    data: Path | None = None
    contenders: Mapping[str, Callable[[ViTConfig], nn.Module]] = field(
        default_factory=lambda: {OURS: VisionTransformer, **PEERS}
    )
    compiled: tuple[str, ...] = ()


def interleaved(
    contenders: Mapping[str, Callable[[], int]], rounds: int, seconds: float, synchronise: Callable[[], None],
    what: str = "",
) -> dict[str, list[float]]:  # fmt: skip
    """Images/s of each contender in each round.

    Args:
        contenders: each does one unit of work when called, and returns how many images that was.
        rounds: in each, all contenders have a turn; who is first changes from round to round.
        seconds: the time of a turn, which ends with the unit that reaches it, but not before LEAST units.
        synchronise: waits for the device.
        what: is measured, for the line that says how long it will take; no line if empty.
    """
    units = {name: warm_up(work, synchronise) for name, work in contenders.items()}
    if what:
        expected = rounds * sum(max((1 + LEAST) * unit, (1 + SETTLE) * seconds) for unit in units.values())
        say(f"{what}: {len(units)} contenders, {rounds} round{'s' * (rounds > 1)}, about {duration(expected)}")
    paces: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            # What the contender before it left in caches or still does (processes that load ahead), and what this
            # one has loaded ahead, is not to count.
            pace(contenders[name], SETTLE * seconds, 1, synchronise)
            paces[name].append(pace(contenders[name], seconds, LEAST, synchronise))
    return paces


def warm_up(work: Callable[[], int], synchronise: Callable[[], None]) -> float:
    """Work until two units in a row take the same time but for 20%, or WARM_UPS units; the seconds of the last."""
    before = unit = float("inf")
    for _ in range(WARM_UPS):
        start = time.perf_counter()
        work()
        synchronise()
        before, unit = unit, time.perf_counter() - start
        if abs(unit - before) <= 0.2 * before < float("inf"):
            break
    return unit


def pace(work: Callable[[], int], seconds: float, least: int, synchronise: Callable[[], None]) -> float:
    """Images/s over about `seconds`, and `least` units at least."""
    synchronise()
    start, done = time.perf_counter(), sum(work() for _ in range(least))
    while time.perf_counter() - start < seconds:
        done += work()
    synchronise()
    return done / (time.perf_counter() - start)


def training(setting: Setting) -> list[Row]:
    """Whole training steps on a batch that is there: logits, loss, gradients, AdamW."""
    return [row for case in setting.cases for row in train_in_turn(case, setting)]


def train_in_turn(case: Case, setting: Setting) -> list[Row]:
    """The rows of one model's training."""
    models = build(case.config, setting)
    units = {name: training_unit(model, case, setting) for name, model in models.items()}
    return timed("training", case, case.batch, units, setting)


def training_unit(model: nn.Module, case: Case, setting: Setting) -> Callable[[], int]:
    """One step of a model, the same for all."""
    device, bf16 = setting.device, setting.precision == "bf16"
    images = random_images(case.config, case.batch, device)
    labels = torch.randint(case.config.num_classes, (case.batch,), device=device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> int:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return case.batch

    return step


def inference(setting: Setting) -> list[Row]:
    """Logits of a batch that is there."""
    return [row for case in setting.cases for row in infer_in_turn(case, setting)]


def infer_in_turn(case: Case, setting: Setting) -> list[Row]:
    """The rows of one model's inference."""
    models, rows = build(case.config, setting), []
    for batch in INFERENCE_BATCHES:
        units = {name: inference_unit(model, case.config, batch, setting) for name, model in models.items()}
        rows += timed("inference", case, batch, units, setting)
    return rows


def inference_unit(model: nn.Module, config: ViTConfig, batch: int, setting: Setting) -> Callable[[], int]:
    """The logits of one batch."""
    device, bf16 = setting.device, setting.precision == "bf16"
    images = random_images(config, batch, device)
    model.eval()

    @torch.inference_mode()
    def run() -> int:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model(images)
        return batch

    return run


def build(config: ViTConfig, setting: Setting) -> dict[str, nn.Module]:
    """Every contender's model, on the device; some also as torch compiles them."""
    models = {name: prepared(make, config, setting.device) for name, make in setting.contenders.items()}
    torch.compiler.reset()  # or what was compiled for another model counts towards the limit of recompilations
    for name in setting.compiled:
        models[f"{name}, compiled"] = prepared(setting.contenders[name], config, setting.device)
        models[f"{name}, compiled"].compile(dynamic=False)
    return models


def prepared(make: Callable[[ViTConfig], nn.Module], config: ViTConfig, device: torch.device) -> nn.Module:
    """A contender's model on the device, its head drawn anew as all of them have it: some begin with zeros, which hide
    what is before them, and leave nothing but zeros for its gradients."""
    model = make(config).to(device)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_classes]
    nn.init.normal_(heads[-1].weight, std=config.hidden_size**-0.5)
    nn.init.zeros_(heads[-1].bias)
    return model


def random_images(config: ViTConfig, batch: int, device: torch.device) -> torch.Tensor:
    """Images from -1 to 1: what they show does not change how long they take."""
    return torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1


def timed(
    task: Literal["training", "inference"], case: Case, batch: int, units: dict[str, Callable[[], int]],
    setting: Setting,
) -> list[Row]:  # fmt: skip
    """The rows of a model's contenders and of its floor, which is measured before and after them."""
    device, precision, config = setting.device, setting.precision, case.config
    shapes = products(config, batch, task == "training")
    floor = partial(product_seconds, shapes, device, DTYPES[precision])
    before = floor()
    what = f"{task}, {case.name}, batch {batch}, {precision}"
    paces = interleaved(units, setting.rounds, setting.seconds, lambda: synchronise(device), what)
    after = floor()

    def row(contender: str, values: Iterable[float], note: str) -> Row:
        return Row(task, case.name, contender, device.type, precision, batch, "images/s", tuple(values), note)

    flops = training_flops if task == "training" else forward_flops
    more = flops(config, every_token=True) / flops(config) - 1
    note = f"{flops(config) / 1e9:.2f} GFLOP an image; {more:.0%} more where the last block works on every token"
    rows = [row(name, values, DIFFERENCES.get(name, "")) for name, values in paces.items()]
    return [*rows, row(FLOOR, (batch / before, batch / after), note)]
