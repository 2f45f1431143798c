"""Where a patch lies in its image: position embeddings, learnt (the paper's) or fixed, and rotary positions. All but
the learnt are computed from the images at hand, and so are right at any size.

    B batch    T tokens    N patches    D hidden_size    H heads    K = D / H, width of a head
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.vit.config import ViTConfig

Rotation = Float[Tensor, "2 _ 1 T pairs"]  # cosines and sines of each token's angles, of each image or of all

SINCOS_BASE = 10_000.0  # MoCo v3's
ROTARY_BASE = 100.0  # RoPE-ViT's: grids are shorter than texts, which take 10,000


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


def rotary_positions(
    config: ViTConfig, tokens: Float[Tensor, "B T D"], places: Int[Tensor, "_ N 2"] | None = None
) -> Rotation | None:
    """What `apply_rotary` takes to turn the patches among these tokens, and not what stands in front of them; None
    where the config has positions of another kind. Half of a head's pairs of channels turn with the row, half with the
    column: axial, as in 2403.13298.

    Args:
        config: of the model.
        tokens: what it goes on with.
        places: rows and columns of the patches, where they are not all of a square image's.
    """
    if config.positions != "rotary":
        return None
    if places is None:
        places = grid(tokens.shape[1] - config.num_prefix_tokens, tokens.device)[None]
    quarter = config.hidden_size // config.num_heads // 4
    frequencies = ROTARY_BASE ** -(torch.arange(quarter, device=tokens.device) / quarter)
    angles = (places[..., None] * frequencies).flatten(-2)  # (B or 1, N, K / 2)
    angles = F.pad(angles, (0, 0, config.num_prefix_tokens, 0))
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def apply_rotary(x: Float[Tensor, "B H T K"], rotation: Float[Tensor, "2 _ 1 _ pairs"]) -> Float[Tensor, "B H T K"]:
    """Queries or keys with their positions (2104.09864, section 3.4): each pair of neighbouring channels is turned by
    an angle of its token's, so that scores depend on how far apart two patches are, not on where they are."""
    cos, sin = rotation[..., : x.shape[2], :]  # queries may be those of the first tokens alone
    pairs = x.unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # A complex product goes through memory once, which takes a tenth of the time of the real ones below.
        turned = torch.view_as_real(torch.view_as_complex(pairs.float()) * torch.complex(cos, sin))
    else:
        first, second = pairs.unbind(-1)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
