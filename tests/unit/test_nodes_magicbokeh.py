"""The nodes of MagicBokeh on a stand-in for ComfyUI; tests/host checks them in a real one."""

import shutil

import pytest
import torch

from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from tests.stand_ins import magicbokeh as stand_ins


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    stand_ins.write_base(folder / "base")
    stand_ins.write_converted(folder / "magicbokeh.safetensors")
    return folder


@pytest.fixture
def installed(written, tmp_path):
    """The stand-in files in the host's model folders. Returns models."""
    models = tmp_path / "models"
    shutil.copytree(written / "base", models / "diffusers" / "sd" / "stable-diffusion-2-1-base")
    (models / "loras").mkdir(parents=True)
    shutil.copy(written / "magicbokeh.safetensors", models / "loras")
    shutil.copy(written / "base" / "vae" / "diffusion_pytorch_model.safetensors", models / "loras" / "another.safetensors")
    return models


NAMES = {"base": "sd/stable-diffusion-2-1-base", "magicbokeh": "magicbokeh.safetensors"}


def test_nothing_installed_is_explained(nodes):
    with pytest.raises(ValueError, match=r"No base model is installed: put the folder stable-diffusion-2-1-base.*models/diffusers"):
        nodes["BokehLoadMagicBokeh"].execute()
    assert nodes["BokehLoadMagicBokeh"].validate_inputs()


def test_the_likely_files_come_first(nodes, installed):
    schema = nodes["BokehLoadMagicBokeh"].define_schema()
    assert {one.id: one.default for one in schema.inputs} == NAMES
    with pytest.raises(ValueError, match=r"There is no MagicBokeh file 'gone.pkl': put lora.pkl"):
        nodes["BokehLoadMagicBokeh"].execute(**{**NAMES, "magicbokeh": "gone.pkl"})


def test_load_and_render(nodes, installed, bar, loads):
    loaded = nodes["BokehLoadMagicBokeh"].execute(**NAMES).args[0]
    assert loaded.patcher in loaded.get_models() and len(loaded.get_models()) == 4
    image = torch.rand(1, 40, 50, 4, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    defocus = make_defocus(torch.linspace(0, 1, 50).expand(1, 40, 50), Lens(strength=300), 0.2, width=50)
    subject = torch.zeros(9, 9)
    subject[:, 7:] = 1
    with torch.inference_mode():
        result = nodes["MagicBokehRender"].execute(image, loaded, "best", "exact", "none", 1.0, defocus, subject).args[0]
    assert result.shape == image.shape and torch.equal(result[..., 3], image[..., 3]) and torch.equal(image, before)
    assert [len(models) for models in loads] == [1, 2, 1]  # encoder, ControlNet and UNet, decoder
    assert bar[-1] == (100, 100) and bar == sorted(bar)
    with pytest.raises(ValueError, match="no defocus"):
        nodes["MagicBokehRender"].execute(image, loaded, "best", "exact", "none", subject=subject)
    with pytest.raises(ValueError, match="2 channels"):
        nodes["MagicBokehRender"].execute(image[..., :2], loaded, "best", "exact", "none")
