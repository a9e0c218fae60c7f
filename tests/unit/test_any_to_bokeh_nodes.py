"""The nodes of Any-to-Bokeh on a stand-in for ComfyUI; tests/host runs them in a real one."""

import shutil
import sys
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from tests.stand_ins import any_to_bokeh as stand_in


@dataclass
class Components:
    images: torch.Tensor
    frame_rate: Fraction
    audio: object = None


class Video:
    def __init__(self, components):
        self.components = components

    def get_components(self):
        return self.components


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("any_to_bokeh") / "release")


@pytest.fixture
def installed(nodes, tmp_path, release, monkeypatch):
    """The nodes, with the stand-in in models/diffusers and beside it the base model of another system."""
    latest = sys.modules["comfy_api.latest"]
    monkeypatch.setattr(latest, "InputImpl", SimpleNamespace(VideoFromComponents=Video), raising=False)
    monkeypatch.setattr(latest, "Types", SimpleNamespace(VideoComponents=Components), raising=False)
    home = tmp_path / "models" / "diffusers"
    shutil.copytree(release, home / "any_to_bokeh")
    for part in ("unet", "vae"):
        (home / "other" / part).mkdir(parents=True)
        (home / "other" / part / "config.json").write_text("{}")
    return nodes


def defocus_of(nodes, image, strength=20.0, focus=0.5):
    depth = torch.linspace(0, 1, image.shape[2]).expand(len(image), image.shape[1], -1)
    widgets = {"focus": "value", "focus_x": 0.5, "focus_y": 0.5, "focus_value": focus, "depth_values": "near is bright", "follow": False}
    return nodes["BokehDefocus"].execute(image=image, depth=depth, strength=strength, **widgets).args[0]


@pytest.fixture
def image():
    return torch.rand(3, 40, 72, 4, generator=torch.Generator().manual_seed(0))


def test_folders_are_found_one_and_two_levels_deep(installed):
    from_node = sys.modules[installed["BokehLoadAnyToBokeh"].__module__]
    assert from_node.release_folders() == ["any_to_bokeh", "other"]


def test_clip_in_clip_out(installed, image, loads, bar):
    model = installed["BokehLoadAnyToBokeh"].execute(model="any_to_bokeh").args[0]
    assert model.patcher is model.networks["unet"].patcher and len(model.get_models()) == 4
    defocus, before = defocus_of(installed, image), image.clone()
    bar.clear()
    frames, video = installed["AnyToBokehRender"].execute(model, image, defocus, resolution=64, frame_rate=12.0).args
    assert frames.shape == image.shape and torch.equal(frames[..., 3], image[..., 3]) and torch.equal(image, before)
    assert not torch.equal(frames[..., :3], image[..., :3])
    assert video.components.frame_rate == 12 and torch.equal(video.components.images, frames[..., :3])
    assert [set(one) for one in loads] == [set(model.get_models())]
    assert bar[-1] == (300, 300) and [done for done, _ in bar] == sorted(done for done, _ in bar)

    film = Video(Components(image[..., :3], Fraction(30000, 1001), audio="sound"))
    again, video = installed["AnyToBokehRender"].execute(model, film, defocus, resolution=64).args
    assert torch.equal(again, frames[..., :3])
    assert video.components.frame_rate == Fraction(30000, 1001) and video.components.audio == "sound"


def test_no_blur_is_the_input(installed, image):
    model = installed["BokehLoadAnyToBokeh"].execute(model="any_to_bokeh").args[0]
    frames, _ = installed["AnyToBokehRender"].execute(model, image, defocus_of(installed, image, strength=0.0)).args
    assert torch.equal(frames, image)


def test_cuts_are_found(installed):
    """Two shots that look nothing alike: the result is that of each shot alone."""
    model = installed["BokehLoadAnyToBokeh"].execute(model="any_to_bokeh").args[0]
    generator = torch.Generator().manual_seed(1)
    scenes = [torch.nn.functional.interpolate(torch.rand(1, 3, 6, 9, generator=generator), (40, 72))[0].movedim(0, -1) for _ in range(2)]
    image = torch.stack([scenes[0]] * 4 + [scenes[1]] * 4)
    render = installed["AnyToBokehRender"].execute
    defocus = defocus_of(installed, image)
    parts = [render(model, image[part], defocus_of(installed, image[part]), resolution=64).args[0] for part in (slice(4), slice(4, 8))]
    found = render(model, image, defocus, resolution=64, cuts=True).args[0]
    assert torch.allclose(found, torch.cat(parts), atol=1e-5)
    assert (render(model, image, defocus, resolution=64).args[0] - found).abs().max() > 1e-3


def test_what_is_missing_is_explained(installed, image, tmp_path):
    load = installed["BokehLoadAnyToBokeh"].execute
    for given, words in (({}, "Any-to-Bokeh is not installed"), ({"model": "gone"}, "There is no 'gone'")):
        with pytest.raises(Exception, match=words) as error:
            load(**given)
        assert all(
            word in str(error.value) for word in ("models/diffusers/any_to_bokeh", "github.com/vivoCameraResearch", "huggingface.co")
        )
    with pytest.raises(Exception, match="no weights"):
        load(model="other")
    model = load(model="any_to_bokeh").args[0]
    with pytest.raises(Exception, match="3 frames and the defocus 2"):
        installed["AnyToBokehRender"].execute(model, image, defocus_of(installed, image[:2]))
    with pytest.raises(Exception, match="2 channels"):
        installed["AnyToBokehRender"].execute(model, image[..., :2], defocus_of(installed, image))


def test_planes(nodes):
    image = torch.zeros(2, 8, 101, 3)
    defocus = defocus_of(nodes, image, focus=1.0)
    masks = [nodes["BokehMPIMasks"].execute(defocus, level, "paper (focus)").args[0] for level in range(4)]
    # Focus at the near end: borders lie at a quarter, a half and three quarters of the way.
    assert [int(mask[0, 0].sum()) for mask in masks] == [26, 51, 76, 101]
    planes = nodes["BokehMPIMasks"].execute(defocus, 0, "released (focus^1.5)").args[1]
    assert planes.shape == image.shape and torch.equal(planes[..., 0].unique(), torch.arange(4) / 3)
