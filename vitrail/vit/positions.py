"""Where a patch lies in its image: learnt position embeddings (the paper's), and the fixed ones of masked
autoencoding's decoder.

    T tokens    N patches    D hidden_size
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

SINCOS_BASE = 10_000.0  # MoCo v3's


def resize_position_embedding(
    embedding: Float[Tensor, "1 T D"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 new_T D"]:
    """Position embeddings for another image size (section 3.2): the grid bilinearly, corners aligned, as the official
    code does (checkpoint.py, SciPy's zoom of order 1); the class token's, where there is one, stays."""
    extra = embedding.shape[1] - grid[0] * grid[1]  # 1 with a class token, else 0
    cells = embedding[:, extra:].unflatten(1, grid)  # (1, rows, columns, D)
    down, across = (
        linear_interpolation(old, new, embedding) for old, new in zip(grid, new_grid, strict=True)
    )  # fmt: skip
    # As matrix products: F.interpolate adds up its gradient in no fixed order on CUDA.
    with torch.autocast(embedding.device.type, enabled=False):
        cells = torch.einsum("ir, jc, brcd -> bijd", down, across, cells)
    return torch.cat([embedding[:, :extra], cells.flatten(1, 2)], dim=1)


def linear_interpolation(old: int, new: int, like: Tensor) -> Float[Tensor, "new old"]:
    """What each of `new` points, spread evenly from the first of `old` to the last, takes from each of these."""
    at = torch.linspace(0, old - 1, new, dtype=torch.float64, device="cpu")
    shares = 1 - (at[:, None] - torch.arange(old, device="cpu")).abs()
    return shares.clamp(min=0).to(like)


def grid(patches: int, device: torch.device) -> Int[Tensor, "N 2"]:
    """Row and column of each patch of a square image."""
    side = math.isqrt(patches)
    number = torch.arange(patches, device=device)
    return torch.stack([number // side, number % side], dim=-1)


def sincos_positions(patches: int, width: int, device: torch.device) -> Float[Tensor, "N D"]:
    """Fixed position embeddings of a square image's patches: sine and cosine of the column, then of the row, at
    wavelengths from 2 π to 20,000 π patches (2205.01580, section 3.3: the code that it names)."""
    frequencies = SINCOS_BASE ** -torch.linspace(0, 1, width // 4, device=device)
    rows, columns = (grid(patches, device)[..., None] * frequencies).unbind(1)  # (N, D / 4) each
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
