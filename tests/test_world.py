"""Several processes, started by torchrun, train one model: as one process does, and with some of them lost."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vitrail
from vitrail.data import cache
from vitrail.data.cache import Images
from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import evaluate_run
from vitrail.input.batches import TrainingBatches
from vitrail.input.pixels import Pixels
from vitrail.recipes import resolve
from vitrail.settings import Recipe
from vitrail.training.parallel import check_shares
from vitrail.training.resume import begun_by_job
from vitrail.weights.files import read_about
from vitrail.world import World

WEIGHTS = Path("model/model.safetensors")
MODEL = ["--hidden-size=16", "--mlp-dim=32", "--num-heads=2", "--num-layers=1", "--batch-size=56"]
TINY = [*MODEL, "--epochs=2"]  # 52 steps
SIX = [*MODEL, "--epochs=6"]
ALL = 1797  # the digits, which two processes cannot share evenly
PATIENCE = 200  # seconds for what hangs

# What each process does: predictions of all digits, of which the first writes what both have put together.
EVALUATE = """
import sys, numpy as np, torch
from vitrail.data import cache
from vitrail.evaluation.evaluate import predict_split
from vitrail.input.pixels import Pixels
from vitrail.world import join
dataset = cache.load("digits", 8)
images = {split: Pixels(images, 8, torch.device("cpu")) for split, images in dataset.splits.items()}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
with join(torch.device("cpu")) as world:
    means = [torch.full((2,), float(world.rank)), torch.full((3, 1), world.rank + 4.0)]
    world.mean(means)
    mean = (world.size - 1) / 2
    assert [tensor.tolist() for tensor in means] == [[mean] * 2, [[mean + 4]] * 3]
    found = [predict_split(model, pixels, batch_size=100, world=world) for pixels in images.values()]
    if world.first:
        arrays = {name: np.concatenate([getattr(one, name) for one in found]) for name in vars(found[0])}
        np.savez(sys.argv[1], **arrays)
"""


def launch(processes: int, *words: str, restarts: int = 0) -> "subprocess.Popen[str]":
    """Start processes by torchrun, each with one thread; without any, the words alone."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command = [sys.executable, *(torchrun if processes else []), *words]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def said(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=PATIENCE)[0]


def train(processes: int, run: Path, *words: str) -> str:
    process = launch(processes, "-m", "vitrail", "train", "--output", str(run), *words)
    text = said(process)
    assert process.returncode == 0, text
    return text


