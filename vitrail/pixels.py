"""A split of a data set on the training device, as bytes, from which squares are cut.

B batch    S side of the image, in pixels
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.cache import Images


class Pixels:
    """The bytes of a split on a device, from which squares are cut.

    Args:
        images: the split; its images are at least `image_size` high and wide.
        image_size: S.
        device: where the bytes go, all of them, once.
        beside: another split over the same bytes, which are then not sent a second time.
    """

    def __init__(self, images: Images, image_size: int, device: torch.device, beside: "Pixels | None" = None) -> None:
        self.size = image_size
        self.device = device
        self.labels = torch.from_numpy(images.labels).to(device)
        self.colours: UInt8[Tensor, "pixels 3"] = (
            torch.from_numpy(images.pixels).view(-1, 3).to(device) if beside is None else beside.colours
        )
        self.begin = torch.from_numpy(images.offsets // 3).to(device)  # an image's first pixel
        self.sizes = torch.from_numpy(images.sizes).to(device)
        # Where all are of the right size already, cutting is only picking rows of one array.
        self.uniform = bool((images.sizes == image_size).all()) and not (images.offsets % (image_size**2 * 3)).any()

    def __len__(self) -> int:
        return len(self.labels)

    def cut(
        self,
        index: Int[Tensor, " B"],
        window: Float[Tensor, "B 2"],
        places: tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]] | None = None,
    ) -> UInt8[Tensor, "B 3 S S"]:
        """A square of each image of `index`; `window` says where, from 0 (top, left) to 1 (bottom, right), and
        `places` which of its rows and columns to show, if not all in their order. In memory, colours come last."""
        size = self.size
        if self.uniform and places is None:
            whole = len(self.colours) // size**2
            squares = self.colours[: whole * size**2].view(whole, size, size, 3)
            return squares[self.begin[index] // size**2].permute(0, 3, 1, 2)
        heights, widths = self.sizes[index].long().unbind(1)
        room = torch.stack([heights - size, widths - size], 1)
        top, left = (window * (room + 1)).long().minimum(room).unbind(1)
        along = torch.arange(size, device=self.device)
        rows, columns = places or (along, along)
        row = self.begin[index, None] + (top[:, None] + rows) * widths[:, None]  # (B, S): the first pixel of each
        pixel = row[:, :, None] + (left[:, None] + columns)[:, None, :]  # (B, S, S)
        return self.colours.index_select(0, pixel.flatten()).view(len(index), size, size, 3).permute(0, 3, 1, 2)
