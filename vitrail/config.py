"""The shape of a Vision Transformer."""

from dataclasses import dataclass
from typing import Literal

from vitrail.errors import BadInput
from vitrail.resnet import stride

MOST = 1 << 17
MOST_LAYERS = 1000


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a Vision Transformer. The defaults are ViT-B/16 as pre-trained on ImageNet.

    Raises:
        BadInput: a size does not divide as it must; the message says which sizes would do.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    num_classes: int = 1000
    classifier: Literal["token", "gap"] = "token"
    representation_size: int | None = None
    dropout: float = 0.0
    resnet_blocks: tuple[int, ...] | None = None  # the hybrid's: bottlenecks of each stage, () for the bare root

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers", "num_classes"):
            if getattr(self, name) < 1:
                raise BadInput(f"a model with {name} = {getattr(self, name)} cannot be; it must be at least 1.")
            if getattr(self, name) > MOST:  # a mistake, or a file that would have us take a terabyte
                raise BadInput(f"a model with {name} = {getattr(self, name)} cannot be; it must be at most {MOST:,}.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is {self.dropout}; it must be at least 0 and below 1.")
        if self.num_layers > MOST_LAYERS or sum(self.resnet_blocks or ()) > MOST_LAYERS:
            raise BadInput(f"a model of more than {MOST_LAYERS:,} layers cannot be.")
        if any(count < 1 for count in self.resnet_blocks or ()):
            raise BadInput(f"a ResNet with stages of {self.resnet_blocks} cannot be; each must have a block at least.")
        if self.image_size % self.cell:
            below = self.image_size - self.image_size % self.cell
            sizes = " or ".join(str(size) for size in (below, below + self.cell) if size)
            others = f", or patches of {divisors(self.image_size)}" if self.resnet_blocks is None else ""
            raise BadInput(
                f"images of {self.image_size} pixels do not divide into patches of {self.cell}: "
                f"take images of {sizes}{others}."
            )
        if self.hidden_size % self.num_heads:
            heads = divisors(self.hidden_size)
            raise BadInput(f"{self.num_heads} heads do not divide a width of {self.hidden_size}: take {heads} heads.")

    @property
    def cell(self) -> int:
        """Side of what one token sees of the image, in pixels. The hybrid's patches are cut from a feature map."""
        return self.patch_size * (1 if self.resnet_blocks is None else stride(self.resnet_blocks))

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.cell

    @property
    def num_tokens(self) -> int:
        """T, the length of the sequence: every patch, and the class token where there is one."""
        return self.grid**2 + (self.classifier == "token")


def divisors(number: int) -> str:
    """`1, 2, 4` for 4."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
