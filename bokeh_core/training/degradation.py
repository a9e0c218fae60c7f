"""The second-order degradation of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, section 3): blur, resizing, noise and JPEG, twice.

MagicBokeh trains on pictures degraded by it and enlarged back to their size (magicbokeh SPEC section 13). All draws come from one numpy
generator, so that a sample depends on its seed only.
"""

import io
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import BokehError

RESIZES = ("area", "bilinear", "bicubic")
SMALLEST = 96  # px: below, the first stage's smallest picture is smaller than its largest blur kernel


@dataclass(frozen=True)
class Stage:
    """One blur, resize, noise, JPEG. Defaults: the first stage.

    blur                 probability that there is any blur
    sinc                 share of blurs that are low-pass (sinc) kernels, which ring; the others are drawn from `shapes`
    shapes               share of each shape: gaussian, generalised and plateau, each round and stretched (anisotropic)
    sizes                smallest and largest kernel, odd px
    sigma                px, of each axis
    generalised, plateau range of the shape parameter beta
    resize               probabilities of enlarging, shrinking and keeping
    factor               smallest and largest
    gaussian             probability of Gaussian noise; else Poisson noise
    noise                standard deviation of Gaussian noise in levels of 255
    poisson              factor on Poisson noise of 255 photons at white
    grey                 probability that noise is the same in all channels
    quality              of JPEG
    """

    blur: float = 1.0
    sinc: float = 0.1
    shapes: dict[str, float] = field(
        default_factory=lambda: {
            "gaussian": 0.45, "stretched gaussian": 0.25, "generalised": 0.12, "stretched generalised": 0.03, "plateau": 0.12,
            "stretched plateau": 0.03,
        }
    )  # fmt: skip
    sizes: tuple[int, int] = (7, 21)
    sigma: tuple[float, float] = (0.2, 3.0)
    generalised: tuple[float, float] = (0.5, 4.0)
    plateau: tuple[float, float] = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    factor: tuple[float, float] = (0.15, 1.5)
    gaussian: float = 0.5
    noise: tuple[float, float] = (1.0, 30.0)
    poisson: tuple[float, float] = (0.05, 3.0)
    grey: float = 0.4
    quality: tuple[int, int] = (30, 95)


@dataclass(frozen=True)
class Degradation:
    """Real-ESRGAN's constants.

    scale       the degraded picture is this many times smaller before it is enlarged back: Real-ESRGAN's; MagicBokeh names no number
    last_sinc   probability of a sinc filter at the end
    sinc_first  probability that it stands before the last JPEG, not behind
    """

    first: Stage = Stage()
    second: Stage = Stage(blur=0.8, sigma=(0.2, 1.5), resize=(0.3, 0.4, 0.3), factor=(0.3, 1.2), noise=(1.0, 25.0), poisson=(0.05, 2.5))
    scale: int = 4
    last_sinc: float = 0.8
    sinc_first: float = 0.5


REAL_ESRGAN = Degradation()


