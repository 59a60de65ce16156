"""Editing tasks. Each says, for every step, which tokens are known and from which pixels; all else is generation.

A known token keeps its code while the others are drawn, so every scale is drawn around what is known of it (FlexVAR,
arXiv 2502.20313, section 4.3: nothing is trained for it). An edit is a value, given to ``pipe(labels, edit=...)`` or
``pipe.stream(labels, edit=...)``; ``pipe.inpaint(...)`` and its relatives are the same in one call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar._numbers import check_integer
from flexvar.generation.fill import fill_painted
from flexvar.generation.pictures import Masks, Pictures, pad_to, pad_to_patches, to_paint, to_pixels
from flexvar.generation.seam import paste_known
from flexvar.generation.settings import Layout, check_pixels
from flexvar.schedule import Size


@dataclass(frozen=True)
class Placement:
    """Where an edit has its picture.

    Attributes:
        size: (height, width) of the finished image in pixels.
        left, top: of the picture in it.
        picture_size: (height, width) of the picture in it.
    """

    size: Size
    left: int
    top: int
    picture_size: Size

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """What is left, right, above and below of the picture."""
        (height, width), (rows, columns) = self.size, self.picture_size
        return self.left, width - columns - self.left, self.top, height - rows - self.top


class Edit(ABC):
    """An editing task and its pictures.

    Attributes:
        task: its name, as messages and settings have it.
        size: (height, width) of the finished image in pixels.
        count: how many pictures it holds; one serves a batch of any size.
        start_step: the first step that is drawn; None is what suits the task and the steps.
    """

    task: ClassVar[str]
    size: Size
    count: int
    start_step: int | None

    @classmethod
    def place(cls, image: Size, arguments: Mapping[str, Any]) -> Placement:
        """Where a picture of a size goes, by the arguments of the class; it stays as it is unless the task says more.

        Raises TypeError and ValueError for arguments of which that follows.
        """
        return Placement(image, 0, 0, image)

    @abstractmethod
    def known_cells(self, layout: Layout, patch_size: int) -> list[Tensor]:
        """For every step bool [count or 1, h_i, w_i], True where the token is known. Raises ValueError."""

    @abstractmethod
    def pixels_to_encode(self, layout: Layout, patch_size: int) -> Tensor:
        """[count, 3, H, W] in [-1, 1], sides multiples of the patch size: the whole image at any resolution. Its codes
        at the size of each step are the known tokens'."""

    def finish(self, images: Tensor) -> Tensor:
        """Decoded images, float32 [B, 3, *size], on their way to the user; as they are unless the task says more."""
        return images

    def _check_start_step(self, start_step: int | None) -> int | None:
        return None if start_step is None else check_integer("start_step", start_step, 0, op=self.task)


