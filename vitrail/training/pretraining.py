"""Self-supervised pre-training: a Vision Transformer learns from images without labels, by predicting what is in
patches that it does not see. `MaskedPatchPrediction` is the paper's own (section 4.6), `MaskedAutoencoder` a later one
(2111.06377); `objective` of a recipe says which. Both train an ordinary `VisionTransformer`, and share `Masks`.

    B batch    N patches    M masked ones of them    D hidden_size    E decoder_hidden_size    P patch_size
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import BadInput
from vitrail.evaluation.evaluate import Judgement
from vitrail.input.augment import normalise, send
from vitrail.input.batches import evaluation_batches, generator
from vitrail.input.pixels import Pixels
from vitrail.progress import track
from vitrail.settings import Recipe
from vitrail.vit.additions import keep_patches, rows_of
from vitrail.vit.config import ViTConfig
from vitrail.vit.model import PatchEmbedding, TransformerEncoderBlock, VisionTransformer
from vitrail.vit.models import Model
from vitrail.vit.positions import sincos_positions
from vitrail.world import ALONE, World

LEVELS = 8  # of a colour channel: 3 bits
SHARES = {"patches": 0.5, "pixels": 0.75}  # of the patches that are masked, as in the papers
TO_MASK, TO_OTHER = 0.8, 0.1  # shares of the corrupted patches (appendix B.1.2); the rest stay as they are
HEAD_WIDTH = 32  # of the decoder, as in MAE's
TARGET_EPS = 1e-6  # added to a patch's variance, as in MAE's code
BATCH = 200  # images at a time in evaluation
PICTURES = 8  # images whose reconstruction is kept for the report


@dataclass(frozen=True)
class Masks:
    """Which patches of each image are masked and have to be predicted, which are not, and what the model has in the
    place of each: the number of a patch, its own if nothing was done to it, or -1 where it has none."""

    masked: Int[Tensor, "B M"]
    visible: Int[Tensor, "B others"]
    source: Int[Tensor, "B N"]

    def part(self, rows: slice | Int[Tensor, " b"]) -> "Masks":
        """Those of some of the images."""
        return Masks(self.masked[rows], self.visible[rows], self.source[rows])

    def to(self, device: torch.device) -> "Masks":
        """The same on a device."""
        return Masks(send(self.masked, device), send(self.visible, device), send(self.source, device))


def draw_masks(recipe: Recipe, images: int, patches: int, random: torch.Generator) -> Masks:
    """Mask the recipe's share of each image's patches, the same number in all, and any of them as likely as any other.

    For `pixels` none of them is left. For `patches` (appendix B.1.2), each is by itself replaced by the [mask]
    embedding (80%) or by another patch of the same image (10%), or is left as it is (10%).
    """
    share = SHARES[recipe.objective] if recipe.mask_ratio is None else recipe.mask_ratio
    count = min(max(round(share * patches), 1), patches - 1)
    order = torch.rand(images, patches, generator=random).argsort(dim=1)
    masked, visible = order[:, :count], order[:, count:]
    instead = torch.full_like(masked, -1)
    if recipe.objective == "patches":
        fate = torch.rand(images, count, generator=random)
        others = (masked + torch.randint(1, patches, (images, count), generator=random)) % patches
        instead = torch.where(fate < TO_MASK, -1, torch.where(fate < TO_MASK + TO_OTHER, others, masked))
    source = torch.arange(patches).repeat(images, 1).scatter(1, masked, instead)
    return Masks(masked, visible, source)


class Pretraining(nn.Module):
    """A Vision Transformer, `encoder`, and what is needed beside it in pre-training alone. The head of the encoder is
    set to 0: nothing trains it."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        nn.init.zeros_(encoder.head.weight)
        nn.init.zeros_(encoder.head.bias)

    def forward(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, " B"]:
        """The loss of each image, the mean over its masked patches."""
        raise NotImplementedError

    def patchify(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N pixels"]:
        """The values of each patch, pixel by pixel, as 2111.06377's code has them too."""
        assert isinstance(self.encoder.patch_embedding, PatchEmbedding)  # Recipe sees to it
        return self.encoder.patch_embedding.patchify(images)

    def reconstruct(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B M pixels"]:
        """What the model takes the masked patches for, like the images from -1 to 1."""
        raise NotImplementedError


class MaskedPatchPrediction(Pretraining):
    """Masked patch prediction: section 4.6 and appendix B.1.2, like BERT's masked words.

    Patches are corrupted behind their embedding and before their position is added; from the encoder's output for each
    corrupted patch, a linear layer predicts its mean colour in 3 bits a channel, one of 512 classes. The loss is their
    cross-entropy, in nats. Where the text leaves it open: the other patch is one of the same image.
    """

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__(encoder)
        width = encoder.config.hidden_size
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.prediction = nn.Linear(width, LEVELS**3)
        nn.init.zeros_(self.prediction.weight)  # like the head: at first all colours are as likely
        nn.init.zeros_(self.prediction.bias)

    def forward(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, " B"]:
        """The cross-entropy of the masked patches' colours, for each image."""
        colours = mean_colours(self.patchify(images)).gather(1, masks.masked)
        logits = self.predict(images, masks)
        return F.cross_entropy(logits.transpose(1, 2), colours, reduction="none").mean(dim=1)

    def predict(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B M colours"]:
        """Logits of each masked patch's colours."""
        return self.prediction(rows_of(self.encode(images, masks), masks.masked)).float()

    def encode(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B N D"]:
        """The encoder's output for each patch of the corrupted images."""
        patches = self.encoder.embed_patches(images)
        replaced = rows_of(patches, masks.source.clamp(min=0))
        patches = torch.where(masks.source[..., None] < 0, self.mask_embedding.to(patches.dtype), replaced)
        encoded = self.encoder.forward_encoder(self.encoder.place(patches))
        return encoded[:, self.encoder.config.num_prefix_tokens :]

    def reconstruct(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B M pixels"]:
        """Patches of the most probable colour each."""
        colours = self.predict(images, masks).argmax(dim=-1)
        levels = torch.stack([colours // LEVELS**2, colours // LEVELS % LEVELS, colours % LEVELS], dim=-1)
        centres = (levels + 0.5) * (2 / LEVELS) - 1  # (B, H, 3)
        return centres.repeat_interleave(self.encoder.config.patch_size**2, dim=-1)


class MaskedAutoencoder(Pretraining):
    """Masked autoencoding (2111.06377, section 3): the encoder gets the visible patches alone; a small decoder gets its
    output, with a [mask] embedding in the place of each masked patch and fixed positions added to all, and predicts the
    pixels of the masked ones. The loss is the mean squared error of pixels that are normalised in each patch: less
    their mean, over their standard deviation.

    What differs from its code: the class token has no part in it where the head reads the mean of the patches, and
    the encoder is the model that is trained afterwards: its learnt positions, its GELU, its initial weights.
    """

    def __init__(self, encoder: VisionTransformer, recipe: Recipe) -> None:
        super().__init__(encoder)
        shape, config = decoder_config(recipe), encoder.config
        width = shape.hidden_size
        self.decoder_embedding = nn.Linear(config.hidden_size, width)
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.decoder_blocks = nn.ModuleList(
            TransformerEncoderBlock(shape, 1 + layer) for layer in range(shape.num_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, shape.layer_norm_eps)
        self.decoder_prediction = nn.Linear(width, 3 * config.patch_size**2)
        for layer in (self.decoder_embedding, *self.decoder_blocks.modules(), self.decoder_prediction):
            if isinstance(layer, nn.Linear):  # all alike, as in its code
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, " B"]:
        """The squared error of the masked patches' normalised pixels, for each image."""
        patches = rows_of(self.patchify(images), masks.masked)
        mean, deviation = moments(patches)
        return (self.predict(images, masks) - (patches - mean) / deviation).square().mean(dim=(1, 2))

    def predict(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B M pixels"]:
        """The normalised pixels of the masked patches."""
        tokens = self.decoder_embedding(self.encode(images, masks))
        front = self.encoder.config.num_prefix_tokens
        prefix, visible = tokens[:, :front], tokens[:, front:]
        masked = self.mask_embedding.to(tokens.dtype).expand(len(tokens), masks.masked.shape[1], -1)
        back = torch.cat([masks.visible, masks.masked], dim=1).argsort(dim=1)  # where each patch lies among these
        patches = rows_of(torch.cat([visible, masked], dim=1), back)
        patches = patches + sincos_positions(patches.shape[1], patches.shape[2], patches.device)
        tokens = torch.cat([prefix.to(patches.dtype), patches], dim=1)
        for block in self.decoder_blocks:
            if self.training and self.encoder.checkpoint_activations:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.decoder_prediction(rows_of(self.decoder_norm(tokens[:, front:]), masks.masked)).float()

    def encode(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B T D"]:
        """The encoder's output for what stands in front of the patches, and for the visible ones."""
        tokens = keep_patches(self.encoder.embed(images), masks.visible, self.encoder.config)
        return self.encoder.forward_encoder(tokens)

    def reconstruct(self, images: Float[Tensor, "B 3 S S"], masks: Masks) -> Float[Tensor, "B M pixels"]:
        """What was predicted, with the mean and the deviation of the true patches, which are not."""
        mean, deviation = moments(rows_of(self.patchify(images), masks.masked))
        return self.predict(images, masks) * deviation + mean


Trainee = Model | Pretraining  # what a training step can improve


def with_objective(encoder: VisionTransformer, recipe: Recipe) -> Pretraining:
    """The encoder with what the recipe's objective needs beside it."""
    return MaskedPatchPrediction(encoder) if recipe.objective == "patches" else MaskedAutoencoder(encoder, recipe)


def decoder_config(recipe: Recipe) -> ViTConfig:
    """The shape of the decoder that predicts pixels.

    Raises:
        BadInput: there can be no such decoder, or each image is a single patch.
    """
    if min(size for size in (recipe.image_size, recipe.first_size, recipe.crop_size) if size) < 2 * recipe.patch_size:
        raise BadInput(
            f"pre-training predicts patches from others, and images with patches of {recipe.patch_size} pixels are "
            "one; take a smaller patch_size or larger images."
        )
    width = recipe.decoder_hidden_size
    if width % HEAD_WIDTH:
        raise BadInput(f"decoder_hidden_size is {width}; it must be a multiple of {HEAD_WIDTH}, the width of a head.")
    return ViTConfig(
        image_size=recipe.image_size, patch_size=recipe.patch_size, hidden_size=width, mlp_dim=4 * width,
        num_heads=width // HEAD_WIDTH, num_layers=recipe.decoder_layers,
    )  # fmt: skip


def mean_colours(patches: Float[Tensor, "B N pixels"]) -> Int[Tensor, "B N"]:
    """The mean colour of each patch in 3 bits a channel, the highest of its byte's: 64 red + 8 green + blue."""
    means = patches.unflatten(2, (-1, 3)).mean(dim=2)
    # A thousandth of a byte keeps patches of one even colour from falling below it by rounding.
    levels = ((means + 1) * 127.5 + 1e-3).div(256 / LEVELS).long().clamp(0, LEVELS - 1)
    red, green, blue = levels.unbind(dim=2)
    return LEVELS**2 * red + LEVELS * green + blue


def moments(patches: Float[Tensor, "B M pixels"]) -> tuple[Float[Tensor, "B M 1"], Float[Tensor, "B M 1"]]:
    """Mean and standard deviation of each patch's pixels, all channels together, as MAE's code takes them."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + TARGET_EPS).sqrt()


# Evaluation


@torch.inference_mode()
def judge_reconstruction(
    model: Pretraining, pixels: Pixels, recipe: Recipe, world: World = ALONE, side: int | None = None
) -> Judgement:
    """The mean loss over every image of a split, of `side` pixels a side where that is said, and pictures of a few of
    them. The masks of each image hang on the seed alone, so that epochs can be compared. The processes of a `world` do
    equal parts of the work, and each returns the whole. The model is left in evaluation mode."""
    model.eval()
    patches, device = ((side or pixels.size) // recipe.patch_size) ** 2, pixels.device
    share = torch.from_numpy(world.share(len(pixels)))
    masks = draw_masks(recipe, len(pixels), patches, generator(recipe.seed, "judged masks", 0)).part(share)
    done, losses = 0, []
    with track(len(share), "evaluating", "images") as advance:
        for images, labels in evaluation_batches(pixels, BATCH, world=world, side=side):
            rows = torch.arange(done, done + len(images)).clamp(max=len(share) - 1)  # the last batch is filled up
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                losses.append(model(images, masks.part(rows).to(device))[: len(labels)].float().cpu())
            done += len(labels)
            advance(len(labels))
    loss = float(world.joined(torch.cat(losses).numpy())[: len(pixels)].mean(dtype=np.float64))
    results = {"objective": recipe.objective, "count": len(pixels), "loss": loss}
    return Judgement({"loss": loss}, results, "reconstructions", draw_pictures(model, pixels, recipe))


def draw_pictures(model: Pretraining, pixels: Pixels, recipe: Recipe) -> dict[str, Tensor]:
    """Of a few images, taken evenly from the split, what the model saw (`seen`, grey where it had nothing), what it
    made of that (`predicted`) and what they are (`original`): each uint8 (images, S, S, 3)."""
    index = torch.linspace(0, len(pixels) - 1, min(PICTURES, len(pixels)), device=pixels.device).long()
    images = normalise(pixels.cut(index, torch.full((len(index), 2), 0.5, device=pixels.device)))
    patches = model.patchify(images)
    masks = draw_masks(recipe, len(index), patches.shape[1], generator(recipe.seed, "judged masks", 1))
    masks = masks.to(pixels.device)
    seen = rows_of(patches, masks.source.clamp(min=0)) * (masks.source[..., None] >= 0)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        found = model.reconstruct(images, masks)
    predicted = patches.scatter(1, masks.masked[..., None].expand_as(found), found.float())
    drawn = {"seen": seen, "predicted": predicted, "original": patches}
    return {name: unpatchify(of, model.encoder.config.patch_size) for name, of in drawn.items()}


def unpatchify(patches: Float[Tensor, "B N pixels"], size: int) -> UInt8[Tensor, "B S S 3"]:
    """Patches put together to images of bytes."""
    side = math.isqrt(patches.shape[1])
    cells = patches.unflatten(2, (size, size, 3)).unflatten(1, (side, side))  # (B, rows, columns, P, P, 3)
    images = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()
