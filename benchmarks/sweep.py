"""Quality of depth from an aperture sweep: not a matter of speed, and so only run when named (`python -m benchmarks --only sweep`).

Ray-traced scenes of `bokeh_core.synthesis` (8-bit pictures, three frames), error of the offset in percent of the depth range, by the
strongest blur and by texture (contrast of the surfaces).
"""

from dataclasses import replace

import torch

from bokeh_core.depth import sweep
from bokeh_core.optics.stack import STACK_WIDTH, BokehStack
from bokeh_core.render.light import to_display
from bokeh_core.render.rays import trace
from bokeh_core.render.scene import Scene
from bokeh_core.synthesis.scenes import flatten, make_scene

from .measure import Curve

SCENES = (("plane", 0.95), ("ground", 0.95), ("portrait", 0.95), ("three", 0.95), ("portrait", 0.8))
BLUR = (4, 8, 16, 32, 48)  # px at 512, of the whole depth range in the strongest frame
CONTRAST = (1.0, 0.3, 0.1, 0.03)


def flatter(scene: Scene, contrast: float) -> Scene:
    """The scene with less texture: colours drawn towards the mean of their surface."""
    layers = []
    for layer in scene.layers:
        mean = layer.color.mean((1, 2), keepdim=True)
        layers.append(replace(layer, color=mean + contrast * (layer.color - mean)))
    return Scene(tuple(layers))


def quality(kind: str, focus: float, blur: float, contrast: float, size: int, rays: int = 128) -> dict:
    scene = flatter(make_scene(kind, 3, size), contrast)
    light, disparity = flatten(scene)
    k = [blur * size / STACK_WIDTH * share for share in (1 / 3, 2 / 3, 1)]
    pictures = torch.stack([light, *(trace(scene, one, focus, rays=rays) for one in k)])
    pictures = (to_display(pictures.clamp(0, 1)) * 255).round() / 255
    stack = BokehStack(pictures[0], pictures[1:], [one * STACK_WIDTH / size for one in k])
    side = "behind" if focus > float(disparity.max()) else "from depth"
    found = sweep.depth_from_sweep(stack, side=side, depth=disparity)
    inner = (slice(size // 16, -size // 16),) * 2
    off, confidence = (found.offset - (disparity - focus).abs()).abs()[inner], found.confidence[inner]
    surer = off[confidence >= confidence.median()]
    sign = ((found.disparity.sign() == (disparity - focus).sign()) | ((disparity - focus).abs() < 0.05))[inner]
    return {
        "median": float(off.median()),
        "mean": float(off.mean()),
        "surer half, mean": float(surer.mean()),
        "sure": float((confidence > 0.5).float().mean()),
        "right side": float(sign.float().mean()),
    }


def mean_of(results: list[dict]) -> dict:
    return {name: sum(one[name] for one in results) / len(results) for name in results[0]}


def measure(quick, device, size=256):
    scenes = SCENES[:2] if quick else SCENES
    for title, cases in {
        "strongest blur at 512 px": {f"{px} px": (px, 1.0) for px in BLUR},
        "contrast of the texture": {f"{share:g}": (32, share) for share in CONTRAST},
    }.items():
        rows = []
        for name, (blur, contrast) in cases.items():
            found = mean_of([quality(kind, focus, blur, contrast, size) for kind, focus in scenes])
            rows.append({title: name, **{key: f"{100 * value:.1f} %" for key, value in found.items()}})
        yield Curve(f"depth from a sweep, by the {title}", rows)