class Inpaint(Edit):
    """Paint anew where a mask is white; all else stays.

    A token is known at a step if its cell of that step's grid lies wholly outside the white region, or the step is
    before ``start_step``. What lies under the mask has no influence on the result.

    Args:
        image: see :data:`~flexvar.generation.pictures.Pictures`. Sides that are not multiples of the patch size are
            continued with their edge pixels, and the result cropped.
        mask: see :data:`~flexvar.generation.pictures.Masks`. One for all images or one per image, of any size: it is
            resampled to the image's, and then white from 0.5 on.
        paste: put the known pixels back into the result, bit for bit; otherwise they pass through the tokenizer.
        feather: width in pixels of a band around the region in which the pasted pixels fade in; 0 is none.
        start_step: the first step that is drawn, counted from 0. Earlier ones are coarse enough to be taken from the
            known pixels, continued smoothly into the region: they pass on colours and layout. By default 1 for an image
            of whose first step no cell lies outside the region (all colours follow from that step), unless it is the
            only one; otherwise 0. Where nothing is known all steps are drawn.

    Raises:
        OSError: a file cannot be read.
        TypeError, ValueError: an argument breaks its rule; or, once the steps are known, ``start_step`` is beyond them.
    """

    task = "inpaint"

    def __init__(
        self,
        image: Pictures,
        mask: Masks,
        *,
        paste: bool = True,
        feather: int = 0,
        start_step: int | None = None,
    ) -> None:
        self.pixels = to_pixels(self.task, image)
        self.size = _size_of(self.pixels)
        self.paint = to_paint(self.task, mask, self.size).to(self.pixels.device)
        counts = (len(self.pixels), len(self.paint))
        self.count = max(counts)
        if any(count not in (1, self.count) for count in counts):
            raise ValueError(f"{self.task}: mask must be one, or one per image ({counts[0]}), got {counts[1]}")
        if not isinstance(paste, bool):
            raise TypeError(f"{self.task}: paste must be a bool, got {paste!r:.100}")
        self.paste = paste
        self.feather = check_integer("feather", feather, 0, max(self.size), op=self.task)
        if self.feather and not paste:
            raise ValueError(f"{self.task}: feather must be 0 where paste is False, got {feather}")
        self.start_step = self._check_start_step(start_step)

    def known_cells(self, layout: Layout, patch_size: int) -> list[Tensor]:
        # A window of adaptive pooling is every pixel that a cell touches: floor(i H / h) to ceil((i + 1) H / h).
        painted = pad_to_patches(self.paint.float(), patch_size)
        known = [F.adaptive_max_pool2d(painted, size)[:, 0] == 0 for size in layout.schedule]
        is_any_known = ~self.paint.flatten(1).all(1)[:, None, None]
        start_step = check_integer("start_step", self.start_step or 0, 0, len(known), op=self.task)
        if self.start_step is None and len(known) > 1:
            known[0] |= is_any_known & ~known[0].any(dim=(1, 2), keepdim=True)
        return [cells | (is_any_known & (step < start_step)) for step, cells in enumerate(known)]

    def pixels_to_encode(self, layout: Layout, patch_size: int) -> Tensor:
        return pad_to_patches(
            fill_painted(self.pixels.expand(self.count, -1, -1, -1), self.paint.expand(self.count, -1, -1, -1)),
            patch_size,
        )

    def finish(self, images: Tensor) -> Tensor:
        if not self.paste:
            return images
        return paste_known(images, self.pixels.to(images.device), self.paint.to(images.device), self.feather)


class Outpaint(Inpaint):
    """Continue a picture beyond its edges: :class:`Inpaint` of margins around it.

    Args:
        image, paste, feather, start_step: as of :class:`Inpaint`.
        left, right, top, bottom: widths of the margins in pixels; at least one is more than 0.

    Raises as :class:`Inpaint`.
    """

    task = "outpaint"

    @classmethod
    def place(cls, image: Size, arguments: Mapping[str, Any]) -> Placement:
        left, right, top, bottom = (
            check_integer(side, arguments.get(side, 0), 0, op=cls.task) for side in ("left", "right", "top", "bottom")
        )
        return Placement((image[0] + top + bottom, image[1] + left + right), left, top, image)

    def __init__(
        self,
        image: Pictures,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        *,
        paste: bool = True,
        feather: int = 0,
        start_step: int | None = None,
    ) -> None:
        pixels = to_pixels(self.task, image)
        margins = {"left": left, "right": right, "top": top, "bottom": bottom}
        place = Outpaint.place(_size_of(pixels), margins)  # not a relative's, which has other arguments
        if not any(place.margins):
            raise ValueError(f"{self.task}: left, right, top or bottom must be at least 1, got 0 for each")
        check_pixels(self.task, *place.size)
        inside = torch.zeros(1, 1, *pixels.shape[2:])
        canvas, mask = F.pad(pixels, place.margins), F.pad(inside, place.margins, value=1.0)
        super().__init__(canvas, mask, paste=paste, feather=feather, start_step=start_step)


