"""What docs/expectations.md promises and only a real ComfyUI shows: memory given back, other folders, no network, old prompts."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.stand_ins.depth import depth_anything

from .comfy import cached, node, saved, shrunk, succeeded
from .inside import inside

# As version 0.1.0 wrote them: without what later versions added, which must stay optional.
DEFOCUS = {"strength": 24.0, "focus": "auto", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5}
DEFOCUS |= {"depth_values": "near is bright", "follow": False}
RENDER = {"quality": "fast", "linear": False}


def photo_prompt(width, height):
    """Load, scale, Set Focus and Blur, Render Bokeh, save: API format."""
    return {
        "photo": node("LoadImage", image="bokeh_demo_photo.png"),
        "map": node("LoadImage", image="bokeh_demo_depth.png"),
        "image": shrunk(["photo", 0], width, height),
        "depth": shrunk(["map", 0], width, height),
        "defocus": node("BokehDefocus", image=["image", 0], depth=["depth", 0], **DEFOCUS),
        "render": node("BokehRender", image=["image", 0], defocus=["defocus", 0], **RENDER),
        "save": node("SaveImage", images=["render", 0], filename_prefix="expectations"),
    }


@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 301), (1600, 101)])
def test_prompts_of_the_first_version_run_at_any_size(host, width, height):
    outputs = succeeded(host.run(photo_prompt(width, height)))
    (entry,) = saved(outputs)
    result = np.asarray(host.picture(entry).convert("RGB"))
    assert result.shape == (height, width, 3) and result.std() > 10


def test_an_equal_prompt_is_served_from_the_cache(host):
    prompt = photo_prompt(120, 80)
    succeeded(host.run(prompt))
    entry = host.run(prompt)
    succeeded(entry)
    assert cached(entry) == set(prompt)


def test_search_words_reach_the_front_end(host):
    info = host.get("/object_info")
    if "search_aliases" not in info["KSampler"]:
        pytest.skip("this ComfyUI has no search aliases")
    for name, one in info.items():
        if one["category"].startswith("bokeh/"):
            assert len(one["search_aliases"]) >= 3, name
    assert {"bokeh", "dof", "depth of field", "lens blur", "defocus", "refocus"} <= set(info["BokehDefocus"]["search_aliases"])


def test_unloading_models_makes_the_next_run_load_again(host):
    """The button "Unload models and execution cache": the pack holds nothing back, and works afterwards."""
    folder = host.base / "models" / "depthanything"
    folder.mkdir(exist_ok=True)
    torch.save(depth_anything(), folder / "unload_me_vits.pth")
    prompt = {
        "photo": node("LoadImage", image="bokeh_demo_photo.png"),
        "model": node("BokehLoadDepthModel", model="unload_me_vits.pth", kind="relative"),
        "depth": node("BokehEstimateDepth", image=["photo", 0], depth_model=["model", 0], frames="one clip", resolution=140, edges="plain"),
        "save": node("SaveImage", images=["depth", 0], filename_prefix="unloaded"),
    }

    def loads():
        return host.log().count("Requested to load")

    succeeded(host.run(prompt))
    first = loads()
    succeeded(host.run(prompt))
    assert loads() == first > 0
    host.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)  # the host does it between two prompts
    succeeded(host.run(prompt))
    assert loads() == first + 1


def test_files_elsewhere_no_network_and_nothing_left_after_unloading(tmp_path):
    """A model in a folder of extra_model_paths.yaml, from file to picture without a connection; then unloaded and really gone."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    torch.save(depth_anything(), tmp_path / "elsewhere" / "deep" / "mine_vits.pth")
    (tmp_path / "extra.yaml").write_text(f"mine:\n  base_path: {tmp_path}\n  depthanything: elsewhere\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)).save(tmp_path / "photo.png")
    code = f"""
import gc, socket, weakref
def forbidden(*args, **keywords): raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
import utils.extra_config
utils.extra_config.load_extra_path_config({str(tmp_path / "extra.yaml")!r})
host.register_folder("depthanything")  # once more, now after the user's settings: nothing of them may get lost
host.preview, host.temporary = (lambda images, node: None), (lambda images, node: [{{}} for _ in images])

(name,) = [one for one in host.model_files("depthanything") if one.endswith("mine_vits.pth")]
from bokeh_pack.nodes.depth import BokehEstimateDepth, BokehLoadDepthModel
from bokeh_pack.nodes.defocus import BokehDefocus
from bokeh_pack.nodes.render import BokehRender
with torch.inference_mode():
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    model = BokehLoadDepthModel.execute(model=name, kind="relative").args[0]
    depth, _ = BokehEstimateDepth.execute(image, model, "one clip", 140, "plain").args
    defocus = BokehDefocus.execute(image=image, depth=depth, **{DEFOCUS!r}).args[0]
    (result,) = BokehRender.execute(image=image, defocus=defocus).args
assert result.shape == image.shape and not torch.equal(result, image)

weights = [weakref.ref(parameter) for parameter in model.managed.network.parameters()]
network = weakref.ref(model.managed.network)
assert len(comfy.model_management.current_loaded_models) == 1
comfy.model_management.unload_all_models()
assert not comfy.model_management.current_loaded_models
del model, depth
gc.collect()
alive = sum(one() is not None for one in weights)
assert network() is None and not alive, (network(), alive)
print("gone")
"""
    assert "gone" in inside(code)
