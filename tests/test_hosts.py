"""Two machines train one model: two network namespaces with an address each, of which one is unplugged for a while."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMESPACES = ("vitrail-one", "vitrail-two")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RECIPE = ["--hidden-size=16", "--mlp-dim=32", "--num-heads=2", "--num-layers=1", "--batch-size=16", "--epochs=6"]
UNPLUGGED = 15.0  # seconds
PATIENCE = 240.0

pytestmark = [
    pytest.mark.skipif("LARGE_TESTS" not in os.environ, reason="takes half a minute; LARGE_TESTS=1 has it run"),
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="makes network namespaces, which takes root and iproute2",
    ),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_machines() -> Iterator[None]:
    """Two namespaces joined by a cable, whose ends are `end0` and `end1`."""
    for name in NAMESPACES:
        ip("netns", "add", name)
    try:
        one, two = NAMESPACES
        ip("link", "add", "end0", "netns", one, "type", "veth", "peer", "name", "end1", "netns", two)
        for number, (name, address) in enumerate(zip(NAMESPACES, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"end{number}")
            for device in (f"end{number}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NAMESPACES:
            ip("netns", "del", name)


def machine(number: int, run: Path) -> "subprocess.Popen[str]":
    """What is typed on one of them."""
    torchrun = [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--rdzv-conf=is_host={1 - number}",
        f"--local-addr={ADDRESSES[number]}",
    ]  # fmt: skip
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMESPACES[number], sys.executable, *torchrun,
         "-m", "vitrail", "train", f"--output={run}", *RECIPE],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"end{number}"},
    )  # fmt: skip


def epochs(run: Path) -> int:
    lines = run / "metrics.jsonl"
    return len(lines.read_text("utf-8").splitlines()) if lines.is_file() else 0


def test_a_machine_that_is_cut_off_and_comes_back_changes_nothing(two_machines: None, tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    subprocess.run(
        [sys.executable, "-m", "vitrail", "train", f"--output={alone}", *RECIPE, "--accumulate=2"],
        check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    processes = [machine(number, run) for number in (0, 1)]
    deadline = time.monotonic() + PATIENCE
    while epochs(run) < 2:
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    ip("-n", NAMESPACES[1], "link", "set", "end1", "down")
    time.sleep(UNPLUGGED)
    assert epochs(run) < 6  # it waits
    ip("-n", NAMESPACES[1], "link", "set", "end1", "up")
    for process in processes:
        text = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, text
    results = [json.loads((path / "results.json").read_text("utf-8")) for path in (run, alone)]
    assert results[0]["top1"] == results[1]["top1"]
    weights = Path("model/model.safetensors")
    assert (run / weights).read_bytes() == (alone / weights).read_bytes()
