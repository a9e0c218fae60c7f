"""Sharp pictures with depth and a subject, blurred by any K: what the targets of BokehDepth's stages are made of."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..media import one_channel, read_picture
from ..optics.defocus import Defocus
from ..optics.lens import Lens
from ..optics.stack import STACK_WIDTH
from ..render import composite, render
from ..render.light import to_display
from ..render.scene import Scene
from ..synthesis.bokehme import scatter_bokehme
from ..synthesis.scenes import KINDS, flatten, make_scene
from .manifests import Photo, read_depth
from .train_defocus import BEST, FocusedDisparity, Quirks, focused_disparity

GAMMA = 2.2  # of BokehMe's light
HORIZON = 0.1  # 1/m added to the disparity 0..1 of synthetic scenes: depth from 0.9 to 10 m
CAPTIONS = {
    "portrait": "a person with wild hair in front of a patterned wall, small lamps glowing in the background",
    "three": "two figures, one near and one farther away, before a wall full of signs and lights",
    "ground": "people and posts standing on a long patterned floor that runs into the distance",
    "plane": "a slanted wall covered with shapes, letters and small lamps",
}


@dataclass(frozen=True, eq=False)
class SharpPhoto:
    """image [3, H, W] display-encoded 0..1; placed: its disparity [H, W] 0..1 and focus; scene: its true layers, where they are known."""

    image: torch.Tensor
    placed: FocusedDisparity
    caption: str
    subject: torch.Tensor | None = None  # [H, W] 0..1 coverage
    scene: Scene | None = None

    def blurred(self, k: float, renderer: str = "physical") -> torch.Tensor:
        """[3, H, W] 0..1 by K: px of blur radius, on a picture 512 px wide, per unit of disparity.

        "physical": by our renderer, over the true layers of a scene, else over those guessed from picture and depth. "classical":
        BokehMe's scatter, without the network that mends its edges.
        """
        px = k * self.image.shape[-1] / STACK_WIDTH
        disparity = torch.from_numpy(self.placed.disparity)
        if renderer == "classical":
            light, _, _, _ = scatter_bokehme(self.image[None] ** GAMMA, px * (disparity - self.placed.focus)[None, None])
            return light[0].clamp(0, 1) ** (1 / GAMMA)
        if self.scene is not None:
            return to_display(composite(self.scene, px, self.placed.focus)).clamp(0, 1)
        defocus = Defocus(disparity[None], torch.tensor([self.placed.focus]), torch.tensor([px]), Lens(), False)
        # A flattened subject lies at its own depth's edge; its mask says better than its depth where it ends.
        matte = self.subject[None] if self.subject is not None and self.placed.flat else None
        return render(self.image[None], defocus, matte=matte)[0].clamp(0, 1)


def synthetic_photo(rng: np.random.Generator, size: int, quirks: Quirks = BEST) -> SharpPhoto:
    """A picture of a procedural scene (synthesis.scenes), size x size px, with all that is hidden in it."""
    kind = KINDS[rng.integers(len(KINDS))]
    scene = make_scene(kind, int(rng.integers(2**31)), size)
    light, disparity = flatten(scene)
    subject = scene.layers[-1].alpha if len(scene.layers) > 1 else None
    depth = 1 / (HORIZON + disparity.clamp(min=0))
    placed = focused_disparity(depth.numpy(), None if subject is None else subject.numpy() >= 0.5, quirks)
    low, span = float(disparity.min()), max(float(disparity.max() - disparity.min()), 1e-8)
    layers = [
        replace(layer, disparity=(layer.disparity - low) / span, plane=None if layer.plane is None else _moved(layer.plane, low, span))
        for layer in scene.layers
    ]
    if placed.flat:
        plane = (placed.focus, 0.0, 0.0)
        layers[-1] = replace(layers[-1], disparity=torch.full_like(disparity, placed.focus), plane=plane)
    # The light that an 8-bit picture can hold: targets are made of what the reference shows.
    layers = [replace(layer, color=layer.color.clamp(0, 1)) for layer in layers]
    return SharpPhoto(to_display(light.clamp(0, 1)), placed, CAPTIONS[kind], subject, Scene(tuple(layers)))


def read_photo(
    photo: Photo, rng: np.random.Generator, size: int | None, quirks: Quirks = BEST
) -> tuple[SharpPhoto, torch.Tensor | None, float]:
    """A picture from disk: (the photo, its real target [3, H, W] or None, px of a 512 px wide picture per px of the photo at that width).

    size  px: the picture is scaled to that on its short side and a square cut out somewhere. None: kept whole, sides floored to 16
    The last number turns K of the whole picture into K of what was cut out. Raises BokehError for files that do not fit each other.
    """
    image = read_picture(photo.image).pixels
    height, width = image.shape[-2:]
    target = None if photo.target is None else _same(read_picture(photo.target).pixels, (height, width), photo.target)
    depth = torch.zeros(height, width) if photo.depth is None else _nearest(read_depth(photo.depth), (height, width))
    subject = None
    if photo.mask is not None:
        mask = one_channel(read_picture(photo.mask).pixels, f"{photo.mask}: this mask")
        subject = _nearest(mask, (height, width))
    placed = focused_disparity(depth.numpy(), None if subject is None else subject.numpy() > 0.5, quirks)
    if photo.focus is not None:
        placed = replace(placed, focus=photo.focus, flat=False)
    if size is None:
        new = tuple(max(side // 16, 1) * 16 for side in (height, width))
        cut = (slice(None), slice(None))
    else:
        new = tuple(max(round(side * size / min(height, width)), size) for side in (height, width))
        top, left = (int(rng.integers(side - size + 1)) for side in new)
        cut = (slice(top, top + size), slice(left, left + size))
    resized = [_resized(picture, new)[(slice(None), *cut)] for picture in (image, target) if picture is not None]
    disparity = _nearest(torch.from_numpy(placed.disparity), new)[cut].contiguous().numpy()
    sharp = SharpPhoto(
        resized[0],
        replace(placed, disparity=disparity),
        str(rng.choice(photo.captions)) if photo.captions else "",
        None if subject is None else _nearest(subject, new)[cut].contiguous(),
    )
    return sharp, resized[1] if target is not None else None, 1.0 if size is None else new[1] / size


def _moved(plane, low, span):
    return ((plane[0] - low) / span, plane[1] / span, plane[2] / span)


def _same(picture: torch.Tensor, size: tuple[int, int], path: Path) -> torch.Tensor:
    if tuple(picture.shape[-2:]) == size:
        return picture
    height, width = picture.shape[-2:]
    if abs(width / height - size[1] / size[0]) > 0.01:
        raise BokehError(f"{path} is {width}x{height} px but its sharp picture {size[1]}x{size[0]} px; expected the same view.")
    return _resized(picture, size)


def _resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return F.interpolate(picture[None], size, mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)


def _nearest(plane: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return plane if tuple(plane.shape) == tuple(size) else F.interpolate(plane[None, None].float(), size, mode="nearest-exact")[0, 0]
