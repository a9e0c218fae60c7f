"""Given the true layers, both back ends must come close to rays: the ceiling of the renderer, without any guessing."""

import pytest
import torch

from bokeh_core.metrics.image import judge
from bokeh_core.render import composite
from bokeh_core.render.rays import trace
from bokeh_core.render.scene import Layer, Scene
from bokeh_core.synthesis.scenes import make_case


def plain_over(scene, k, focus):
    """The same layers, blurred one by one and composed with the covariance left out."""

    def alone(color, layer):
        return composite(Scene((Layer(color, torch.ones_like(layer.alpha), layer.disparity, layer.plane),)), k, focus)

    out = alone(scene.layers[0].color, scene.layers[0])
    for layer in scene.layers[1:]:
        cover = alone(layer.alpha.expand(3, -1, -1), layer)
        out = out * (1 - cover) + alone(layer.color * layer.alpha, layer)
    return out


@pytest.mark.parametrize(("kind", "focus"), [("portrait", 0.95), ("three", 0.5), ("ground", 0.62)])
def test_true_layers(kind, focus):
    case = make_case(kind, 5, 192, focus, 26.0, rays=2048)
    scene = case["layers"]
    fast = judge(composite(scene, 26.0, focus), case)
    over = judge(plain_over(scene, 26.0, focus), case)
    rays = judge(trace(scene, 26.0, focus, rays=1024), case)
    assert rays["all"] >= 50 and rays["edge8"] >= 50
    assert fast["all"] >= 48 and fast["edge8"] >= 45
    assert fast["edge8"] >= over["edge8"] + 3  # overlapping layers are blurred in all of these
