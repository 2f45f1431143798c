"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929), as its official JAX code computes it.

Read it from the bottom up: `VisionTransformer` is the paper's section 3.1, each class above it one of its parts.

    B batch    T tokens (patches, and the class token)    D hidden_size    F mlp_dim
    H heads    K = D / H, width of a head                 P patch_size     C classes

Where the paper's text, the official code and other implementations differ, this follows the official code: GELU by
its tanh approximation, LayerNorm with an epsilon of 1e-6 (both unless the weights come from elsewhere), dropout after
the position embeddings, after attention and after each layer of the MLP, and the initial weights of
`VisionTransformer.initialise`.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.config import Gelu, ViTConfig
from vitrail.errors import BadInput
from vitrail.resnet import ResNet, lecun_normal_, out_channels

LAYER_NORM_EPS = ViTConfig.layer_norm_eps  # the official code's
# On a CPU the backward pass of torch's fused attention is slower than plain matrix products up to here (docs/speed.md).
# They need memory for the (T, T) matrices, so that long sequences, inference and GPUs are left to the fused kernel.
PLAIN_ATTENTION_TOKENS = 256


class Dropout(nn.Module):
    """Zeroes each activation with probability `rate` in training and scales up the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        # A CPU draws its noise one number after another, which made F.dropout a third of a whole training step.
        # Sixteen bits are enough to decide, so that one 64-bit draw decides for four activations.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        noise = draws.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.rate * 2**16), 2**16 - 1)
        return x * (noise >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))


class PatchEmbedding(nn.Module):
    """Image → patches → linear projection: the x_p E of equation 1.

    A convolution whose stride is its kernel is that projection; its weight has the official code's layout, transposed.
    """

    def __init__(self, patch_size: int, hidden_size: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B patches D"]:
        return F.linear(self.patchify(images), self.projection.weight.flatten(1), self.projection.bias)

    def patchify(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B patches pixels"]:
        """Cut images into patches, row by row; a patch's pixels are flattened channel first."""
        batch, channels, height, width = images.shape
        size = self.patch_size
        cells = images.reshape(batch, channels, height // size, size, width // size, size)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, rows · columns, channels · P · P)


class Attention(nn.Module):
    """Multi-head self-attention: equations 5 to 8 (appendix A), the MSA of equation 2.

    Query, key and value come from one matrix product; rows 0 to D of its weight make the queries, the next D the
    keys, the last D the values.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B T D"], wanted: int | None = None) -> Float[Tensor, "B wanted D"]:
        """What the first `wanted` tokens, or all, take from all."""
        q, k, v = self.project(x, wanted)
        if x.device.type == "cpu" and torch.is_grad_enabled() and x.shape[1] <= PLAIN_ATTENTION_TOKENS:
            heads = self.softmax(q, k) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, H, wanted, K) → (B, wanted, D)

    def weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T T"]:
        """How much each token (row) takes from each other (column): equation 6. Each row adds up to 1."""
        q, k, _ = self.project(x)
        return self.softmax(q, k)

    def project(self, x: Float[Tensor, "B T D"], wanted: int | None = None) -> tuple[Float[Tensor, "B H _ K"], ...]:
        """Queries of the first `wanted` tokens, or all, and keys and values of all, of every head: equation 5."""
        width = x.shape[-1]
        if wanted is None:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            q_weight, kv_weight = self.qkv.weight.split([width, 2 * width])
            q_bias, kv_bias = self.qkv.bias.split([width, 2 * width])
            parts = F.linear(x[:, :wanted], q_weight, q_bias), *F.linear(x, kv_weight, kv_bias).chunk(2, dim=-1)
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    @staticmethod
    def softmax(q: Float[Tensor, "B H Q K"], k: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H Q T"]:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)


class MLP(nn.Module):
    """Two layers with a GELU between them: the MLP of equation 3."""

    def __init__(self, hidden_size: int, mlp_dim: int, dropout: float, gelu: Gelu) -> None:
        super().__init__()
        self.approximate = "tanh" if gelu == "tanh" else "none"  # what torch calls it
        self.hidden = nn.Linear(hidden_size, mlp_dim)
        self.out = nn.Linear(mlp_dim, hidden_size)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        hidden = self.dropout(F.gelu(self.hidden(x), approximate=self.approximate))  # (B, T, F)
        return self.dropout(self.out(hidden))


class TransformerEncoderBlock(nn.Module):
    """One layer of the encoder: equations 2 and 3, each with its residual."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_dim, config.dropout, config.gelu)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T D"], wanted: int | None = None) -> Float[Tensor, "B wanted D"]:
        """The first `wanted` tokens of the block's output, or all."""
        x = x[:, :wanted] + self.dropout(self.attention(self.attention_norm(x), wanted))
        return x + self.mlp(self.mlp_norm(x))

    def attention_weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T T"]:
        """The attention that this block pays, given its input."""
        return self.attention.weights(self.attention_norm(x))


