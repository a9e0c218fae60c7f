"""What Any-to-Bokeh trains on: short windows of clips with their bokeh, made on the fly or read from a list (SPEC sections 9.1 and 10).

On the fly, cut-outs wander before a still picture as published (synthesis.any_to_bokeh_clip); the lens is ours or the published tracer.
A list is a csv file with a header, one clip and one lens setting a row; folders count from the file's own:

    aif_folder, bokeh_folder, disp_folder, mask_folder, k, concept_i

Names begin with the number of the frame. Those of the bokeh carry the focus disparity 0..1, and K where the column k says `rand`:
12_zf_0.53367.png, 12_zf_0.53367_k_24.png. Masks are 12_LAYER.png, layer 0 nearest. concept_i is the layer in focus, or far2near or
near2far where the focus moves.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import BokehError
from ..media import Picture, one_channel, read_picture, write_picture
from ..render import composite
from ..render.scene import Layer, Scene
from ..samplers.any_to_bokeh import mpi, preparation
from ..synthesis.any_to_bokeh_clip import K_LEVELS, K_LEVELS_PULL, ClipDraws, LayeredClip, layered_clip
from ..synthesis.planar import flatten_planes, trace_any_to_bokeh
from ..synthesis.scenes import make_scene
from .composites import picture_files
from .perturbation import Draws, perturb

FRAMES = 25  # of a clip, from which a window is taken
RAMP = 25  # whole numbers in a row that K runs through where it changes, from 1..7 on
COLUMNS = ("aif_folder", "bokeh_folder", "disp_folder", "mask_folder", "k", "concept_i")
PULLS = ("far2near", "near2far")
TRIES = 100  # samples or clips that may be unusable one after the other


@dataclass(frozen=True, eq=False)
class Frames:
    """Consecutive frames of a clip, before they are prepared for the networks.

    sharp, bokeh  [n, 3, H, W] 0..1
    disparity     [n, H, W] 0..1, larger = nearer
    mask          [n, H, W] 0 or 1: where the object in focus is seen; None where the focus moves, which is never perturbed
    focus, k      [n] float64: disparity in focus, px of radius at this width per unit of disparity
    """

    sharp: torch.Tensor
    bokeh: torch.Tensor
    disparity: torch.Tensor
    mask: torch.Tensor | None
    focus: torch.Tensor
    k: torch.Tensor


def visible(masks: torch.Tensor, layer: int) -> torch.Tensor:
    """[n, H, W] 0 or 1: one object without what nearer ones hide, from masks [n, layers, H, W] uint8, layer 0 nearest."""
    seen = masks > 128
    return (seen[:, layer] & ~seen[:, :layer].any(1)).float()


def training_sample(frames: Frames, size: tuple[int, int], draws: Draws, perturbed: float = 0.0) -> dict[str, torch.Tensor] | None:
    """Frames as the networks take them in training (SPEC sections 2.2, 2.3 and 9.1); None for a sample that has to be left out.

    size       (H, W)
    perturbed  probability for each frame that its disparity is disturbed
    Returns sharp, bokeh [n, 3, H, W] -1..1; difference [n, 1, H, W] -1..1 (0 of V_D is -1); region [n, 1, H, W] uint8 0..3; k, focus [n];
    disparity [n, 1, H, W] 0..1. All mirrored where the last frame's draw, that of the perturbation, is above 0.5.
    """
    disparity, drawn = frames.disparity.clone(), 0.0
    for i in range(len(disparity)):
        drawn = draws.uniform()
        if drawn < perturbed and frames.mask is not None:
            if not bool(frames.mask[i].any()):
                return None
            disparity[i] = perturb(disparity[i], frames.mask[i], float(frames.focus[i]), draws, perturbed)
    difference = preparation.disparity_difference(disparity, frames.focus)
    region = mpi.regions(disparity, frames.focus, mpi.TRAINING)
    sample = {
        "sharp": preparation.resize(frames.sharp, size) * 2 - 1,
        "bokeh": preparation.resize(frames.bokeh, size) * 2 - 1,
        "difference": (preparation.resize(difference, size) * 2 - 1)[:, None],
        "region": preparation.resize_regions(region, size)[:, None],
        "disparity": preparation.resize(disparity, size)[:, None],
    }
    if drawn > 0.5:
        sample = {name: maps.flip(-1) for name, maps in sample.items()}
    sample = {name: maps.contiguous() for name, maps in sample.items()}
    return sample | {"k": frames.k.float(), "focus": frames.focus.float()}


# On the fly


@dataclass(frozen=True)
class Shots:
    """How clips made on the fly are shot. How often each kind occurs is not published.

    pulls      share of clips whose focus moves from the farthest to the nearest object or back
    ramps      share of clips whose K changes from frame to frame
    published  trace rays as the published generator does, `samples` aperture points a side: exact, and far slower
    """

    pulls: float = 0.2
    ramps: float = 0.2
    published: bool = False
    samples: int = 101


class Cutouts:
    """Moving cut-outs and still backgrounds: the user's, or figures and walls of synthetic scenes where no folder is named."""

    def __init__(self, foregrounds: Path | None, backgrounds: Path | None, synthetic: int = 416):
        """foregrounds  a folder of pictures with alpha, or a json file {index: {clip_paths: [25], clip_mask_paths: [25]}}
        backgrounds  a folder of pictures
        synthetic    px of the synthetic ones
        Raises BokehError for one without the other, and for missing or unusable files.
        """
        if (foregrounds is None) != (backgrounds is None):
            raise BokehError("[data] names only one of foregrounds and backgrounds; name both, or none for synthetic clips.")
        self.synthetic, self.clips = synthetic, None
        if foregrounds is None:
            make_scene("three", 0, synthetic)  # refuses a size that is too small
            return
        self.backgrounds = picture_files(backgrounds)
        if foregrounds.is_dir():
            self.clips = [([file] * FRAMES, None) for file in picture_files(foregrounds)]
            opaque = [files[0] for files, _ in self.clips if read_picture(files[0]).alpha is None]
            if opaque:
                raise BokehError(f"{len(opaque)} foregrounds have no alpha channel, for example {opaque[0]}; save them as PNG with alpha.")
        else:
            self.clips = _foreground_list(foregrounds)

    def draw(self, count: int, draws: np.random.Generator, needed: range) -> tuple[list, list, np.ndarray]:
        """(foregrounds, mattes, background) for `layered_clip`: uint8 arrays, [object][frame]. Frames outside `needed` may be None."""
        if self.clips is None:
            figures, wall = [], None
            while len(figures) < count:
                layers = make_scene("three", int(draws.integers(2**31)), self.synthetic).layers
                wall = layers[0].color
                figures += [(layer.color, layer.alpha) for layer in layers[1:]]
            shown = [(_bytes(color.clamp(0, 1) ** (1 / 2.2)), _bytes(alpha[None])[..., 0]) for color, alpha in figures[:count]]
            still = _bytes(wall.clamp(0, 1) ** (1 / 2.2))
            return [[color] * FRAMES for color, _ in shown], [[alpha] * FRAMES for _, alpha in shown], still
        foregrounds, mattes = [], []
        for index in draws.integers(len(self.clips), size=count):
            files, masks = self.clips[index]
            read = {}
            for i in sorted({0, *needed}):
                if (files[i], masks and masks[i]) not in read:
                    picture = read_picture(files[i])
                    alpha = picture.alpha if masks is None else one_channel(read_picture(masks[i]).pixels, f"{masks[i]}: this matte")
                    read[files[i], masks and masks[i]] = (_bytes(picture.pixels), _bytes(alpha[None])[..., 0])
            pairs = [read.get((files[i], masks and masks[i]), (None, None)) for i in range(FRAMES)]
            foregrounds.append([color for color, _ in pairs])
            mattes.append([alpha for _, alpha in pairs])
        behind = read_picture(self.backgrounds[draws.integers(len(self.backgrounds))])
        return foregrounds, mattes, _bytes(behind.pixels)