class Expand(Outpaint):
    """A larger picture around one in its centre (the paper's expansion to 1:2): :class:`Outpaint` to a size.

    Args:
        image, paste, feather, start_step: as of :class:`Inpaint`.
        height, width: of the result in pixels, at least the image's and not both equal to it. An odd pixel of margin
            goes to the right or below.

    Raises as :class:`Inpaint`.
    """

    task = "expand"

    @classmethod
    def place(cls, image: Size, arguments: Mapping[str, Any]) -> Placement:
        height, width = (
            check_integer(name, arguments[name], side, op=cls.task)
            for name, side in zip(("height", "width"), image, strict=True)
        )
        return Placement((height, width), (width - image[1]) // 2, (height - image[0]) // 2, image)

    def __init__(
        self,
        image: Pictures,
        height: int,
        width: int,
        *,
        paste: bool = True,
        feather: int = 0,
        start_step: int | None = None,
    ) -> None:
        pixels = to_pixels(self.task, image)
        place = self.place(_size_of(pixels), {"height": height, "width": width})
        if not any(place.margins):
            raise ValueError(f"{self.task}: height or width must be more than the image's, got {height} x {width}")
        super().__init__(pixels, *place.margins, paste=paste, feather=feather, start_step=start_step)


class Refine(Edit):
    """A larger picture from a small one: its tokens are taken up to a step, the later steps are drawn.

    Args:
        image: see :data:`~flexvar.generation.pictures.Pictures`. One with more patches than the result is shrunk
            first; one of another aspect ratio is stretched.
        height, width: of the result in pixels.
        start_step: the first step that is drawn, counted from 0: 0 is plain generation, the number of steps is plain
            reconstruction. By default the first whose grid has more rows or columns than the image has patches: all
            that the image shows is kept, all that it cannot show is drawn.

    Raises:
        OSError: a file cannot be read.
        TypeError, ValueError: an argument breaks its rule; or, once the steps are known, ``start_step`` is not among
            them, or is left out for an image that has the patches of every step already.
    """

    task = "refine"

    @classmethod
    def place(cls, image: Size, arguments: Mapping[str, Any]) -> Placement:
        height, width = (check_integer(name, arguments[name], 1, op=cls.task) for name in ("height", "width"))
        return Placement((height, width), 0, 0, (height, width))

    def __init__(self, image: Pictures, height: int, width: int, start_step: int | None = None) -> None:
        self.pixels = to_pixels(self.task, image)
        self.count = len(self.pixels)
        self.size = self.place(_size_of(self.pixels), {"height": height, "width": width}).size
        check_pixels(self.task, *self.size)
        self.start_step = self._check_start_step(start_step)

    def known_cells(self, layout: Layout, patch_size: int) -> list[Tensor]:
        start_step = self._first_drawn_step(layout, patch_size)
        return [torch.full((1, *size), step < start_step) for step, size in enumerate(layout.schedule)]

    def pixels_to_encode(self, layout: Layout, patch_size: int) -> Tensor:
        grid = self._grid(layout, patch_size)
        # The image has to cover the part of its grid that the finished image covers of the last.
        covered = zip(grid, layout.image_size, layout.schedule.final_size, strict=True)
        height, width = (max(1, round(cells * side / last)) for cells, side, last in covered)
        pixels = self.pixels
        if tuple(pixels.shape[2:]) != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
        return pad_to(pixels, (grid[0] * patch_size, grid[1] * patch_size))

    def _first_drawn_step(self, layout: Layout, patch_size: int) -> int:
        if self.start_step is not None:
            return check_integer("start_step", self.start_step, 0, len(layout.schedule), op=self.task)
        grid = self._grid(layout, patch_size)
        for step, (rows, columns) in enumerate(layout.schedule):
            if rows > grid[0] or columns > grid[1]:
                return step
        raise ValueError(
            f"{self.task}: start_step must be given where the image has the patches of every step, {grid[0]} x "
            f"{grid[1]}, got none"
        )

    def _grid(self, layout: Layout, patch_size: int) -> Size:
        """Rows and columns of patches that the image fills, at most the result's."""
        sides = zip(self.pixels.shape[2:], layout.schedule.final_size, strict=True)
        rows, columns = (min(-(-side // patch_size), last) for side, last in sides)
        return rows, columns


def _size_of(pixels: Tensor) -> Size:
    height, width = pixels.shape[2:]
    return height, width
