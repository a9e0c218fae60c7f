"""Physics-inspired self-attention (PISA) of BokehDiff: each key is a light source that spreads its energy over the queries it can reach.

Three things set it apart from ordinary attention (SPEC section 4, paper equations 5 to 8):
- the softmax runs over the queries, so every key gives away exactly its energy;
- a key reaches only the queries inside its circle of confusion, softly;
- light that an occluder blocks on its way is lost.

`dense_attention` is the plain definition over all pairs of tokens. `scene_blocks` with `block_attention` is the form that is run: it looks
only at pairs within reach, and finds the occlusion once for all layers of a pass. A test ties the two.

Units: a CoC radius of 1 is 1/51.2 of the side of a 512 px tile (10 px). Tokens are numbered row by row. Disparity is 0..1, camera = 1.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

UNITS = 51.2  # radius units along the side of a tile
TRAINED_SIDE = 32  # tokens along the side of a 512 px tile, the only size the weights were trained on
REACH = -100.0  # log of the soft mask below which a pair counts as out of reach
LOOK_UPS = 1 << 19  # of the disparity, made in one go


@dataclass(frozen=True)
class Pisa:
    """How PISA behaves. The defaults are corrected and deterministic; the published behaviour is PISA_AS_PUBLISHED."""

    hardness: float = 1e7  # the soft mask's slope is its natural logarithm; training starts at 3
    segments: int = 7  # points looked at between the scene and the camera; 0: no occlusion
    samples: int = 5  # of the occlusion: one exact, the others jittered by up to half a token
    spacing: float | None = UNITS / (TRAINED_SIDE - 1)  # units between tokens, as trained; None: published, 51.2 over every grid
    dropout: float = 0.0  # published: 0.1, left on at inference by mistake
    random_jitter: bool = False  # published: random samples; else their expectation by a fixed 5 x 5 rule
    square_grids_only: bool = False  # published: index grid and jitter are right only where height = width

    @property
    def slope(self) -> float:
        return math.log(self.hardness)

    @property
    def most_occluded(self) -> float:
        """While the mask is soft (training) nothing is occluded completely."""
        return 0.99 if self.hardness < 1e6 else 1.0

    def harder(self) -> "Pisa":
        """The state after one call in training: the hardness has grown by 1. At inference it stays."""
        return replace(self, hardness=self.hardness + 1) if self.hardness < 1e6 else self


PISA_AS_PUBLISHED = Pisa(spacing=None, dropout=0.1, random_jitter=True, square_grids_only=True)


class Draws:
    """The random numbers of published behaviour, drawn on the CPU so that every device gets the same ones."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def jitter(self, samples: int, segment: int, image: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[samples, pairs, 2] uniform in 0..1, last axis (x, y), for the pairs (queries, keys) [pairs] of one image."""
        return torch.rand(samples, len(queries), 2, generator=self.generator).to(queries.device)

    def kept(self, probability: float, heads: int, queries: torch.Tensor, keys: torch.Tensor, images: int) -> torch.Tensor:
        """[images, heads, keys, queries] 1 where dropout keeps a weight; queries, keys: token numbers."""
        drawn = torch.rand(images, heads, len(keys), len(queries), generator=self.generator)
        return (drawn >= probability).to(queries.device)


@dataclass(frozen=True)
class Scene:
    """What PISA knows about the picture.

    disparity  [B, N] at the tokens
    radius     [B, N] CoC radius in units
    fine       [B, 1, 3h, 3w] disparity on a grid three times as fine, where occluders are looked up
    grid       (h, w) tokens, N = h w
    """

    disparity: torch.Tensor
    radius: torch.Tensor
    fine: torch.Tensor
    grid: tuple[int, int]


def scene_of(disp_coc: torch.Tensor, grid: tuple[int, int]) -> Scene:
    """Disparity and CoC radius [B, 2, H, W] of the picture, brought to the token grid (SPEC 4.3)."""
    from einops import rearrange

    height, width = grid
    coarse = F.interpolate(disp_coc.float(), size=(height, width), mode="bilinear", align_corners=False)
    fine = F.interpolate(disp_coc[:, :1].float(), size=(3 * height, 3 * width), mode="bilinear", align_corners=False)
    disparity, radius = rearrange(coarse, "b c h w -> c b (h w)")
    return Scene(disparity, radius, fine, (height, width))


# --- geometry ---------------------------------------------------------------------------------------------------------------------


def places(grid: tuple[int, int], pisa: Pisa, device=None) -> torch.Tensor:
    """[N, 2] (row, column) of the tokens as fractions of a tile's side (SPEC 4.4)."""

    def line(length):
        return torch.linspace(0, (length - 1) * _spacing(length, pisa) / UNITS, length, device=device)

    return torch.cartesian_prod(line(grid[0]), line(grid[1])).view(-1, 2)


