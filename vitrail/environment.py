"""What a run ran on: versions, commit, hardware, command. A figure without them cannot be reproduced."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vitrail import __version__
from vitrail.errors import of_many
from vitrail.world import ALONE, World, job

PACKAGES = ("torch", "numpy", "pillow")


def describe(device: torch.device, world: World = ALONE) -> dict[str, Any]:
    """What is true of a run that takes up its work now, for an entry of `environment.json`."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "vitrail": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "job": job(),
        "compiler": compiler(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def command() -> str:
    """The command line as it could be typed again, or the name of the program that called Vitrail from Python."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("vitrail", "__main__.py"):
        return shlex.join(["vitrail", *sys.argv[1:]])
    return f"vitrail.train in {program or 'an interactive session'}"


def program() -> str:
    """What to type for Vitrail here: `vitrail` where the shell finds that, else the path by which it was started, as
    `make train` does."""
    started = sys.argv[0] if sys.argv else ""
    if Path(started).name == "vitrail" and shutil.which("vitrail") is None:
        return shlex.quote(started)
    return "vitrail"


def launcher() -> str:
    """What to type before `train` for a run to go on as it is trained here: `program`, or, for several processes,
    torchrun and as many of them."""
    if not of_many():
        return program()
    here, machines = os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_WORLD_SIZE"]
    where = "--standalone" if machines == "1" else f"--nnodes={machines} …"
    return f"torchrun {where} --nproc-per-node={here} -m vitrail"


def commit() -> str | None:
    """The commit of the checkout that Vitrail runs from, `+changes` where files differ; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", __file__):  # installed below somebody else's checkout
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def compiler() -> str | None:
    """The C++ compiler that torch would find to write kernels for a processor with; None if there is none."""
    names = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    return next((name for name in names if shutil.which(name)), None)


def cpu() -> str:
    """The processor's name, with the numbers of its family and model, where there are such, for some names stand for
    processors of several generations."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        first = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        numbers = [f"{name.removeprefix('cpu ')} {first[name]}" for name in ("cpu family", "model") if name in first]
        return first["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
