"""Pictures and layered scenes for training: from the user's folders, or synthetic where no folder is named (magicbokeh SPEC section 13)."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..media import READABLE, Picture, picture_size, read_picture
from ..metrics.edges import encode
from ..render.rays import trace
from ..render.scene import Layer, Scene
from ..synthesis.scenes import KINDS, flatten, make_scene

GAMMA = 2.2  # of the synthetic scenes and of `encode`
FEWEST_RAYS = 64


class Pictures:
    """Square crops of a folder's pictures (with its subfolders), or pictures of synthetic scenes where folder is None."""

    def __init__(self, folder: Path | None, size: int):
        """size: px of the crops. Raises BokehError for a folder without pictures, and names a file that is no picture."""
        self.files, self.size = None if folder is None else picture_files(folder), size

    def draw(self, rng: np.random.Generator) -> torch.Tensor:
        """[3, size, size] float32 display-encoded 0..1. Pictures smaller than a crop are enlarged; half of all are mirrored."""
        if self.files is None:
            scene = make_scene(KINDS[rng.integers(len(KINDS))], int(rng.integers(2**31)), self.size)
            picture = encode(flatten(scene)[0])
        else:
            picture = crop(_display(read_picture(self.files[rng.integers(len(self.files))])), self.size, rng)
        return picture.flip(-1).contiguous() if rng.random() < 0.5 else picture


class Composites:
    """Scenes of two cut-outs before a background, with the published spread of depths, blurs and focus."""

    def __init__(self, foregrounds: Path | None, backgrounds: Path | None, size: int):
        """Folders of pictures with alpha and of pictures; both None: synthetic. Raises BokehError for one alone, and for unusable files."""
        if (foregrounds is None) != (backgrounds is None):
            raise BokehError("[data] names only one of foregrounds and backgrounds; name both folders, or none for synthetic scenes.")
        self.size = size
        self.cutouts, self.backgrounds = (None if f is None else picture_files(f) for f in (foregrounds, backgrounds))
        opaque = [] if self.cutouts is None else [file for file in self.cutouts if not _has_alpha(file)]
        if opaque:
            raise BokehError(
                f"{len(opaque)} of {len(self.cutouts)} foregrounds have no alpha channel, for example {opaque[0]}; save them as PNG."
            )

    def draw(self, rng: np.random.Generator) -> Scene:
        """Three layers, far to near, disparity 0..1: a slanted background and two level cut-outs before all of it."""
        if self.cutouts is None:
            drawn = make_scene("three", int(rng.integers(2**31)), self.size).layers
            surfaces = [(layer.color, layer.alpha) for layer in drawn]
        else:
            behind = crop(_display(read_picture(self.backgrounds[rng.integers(len(self.backgrounds))])), self.size, rng) ** GAMMA
            surfaces = [(behind, torch.ones_like(behind[0]))]
            surfaces += [_placed(self.cutouts[rng.integers(len(self.cutouts))], self.size, rng) for _ in range(2)]
        planes = _planes(rng, self.size)
        if rng.random() < 0.5:
            surfaces = [(color.flip(-1), alpha.flip(-1)) for color, alpha in surfaces]
        y, x = torch.meshgrid(*[torch.arange(self.size, dtype=torch.float32)] * 2, indexing="ij")
        return Scene(
            tuple(
                Layer(color.contiguous(), alpha.contiguous(), d + gx * x + gy * y, (d, gx, gy))
                for (color, alpha), (d, gx, gy) in zip(surfaces, planes, strict=True)
            )
        )


def lens(scene: Scene, rng: np.random.Generator, k_max: float) -> tuple[float, float]:
    """(k, focus): k uniform in 0..k_max px; focus on any of the layers, at a random place of a slanted one."""
    disparity = scene.layers[rng.integers(len(scene.layers))].disparity.flatten()
    return float(rng.uniform(0, k_max)), float(disparity[rng.integers(len(disparity))])


def photograph(scene: Scene, k: float, focus: float, rays: int, k_max: float) -> torch.Tensor:
    """[3, H, W] display-encoded: the scene through a thin lens by rays, `rays` at a radius of k_max and fewer for less blur."""
    radius = max(k * float((layer.disparity - focus).abs().max()) for layer in scene.layers)
    count = round(rays * (radius / k_max) ** 2) if k_max else 1
    return encode(trace(scene, k, focus, rays=max(count, FEWEST_RAYS)))


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders, sorted. Raises BokehError where there are none or one cannot be read."""
    if not folder.is_dir():
        raise BokehError(f"{folder} is not a folder; expected a folder of pictures.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in READABLE)
    if not files:
        raise BokehError(f"{folder} holds no pictures; expected files such as .png or .jpg.")
    for file in files:
        picture_size(file)  # reads the header only
    return files


def crop(picture: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """[3, size, size] 0..1 from anywhere in picture [3, H, W], which is enlarged first where a side is too short."""
    enlarge = size / min(picture.shape[-2:])
    if enlarge > 1:
        sides = [max(round(side * enlarge), size) for side in picture.shape[-2:]]
        picture = F.interpolate(picture[None], sides, mode="bicubic", align_corners=False)[0]
    top, left = (int(rng.integers(side - size + 1)) for side in picture.shape[-2:])
    return picture[:, top : top + size, left : left + size].clamp(0, 1).contiguous()


def _planes(rng: np.random.Generator, size: int) -> list[tuple[float, float, float]]:
    """(d, gx, gy) far to near: the background varies by up to 0.3 around 0.05 to 0.35, the others lie anywhere between it and 1."""
    middle = rng.uniform(0.05, 0.35)
    slope, reach = rng.uniform(-1, 1, 2), rng.uniform(0, min(0.15, middle))  # reach: in the farthest corner
    slope = slope * reach / max(abs(slope).sum(), 1e-6) * 2 / (size - 1)
    near = np.sort(rng.uniform(middle + reach + 0.02, 1, 2))
    corner = middle - slope.sum() * (size - 1) / 2
    return [(float(corner), float(slope[0]), float(slope[1])), *((float(d), 0.0, 0.0) for d in near)]


def _placed(file: Path, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour [3, size, size], linear, and alpha [size, size] of a cut-out at a random size and place; it may hang over the border."""
    picture = read_picture(file)
    rows, columns = ((picture.alpha > 0.5 / 255).any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise BokehError(f"{file}: this foreground is transparent everywhere; remove it.")
    box = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    alpha = picture.alpha[box]
    rgba = torch.cat([_display(picture)[box] ** GAMMA * alpha, alpha[None]])
    scale = size * rng.uniform(0.4, 0.9) / max(alpha.shape)
    sides = [max(round(side * scale), 1) for side in alpha.shape]
    rgba = F.interpolate(rgba[None], sides, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = (round(float(size * rng.uniform(0.2, 0.8) - side / 2)) for side in sides)
    canvas = F.pad(rgba, (left, size - left - sides[1], top, size - top - sides[0]))  # negative padding cuts
    return canvas[:3] / canvas[3].clamp_min(1e-4), canvas[3]


def _display(picture: Picture) -> torch.Tensor:
    return encode(picture.pixels) if picture.linear else picture.pixels.clamp(0, 1)


def _has_alpha(file: Path) -> bool:
    from PIL import Image

    if file.suffix.lower() in (".npy", ".exr"):
        return read_picture(file).alpha is not None
    with Image.open(file) as image:
        return "A" in image.getbands() or "transparency" in image.info
