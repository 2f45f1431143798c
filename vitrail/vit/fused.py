"""Two steps of the model as one where a CPU's library has them as one."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def linear_gelu(x: Float[Tensor, "*tokens D"], linear: nn.Linear, approximate: str) -> Float[Tensor, "*tokens F"]:
    """GELU(linear(x)), `approximate` as `torch.nn.functional.gelu` has it.

    In inference on a CPU by oneDNN's product that applies GELU as it writes: torch's own reads and writes all of it
    once more, and takes most of its time for tanh. With gradients by torch's two, for these need what is between.
    """
    # What hangs on the module or stands in its place is not to be passed by: hooks, adapters, quantisation.
    plain = type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not plain or x.device.type != "cpu" or torch.is_grad_enabled() or not has_product_with_gelu(dtype):
        return F.gelu(linear(x), approximate=approximate)
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
