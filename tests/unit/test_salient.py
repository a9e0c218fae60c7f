"""The salient-object network, its node, and what it says to wrong files. The numbers are held by tests/parity (ldf_*)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bokeh_core.errors import BokehError
from bokeh_core.models_cli import identify
from bokeh_core.salient.ldf import LDF, SIDE, Config, build, folded_tensors, load_ldf, prepare, read_ldf, recognise, salient_masks
from tests.stand_ins.salient import ldf_tensors, write_ldf

MANIFEST = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "magicbokeh" / "keys_ldf_model40.json"


@pytest.fixture
def photo():
    """[2,3,50,70]: two pictures of a bright blob."""
    y, x = torch.meshgrid(torch.arange(50), torch.arange(70), indexing="ij")
    blobs = [torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 150) for cx, cy in ((20, 25), (50, 30))]
    return torch.stack([torch.stack([0.2 + 0.7 * blob, 0.5 - 0.3 * blob, 0.3 + 0.0 * blob]) for blob in blobs])


def test_names_and_shapes_are_those_of_the_published_file():
    if not MANIFEST.is_file():
        pytest.skip(f"THE MANIFEST IS MISSING: {MANIFEST}")
    published = {name: tuple(shape) for name, shape, _ in json.loads(MANIFEST.read_text())}
    with torch.device("meta"):
        network = LDF(Config())
        assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == published
        tensors = {name: torch.empty(shape) for name, shape in published.items()}
    assert recognise(tensors) == Config()
    assert sum(tensor.numel() for tensor in tensors.values()) == 25207061
    without_counters = {name: tensor for name, tensor in tensors.items() if "num_batches" not in name}
    for given in (tensors, without_counters):
        build(nn, folded_tensors(given))


def test_folding_changes_nothing(photo):
    """The form that is run against the plain form of the file, with batch norms."""
    tensors = ldf_tensors()
    plain = LDF(recognise(tensors)).eval()
    plain.load_state_dict(tensors)
    inputs = torch.stack([prepare(image) for image in photo])
    with torch.no_grad():
        expected, found = plain(inputs), build(nn, folded_tensors(tensors))(inputs)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_input_is_what_pillow_makes(photo):
    levels = (photo[0] * 255).round().byte()
    small = Image.fromarray(levels.movedim(0, -1).numpy()).resize((SIDE, SIDE), Image.BILINEAR)
    expected = (np.asarray(small) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(prepare(photo[0]).movedim(0, -1).numpy() - expected).max() < 1e-6
    odd = photo[0].clone()
    odd[:, 0, 0] = torch.tensor([float("nan"), 7.0, -1.0])
    assert prepare(odd).isfinite().all()


@pytest.mark.parametrize("legacy", [False, True])
def test_masks_of_a_file(tmp_path, photo, legacy):
    network = load_ldf(write_ldf(tmp_path / "model-40", legacy=legacy))
    before = photo.clone()
    masks = salient_masks(network, photo)
    assert masks.shape == (2, 50, 70) and masks.min() >= 0 and masks.max() <= 1 and masks.std() > 0.01
    assert torch.equal((masks * 255).round() / 255, masks), "steps of 1/255, as published"
    assert torch.equal(photo, before)
    alone = torch.cat([salient_masks(network, image[None]) for image in photo])
    assert (masks - alone).abs().max() <= 1 / 255 + 1e-6, "pictures of a batch must not see each other"
    assert (masks[0] - masks[1]).abs().max() > 0.02


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(BokehError, match=r"no file .*model-40"):
        read_ldf(tmp_path / "model-40")
    torch.save({"fc.weight": torch.ones(2), "layer1.0.conv1.weight": torch.ones(2)}, tmp_path / "resnet50.pth")
    with pytest.raises(BokehError, match=r"resnet50\.pth is not the LDF .*fc\.weight.*model-40"):
        read_ldf(tmp_path / "resnet50.pth")
    tensors = ldf_tensors()
    for change, expected in (
        ({"encoder.bn2b.running_var": None}, "1 tensors missing: encoder.bn2b.running_var"),
        ({"fc.weight": torch.ones(2)}, "1 tensors unexpected: fc.weight"),
        ({"linear.0.bias": torch.ones(3)}, r"of another shape: linear.0.bias \(found \[3\], expected \[8\]\)"),
    ):
        altered = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(BokehError, match=expected):
            folded_tensors(altered, "model-40")


def test_models_check_knows_the_file(tmp_path):
    report = identify(write_ldf(tmp_path / "model-40"))
    assert "LDF" in report.title and not report.problems
    tensors = ldf_tensors()
    del tensors["linearb.bias"]
    torch.save(tensors, tmp_path / "cut")
    assert any("linearb.bias" in problem for problem in identify(tmp_path / "cut").problems)


def test_node(nodes, loads, bar, tmp_path, photo):
    write_ldf(tmp_path / "models" / "salient" / "model-40")
    image = torch.cat([photo, photo.flip(0), photo[:1]]).movedim(1, -1)
    image = torch.cat([image, torch.zeros(5, 50, 70, 1)], -1)  # alpha is not looked at
    (model,) = nodes["BokehLoadSalientModel"].execute("model-40").args
    assert model.patcher
    (masks,) = nodes["BokehSalientMask"].execute(image, model).args
    expected = salient_masks(load_ldf(tmp_path / "models" / "salient" / "model-40"), image[..., :3].movedim(-1, 1))
    assert masks.shape == (5, 50, 70) and (masks - expected).abs().max() <= 1 / 255 + 1e-6
    assert loads == [[model.patcher]] and bar[-1][0] == bar[-1][1]
    (hard,) = nodes["BokehSalientMask"].execute(image, model, 0.5).args
    assert torch.equal(hard, (masks >= 0.5).float())


def test_node_lists_files_without_a_suffix_and_says_what_to_do(nodes, tmp_path):
    for name in ("model-40", "deeper/model-40.safetensors", "notes.txt"):
        (tmp_path / "models" / "salient" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / "salient" / name).write_bytes(b"?")
    loader = nodes["BokehLoadSalientModel"]
    host = __import__("sys").modules[loader.__module__.rpartition(".")[0] + ".host"]
    assert host.model_files("salient") == ["deeper/model-40.safetensors", "model-40"]
    for given, words in ((None, "No salient-object model is installed"), ("gone", "There is no salient-object model 'gone'")):
        with pytest.raises(ValueError, match=rf"{words}: put model-40 .*https://github\.com/\S+ *.*models/salient"):
            loader.execute(given)
    with pytest.raises(ValueError, match=r"model-40 .*neither"):
        loader.execute("model-40")


def test_node_halves_the_batch_when_memory_is_out(nodes, tmp_path, photo, monkeypatch):
    write_ldf(tmp_path / "models" / "salient" / "model-40")
    (model,) = nodes["BokehLoadSalientModel"].execute("model-40").args
    image = torch.cat([photo, photo]).movedim(1, -1)
    (expected,) = nodes["BokehSalientMask"].execute(image, model).args
    network, sizes = model.network, []

    def scarce(inputs):
        sizes.append(len(inputs))
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("no room")
        return type(network).forward(network, inputs)

    monkeypatch.setattr(network, "forward", scarce)
    (masks,) = nodes["BokehSalientMask"].execute(image, model).args
    assert sizes == [4, 2, 1, 1, 1, 1] and (masks - expected).abs().max() <= 1 / 255 + 1e-6
