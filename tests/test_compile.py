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
def test_with_its_kernel_gelu_is_the_official_one_and_all_gradients_are_torch_s() -> None:
    """Of models that are small, by having the kernel used for any number of activations: logits of the golden cases,
    gradients of whole models in both precisions, kept or computed again, and the values and derivatives themselves."""
    script = """
import sys
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
import vitrail
from vitrail.vit import fused

def reachable(node):
    seen, left = [], [node]
    while left:
        if (one := left.pop()) is not None and one not in seen:
            seen.append(one)
            left += [before for before, _ in one.next_functions]
    return " ".join(node.name() for node in seen)

def gradients(model, images, bf16):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images)
    names = reachable(logits.grad_fn)
    logits.float().square().sum().backward()
    return logits.detach(), names, [weight.grad for weight in model.parameters()]

fused.WORTH_A_KERNEL = 1
for case in ("token", "gap", "pre-logits"):
    expected = {name: torch.from_numpy(array) for name, array in np.load(f"{sys.argv[1]}/{case}.expected.npz").items()}
    images = expected["image"].permute(0, 3, 1, 2)
    model = vitrail.load(f"{sys.argv[1]}/{case}.npz").train()
    for bf16 in (False, True):
        for again in (False, True):
            model.checkpoint_activations = again
            fused.CUSTOM_GRADIENTS = False
            plain, names, by_torch = gradients(model, images, bf16)
            assert "TanhGelu" not in names and "SelfAttention" not in names
            fused.CUSTOM_GRADIENTS = True
            logits, names, custom = gradients(model, images, bf16)
            assert again or ("TanhGelu" in names and "SelfAttention" in names), names
            if not bf16:
                torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
            for one, other in zip(custom, by_torch, strict=True):
                scale = max(float(other.abs().max()), 1e-3)
                assert float((one - other).abs().max()) <= (0.05 if bf16 else 2e-5) * scale
    with FlopCounterMode(display=False) as counted:  # which looks through functions
        model(images).sum().backward()
    assert counted.get_total_flops() > 0
for dtype, close in ((torch.float32, 5e-6), (torch.bfloat16, 2**-8)):
    x = torch.linspace(-12, 12, 4001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    value, expected = fused.gelu(x, "tanh"), F.gelu(exact, approximate="tanh")
    assert "TanhGelu" in value.grad_fn.name()
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(value.double(), expected, atol=close, rtol=close)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=close, rtol=close)
assert "TanhGelu" not in fused.gelu(exact, "tanh").grad_fn.name()  # float64 stays that
"""
    subprocess.run([sys.executable, "-c", script, str(GOLDEN)], check=True, timeout=300)


@needs_a_compiler
def test_the_profile_knows_the_kernel() -> None:
    script = """
from dataclasses import replace
import torch
from vitrail.speed import operators, rounds
from vitrail.vit import fused
fused.WORTH_A_KERNEL = 1
config = replace(rounds.SMALLEST, hidden_size=64, mlp_dim=4096, num_heads=2, num_layers=2)
setting = rounds.Setting(torch.device("cpu"), "fp32", 1, 0.1, (rounds.Case("one", config, 64),))
shares = {row.contender: row.median for row in operators.profiled(setting)}
assert shares[operators.GELU_KERNEL] > 1, shares
assert "GELU" not in shares, shares
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


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
    assert done.stderr.count("could not compile a kernel for it here") == 1, done.stderr


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
