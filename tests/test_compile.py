"""A compiled model is the same model. In processes of their own, for torch's compiler cannot see through the checks of
shapes that the tests have on."""

import json
import os
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


needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"
)


@needs_a_compiler
def test_gelu_with_its_slope_gives_the_official_logits_and_torch_s_gradients() -> None:
    """Of models that are small, by having the kernel used for any number of activations."""
    script = """
import sys
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
import vitrail
from vitrail.vit import fused
fused.WORTH_A_KERNEL = 1
for case in ("token", "gap", "pre-logits"):
    expected = {name: torch.from_numpy(array) for name, array in np.load(f"{sys.argv[1]}/{case}.expected.npz").items()}
    model = vitrail.load(Path(sys.argv[1]) / f"{case}.npz").train()
    logits = model(expected["image"].permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    assert "ApproximateGelu" in str(seen := [node.name() for node in reachable(logits.grad_fn)]), seen
for dtype, close in ((torch.float32, 5e-6), (torch.bfloat16, 2**-8)):
    x = torch.linspace(-12, 12, 4001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    for given in (x, exact):
        fused.gelu(given, "tanh").sum().backward() if given is x else F.gelu(given, approximate="tanh").sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=close, rtol=close)
    torch.testing.assert_close(
        fused.gelu(x, "tanh").double(), F.gelu(exact, approximate="tanh"), atol=close, rtol=close
    )
"""
    walk = """
def reachable(node):
    seen, left = [], [node]
    while left:
        if (one := left.pop()) is not None and one not in seen:
            seen.append(one)
            left += [before for before, _ in one.next_functions]
    return seen
"""
    subprocess.run([sys.executable, "-c", walk + script, str(GOLDEN)], check=True, timeout=300)


def test_where_nothing_can_be_compiled_gelu_is_torch_s_and_that_is_said_once(tmp_path: Path) -> None:
    script = """
import torch
import torch.nn.functional as F
from vitrail.vit import fused
fused.WORTH_A_KERNEL = 1
x = torch.randn(100, requires_grad=True)
for _ in range(2):
    assert torch.equal(fused.gelu(x, "tanh"), F.gelu(x, approximate="tanh"))
"""
    without = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=without, check=True
    )
    assert done.stderr.count("could not compile a kernel here") == 1, done.stderr


@needs_a_compiler
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