class VisionTransformer(nn.Module):
    """Section 3.1: patches and a class token go through L encoder blocks; a head reads the class from the result.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        # Keep only what enters each block, and compute the rest again in the backward pass: less memory, more time.
        self.checkpoint_activations = False
        width = config.hidden_size
        blocks = config.resnet_blocks
        self.resnet = ResNet(blocks) if blocks is not None else None
        self.patch_embedding = PatchEmbedding(config.patch_size, width, 3 if blocks is None else out_channels(blocks))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.classifier == "token" else None
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerEncoderBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.pre_logits = nn.Linear(width, config.representation_size) if config.representation_size else None
        self.head = nn.Linear(config.representation_size or width, config.num_classes)
        self.initialise()

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B C"]:
        """Logits of normalised images.

        Raises:
            BadInput: the images are not of the shape that the model was made for.
        """
        # A head that reads the class token leaves the last block's other outputs unread: they are not computed, which
        # spares 14% of the work of 6 layers, 7% of 12 (docs/speed.md).
        read = 1 if self.config.classifier == "token" else None
        return self.forward_head(self.forward_encoder(self.embed(images), read))

    def embed(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B T D"]:
        """z_0 of equation 1: projected patches behind the class token, each with its position embedding."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            mend = "resize them, or load the model with image_size=… to resize its position embeddings"
            if images.shape[1] != 3:
                mend = "repeat a grey channel three times, or drop transparency"
            shape = tuple(images.shape)
            raise BadInput(f"the model takes images of shape (batch, 3, {size}, {size}), not {shape}: {mend}.")
        # The hybrid cuts its patches out of a ResNet's feature map instead of the image (section 3.1).
        tokens = self.patch_embedding(images if self.resnet is None else self.resnet(images))
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.dropout(tokens + self.position_embedding)

    def forward_encoder(self, tokens: Float[Tensor, "B T D"], wanted: int | None = None) -> Float[Tensor, "B wanted D"]:
        """z_0 → z_L, equations 2 and 3, and the LayerNorm of equation 4; of the first `wanted` tokens, or all."""
        for layer, block in enumerate(self.blocks, start=1):
            tokens = self.run(block, tokens, wanted if layer == len(self.blocks) else None)
        return self.norm(tokens)

    def run(self, block: nn.Module, tokens: Float[Tensor, "B T D"], wanted: int | None) -> Float[Tensor, "B wanted D"]:
        """A block's output; with `checkpoint_activations`, only its input is kept for the backward pass."""
        if self.training and self.checkpoint_activations:
            return checkpoint(block, tokens, wanted, use_reentrant=False)
        return block(tokens, wanted)

    def forward_head(self, encoded: Float[Tensor, "B T D"]) -> Float[Tensor, "B C"]:
        """y of equation 4, from the class token or the mean of all tokens, and the classification head. A head that
        reads the class token needs no others in `encoded`."""
        y = encoded[:, 0] if self.config.classifier == "token" else encoded.mean(dim=1)
        if self.pre_logits is not None:
            y = torch.tanh(self.pre_logits(y))
        return self.head(y)

    def attention(
        self, images: Float[Tensor, "B channels height width"], layers: Collection[int] | None = None
    ) -> dict[int, Float[Tensor, "B H T T"]]:
        """Attention weights by layer (from 0), computed explicitly for the layers asked for; all of them if None.

        Raises:
            BadInput: there is no such layer, or the images are of another shape than the model's.
        """
        wanted = set(range(len(self.blocks)) if layers is None else layers)
        if missing := wanted - set(range(len(self.blocks))):
            raise BadInput(f"the model has layers 0 to {len(self.blocks) - 1}, and no layer {min(missing)}.")
        found = {}
        tokens = self.embed(images)
        for layer, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            if layer in wanted:
                assert isinstance(block, TransformerEncoderBlock)  # for the type checker: a ModuleList forgets
                found[layer] = block.attention_weights(tokens)
            tokens = block(tokens)
        return found

    @torch.no_grad()
    def resize(self, image_size: int) -> None:
        """Make the model one for images of another size, as fine-tuning at a higher resolution does (section 3.2).

        Raises:
            BadInput: the size is no multiple of the patch size.
        """
        config = replace(self.config, image_size=image_size)
        grids = (self.config.grid, self.config.grid), (config.grid, config.grid)
        self.position_embedding = nn.Parameter(resize_position_embedding(self.position_embedding, *grids))
        self.config = config

    @torch.no_grad()
    def initialise(self) -> None:
        """Initial weights as in the official code (models_vit.py): all of them are set here and nowhere else.

        Xavier uniform for every matrix of the blocks, MLP biases N(0, 1e-6), position embeddings N(0, 0.02), LeCun
        normal for the patch embedding and the representation layer, zero for the head, the class token and the rest
        of the biases: a new model gives each class the same probability.
        """
        lecun_normal_(self.patch_embedding.projection)
        if self.resnet is not None:
            self.resnet.initialise()
        nn.init.normal_(self.position_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, Attention):
                # q, k and v are a matrix each: drawn as one (3D, D) matrix, their range would be 0.71 of this.
                for matrix in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(matrix)
                nn.init.zeros_(module.qkv.bias)
                nn.init.xavier_uniform_(module.out.weight)
                nn.init.zeros_(module.out.bias)
            elif isinstance(module, MLP):
                for layer in (module.hidden, module.out):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.normal_(layer.bias, std=1e-6)
        if self.pre_logits is not None:
            lecun_normal_(self.pre_logits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def resize_position_embedding(
    embedding: Float[Tensor, "1 T D"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 new_T D"]:
    """Position embeddings for another image size (section 3.2): the grid bilinearly, corners aligned, as the official
    code does (checkpoint.py, SciPy's zoom of order 1); the class token's, where there is one, stays."""
    extra = embedding.shape[1] - grid[0] * grid[1]  # 1 with a class token, else 0
    cells = embedding[:, extra:].reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    cells = F.interpolate(cells, new_grid, mode="bilinear", align_corners=True)
    return torch.cat([embedding[:, :extra], cells.flatten(2).transpose(1, 2)], dim=1)
