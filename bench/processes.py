"""Measures what several processes on this machine send one another in a training step, and what memory each takes.

    python bench/processes.py [--processes 2]

trains a model of VIT-12's shape on digits, alone, by DDP and by FSDP2, and prints a Markdown table to stdout. What is
sent is what the loopback device of Linux counts: nothing else may use it meanwhile.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGES, BATCH = 1438, 16  # few at once, so that weights take more memory than activations
MODEL = ["--hidden-size=384", "--mlp-dim=1536", "--num-heads=6", "--num-layers=6"]
SMALL = ["--hidden-size=16", "--mlp-dim=16", "--num-heads=1", "--num-layers=1"]
COMMON = [f"--batch-size={BATCH}", "--device=cpu", "--checkpoint-every=10000"]
EPOCHS = (1, 2)  # runs of as many, whose difference is steps alone


def sent() -> int:
    """Bytes that went over the loopback device so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[1])


def most_memory(of: int, rank: int) -> int:
    """Bytes that the process of that rank, which a torchrun has started, has had at most; 0 while there is none."""
    for child in map(int, Path(f"/proc/{of}/task/{of}/children").read_text().split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return peak(child)
    return 0


def peak(process: int) -> int:
    """Bytes that a process has had at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def train(processes: int, words: list[str], epochs: int) -> tuple[int, int, dict[str, float]]:
    """Bytes sent by a run of that many epochs, the most memory of its last process, and its results."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
        command = [sys.executable, *torchrun, "-m", "vitrail", "train", f"--output={run}", f"--epochs={epochs}"]
        before, memory = sent(), 0
        process = subprocess.Popen(
            [*command, *COMMON, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))},
        )  # fmt: skip
        while process.poll() is None:
            with contextlib.suppress(OSError):  # it has just ended
                now = peak(process.pid) if processes == 1 else most_memory(process.pid, processes - 1)
                memory = max(memory, now)
            time.sleep(0.05)
        return sent() - before, memory, json.loads((run / "results.json").read_text("utf-8"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    count = parser.parse_args().processes
    steps = -(-EPOCHS[1] * IMAGES // BATCH) - -(-EPOCHS[0] * IMAGES // BATCH)
    print(f"| | MB sent a step, by all {count} processes | MB of memory of the last | images/s |")
    print("| --- | ---: | ---: | ---: |")
    ways = {"alone": (1, []), "DDP": (count, []), "FSDP2": (count, ["--parallel=fsdp"])}
    for name, (processes, words) in ways.items():
        _, small, _ = train(processes, [*SMALL, *words], EPOCHS[0])
        (first, _, _), (second, large, results) = (train(processes, [*MODEL, *words], epochs) for epochs in EPOCHS)
        memory = (large - small) / 1e6
        print(f"| {name} | {(second - first) / steps / 1e6:.1f} | {memory:.0f} | {results['images_per_second']:.0f} |")
    print(f"\nThe model has {results['parameters']:,} parameters; memory is beyond that of a run of a small model.")


if __name__ == "__main__":
    main()
