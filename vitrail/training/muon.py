"""Muon: momentum, made orthogonal, for the matrices of the blocks; AdamW for all else.

N matrices    R rows, at most as many as    C columns
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Of Jordan et al., https://kellerjordan.github.io/posts/muon, as torch.optim.Muon has them
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for the groups with `parts`, AdamW for the others.

    Each matrix moves by its Nesterov momentum with all singular values put near 1, times the learning rate, and times
    the root of rows / columns where it is tall; decay is decoupled. `torch.optim.Muon` computes the same, one matrix
    after the other; here, all that are of one shape, transposed or not, go through the iteration together.

    Args:
        groups: parameter groups, with `lr` and `weight_decay`. With `parts`, each parameter is that many matrices below
            one another, and each of them is made orthogonal by itself: the queries, keys and values of `Attention` are
            three. As one (3D, D) matrix, they would have D directions between them, which is another update. The kernel
            of a convolution is a matrix with a row for each channel of its output.
        dtype: of the products that make them so. torch.optim.Muon has bfloat16 everywhere; a CPU without instructions
            for it takes 4.6 times as long with it.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        super().__init__(groups, {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Give AdamW its groups, and the state: to schedule, to save and to load there is one optimizer."""
        rest = [group for group in self.param_groups if "parts" not in group]
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.999), fused=True)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: a step is one gradient
        """Move the weights by their gradients."""
        self.adamw.step()
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}  # wide shape: weights, momenta, rates
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if "parts" not in group or not weights:
                continue
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for weight, momentum in zip(weights, self.nesterov(weights), strict=True):
                whole, ahead = weight.view(len(weight), -1), momentum.view(len(weight), -1)
                for part, along in zip(whole.chunk(group["parts"]), ahead.chunk(group["parts"]), strict=True):
                    rows, columns = part.shape
                    rate = group["lr"] * math.sqrt(max(1, rows / columns))
                    wide = (part.T, along.T, rate) if rows > columns else (part, along, rate)
                    alike.setdefault((min(rows, columns), max(rows, columns)), []).append(wide)
        for matrices in alike.values():
            parts, alongs, rates = zip(*matrices, strict=True)
            updates = orthogonalise(torch.stack(alongs), self.dtype).unbind()
            torch._foreach_mul_(updates, rates)
            torch._foreach_sub_(parts, updates)

    def nesterov(self, weights: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """The momentum of each weight, which its gradient is added to first, and once more ahead of its time."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return torch._foreach_lerp(gradients, momenta, MOMENTUM)


def orthogonalise(matrices: Float[Tensor, "N R C"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "N R C"]:
    """U p(S / |S|) Vᵀ of each matrix U S Vᵀ, where p is the odd polynomial of degree 5 that `COEFFICIENTS` are of, five
    times over: Newton-Schulz. It puts the singular values from 0.003 |S| up between 0.68 and 1.21.

    Args:
        matrices: in float32.
        dtype: of the products.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