def degrade(picture: torch.Tensor, rng: np.random.Generator, recipe: Degradation = REAL_ESRGAN) -> torch.Tensor:
    """A degraded picture of the same size, as a poor camera and two uploads leave it: float32 in steps of 1/255.

    picture [3, H, W] display-encoded 0..1, on the CPU, sides of 96 px or more. Raises BokehError for others.
    """
    if picture.ndim != 3 or len(picture) != 3 or min(picture.shape[-2:]) < SMALLEST:
        raise BokehError(f"A picture of shape {list(picture.shape)} cannot be degraded; expected [3, H, W], sides of {SMALLEST} or more.")
    height, width = picture.shape[-2:]
    low = max(height // recipe.scale, 1), max(width // recipe.scale, 1)
    x = picture.float().clamp(0, 1)
    x = _spoil(x, rng, recipe.first, (height, width))
    x = jpeg(x, _whole(rng, recipe.first.quality))
    x = _spoil(x, rng, recipe.second, low)
    quality = _whole(rng, recipe.second.quality)
    if rng.random() < recipe.sinc_first:
        x = jpeg(_last_sinc(resized(x, low, rng), rng, recipe), quality)
    else:
        x = _last_sinc(resized(jpeg(x, quality), low, rng), rng, recipe)
    x = (x.clamp(0, 1) * 255).round() / 255
    return F.interpolate(x[None], (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1).mul(255).round() / 255


def _spoil(x: torch.Tensor, rng: np.random.Generator, stage: Stage, size: tuple[int, int]) -> torch.Tensor:
    """One stage without its JPEG. Resize factors count from `size`."""
    if rng.random() < stage.blur:
        x = blurred(x, blur_kernel(rng, stage))
    smallest, largest = stage.factor
    ranges = ((1.0, largest), (smallest, 1.0), (1.0, 1.0))
    factor = rng.uniform(*ranges[rng.choice(3, p=stage.resize)])
    x = resized(x, tuple(max(round(side * factor), 1) for side in size), rng)
    return noisy(x, rng, stage)


def _last_sinc(x: torch.Tensor, rng: np.random.Generator, recipe: Degradation) -> torch.Tensor:
    size, cutoff = _kernel_size(rng, recipe.second), rng.uniform(np.pi / 3, np.pi)
    return blurred(x, sinc_kernel(size, cutoff)) if rng.random() < recipe.last_sinc else x


def blur_kernel(rng: np.random.Generator, stage: Stage = Stage()) -> torch.Tensor:
    """[n, n] float32, sum 1: one of the stage's kernels."""
    size = _kernel_size(rng, stage)
    if rng.random() < stage.sinc:
        # Small kernels must not cut off more than they can represent.
        return sinc_kernel(size, rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
    shape = list(stage.shapes)[rng.choice(len(stage.shapes), p=list(stage.shapes.values()))]
    first = rng.uniform(*stage.sigma)
    second, angle = (rng.uniform(*stage.sigma), rng.uniform(-np.pi, np.pi)) if shape.startswith("stretched") else (first, 0.0)
    form = shape.removeprefix("stretched ")
    beta = {"gaussian": lambda: 1.0, "generalised": lambda: rng.uniform(*stage.generalised), "plateau": lambda: rng.uniform(*stage.plateau)}
    return shaped_kernel(size, form, first, second, angle, beta[form]())


def shaped_kernel(size: int, form: str, sigma_x: float, sigma_y: float, angle: float, beta: float = 1.0) -> torch.Tensor:
    """[size, size] float32, sum 1. With m = c^T S^-1 c, S = R(angle) diag(sigma^2) R^T: exp(-m^beta / 2), or 1 / (1 + m^beta) for plateau.

    form  "gaussian" (beta 1), "generalised" or "plateau"
    """
    x, y = _grid(size)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    m = ((u / sigma_x) ** 2 + (v / sigma_y) ** 2) ** beta
    kernel = 1 / (1 + m) if form == "plateau" else np.exp(-m / 2)
    return torch.from_numpy(kernel / kernel.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> torch.Tensor:
    """[size, size] float32, sum 1: the round ideal low pass, cutoff J1(cutoff r) / (2 pi r); cutoff in radians per px."""
    r = torch.from_numpy(np.hypot(*_grid(size)))
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * torch.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * torch.pi)
    return (kernel / kernel.sum()).float()


def blurred(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """x [3, H, W] filtered by kernel [n, n]; the border mirrors."""
    from kornia.filters import filter2d

    return filter2d(x[None], kernel[None], border_type="reflect")[0]


def resized(x: torch.Tensor, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """x [3, H, W] at another size by one of three ways, none of which smooths beyond its taps but "area"."""
    mode = RESIZES[rng.integers(3)]
    return F.interpolate(x[None], size, mode=mode, align_corners=None if mode == "area" else False)[0]


def noisy(x: torch.Tensor, rng: np.random.Generator, stage: Stage) -> torch.Tensor:
    """x [3, H, W] with Gaussian or Poisson noise, in colour or grey, clipped to 0..1."""
    from kornia.color import rgb_to_grayscale

    grey = rng.random() < stage.grey
    if rng.random() < stage.gaussian:
        sigma = rng.uniform(*stage.noise) / 255
        noise = sigma * torch.from_numpy(rng.standard_normal((1 if grey else 3, *x.shape[1:]), dtype=np.float32))
    else:
        clean = x.clamp(0, 1)
        clean = rgb_to_grayscale(clean) if grey else clean
        noise = torch.from_numpy(rng.poisson(clean.double().numpy() * 255) / 255).float() - clean
        noise = rng.uniform(*stage.poisson) * noise
    return (x + noise).clamp(0, 1)


def jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    """x [3, H, W] through a JPEG file of this quality, colours at half resolution."""
    from einops import rearrange
    from PIL import Image

    file = io.BytesIO()
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy()).save(file, "jpeg", quality=quality, subsampling="4:2:0")
    with Image.open(file) as decoded:
        return rearrange(torch.from_numpy(np.array(decoded)), "h w c -> c h w").float() / 255


def _kernel_size(rng: np.random.Generator, stage: Stage) -> int:
    return 2 * int(rng.integers(stage.sizes[0] // 2, stage.sizes[1] // 2 + 1)) + 1


def _whole(rng: np.random.Generator, span: tuple[int, int]) -> int:
    return int(rng.integers(span[0], span[1] + 1))


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y [size, size] float64, px from the middle."""
    y, x = np.mgrid[:size, :size].astype(np.float64) - size // 2
    return x, y
