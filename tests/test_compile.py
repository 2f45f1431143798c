"""A compiled model is the same model. In processes of their own, for torch's compiler cannot see through the checks of
shapes that the tests have on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
SMALL = (
    "--epochs", "2", "--image-size", "16", "--hidden-size", "32", "--mlp-dim", "64", "--num-heads", "2", "--num-layers",
    "2", "--batch-size", "100",
)  # fmt: skip


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_compiled_models_give_the_official_logits(checkpoint_activations: bool) -> None:
    script = """
import sys
from pathlib import Path
import numpy as np
import torch
import vitrail
golden, checkpoint_activations = Path(sys.argv[1]), sys.argv[2] == "True"
for case in ("token", "gap", "pre-logits"):
    expected = {name: torch.from_numpy(array) for name, array in np.load(golden / f"{case}.expected.npz").items()}
    model = vitrail.load(golden / f"{case}.npz")
    model.checkpoint_activations = checkpoint_activations
    # all that torch's compiler does but the code that it writes in the end
    model.compile(backend="aot_eager", fullgraph=not checkpoint_activations, dynamic=False)
    images = expected["image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected["logits"], atol=1e-5, rtol=0)
    logits = model.train()(images)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    logits.sum().backward()
    found = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    plain = vitrail.load(golden / f"{case}.npz").train()
    plain(images).sum().backward()
    torch.testing.assert_close(found, [weight.grad for weight in plain.parameters()], atol=1e-4, rtol=1e-4)
"""
    words = [sys.executable, "-c", script, str(GOLDEN), str(checkpoint_activations)]
    subprocess.run(words, check=True, timeout=300)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_a_compiled_run_learns_the_same_under_the_same_names(tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        words = [sys.executable, "-m", "vitrail", "train", *SMALL, *more, "--output", str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "compiled"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if not name.endswith("qkv.bias"):  # the keys' has no effect: Adam makes steps of what is only rounding
            torch.testing.assert_close(found[name], weight, atol=2e-3, rtol=1e-2)
    losses = [json.loads((tmp_path / name / "results.json").read_text())["loss"] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
