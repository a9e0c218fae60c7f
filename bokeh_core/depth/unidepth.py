"""UniDepthV2: metric depth, confidence and the camera of one picture, with or without DSFA (bokehdepth_stage2 SPEC section 5)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.loading import cast
from ..errors import BokehError
from .dsfa import DSFABlock, DSFAConfig
from .preprocessing import RESOLUTION, normalised
from .vit import LayerScale, ViT, ViTConfig

# These compute in float32: logarithms of depth and angles would step in half precision, and the camera is one small head.
IN_FLOAT32 = (".camera_layer.", ".camera_token_adapter.", ".to_depth_hr.", ".to_confidence_hr.")
GUESSED_FOCAL = 0.7  # times the picture's width: the camera the published pipeline makes up


@dataclass(frozen=True)
class UniDepthConfig:
    """vit: the encoder, with four taps. dsfa: where DSFA acts, None for plain UniDepthV2. hidden, heads, expansion of the decoder.

    depths   residual units of its three levels
    ratio    least and greatest width / height of the network's input; pictures beyond are padded
    pixels   least and most pixels of the network's input
    """

    vit: ViTConfig
    dsfa: DSFAConfig | None = None
    hidden: int = 512
    heads: int = 8
    expansion: int = 4
    depths: tuple[int, int, int] = (2, 2, 2)
    ratio: tuple[float, float] = (0.5, 2.5)
    pixels: tuple[float, float] = (200_000, 600_000)


@dataclass(frozen=True)
class Quirks:
    """What the published code does and we do better (SPEC sections 5.4, 5.5, 12)."""

    truncated_width: bool = False  # pads to int(H (W / H)) columns, sometimes W - 1: the result is then one pixel wide
    one_factor: bool = False  # scales the camera by one factor, although both sides are rounded up to multiples of 14
    half_rays: bool = False  # rays of an estimated camera are a product in the network's precision: pixels above 2048 merge
    free_polar: bool = False  # acos of a cosine that rounding may put above 1: not a number
    black_border: bool = False  # pads with black, not with the mean colour the network was trained on
    made_up_camera: bool = False  # never uses the estimated camera, but 0.7 times the width when none is given
    late_crop: bool = False  # brings padded depth to the unpadded size and then cuts the border off: too small, and distorted


BEST = Quirks()
INFER = Quirks(truncated_width=True, one_factor=True, half_rays=True, free_polar=True)
PIPELINE = Quirks(**{name: True for name in Quirks.__dataclass_fields__})


@dataclass(frozen=True)
class Prediction:
    """What the network says of a batch, at the network's size or (see `to_picture`) at the picture's.

    depth       [B, H, W] metres along the optical axis
    radius      [B, H, W] metres along the ray
    rays        [B, 3, H, W] unit directions: x right, y down, z forward
    error       [B, H, W] >= 3e-4; its logarithm was trained to be the absolute error of the depth: more is worse
    intrinsics  [B, 3, 3] px, of the estimated camera, also where a camera was given
    """

    depth: torch.Tensor
    radius: torch.Tensor
    rays: torch.Tensor
    error: torch.Tensor
    intrinsics: torch.Tensor


class UniDepth(nn.Module):
    """Names are those of the DSFA release; a plain UniDepthV2 file lacks the level `backbone`."""

    def __init__(self, config: UniDepthConfig, ops=nn):
        super().__init__()
        self.config = config
        self.pixel_encoder = nn.Module()
        self.pixel_encoder.backbone = ViT(config.vit, ops)
        if config.dsfa:
            blocks = {str(tap): DSFABlock(config.vit.width, config.dsfa, ops) for tap in config.dsfa.taps}
            self.pixel_encoder.fusion_blocks = nn.ModuleDict(blocks)
        self.pixel_decoder = Decoder(config, ops)

    @property
    def blocks(self) -> dict[int, DSFABlock]:
        return {int(tap): block for tap, block in self.pixel_encoder.fusion_blocks.items()} if self.config.dsfa else {}

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """[B, 1 + P, D] per tap of pixels [B, 3, H, W]."""
        return self.pixel_encoder.backbone(pixels)

    def decode(
        self,
        taps: list[torch.Tensor],  # of `encode`, possibly rewritten by DSFA
        size: tuple[int, int],  # H, W of the pixels
        camera: torch.Tensor | None = None,  # [B or 1, 3, 3] pinhole matrix in px of the network's input; None = the estimated one
        quirks: Quirks = BEST,
    ) -> Prediction:
        return self.pixel_decoder(taps, size, self.config.vit.patch, camera, quirks)

    def forward(self, pixels: torch.Tensor, camera: torch.Tensor | None = None) -> Prediction:
        return self.decode(self.encode(pixels), pixels.shape[-2:], camera)


class Decoder(nn.Module):
    """Taps to camera, depth and error."""

    def __init__(self, config: UniDepthConfig, ops):
        super().__init__()
        taps, width, hidden = len(config.vit.taps), config.vit.width, config.hidden
        self.level_embeds = nn.Parameter(torch.empty(1, 1, taps, hidden))  # in every file, and never used
        for name in ("input_adapter", "camera_token_adapter"):
            adapter = nn.Module()
            adapter.input_adapters = nn.ModuleList(ops.Linear(width, hidden) for _ in range(taps))
            setattr(self, name, adapter)
        self.camera_layer = CameraHead(config, ops)
        self.depth_layer = DepthHead(config, ops)

    def forward(self, taps, size, patch, camera, quirks) -> Prediction:
        tokens = [adapt(tap[:, 0].float()) for adapt, tap in zip(self.camera_token_adapter.input_adapters, taps, strict=True)]
        intrinsics = matrix(self.camera_layer(torch.stack(tokens, dim=1), size))
        if camera is None:
            view = rays(intrinsics, size, taps[0].dtype if quirks.half_rays else torch.float32)
        else:
            view = rays(camera.to(intrinsics).expand(len(intrinsics), 3, 3), size)
        features = [adapt(tap[:, 1:]) for adapt, tap in zip(self.input_adapter.input_adapters, taps, strict=True)]
        grid = (size[0] // patch, size[1] // patch)
        embedding = ray_embedding(view, grid, features[0].shape[-1], clamp=not quirks.free_polar)
        log_depth, log_error = self.depth_layer(features, embedding.to(features[0]), grid, size)
        radius = (log_depth.clamp(-8, 8) + 2).exp()
        return Prediction(view[:, 2] * radius, radius, view, log_error.clamp(-8, 8).exp(), intrinsics)


class CameraHead(nn.Module):
    """The class tokens of the taps to fx, fy, cx, cy."""

    def __init__(self, config: UniDepthConfig, ops):
        super().__init__()
        hidden = config.hidden
        self.latents_pos = nn.Parameter(torch.empty(1, 4, hidden))
        self.aggregate1 = CrossAttention(config, ops, gated=True)
        self.aggregate2 = CrossAttention(config, ops, gated=True)
        self.project = MLP(hidden, 1, hidden, ops)
        self.out_pinhole = MLP(hidden, 1, 1, ops)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, 4, hidden]
        size: tuple[int, int],
    ) -> torch.Tensor:
        """[B, 4] px of the network's input."""
        t, position = self.project(tokens), cast(self.latents_pos, tokens)
        for aggregate in (self.aggregate1, self.aggregate2):
            t = aggregate(t, t, position)
        fx, fy, cx, cy = self.out_pinhole(t)[..., 0].unbind(1)
        focal = 0.7 * math.hypot(*size)
        return torch.stack([focal * fx.exp(), focal * fy.exp(), size[1] * cx.sigmoid(), size[0] * cy.sigmoid()], dim=1)


