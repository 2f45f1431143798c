"""What is said of the process's memory and of the processor is so."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitrail.vit.floor import faster_precision, native_precision

CPU_INFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not CPU_INFO.exists() or platform.machine() != "x86_64", reason="Linux on x86 says what its processor has"
)
def test_bf16_is_the_native_and_the_faster_one_where_there_are_instructions_for_it() -> None:
    there = set(CPU_INFO.read_text().split()) & {"avx512_bf16", "amx_bf16"}
    for precision in (native_precision, faster_precision):
        assert precision(torch.device("cpu")) == ("bf16" if there else "fp32")


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


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory"
)
def test_evaluation_leaves_no_holes_in_what_is_kept() -> None:
    script = """
import torch
from vitrail.process import keep_freed_memory, kept_memory_as_it_is, resident
keep_freed_memory()
def evaluate():
    before, results, large = resident()[0], [], None
    for _ in range(12):
        large = torch.zeros(1 << 22)  # 16 MB, while the last is there
        again = large + 1
        results.append(again[:2000].clone())
        del again
    return (resident()[0] - before) >> 20
with kept_memory_as_it_is(True):
    less = evaluate()
print(less, evaluate())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    less, more = map(int, done.stdout.split())
    assert less < 40, (less, more, done.stderr)
