"""A split of a data set for the training device, as bytes, from which squares are cut.

B batch    S side of the image, in pixels
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.data.cache import Images, Split
from vitrail.input.augment import Places, send

FREE = 0.5  # of a GPU's free memory, what images may take; the rest is for what training them takes


class Pixels:
    """The bytes of a split on a device, from which squares are cut.

    Args:
        images: the split; its images are at least `image_size` high and wide.
        image_size: S.
        device: where the bytes go, all of them, once.
        beside: another split over the same bytes, which are then not sent a second time.
    """

    def __init__(self, images: Images, image_size: int, device: torch.device, beside: "Pixels | None" = None) -> None:
        self._take(images, image_size, device)
        if device.type != "cpu":
            self.ahead = 0
        self.colours: UInt8[Tensor, "pixels 3"] = (
            torch.from_numpy(images.pixels).view(-1, 3).to(device) if beside is None else beside.colours
        )
        self.begin = torch.from_numpy(images.offsets // 3).to(device)  # an image's first pixel
        self.sizes = torch.from_numpy(images.sizes).to(device)
        # Where all are of the right size already, cutting is only picking rows of one array.
        self.uniform = bool((images.sizes == image_size).all()) and not (images.offsets % (image_size**2 * 3)).any()

    def _take(self, images: Split, image_size: int, device: torch.device) -> None:
        self.images = images
        self.size = image_size
        self.device = device
        self.ahead = images.ahead  # how many images `read_ahead` is of use for
        self.labels = torch.from_numpy(images.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def read_ahead(self, cuts: Sequence[Int[Tensor, " _"]]) -> None:
        """Prepare for the next cuts: the images that each of them will ask for."""
        self.images.expect([number for index in cuts for number in dict.fromkeys(index.tolist())])

    def cut(
        self, index: Int[Tensor, " B"], window: Float[Tensor, "B 2"], places: Places | None = None
    ) -> UInt8[Tensor, "B 3 S S"]:
        """A square of each image of `index`; `window` says where, from 0 (top, left) to 1 (bottom, right), and
        `places` which of its rows and columns to show, if not all in their order. In memory, colours come last.
        `index` and `window` may be on the processor, `places` are on the device."""
        size = self.size
        index, window = send(index, self.device), send(window, self.device)
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


class HostPixels(Pixels):
    """A split that stays where it is, in files or mapped from one: squares are cut by the processor, and they alone are
    sent to the device. They are those that `Pixels` cuts."""

    def __init__(self, images: Split, image_size: int, device: torch.device) -> None:
        self._take(images, image_size, device)

    def cut(
        self, index: Int[Tensor, " B"], window: Float[Tensor, "B 2"], places: Places | None = None
    ) -> UInt8[Tensor, "B 3 S S"]:
        """As of `Pixels`."""
        size, numbers, windows = self.size, index.tolist(), window.cpu().numpy()
        squares = torch.empty(len(numbers), size, size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        shown, copies = squares.numpy(), dict[int, list[int]]()
        for row, number in enumerate(numbers):
            copies.setdefault(number, []).append(row)
        for rows, image in zip(copies.values(), self.images.read(list(copies)), strict=True):
            room = np.array(image.shape[:2]) - size
            for row in rows:  # in float32, as on the device
                top, left = np.minimum((windows[row] * (room + 1).astype(np.float32)).astype(np.int64), room)
                shown[row] = image[top : top + size, left : left + size]
        squares = squares.to(self.device, non_blocking=True)
        if places is not None:
            first = torch.arange(len(numbers), device=self.device)[:, None, None] * size**2
            pixel = first + places[0][:, :, None] * size + places[1][:, None, :]
            squares = squares.view(-1, 3).index_select(0, pixel.flatten()).view_as(squares)
        return squares.permute(0, 3, 1, 2)


def pixels_of(images: Split, image_size: int, device: torch.device, beside: Pixels | None = None) -> Pixels:
    """The split for the device: on it, if it is decoded and the device has room for it.

    Args:
        images: its images are at least `image_size` high and wide.
        image_size: S.
        device: where squares are wanted.
        beside: another split that has been placed. If it is over the same bytes, these are not sent a second time.
    """
    if not isinstance(images, Images):
        return HostPixels(images, image_size, device)
    shared = beside is not None and isinstance(beside.images, Images) and beside.images.pixels is images.pixels
    if shared and beside is not None and type(beside) is Pixels:
        return Pixels(images, image_size, device, beside)
    if device.type == "cuda" and images.pixels.nbytes > FREE * torch.cuda.mem_get_info(device)[0]:
        return HostPixels(images, image_size, device)
    return Pixels(images, image_size, device)