def losses(run: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(line["train_loss"], line["val_loss"]) for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, which works through each batch in the two halves that two processes have of it."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    train(0, run, *TINY, "--accumulate=2", "--ema-decay=0.9")
    return run


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "together"
    return run, train(2, run, *TINY, "--ema-decay=0.9")


def test_two_processes_end_with_the_bits_of_one(alone: Path, together: tuple[Path, str]) -> None:
    run, text = together
    assert "Warning" not in text
    assert losses(run) == losses(alone)
    assert (run / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()
    assert (run / "predictions.safetensors").read_bytes() == (alone / "predictions.safetensors").read_bytes()
    results, expected = (json.loads((path / "results.json").read_text("utf-8")) for path in (run, alone))
    assert results["count"] == expected["count"] == 359  # of which one process has one more than the other
    assert results["top1"] == expected["top1"]
    launches = json.loads((run / "environment.json").read_text("utf-8"))["launches"]
    assert [launch["processes"] for launch in launches] == [2]
    # One of them speaks, and what it says is said once.
    for line in (
        "359 test images of 10 classes, 2 processes (ddp), cpu, fp32",
        "epoch   1/2",
        "epoch   2/2",
        "2 epochs in",
    ):
        assert text.count(line) == 1, text


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_model_in_parts_follows_the_same_curve(precision: str, close: float, tmp_path: Path) -> None:
    # Its parts are other tensors than the whole, whose sums are rounded otherwise: for clipping, and in the optimizer.
    # Several blocks, whose weights do not divide evenly; in bf16 they are gathered in that.
    model = [*TINY, "--ema-decay=0.9", "--num-layers=3", "--mlp-dim=37", f"--precision={precision}"]
    train(0, tmp_path / "alone", *model)
    train(2, tmp_path / "fsdp", *model, "--parallel=fsdp")
    np.testing.assert_allclose(losses(tmp_path / "fsdp"), losses(tmp_path / "alone"), rtol=close)
    ours, theirs = (load_file(tmp_path / run / WEIGHTS) for run in ("fsdp", "alone"))
    assert {name: weight.shape for name, weight in ours.items()} == {name: w.shape for name, w in theirs.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processes_agree_on_what_batch_norm_measured(precision: str, tmp_path: Path) -> None:
    # In training each normalises its own images, as one process does in as many halves. That one moves its averages
    # twice a step, once by each half, where they move them once, and share the mean.
    model = [*TINY, "--stem=convolutions", "--ema-decay=0.9", f"--precision={precision}"]
    train(0, tmp_path / "one", *model, "--accumulate=2")
    train(2, tmp_path / "ddp", *model)
    train(2, tmp_path / "fsdp", *model, "--parallel=fsdp")
    expected = load_file(tmp_path / "one" / WEIGHTS)
    for parallel in ("ddp", "fsdp"):
        close = 1e-5 if precision == "fp32" else 1e-2
        weights = load_file(tmp_path / parallel / WEIGHTS)
        training, evaluation = zip(*losses(tmp_path / parallel), strict=True)
        np.testing.assert_allclose(training, [line[0] for line in losses(tmp_path / "one")], rtol=close)
        np.testing.assert_allclose(evaluation, [line[1] for line in losses(tmp_path / "one")], rtol=0.02)
        assert {name: weight.dtype for name, weight in weights.items()} == {n: w.dtype for n, w in expected.items()}
        if parallel == "ddp":
            assert all(
                torch.equal(w, expected[n]) for n, w in weights.items() if "running_" not in n and "num_" not in n
            )
        assert evaluate_run(tmp_path / parallel)["loss"] == pytest.approx(evaluation[-1], rel=close)
    train(2, tmp_path / "stopped", *model, "--stop-after=1")
    train(2, tmp_path / "stopped", "--resume")
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "ddp" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, in the halves that two have, without interruption."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(0, run, *SIX, "--accumulate=2")
    return run


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_goes_from_two_to_one_to_two(parallel: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(2, run, *SIX, "--stop-after=1", f"--parallel={parallel}")
    assert "processes is 1, and was 2" in train(0, run, "--resume", "--stop-after=2")
    train(2, run, "--resume", "--stop-after=3")
    np.testing.assert_allclose(losses(run), losses(whole)[:3], rtol=1e-5)


def test_pre_training_follows_the_same_curve(tmp_path: Path) -> None:
    pretrain = [*TINY, "--objective=patches"]
    for processes, name, more in ((0, "one", ["--accumulate=2"]), (2, "two", []), (2, "parts", ["--parallel=fsdp"])):
        train(processes, tmp_path / name, *pretrain, *more)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "one"), rtol=1e-5)


def test_streamed_images_are_shared_as_others_are(tmp_path: Path) -> None:
    scans = cache.load("digits", 8).splits["train"]
    for i in range(300):
        (tmp_path / "scans" / f"{scans.labels[i]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(scans.image(i)).save(tmp_path / "scans" / f"{scans.labels[i]}" / f"{i}.png")
    streamed = [*TINY, f"--data={tmp_path / 'scans'}", "--stream"]
    train(0, tmp_path / "one", *streamed, "--accumulate=2")
    train(2, tmp_path / "two", *streamed)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert (tmp_path / "two" / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_compiled_models_follow_the_same_curve(alone: Path, tmp_path: Path) -> None:
    for parallel in ("ddp", "fsdp"):
        train(2, tmp_path / parallel, *TINY, "--ema-decay=0.9", "--compile", f"--parallel={parallel}")
        np.testing.assert_allclose(losses(tmp_path / parallel), losses(alone), rtol=1e-4)
        names = load_file(tmp_path / parallel / WEIGHTS).keys()
        assert names == load_file(alone / WEIGHTS).keys()


def test_a_loss_that_is_not_finite_is_said_once(tmp_path: Path) -> None:
    process = launch(2, "-m", "vitrail", "train", "--output", str(tmp_path / "run"), *TINY, "--lr=1e30")
    text = said(process)
    assert process.returncode == 1
    assert text.count("training diverged: the training loss is ") == 1, text
    assert "another process" not in text


def test_what_memory_divided_is_divided_for_any_number_of_processes() -> None:
    images = cache.load("digits", 8).splits["train"]
    assert isinstance(images, Images)
    pixels = Pixels(images, 8, torch.device("cpu"))
    for batch, size, parts in ((60, 2, 2), (96, 8, 3), (56, 4, 1)):
        recipe = Recipe(batch_size=batch, image_size=8, patch_size=4)
        covered: list[int] = []
        for rank in range(size):
            batches = TrainingBatches(pixels, recipe, world=World(rank, size))
            batches.divided_by = batches.parts_from(parts)
            rows = batches.rows()
            assert len({part.stop - part.start for part in rows}) == 1
            covered += [row for part in rows for row in range(part.start, part.stop)]
        assert covered == list(range(batch))


def test_a_job_goes_on_with_its_own_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_heads": 1,
        "num_layers": 1,
        "batch_size": 500,
        "epochs": 3,
    }
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    world = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()), "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    run = vitrail.train("digits", output=tmp_path / "run", stop_after=1, **settings).run
    (run / "results.json").unlink()  # as if it had been killed
    assert begun_by_job(run, resolve("digits", **settings), World()) == run
    assert begun_by_job(run, resolve("digits", **settings | {"lr": 1e-4}), World()) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert begun_by_job(run, resolve("digits", **settings), World()) is None


def test_each_image_counts_once(tmp_path: Path) -> None:
    script, found = tmp_path / "evaluate.py", []
    script.write_text(EVALUATE, encoding="utf-8")
    for processes in (0, 2):
        path = tmp_path / f"{processes}.npz"
        process = launch(processes, str(script), str(path))
        text = said(process)
        assert process.returncode == 0, text
        found.append(np.load(path))
    for name in found[0].files:
        assert len(found[1][name]) == ALL
        np.testing.assert_array_equal(found[0][name], found[1][name])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def worker(of: int, rank: int) -> int:
    """The process of that rank that a torchrun has started."""
    children = Path(f"/proc/{of}/task/{of}/children")
    for child in map(int, children.read_text().split()):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment and b"TORCHELASTIC_RUN_ID" in b"\0".join(environment):
            return child
    raise AssertionError(f"torchrun has no process of rank {rank}")


def await_epochs(run: Path, epochs: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < epochs:
        assert process.poll() is None, said(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in Linux's /proc")
@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 0), ("ddp", 1), ("fsdp", 1)])
def test_a_killed_process_starts_all_of_them_from_the_last_checkpoint(
    parallel: str, rank: int, whole: Path, tmp_path: Path
) -> None:
    unbroken, run, shared = whole, tmp_path / "run", [*SIX, f"--parallel={parallel}"]
    if parallel == "fsdp":  # which adds up in another order than one process
        unbroken = tmp_path / "unbroken"
        train(2, unbroken, *shared)
    process = launch(2, "-m", "vitrail", "train", "--output", str(run), *shared, "--checkpoint-every=0.1", restarts=2)
    await_epochs(run, 1, process)
    os.kill(worker(process.pid, rank), signal.SIGKILL)
    text = said(process)
    assert process.returncode == 0, text
    assert "going on with" in text
    assert not (tmp_path / "run-2").exists()
    assert losses(run) == losses(unbroken)
    assert (run / WEIGHTS).read_bytes() == (unbroken / WEIGHTS).read_bytes()
    assert len(json.loads((run / "environment.json").read_text("utf-8"))["launches"]) == 2


def test_a_signal_stops_all_of_them_after_saving(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(2, "-m", "vitrail", "train", "--output", str(run), *MODEL, "--epochs=500")
    await_epochs(run, 1, process)
    # As batch systems do, and torchrun once more: to all of them.
    for one in (worker(process.pid, 0), worker(process.pid, 1), process.pid):
        os.kill(one, signal.SIGTERM)
    text = said(process)
    found = re.search(r"stopped at step (\d+) of", text)
    assert found, text
    assert text.count("stopped at step") == 1
    assert f"torchrun --standalone --nproc-per-node=2 -m vitrail train --resume --output {run}" in text
    assert read_about(run / "last" / "state.safetensors")["step"] == int(found[1]) > 20


def test_what_all_of_them_fail_of_is_said_once(tmp_path: Path) -> None:
    process = launch(2, "-m", "vitrail", "train", "--output", str(tmp_path / "run"), "--batch-sze=31")
    assert said(process).count("did you mean '--batch-size'?") == 1
    assert process.returncode == 1


def test_a_batch_is_that_of_all_processes() -> None:
    check_shares(Recipe(batch_size=32), World(0, 4))
    with pytest.raises(BadInput, match=r"a batch of 32 does not divide evenly among 3 processes: .* a multiple of 3 "):
        check_shares(Recipe(batch_size=32), World(0, 3))
    with pytest.raises(BadInput, match=r"mixed in pairs, does not divide .* 4 processes with --accumulate 2: .* 16 "):
        check_shares(Recipe(batch_size=40, accumulate=2, mixup=0.2), World(0, 4))
    with pytest.raises(BadInput, match="muon needs whole matrices"):
        check_shares(Recipe(batch_size=32, optimizer="muon", parallel="fsdp"), World(0, 2))


def test_who_is_alone_is_told_that_fsdp_shares_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    check_shares(Recipe(batch_size=32), World())
    assert not capsys.readouterr().err
    check_shares(Recipe(batch_size=32, parallel="fsdp"), World())
    assert "alone" in (said := capsys.readouterr().err)
    assert "torchrun" in said


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 1797])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_equal_and_together_all(size: int, count: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    np.testing.assert_array_equal(np.concatenate(shares)[:count], np.arange(count))