class DepthHead(nn.Module):
    """Features, told the direction of every patch, to the logarithms of radius and error."""

    def __init__(self, config: UniDepthConfig, ops):
        super().__init__()
        hidden = config.hidden
        inner = (hidden, hidden, hidden // 2)  # of the three levels, at 1, 2 and 4 times the patches' resolution
        after = (hidden, hidden // 2, hidden // 4)
        self.prompt_camera = nn.ModuleList(nn.Module() for _ in config.vit.taps)
        for prompt in self.prompt_camera:
            prompt.layers = nn.ModuleList([CrossAttention(config, ops, gated=False)])
        self.to_latents = ops.Linear(hidden, hidden)
        self.process_features = nn.ModuleList(ops.ConvTranspose2d(hidden, c, 2**i, stride=2**i) for i, c in enumerate(inner))
        self.ups = nn.ModuleList(Up(c, a, n, ops) for c, a, n in zip(inner, after, config.depths, strict=True))
        last, out = after[-1], after[-1] // 2
        self.depth_mlp = nn.ModuleList([nn.Identity(), nn.Identity(), self._mlp(last, ops)])  # the file counts three, and has one
        self.confidence_mlp = self._mlp(last, ops)
        for name in ("depth", "confidence"):
            setattr(self, f"to_{name}_lr", ops.Conv2d(last, out, 3))
            setattr(self, f"to_{name}_hr", nn.Sequential(ops.Conv2d(out, 32, 3), nn.LeakyReLU(0.01), ops.Conv2d(32, 1, 1)))

    @staticmethod
    def _mlp(width, ops):
        return nn.Sequential(ops.LayerNorm(width, eps=1e-5), ops.Linear(width, width))

    def forward(
        self,
        features: list[torch.Tensor],  # four times [B, h w, hidden]
        embedding: torch.Tensor,  # [B, h w, hidden] of the rays
        grid: tuple[int, int],  # h, w
        size: tuple[int, int],  # H, W
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, W] float32 each."""
        from einops import rearrange

        c = [prompt.layers[0](f, embedding) for prompt, f in zip(self.prompt_camera, features, strict=True)]
        maps = [rearrange(x, "b (h w) c -> b c h w", h=grid[0]) for x in (self.to_latents(c[0]), *c[1:])]
        latent = maps[0]
        for map_, process, up in zip(maps[1:], self.process_features, self.ups, strict=True):
            latent = up(latent + process(map_))
        latent = latent.movedim(1, -1)
        log_depth = self._finish(self.depth_mlp[2](latent), self.to_depth_lr, self.to_depth_hr, size)
        return log_depth, self._finish(self.confidence_mlp(latent), self.to_confidence_lr, self.to_confidence_hr, size)

    @staticmethod
    def _finish(x, low, high, size):
        x = low(_reflected(x.movedim(-1, 1)))
        x = F.interpolate(x.float(), size, mode="bilinear", align_corners=True)
        return high(_reflected(x))[:, 0]


class Up(nn.Module):
    """Residual units, then fewer channels at twice the resolution."""

    def __init__(self, width: int, out: int, units: int, ops):
        super().__init__()
        self.convs = nn.ModuleList(ResidualUnit(width, ops) for _ in range(units))
        self.up = nn.Sequential(ops.Conv2d(width, out, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.convs:
            x = unit(x)
        return F.interpolate(self.up(x), scale_factor=2, mode="bilinear", align_corners=False)


class ResidualUnit(nn.Module):
    """x + gamma conv2(lrelu(conv1(lrelu x)))."""

    def __init__(self, width: int, ops):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, width, 1, 1))
        self.conv1 = ops.Conv2d(width, width, 3, padding=1)
        self.conv2 = ops.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.01)), 0.01))
        return x + cast(self.gamma, x) * y


class CrossAttention(nn.Module):
    """x += g1 attention(x; context); x += g2 mlp(x). With gated=False, g1 = g2 = 1."""

    def __init__(self, config: UniDepthConfig, ops, *, gated: bool):
        super().__init__()
        width = config.hidden
        self.heads = config.heads
        self.mlp = MLP(width, config.expansion, width, ops)
        self.kv = ops.Linear(width, 2 * width, bias=False)
        self.q = ops.Linear(width, width, bias=False)
        self.norm_attnx = ops.LayerNorm(width, eps=1e-5)
        self.norm_attnctx = ops.LayerNorm(width, eps=1e-5)
        self.out = ops.Linear(width, width, bias=False)
        self.ls1 = LayerScale(width) if gated else nn.Identity()
        self.ls2 = LayerScale(width) if gated else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,  # [B, L, width]
        context: torch.Tensor,  # [B, M, width]
        position: torch.Tensor | None = None,  # [1, L, width] added to the projected queries
    ) -> torch.Tensor:
        from einops import rearrange

        q = self.q(self.norm_attnx(x))
        q = q if position is None else q + position
        q = rearrange(q, "b l (heads d) -> b heads l d", heads=self.heads)
        k, v = rearrange(self.kv(self.norm_attnctx(context)), "b l (two heads d) -> two b heads l d", two=2, heads=self.heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads l d -> b l (heads d)")
        x = x + self.ls1(self.out(y))
        return x + self.ls2(self.mlp(x))


class MLP(nn.Module):
    def __init__(self, width: int, expansion: int, out: int, ops):
        super().__init__()
        self.norm = ops.LayerNorm(width, eps=1e-5)
        self.proj1 = ops.Linear(width, expansion * width)
        self.proj2 = ops.Linear(expansion * width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj2(F.gelu(self.proj1(self.norm(x))))


def _reflected(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def matrix(camera: torch.Tensor) -> torch.Tensor:
    """[B, 3, 3] pinhole matrices of [B, 4] fx, fy, cx, cy."""
    fx, fy, cx, cy = camera.unbind(1)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    return torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], dim=1).view(-1, 3, 3)


def rays(intrinsics: torch.Tensor, size: tuple[int, int], product_in: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, 3, H, W] float32 unit directions through the pixel centres of cameras [B, 3, 3] in px.

    By the general inverse, as published: where the camera is centred, the signs of directions of about 1e-9 decide the azimuth, and
    other ways to compute the same make other signs (SPEC section 12.1).
    """
    height, width = size
    y, x = torch.meshgrid(
        torch.arange(height, device=intrinsics.device) + 0.5, torch.arange(width, device=intrinsics.device) + 0.5, indexing="ij"
    )
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # [3, H W]
    directions = (torch.linalg.inv(intrinsics.float()).to(product_in) @ pixels.to(product_in)).float()
    directions = directions / directions[:, 2:]
    return F.normalize(directions, dim=1).unflatten(2, (height, width))


def ray_embedding(
    view: torch.Tensor,  # [B, 3, H, W] unit directions
    grid: tuple[int, int],  # h, w
    width: int,
    *,
    clamp: bool = True,
) -> torch.Tensor:
    """[B, h w, width] sines of polar angle and azimuth at width / 2 frequencies each, pi to pi max(h, w) // 2."""
    view = F.interpolate(view, grid, mode="bilinear", align_corners=False, antialias=True)
    x, y, z = F.normalize(view, dim=1).flatten(2).unbind(1)
    polar = (z.clamp(-1, 1) if clamp else z).acos()
    x = torch.where(x < 0, -1.0, 1.0) * x.abs().clamp(min=1e-3)
    angles = torch.stack([polar, torch.atan2(y, x)], dim=-1)
    count = width // 2
    octaves = math.log2(max(grid) // 2) * torch.arange(count, device=view.device, dtype=torch.float32) / (count - 1)
    return (math.pi * angles[..., None] * 2**octaves).sin().flatten(-2)


@dataclass(frozen=True)
class Fit:
    """How a picture becomes the network's input: padded, then brought to another size.

    size, padded, network  (height, width)
    left, right, top, bottom  px of padding at the picture's size
    factor  the published zoom; the sides themselves are rounded up to multiples of the patch
    """

    size: tuple[int, int]
    left: int
    right: int
    top: int
    bottom: int
    padded: tuple[int, int]
    network: tuple[int, int]
    factor: float

    def zoom(self, quirks: Quirks) -> tuple[float, float]:
        """Network px per padded px, (horizontal, vertical)."""
        if quirks.one_factor:
            return self.factor, self.factor
        return self.network[1] / self.padded[1], self.network[0] / self.padded[0]

    def cut(self, maps: torch.Tensor) -> torch.Tensor:
        """[..., H, W] without the padding, of maps at a size that has it."""
        height, width = maps.shape[-2:]
        return maps[..., self.top : height - self.bottom, self.left : width - self.right]

    def inside(self, maps: torch.Tensor) -> torch.Tensor:
        """[B, h, w] the picture's part of maps [B, *network], at about their resolution; borders lie on borders."""
        if self.size == self.padded:
            return maps
        size = [max(round(n * s / p), 1) for n, s, p in zip(self.network, self.size, self.padded, strict=True)]
        (h, w), (rows, columns) = self.padded, self.size
        move = maps.new_tensor([[columns / w, 0, (2 * self.left + columns) / w - 1], [0, rows / h, (2 * self.top + rows) / h - 1]])
        grid = F.affine_grid(move.expand(len(maps), 2, 3), [len(maps), 1, *size], align_corners=False)
        return F.grid_sample(maps[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]


def fit(height: int, width: int, config: UniDepthConfig, quirks: Quirks = BEST, pixels: tuple[float, float] | None = None) -> Fit:
    """The network's input for a picture (SPEC section 5.4). pixels: instead of the config's bounds."""
    aspect = width / height
    target = min(max(aspect, config.ratio[0]), config.ratio[1])
    rows, columns = height, width
    if aspect > target:
        rows = int(width / target)
    elif aspect < target or quirks.truncated_width:
        columns = int(height * target)
    left, top = (columns - width) // 2, (rows - height) // 2
    low, high = pixels or config.pixels
    area = rows * columns
    factor = math.sqrt(min(max(area, low), high) / area)
    patch = config.vit.patch
    network = tuple(math.ceil(int(side * factor) / patch) * patch for side in (rows, columns))
    right, bottom = columns - width - left, rows - height - top
    return Fit((height, width), left, right, top, bottom, (rows, columns), network, factor)


def level_pixels(level: int, pixels: tuple[float, float] = UniDepthConfig.pixels) -> tuple[float, float]:
    """The bounds of a published resolution level, 0 to 9: one tenth of the whole interval. Raises BokehError for another."""
    if not 0 <= level <= 9:
        raise BokehError(f"The resolution level is {level}; expected 0 (fewest pixels) to 9.")
    low, high = pixels
    tenth = (high - low) / 10
    return low + level * tenth, low + (level + 1) * tenth


def bounds(config: UniDepthConfig, resolution: int) -> tuple[float, float]:
    """Bounds of the number of pixels for a resolution: the published ones for 518, and growing with its square."""
    return tuple(limit * (resolution / RESOLUTION) ** 2 for limit in config.pixels)


def network_input(images: torch.Tensor, fit: Fit, quirks: Quirks = BEST) -> torch.Tensor:
    """[B, 3, h, w] float32, normalised, of images [B, 3, H, W] display-encoded 0..1."""
    border = (fit.left, fit.right, fit.top, fit.bottom)
    images = images.float().clamp(0, 1)
    images = normalised(F.pad(images, border)) if quirks.black_border else F.pad(normalised(images), border)
    return F.interpolate(images, fit.network, mode="bilinear", align_corners=False)


def network_camera(camera: torch.Tensor, fit: Fit, quirks: Quirks = BEST) -> torch.Tensor:
    """[B, 3, 3] px of the network's input, of cameras [B, 3, 3] or [3, 3] in px of the picture. The given ones are left as they are."""
    camera = camera.reshape(-1, 3, 3).float().clone()
    camera[:, 0, 2] += fit.left
    camera[:, 1, 2] += fit.top
    x, y = fit.zoom(quirks)
    return camera * camera.new_tensor([x, y, 1]).view(3, 1)


def picture_camera(intrinsics: torch.Tensor, fit: Fit, quirks: Quirks = BEST) -> torch.Tensor:
    """[B, 3, 3] px of the picture, of cameras in px of the network's input."""
    x, y = fit.zoom(quirks)
    camera = intrinsics / intrinsics.new_tensor([x, y, 1]).view(3, 1)
    camera[:, 0, 2] -= fit.left
    camera[:, 1, 2] -= fit.top
    return camera


def made_up_camera(height: int, width: int) -> torch.Tensor:
    """[1, 3, 3] px: the camera of the published pipeline."""
    return matrix(torch.tensor([[GUESSED_FOCAL * width, GUESSED_FOCAL * width, width / 2, height / 2]]))


def to_picture(prediction: Prediction, fit: Fit, quirks: Quirks = BEST) -> Prediction:
    """The same at the picture's size; under quirks also at another one, see Quirks."""
    points = prediction.rays * prediction.radius[:, None]
    size = fit.size if quirks.late_crop else fit.padded
    resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (points, prediction.rays, prediction.error[:, None])]
    points, view, error = (fit.cut(x) for x in resized)
    camera = picture_camera(prediction.intrinsics, fit, quirks)
    return Prediction(points[:, 2], points.norm(dim=1), F.normalize(view, dim=1), error[:, 0], camera)


def activation_bytes(config: UniDepthConfig, patches: int, pictures: int, itemsize: int) -> int:
    """Bytes that the network needs for its activations, at most, for pictures of so many patches.

    Per patch: 14 times the width of a token in the transformer; or in the decoder the taps, its features, the latent map at 8 times
    the patches' resolution, and in float32 the last maps: twice hidden / 8 channels at full size beside 32 of the last convolution.
    """
    token, hidden = config.vit.width, config.hidden
    decoder = itemsize * (len(config.vit.taps) * token + 32 * hidden) + 4 * config.vit.patch**2 * (hidden // 4 + 58)
    return pictures * patches * max(itemsize * 14 * token, decoder)
