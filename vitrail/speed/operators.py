"""Where the time of a training step goes, by kind of operator."""

import os
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from vitrail.speed.rounds import OURS, Row, Setting, prepared, training_unit
from vitrail.vit.floor import synchronise

STEPS = 3
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler tells the terminal when it starts and stops
# Beginnings of operators' names as the profiler gives them; on a GPU, of the operators that launched the kernels.
KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "linear"),  # before what begins with "add"
    "fused attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention"),
    "GELU": ("gelu",),
    "LayerNorm": ("native_layer_norm",),
    "softmax of attention": ("_softmax", "softmax"),
    "copies and casts": ("copy_", "cat", "clone", "contiguous", "_to_copy", "stack"),
    "additions and products": ("add", "mul", "div", "sub", "sum"),
    "AdamW": ("_fused_adamw",),
    "gradients set to zero": ("zero_", "fill_"),
}
OTHER = "other operators"
COMPILED = "compiled kernels"
GELU_KERNEL = "GELU and its derivative, compiled"  # fused.py; what is compiled of a model that is not
OUTSIDE = "outside of operators"  # Python, autograd, and on a GPU the waiting between kernels


def profiled(setting: Setting) -> list[Row]:
    """The task `profile`: for each model, what share of Vitrail's training step each kind of operator takes. The
    profiler slows down what is small, so that its shares are a little too large. On CUDA the model is compiled."""
    rows = []
    for case in setting.cases:
        model = prepared(setting.contenders[OURS], case.config, setting.device)
        if setting.device.type == "cuda":
            torch.compiler.reset()
            model.compile(dynamic=False)
        step = training_unit(model, case, setting)
        for name, share in shares(step, setting.device).items():
            row = Row("profile", case.name, name, setting.device.type, setting.precision, case.batch, "%", (share,))
            rows.append(row)
    return rows


def shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Percent of the time of some steps that operators of each kind take, the largest first; after two to warm up."""
    for _ in range(2):
        step()
    synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        synchronise(device)
        whole = (time.perf_counter() - began) * 1e6  # the profiler counts microseconds
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        took = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        # Kernels of a GPU are also listed apart from the operators they belong to; those that torch compiled belong
        # to none.
        if event.key.startswith("aten::"):
            seconds[kind(event.key.removeprefix("aten::"))] += took
        elif event.key.startswith(("triton_", "## Call CompiledFxGraph")):
            seconds[COMPILED if device.type == "cuda" else GELU_KERNEL] += took
    seconds[OUTSIDE] = max(0.0, whole - sum(seconds.values()))
    return {name: 100 * took / whole for name, took in sorted(seconds.items(), key=lambda item: -item[1])}


def kind(operator: str) -> str:
    """The kind of an operator, by its name without `aten::`."""
    return next((name for name, starts in KINDS.items() if operator.startswith(starts)), OTHER)
