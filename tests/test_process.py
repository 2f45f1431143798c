"""What is said of the process's memory is so."""

import subprocess
import sys


def test_peak_memory_is_what_the_process_had_at_most() -> None:
    script = """
import torch
from vitrail.process import peak_memory, resident
cpu = torch.device("cpu")
before = peak_memory(cpu)
block = torch.ones(before // 4)  # in float32: as much as there has been
high = peak_memory(cpu)
assert high >= before * 0.9 + block.nbytes, (before, high)
del block
assert peak_memory(cpu) > 0.99 * high > resident()[0] + 0.5 * before, (high, resident())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
