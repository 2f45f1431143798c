"""Steps of the model as a CPU computes them fastest: the same functions, in fewer passes over memory.

Letters are model.py's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from vitrail.progress import say

# On a CPU torch's fused attention is slower than plain matrix products, which need memory for (T, T) matrices, up to
# here: backward, and in bf16 forward too (docs/log.md).
PLAIN_ATTENTION_TOKENS = 256
# Activations from which it is worth some seconds, once, to have torch's compiler write a kernel for them (docs/log.md).
WORTH_A_KERNEL = 1 << 22
# False has torch's own operators compute everything: slower, and second derivatives, batches of gradients and forward
# mode are to be had.
CUSTOM_GRADIENTS = True
# 2 u of GELU's approximation x σ(2 u), u = √(2 / π) (x + 0.044715 x³) (1606.08415, section 2): its coefficients.
LINEAR, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


def multiplied_in(x: Float[Tensor, "*shape"]) -> torch.dtype:
    """The type in which layers multiply what lies on a CPU: autocast's where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def attends_by_products(x: Float[Tensor, "B T D"]) -> bool:
    """Whether attention among these tokens is faster by plain matrix products than by torch's fused kernel."""
    slow = x.device.type == "cpu" and (torch.is_grad_enabled() or multiplied_in(x) == torch.bfloat16)
    return slow and x.shape[1] <= PLAIN_ATTENTION_TOKENS