def distance(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Units between places [..., 2]."""
    return UNITS * (queries - keys).square().sum(-1).sqrt()


def log_mask(distance: torch.Tensor, radius: torch.Tensor, pisa: Pisa) -> torch.Tensor:
    """Logarithm of the soft CoC mask; `radius` is that of the key (SPEC 4.4)."""
    return F.logsigmoid(pisa.slope * (radius - distance))


def grid_points(grid: tuple[int, int], pisa: Pisa, device=None) -> torch.Tensor:
    """[N, 2] (x, y) of the tokens' centres in -1..1, as grid_sample counts (SPEC 4.5)."""

    def line(length):
        return torch.linspace(-1 + 1 / length, 1 - 1 / length, length, device=device)

    height, width = grid
    number = torch.arange(height * width, device=device)
    if pisa.square_grids_only:
        return torch.stack([line(height)[number % height], line(width)[number // height]], -1)
    return torch.stack([line(width)[number % width], line(height)[number // width]], -1)


def light_positions(scene: Scene, image: int, part: float, points: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor):
    """Where the light from `keys` to `queries` [pairs] passes at the share `part` of the way to the scene: [pairs, 2] (x, y), -1..1.

    Published: the disparity on the way is the query's, where equation 7 has the key's. At disparity 1 it is infinite or NaN.
    """
    way = part * scene.disparity[image] + (1 - part)
    way, light = way[queries], scene.disparity[image][keys]
    step = (1 - way) * light / (way * (1 - light))
    start = points[queries]
    return step[:, None] * (points[keys] - start) + start


def occlusion(scene: Scene, image: int, queries: torch.Tensor, keys: torch.Tensor, pisa: Pisa, draws: Draws | None = None) -> torch.Tensor:
    """M [pairs] 0..1: how much of the light from `keys` to `queries` (token numbers of one image of the scene) is blocked (SPEC 4.5)."""
    points = grid_points(scene.grid, pisa, queries.device)
    size = max(1, LOOK_UPS // (pisa.samples if pisa.random_jitter else 25))
    parts = [
        _occlusion(scene, image, some, others, points, pisa, draws)
        for some, others in zip(queries.split(size), keys.split(size), strict=True)
    ]
    return torch.cat(parts)


def _occlusion(scene, image, queries, keys, points, pisa, draws):
    nearest = scene.fine[image].amax().clamp_min(0)  # outside the picture the look-up gives 0
    height, width = scene.grid
    token = points.new_tensor([2 / height, 2 / height] if pisa.square_grids_only else [2 / width, 2 / height])
    fifths = torch.tensor([-0.4, -0.2, 0.0, 0.2, 0.4], device=points.device)
    rule = torch.cartesian_prod(fifths, fifths)[:, None]  # midpoint rule over the token; its middle is the exact sample
    exact = torch.zeros(len(queries), dtype=torch.bool, device=points.device)
    jittered = torch.zeros(pisa.samples - 1, len(queries), dtype=torch.bool, device=points.device)
    unblocked = torch.ones(len(queries), device=points.device)
    for segment, part in enumerate(torch.linspace(0.1, 0.9, pisa.segments).tolist()):
        threshold = (part * scene.disparity[image] + (1 - part))[keys]
        chosen = (threshold < nearest).nonzero()[:, 0]  # nothing in the picture is near enough to block the others
        if not len(chosen):
            continue
        q, k = queries[chosen], keys[chosen]
        position = light_positions(scene, image, part, points, q, k)[None]
        if pisa.random_jitter:
            u = draws.jitter(pisa.samples - 1, segment, image, q, k) if pisa.samples > 1 else position[:0]
            position = torch.cat([position, position + (u - 0.5) * token])
        elif pisa.samples > 1:
            position = position + rule * token
        position = position.nan_to_num(nan=2.0, posinf=2.0, neginf=-2.0).clamp(-4, 4)  # all outside; the sampler dislikes infinity
        found = F.grid_sample(scene.fine[image][None], position[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0]
        blocked = found > threshold[chosen]
        if pisa.random_jitter:
            exact[chosen] |= blocked[0]
            jittered[:, chosen] |= blocked[1:]
        else:
            exact[chosen] |= blocked[len(blocked) // 2]
            unblocked[chosen] *= 1 - blocked.float().mean(0)
    if pisa.random_jitter:
        total = exact.float() + jittered.sum(0)
    else:
        total = exact.float() + (pisa.samples - 1) * (1 - unblocked)
    return (total / pisa.samples).clamp_max(pisa.most_occluded)


# --- dense: the definition ----------------------------------------------------------------------------------------------------------


def dense_maps(scene: Scene, pisa: Pisa, draws: Draws | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(logarithm of the CoC mask, occlusion) [B, N queries, N keys] of all pairs."""
    place = places(scene.grid, pisa, scene.radius.device)
    mask = log_mask(distance(place[:, None], place[None]), scene.radius[:, None, :], pisa)
    count = len(place)
    every = torch.arange(count, device=place.device)
    queries, keys = torch.cartesian_prod(every, every).unbind(-1)
    blocked = [occlusion(scene, b, queries, keys, pisa, draws) for b in range(len(scene.radius))]
    return mask, torch.stack(blocked).view(-1, count, count)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor],
    pisa: Pisa,
    draws: Draws | None = None,
) -> torch.Tensor:
    """PISA over all pairs (SPEC 4.6, in the log domain: no 0/0 at any score). q, k, v and the result are [B, heads, N, width].

    maps  of `dense_maps`
    """
    mask, blocked = maps
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores.float() + mask[:, None]).softmax(-2) * (1 - blocked)[:, None]
    if pisa.dropout:
        every = torch.arange(q.shape[2], device=q.device)
        kept = draws.kept(pisa.dropout, q.shape[1], every, every, q.shape[0])
        weights = weights * kept.transpose(-1, -2) / (1 - pisa.dropout)
    return (weights @ v.float()).to(v)


# --- blocks: the form that is run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A square of keys with the window of queries they reach. Slices are over the token grid.

    mask    [B, keys, queries] logarithm of the CoC mask
    passed  [B, keys, queries] share of the light that arrives, or None when all of it does
    """

    key_rows: slice
    key_columns: slice
    query_rows: slice
    query_columns: slice
    mask: torch.Tensor
    passed: torch.Tensor | None


@torch.no_grad()
def scene_blocks(scene: Scene, pisa: Pisa, draws: Draws | None = None, side: int = 8) -> list[Block]:
    """The pairs of tokens that matter, in squares of side x side keys; shared by all PISA layers of a pass.

    A pair is left out where the soft mask is below e^-100. That is where float32 ends: the published product form counts it as nothing too.
    """
    height, width = scene.grid
    images = len(scene.radius)
    place = places(scene.grid, pisa, scene.radius.device).view(height, width, 2)
    radius = scene.radius.view(-1, height, width)
    number = torch.arange(height * width, device=radius.device).view(height, width)
    reach = (radius.amax(0) - REACH / pisa.slope).cpu()
    step = [_spacing(length, pisa) for length in (height, width)]

    layout, masks, pairs = [], [], []
    for top in range(0, height, side):
        for left in range(0, width, side):
            keys = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            furthest = float(reach[keys].max())
            queries = tuple(
                slice(max(0, line.start - math.ceil(furthest / s)), min(length, line.stop + math.ceil(furthest / s)))
                for line, s, length in zip(keys, step, scene.grid, strict=True)
            )
            apart = distance(place[queries].flatten(0, 1)[None], place[keys].flatten(0, 1)[:, None])
            masks.append(log_mask(apart, radius[(slice(None), *keys)].flatten(1)[..., None], pisa))
            layout.append((keys, queries))
            key_numbers, query_numbers = number[keys].flatten(), number[queries].flatten()
            near = [one.nonzero(as_tuple=True) for one in masks[-1] > REACH]
            pairs.append([(k, q, key_numbers[k], query_numbers[q]) for k, q in near])

    blocked = [
        occlusion(scene, b, torch.cat([p[b][3] for p in pairs]), torch.cat([p[b][2] for p in pairs]), pisa, draws).split(
            [len(p[b][3]) for p in pairs]
        )
        for b in range(images)
    ]
    blocks = []
    for i, ((keys, queries), mask) in enumerate(zip(layout, masks, strict=True)):
        passed = None
        if pisa.segments > 0:
            passed = torch.ones_like(mask)
            for b in range(images):
                k, q = pairs[i][b][:2]
                passed[b, k, q] = 1 - blocked[b][i]
        blocks.append(Block(*keys, *queries, mask, passed))
    return blocks


def _spacing(length, pisa):
    """Units between neighbouring tokens of one axis."""
    return UNITS / max(length - 1, 1) if pisa.spacing is None else pisa.spacing


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    blocks: list[Block],
    pisa: Pisa,
    draws: Draws | None = None,
) -> torch.Tensor:
    """PISA over the blocks of `scene_blocks`. q, k, v and the result are [B, heads, N, width], N = the tokens of `grid`.

    Each block holds every query its keys reach, so the softmax over queries is complete inside it. Sums are formed in float32.
    """
    from einops import rearrange

    height, width = grid
    q, k, v = (rearrange(x, "b n (h w) c -> b n h w c", h=height, w=width) for x in (q * q.shape[-1] ** -0.5, k, v))
    number = torch.arange(height * width, device=q.device).view(height, width)
    total = torch.zeros(v.shape, device=v.device, dtype=torch.float32)
    every = slice(None)
    for block in blocks:
        keys, queries = (block.key_rows, block.key_columns), (block.query_rows, block.query_columns)
        here, there = (every, every, *keys), (every, every, *queries)
        scores = k[here].flatten(2, 3) @ q[there].flatten(2, 3).transpose(-1, -2)
        weights = (scores.float() + block.mask[:, None]).softmax(-1)
        if block.passed is not None:
            weights = weights * block.passed[:, None]
        if pisa.dropout:
            kept = draws.kept(pisa.dropout, q.shape[1], number[queries].flatten(), number[keys].flatten(), q.shape[0])
            weights = weights * kept / (1 - pisa.dropout)
        light = weights.transpose(-1, -2).to(v.dtype) @ v[here].flatten(2, 3)
        total[there] += light.view_as(total[there])
    return rearrange(total, "b n h w c -> b n (h w) c").to(v.dtype)
