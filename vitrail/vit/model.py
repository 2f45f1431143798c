"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929), as its official JAX code computes it.

Read it from the bottom up: `VisionTransformer` is the paper's section 3.1, each class above it one of its parts.

    B batch    T tokens (patches, and the class token)    D hidden_size    F mlp_dim
    H heads    K = D / H, width of a head                 P patch_size     C classes

Where the paper's text, the official code and other implementations differ, this follows the official code: GELU by
its tanh approximation, LayerNorm with an epsilon of 1e-6 (both unless the weights come from elsewhere), dropout after
the position embeddings, after attention and after each layer of the MLP, and the initial weights of
`VisionTransformer.initialise`. What later papers add is in `additions.py`, and off unless the config asks for it.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import BadInput, wrong_shape
from vitrail.vit.additions import ConvolutionalStem, ResidualScale, drop_patches
from vitrail.vit.config import Gelu, ViTConfig
from vitrail.vit.fused import attend, attends_by_products, gradients_may_be_custom, linear_gelu
from vitrail.vit.positions import resize_position_embedding
from vitrail.vit.resnet import ResNet, lecun_normal_, out_channels


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

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = size = config.patch_size
        channels = 3 if config.resnet_blocks is None else out_channels(config.resnet_blocks)
        self.projection = nn.Conv2d(channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B patches D"]:
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # in the order of a patch's values
        return F.linear(self.patchify(images), weight, self.projection.bias)

    def patchify(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B patches values"]:
        """x_p: images cut into patches, row by row; of a patch, the P² · C values pixel by pixel, as batches have them
        in memory."""
        batch, channels, height, width = images.shape
        size = self.patch_size
        cells = images.permute(0, 2, 3, 1).reshape(batch, height // size, size, width // size, size, channels)
        return cells.transpose(2, 3).flatten(3).flatten(1, 2)


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
        by_products = attends_by_products(x)
        if by_products and wanted is None and gradients_may_be_custom():
            return self.out(attend(self.qkv(x), self.num_heads))  # what follows, with fewer copies
        q, k, v = self.project(x, wanted)
        heads = self.softmax(q, k) @ v if by_products else F.scaled_dot_product_attention(q, k, v)
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
            (q_weight, kv_weight), (q_bias, kv_bias) = (p.split([width, 2 * width]) for p in self.qkv.parameters())
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
        hidden = self.dropout(linear_gelu(x, self.hidden, self.approximate))  # (B, T, F)
        return self.dropout(self.out(hidden))


class TransformerEncoderBlock(nn.Module):
    """One layer of the encoder, the `layer`-th from 1: equations 2 and 3, each with its residual."""

    def __init__(self, config: ViTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.attention_scale = ResidualScale(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_dim, config.dropout, config.gelu)
        self.mlp_scale = ResidualScale(config, layer)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T D"], wanted: int | None = None) -> Float[Tensor, "B wanted D"]:
        """The first `wanted` tokens of the block's output, or all."""
        x = x[:, :wanted] + self.attention_scale(self.dropout(self.attention(self.attention_norm(x), wanted)))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


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
        self.accepts_smaller = False  # images in evaluation too, and not in training alone
        width = config.hidden_size
        self.resnet = ResNet(config.resnet_blocks) if config.resnet_blocks is not None else None
        self.patch_embedding: PatchEmbedding | ConvolutionalStem = (
            PatchEmbedding(config) if config.stem == "patch" else ConvolutionalStem(config)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.classifier == "token" else None
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerEncoderBlock(config, 1 + n) for n in range(config.num_layers))
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
        tokens = self.embed(images)
        if self.training and self.config.patch_dropout:
            tokens = drop_patches(tokens, self.config)
        return self.forward_head(self.forward_encoder(tokens, read))

    def embed(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B T D"]:
        """z_0 of equation 1: projected patches behind the class token, each with its position embedding."""
        return self.place(self.embed_patches(images))

    def embed_patches(self, images: Float[Tensor, "B channels height width"]) -> Float[Tensor, "B N D"]:
        """x_p E of equation 1, for N patches. In training, and where the model `accepts_smaller`, images may be
        smaller squares of whole patches.

        Raises:
            BadInput: the images are not of the shape that the model was made for.
        """
        size, cell = self.config.image_size, self.config.cell
        side = images.shape[-1]
        smaller = images.shape[1:] == (3, side, side) and side in range(cell, size, cell)
        smaller = smaller and (self.training or self.accepts_smaller)
        if images.shape[1:] != (3, size, size) and not smaller:
            mend = "resize them, or load the model with image_size=… to resize its position embeddings"
            raise wrong_shape(size, images.shape, mend)
        # The hybrid cuts its patches out of a ResNet's feature map instead of the image (section 3.1).
        return self.patch_embedding(images if self.resnet is None else self.resnet(images))

    def place(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B T D"]:
        """z_0 of embedded patches. Position embeddings are resized each time where the patches are those of images
        smaller than the model's: shrunk ones, or squares cut out."""
        side = math.isqrt(tokens.shape[1])
        positions: Tensor = self.position_embedding
        if side != self.config.grid:
            positions = resize_position_embedding(positions, 2 * (self.config.grid,), 2 * (side,))
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.dropout((tokens + positions).to(self.norm.weight.dtype))  # residuals are not summed in bf16

    def forward_encoder(self, tokens: Float[Tensor, "B T D"], wanted: int | None = None) -> Float[Tensor, "B wanted D"]:
        """z_0 → z_L, equations 2 and 3, and the LayerNorm of equation 4; of the first `wanted` tokens, or all."""
        for layer, block in enumerate(self.blocks, start=1):
            asked = wanted if layer == len(self.blocks) else None
            if self.training and self.checkpoint_activations:
                tokens = checkpoint(block, tokens, asked, use_reentrant=False)
            else:
                tokens = block(tokens, asked)
        return self.norm(tokens)

    def forward_head(self, encoded: Float[Tensor, "B T D"]) -> Float[Tensor, "B C"]:
        """y of equation 4, from the class token or the mean of all patches, and the classification head. A head that
        reads the class token needs no others in `encoded`."""
        patches = encoded[:, self.config.num_prefix_tokens :]
        y = encoded[:, 0] if self.config.classifier == "token" else patches.mean(dim=1)
        if self.pre_logits is not None:
            y = torch.tanh(self.pre_logits(y))
        return self.head(y)

    def attention(
        self, images: Float[Tensor, "B channels height width"], layers: int | Collection[int] | None = None
    ) -> dict[int, Float[Tensor, "B H T T"]]:
        """As `vitrail.attention` (explain.py), but of all images at once, with gradients, and with dropout and
        BatchNorm as in training while the model is in training mode."""
        each = self.each_block(images, layers)
        return {n: block.attention.weights(block.attention_norm(z)) for n, block, z in each}

    def each_block(
        self, images: Float[Tensor, "B channels height width"], layers: int | Collection[int] | None = None
    ) -> Iterator[tuple[int, TransformerEncoderBlock, Float[Tensor, "B T D"]]]:
        """The blocks of these layers one by one, and what enters each. Nothing behind the last of them is computed."""
        wanted = {layers} if isinstance(layers, int) else set(range(len(self.blocks)) if layers is None else layers)
        if missing := wanted - set(range(len(self.blocks))):
            raise BadInput(f"the model has layers 0 to {len(self.blocks) - 1}, and no layer {min(missing)}.")
        tokens, last = self.embed(images), max(wanted, default=-1)
        for layer, block in enumerate(self.blocks[: last + 1]):
            if layer in wanted:
                assert isinstance(block, TransformerEncoderBlock)  # for the type checker: a ModuleList forgets
                yield layer, block, tokens
            if layer < last:
                tokens = block(tokens)

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
        """Initial weights as in the official code (models_vit.py). All of them are set here; a recipe that wants others
        changes some afterwards (`additions.initialise_as_torch`, `additions.zero_residuals`).

        Xavier uniform for every matrix of the blocks, MLP biases N(0, 1e-6), position embeddings N(0, 0.02), LeCun
        normal for the patch embedding and the representation layer, zero for the head, the class token and the rest
        of the biases: a new model gives each class the same probability.
        """
        if self.head.weight.is_meta:  # nothing to draw, and torch would import its compiler to pretend: a second
            return
        for part in self.patch_embedding.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                lecun_normal_(part)
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