def attend(qkv: Float[Tensor, "B T width"], num_heads: int) -> Float[Tensor, "B T D"]:
    """What all tokens take from all, by plain matrix products: equations 6 to 8 before the last projection, from
    queries, keys and values side by side (width 3 D). Where `gradients_may_be_custom`, for its gradient is.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    heads: Tensor = SelfAttention.apply(qkv, num_heads)  # type: ignore[no-untyped-call]
    return heads


class SelfAttention(torch.autograd.Function):
    """Queries, keys and values are brought into the layout of matrix products by one copy, and their gradients back by
    one, where torch's operators, one by one, take a copy for each, and another to lay gradients side by side."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:  # noqa: D102
        batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        apart = qkv.new_empty(3, batch, num_heads, tokens, width // num_heads)
        apart.copy_(qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4))
        q, k, v = apart.flatten(1, 2)  # (B · H, T, K) each
        q.mul_(q.shape[-1] ** -0.5)
        weights = torch.softmax(q @ k.mT, dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return (weights @ v).unflatten(0, (batch, num_heads)).transpose(1, 2).reshape(batch, tokens, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        first_derivatives_only()
        q, k, v, weights = ctx.saved_tensors
        batch, heads, head_width = gradient.shape[0], gradient.shape[2] // q.shape[-1], q.shape[-1]
        with torch.autocast("cpu", enabled=False):  # all are of one type already
            gradient = gradient.unflatten(-1, (heads, -1)).transpose(1, 2).reshape(q.shape)
            scores = torch.ops.aten._softmax_backward_data(gradient @ v.mT, weights, -1, weights.dtype)
            apart = q.new_empty(3, *q.shape)
            torch.bmm(scores, k, out=apart[0]).mul_(head_width**-0.5)
            torch.bmm(scores.mT, q, out=apart[1])  # q has the factor already
            torch.bmm(weights.mT, gradient, out=apart[2])
        return apart.unflatten(1, (batch, heads)).permute(1, 3, 0, 2, 4).flatten(2), None


def linear_gelu(x: Float[Tensor, "*tokens D"], linear: nn.Linear, approximate: str) -> Float[Tensor, "*tokens F"]:
    """GELU(linear(x)), `approximate` as `torch.nn.functional.gelu` has it.

    In inference on a CPU by oneDNN's product that applies GELU as it writes: torch's own reads and writes all of it
    once more, and takes most of its time for tanh. With gradients, which need what is between the two, see `gelu`.
    """
    # What hangs on the module or stands in its place is not to be passed by: hooks, adapters, quantisation.
    plain = type(linear) is nn.Linear and type(linear.weight) in (Tensor, nn.Parameter)
    plain = plain and not linear._forward_hooks and not linear._forward_pre_hooks
    dtype = multiplied_in(x)
    if not plain or x.device.type != "cpu" or torch.is_grad_enabled() or not has_product_with_gelu(dtype):
        return gelu(linear(x), approximate)
    assert linear.bias is not None  # as everywhere in the model
    weight, bias = linear.weight.to(dtype), linear.bias.to(dtype)
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "gelu", [], approximate)
    return fused


def has_product_with_gelu(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, and that has this type here. Torch's compiler fuses by itself."""
    if torch.compiler.is_compiling() or not (
        torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    ):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def operations(x: torch.Size, weight: torch.Size, *others: Any, **more: Any) -> int:
    """Of the product, as torch counts those of others: 2 for each multiply-add."""
    return 2 * math.prod(x) * weight[0]


if torch.backends.mkldnn.is_available():
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(operations)


def gelu(x: Float[Tensor, "*shape"], approximate: str) -> Float[Tensor, "*shape"]:
    """GELU, `approximate` as `torch.nn.functional.gelu` has it: that itself, or, where it is the approximation, with
    gradients, of many activations on a CPU, by a kernel that is compiled for it."""
    asked = approximate == "tanh" and x.device.type == "cpu" and x.requires_grad and x.numel() >= WORTH_A_KERNEL
    if asked and x.dtype in (torch.float32, torch.bfloat16) and gradients_may_be_custom():
        kernel = compiled_gelu(x.dtype)
        if kernel is not None:
            found: Tensor = TanhGelu.apply(x, kernel)  # type: ignore[no-untyped-call]
            return found
    return F.gelu(x, approximate=approximate)


class TanhGelu(torch.autograd.Function):
    """Its derivative is worked out with its value, for both have the tanh, and kept instead of the activation: torch's
    own computes that anew for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:  # noqa: D102
        value, derivative = kernel(x.reshape(-1))
        ctx.save_for_backward(derivative)
        return value.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        first_derivatives_only()
        (derivative,) = ctx.saved_tensors
        return gradient * derivative.view(gradient.shape), None


def gelu_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU's approximation of each activation and its derivative there, computed in float32 and rounded once."""
    wide = x.float()
    share = torch.sigmoid(wide * (LINEAR + CUBIC * wide * wide))
    value = wide * share
    derivative = share + value * (1 - share) * (LINEAR + 3 * CUBIC * wide * wide)
    return value.to(x.dtype), derivative.to(x.dtype)


@functools.cache
def compiled_gelu(dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """`gelu_and_derivative` as one pass over memory; None, said once, where it cannot be compiled."""
    # Many, for the compiler writes a loop for one thread for a few; without gradients, as `TanhGelu` calls it.
    activations = torch.ones(1 << 22, dtype=dtype)
    for last in (False, True):  # twice: Ctrl-C, which lets a run end its step, ends the C++ compiler at once
        try:
            kernel = torch.compile(gelu_and_derivative, dynamic=True, fullgraph=True)
            with torch.no_grad():
                kernel(activations)
        except Exception as error:  # of many kinds: no C++ compiler, a folder that cannot be written, a Python too new
            if last:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                say(f"GELU takes twice its time, for torch could not compile a kernel for it here: {why}")
        else:
            return kernel
    return None


def gradients_may_be_custom() -> bool:
    """Whether functions that bring their own gradient may be used: they are for first derivatives in reverse, and what
    looks through functions, torch's compiler, its transforms and its modes, knows torch's own operators only."""
    looked_through = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )
    return CUSTOM_GRADIENTS and not looked_through


def first_derivatives_only() -> None:
    """Stop a backward pass that is to be differentiated itself, or that is of many gradients at once.

    Raises:
        RuntimeError: it is.
    """
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "on a CPU, attention and GELU have first derivatives only, one at a time. Set "
            "vitrail.vit.fused.CUSTOM_GRADIENTS = False before the forward pass for others."
        )