def _foreground_list(path: Path) -> list[tuple[list[Path], list[Path]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        clips = [
            tuple([path.parent / name for name in one[key]] for key in ("clip_paths", "clip_mask_paths"))
            for _, one in sorted(content.items(), key=lambda item: int(item[0]))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BokehError(
            f"{path} is no list of foregrounds ({error}); expected {{index: {{clip_paths: [...], clip_mask_paths: [...]}}}} as json."
        ) from error
    for files, masks in clips:
        if len(files) < FRAMES or len(masks) < FRAMES:
            raise BokehError(f"{path}: a clip has {len(files)} pictures and {len(masks)} mattes; expected {FRAMES} of each.")
        if lost := [file for file in (*files, *masks) if not file.is_file()]:
            raise BokehError(f"{path} names {lost[0]}, which is not there.")
    if not clips:
        raise BokehError(f"{path} holds no clips.")
    return clips


def _bytes(picture: torch.Tensor) -> np.ndarray:
    """[H, W, C] uint8 of [C, H, W] 0..1."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def lens_of_clip(kind: str, depth: torch.Tensor, layer: int, draws: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(focus, k), each [FRAMES] float64, of a whole clip with planes at depth [FRAMES, L], the background last.

    kind  "fixed": one K of K_LEVELS on object `layer`; "ramp": K runs through whole numbers, up or down, on object `layer`; far2near and
          near2far: the focus moves in a line from one end of the objects to the other, with one K of K_LEVELS_PULL
    """
    frames, objects = len(depth), depth.shape[1] - 1
    disparity = 1 / depth.double()
    if kind in PULLS:
        first, last = (objects - 1, 0) if kind == "far2near" else (0, objects - 1)
        t = torch.linspace(0, 1, frames, dtype=torch.float64)
        return disparity[0, first] * (1 - t) + disparity[-1, last] * t, torch.full((frames,), float(draws.choice(K_LEVELS_PULL))).double()
    if kind == "ramp":
        k = torch.arange(RAMP, dtype=torch.float64) + int(draws.integers(1, 8))
        return disparity[:, layer], k.flip(0) if draws.random() < 0.5 else k
    return disparity[:, layer], torch.full((frames,), float(draws.choice(K_LEVELS))).double()


def through_lens(clip: LayeredClip, focus: torch.Tensor, k: torch.Tensor, shots: Shots) -> torch.Tensor:
    """[F, 3, H, W] 0..1 bokeh of a clip; focus and k [F]. Display values are averaged as they are, as published."""
    if shots.published:
        return (trace_any_to_bokeh(clip.images, clip.alphas, clip.planes, k, 1 / focus, shots.samples) / 255).clamp(0, 1)
    pictures = []
    for images, alphas, depth, f, strength in zip(clip.images, clip.alphas, clip.depth, focus.tolist(), k.tolist(), strict=True):
        layers = [
            Layer(image / 255, alpha[0], torch.full_like(alpha[0], 1 / float(c)), (1 / float(c), 0.0, 0.0))
            for image, alpha, c in zip(images, alphas, depth, strict=True)
        ]
        pictures.append(composite(Scene(tuple(reversed(layers))), strength, f))
    return torch.stack(pictures).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Shot:
    """A window of a clip made on the fly. concept: the layer in focus, or one of PULLS; focus, k [F] float64."""

    clip: LayeredClip
    concept: int | str
    focus: torch.Tensor
    k: torch.Tensor

    def frames(self, shots: Shots) -> Frames:
        sharp, disparity = flatten_planes(self.clip.images, self.clip.alphas, self.clip.planes)
        mask = None if isinstance(self.concept, str) else visible(self.masks(), self.concept)
        return Frames(sharp / 255, through_lens(self.clip, self.focus, self.k, shots), disparity[:, 0], mask, self.focus, self.k)

    def masks(self) -> torch.Tensor:
        """[F, objects, H, W] uint8 0 or 255, each object as a whole."""
        return ((self.clip.alphas[:, :-1, 0] > 0.5) * 255).to(torch.uint8)


def synthetic_shot(cutouts: Cutouts, shots: Shots, size: tuple[int, int], objects: int, seed: tuple[int, ...], count: int) -> Shot:
    """A window of `count` frames of the clip that belongs to `seed`. Raises BokehError where TRIES clips in a row cannot be made."""
    for attempt in range(TRIES):
        draws = np.random.default_rng([*seed, attempt])
        start = int(draws.integers(FRAMES - count + 1))
        window = range(start, start + count)
        foregrounds, mattes, background = cutouts.draw(objects, draws, window)
        order = ClipDraws(int(draws.integers(2**63)))
        try:
            clip = layered_clip(foregrounds, mattes, background, order, size[1], size[0], window)
        except (BokehError, ValueError) as error:  # an empty matte, or an object larger than the frame: such clips are dropped
            reason = error
            continue
        layer, u = int(draws.integers(objects)), draws.random()
        kind = PULLS[int(draws.integers(2))] if u < shots.pulls else "ramp" if u < shots.pulls + shots.ramps else "fixed"
        focus, k = lens_of_clip(kind, clip.all_depth, layer, draws)
        return Shot(clip, kind if kind in PULLS else layer, focus[start : window.stop], k[start : window.stop])
    raise BokehError(f"{TRIES} clips in a row could not be made: {reason}")


# From disk


@dataclass(frozen=True)
class Row:
    """One row of a list: files of one clip by frame, and how it was shot. concept: the layer in focus, or one of PULLS."""

    sharp: list[Path]
    bokeh: list[Path]
    disparity: list[Path]
    masks: list[list[Path]]  # [frame][layer]
    k: float | None  # None: in the names of the bokeh
    concept: int | str


def read_list(path: Path, least: int) -> list[Row]:
    """The clips of a csv file, checked. least: frames that each must have. Raises BokehError naming the row and what is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BokehError(f"{path} is no list of clips ({error}); expected a csv file with the columns {', '.join(COLUMNS)}.") from error
    if not table or (lost := set(COLUMNS) - set(table[0])):
        missing = f"without the columns {', '.join(sorted(lost))}" if table else "without rows"
        raise BokehError(f"{path} is {missing}; expected a csv file with the columns {', '.join(COLUMNS)}.")
    rows = []
    for number, entry in enumerate(table, 2):
        try:
            rows.append(_row(path.parent, entry, least))
        except BokehError as error:
            raise BokehError(f"{path}, line {number}: {error}") from error
    return rows


def _row(home: Path, entry: dict[str, str], least: int) -> Row:
    folders = {}
    for name in COLUMNS[:4]:
        folder = home / (entry[name] or "")
        if not entry[name] or not folder.is_dir():
            raise BokehError(f"the {name} '{entry[name]}' is no folder.")
        folders[name] = _numbered(folder)
    concept = entry["concept_i"].strip()
    if concept not in PULLS:
        if not concept.isdigit():
            raise BokehError(f"concept_i is '{concept}'; expected the number of a layer, {' or '.join(PULLS)}.")
        concept = int(concept)
    sharp, bokeh, disparity = ([file for _, file in folders[name]] for name in COLUMNS[:3])
    masks: dict[int, list[Path]] = {}
    for frame, file in folders["mask_folder"]:
        masks.setdefault(frame, []).append(file)
    by_layer = [sorted(files, key=_layer) for _, files in sorted(masks.items())]
    counts = {
        "sharp frames": len(sharp),
        "frames with bokeh": len(bokeh),
        "disparity maps": len(disparity),
        "frames with masks": len(by_layer),
    }
    if len(set(counts.values())) > 1 or len(sharp) < least:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise BokehError(f"found {found}; expected the same number of each, {least} or more.")
    if isinstance(concept, int) and min(map(len, by_layer)) <= concept:
        raise BokehError(f"concept_i is {concept} but a frame has {min(map(len, by_layer))} masks; layers count from 0.")
    k = None
    if entry["k"].strip() != "rand":
        try:
            k = float(entry["k"])
        except ValueError:
            raise BokehError(f"k is '{entry['k']}'; expected a number or rand.") from None
    for file in bokeh:
        _, _, named = preparation.read_name(file.name)
        if k is None and named is None:
            raise BokehError(f"k is rand but {file.name} names none; expected a name such as 3_zf_0.53367_k_24.png.")
    return Row(sharp, bokeh, disparity, by_layer, k, concept)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(number[0]), file) for file in folder.iterdir() if (number := re.match(r"\d+(?=[_.])", file.name))]
    return sorted(found)


def _layer(file: Path) -> int:
    layer = re.search(r"_(\d+)\.", file.name)
    if layer is None:
        raise BokehError(f"the mask {file.name} does not name its layer; expected a name such as 12_0.png.")
    return int(layer[1])


def listed_frames(row: Row, start: int, count: int) -> Frames:
    """The frames of a row from `start` on. Raises BokehError for a file that cannot be read or has another size."""
    places = range(start, start + count)
    pictures = [[read_picture(files[i]).pixels for i in places] for files in (row.sharp, row.bokeh)]
    maps = [one_channel(read_picture(row.disparity[i]).pixels, f"{row.disparity[i]}: this disparity") for i in places]
    names = [preparation.read_name(row.bokeh[i].name) for i in places]
    focus = torch.tensor([f for _, f, _ in names], dtype=torch.float64)
    k = torch.tensor([row.k if row.k is not None else named for _, _, named in names], dtype=torch.float64)
    masks = []
    if isinstance(row.concept, int):
        for i in places:
            layers = [one_channel(read_picture(file).pixels, f"{file}: this mask") for file in row.masks[i][: row.concept + 1]]
            masks.append((torch.stack(layers) * 255).round().to(torch.uint8))
    sizes = {tuple(one.shape[-2:]) for one in (*pictures[0], *pictures[1], *maps, *masks)}
    if len(sizes) > 1:
        raise BokehError(f"The frames beside {row.sharp[start]} have several sizes: {sorted(sizes)}; expected one.")
    mask = visible(torch.stack(masks), row.concept) if masks else None
    return Frames(torch.stack(pictures[0]), torch.stack(pictures[1]), torch.stack(maps), mask, focus, k)


def write_list(
    folder: Path,
    clips: int,
    cutouts: Cutouts,
    *,
    size: tuple[int, int] = preparation.PUBLISHED_SIZE,
    objects: int = 4,
    shots: Shots | None = None,
    frames: int = FRAMES,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write clips and their list, folder/clips.csv, with one lens for each clip; returns the list. Clips that are there already are kept.

    To be read again by training many times over, where the lens takes longer than a training step. 8-bit PNG files.
    """
    shots = shots or Shots()
    for index in range(clips):
        home = folder / f"{index:05d}"
        note = home / "row.json"  # last of all: the clip is whole
        if not note.exists():
            _write_clip(home, note, (seed, index), cutouts, shots, size, objects, frames)
        if progress is not None:
            progress(index + 1, clips)
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for index in range(clips):
            row = json.loads((folder / f"{index:05d}" / "row.json").read_text(encoding="utf-8"))
            table.writerow({name: f"{index:05d}/{value}" if name.endswith("_folder") else value for name, value in row.items()})
    return folder / "clips.csv"


def _write_clip(home: Path, note: Path, seed: tuple[int, int], cutouts: Cutouts, shots: Shots, size, objects: int, count: int) -> None:
    shot = synthetic_shot(cutouts, shots, size, objects, seed, count)
    frames = shot.frames(shots)
    k = None if bool((shot.k != shot.k[0]).any()) else float(shot.k[0])
    row = {"k": "rand" if k is None else f"{k:g}", "concept_i": shot.concept}
    for name in COLUMNS[:4]:
        (home / name.removesuffix("_folder")).mkdir(parents=True, exist_ok=True)
        row[name] = name.removesuffix("_folder")
    for i in range(count):
        suffix = f"_k_{shot.k[i]:g}" if k is None else ""
        grey = frames.disparity[i].expand(3, -1, -1)
        pictures = {
            f"aif/{i}.png": frames.sharp[i],
            f"bokeh/{i}_zf_{shot.focus[i]:.5f}{suffix}.png": frames.bokeh[i],
            f"disp/{i}.png": grey,
        }
        pictures |= {f"mask/{i}_{layer}.png": mask.expand(3, -1, -1) / 255 for layer, mask in enumerate(shot.masks()[i])}
        for name, picture in pictures.items():
            write_picture(home / name, Picture(picture))
    note.write_text(json.dumps(row), encoding="utf-8")
