"""Losses against SciPy, and the feature networks against numbers that the packages lpips and timm gave for the same weights."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

from bokeh_core.errors import BokehError
from bokeh_core.training import losses
from bokeh_core.training.features import ConvNeXt, Perceptual, convnext, perceptual


def pictures(count=2, height=14, width=11, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sobel_of_scipy(images):
    """(x, y) [B, 3, H, W] with zeros around the picture."""
    arrays = images.double().numpy()
    gradients = []
    for kernel in (np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]]), np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])):
        found = [[ndimage.correlate(plane, kernel, mode="constant") for plane in picture] for picture in arrays]
        gradients.append(torch.tensor(np.array(found)))
    return gradients


def test_sobel_is_that_of_scipy():
    a, b = pictures(seed=1), pictures(seed=2)
    (ax, ay), (bx, by) = sobel_of_scipy(a), sobel_of_scipy(b)
    magnitudes = [(x**2 + y**2 + 1e-6).sqrt() for x, y in ((ax, ay), (bx, by))]
    assert torch.allclose(losses.sobel_magnitude(a).double(), magnitudes[0], atol=1e-5)
    assert float(losses.texture_loss(a, b)) == pytest.approx(float((magnitudes[0] - magnitudes[1]).abs().mean()), rel=1e-5)
    expected = float(((ax - bx) ** 2).mean() + ((ay - by) ** 2).mean())
    assert float(losses.texture_loss_paper(a, b)) == pytest.approx(expected, rel=1e-5)


def test_the_papers_texture_loss_sees_the_direction_of_edges():
    """Turned gradients have the same magnitude, so the script's form sees nothing."""
    x = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16).contiguous()
    y = x.transpose(-1, -2).contiguous()
    inner = (..., slice(2, -2), slice(2, -2))
    assert float((losses.sobel_magnitude(x) - losses.sobel_magnitude(y))[inner].abs().max()) < 1e-5
    assert float(losses.texture_loss_paper(x, y)) > 0.1


def test_edge_loss_of_the_paper():
    """Sobel gradients, 1 / l^2, and the weight without 1: written out at the first scale."""
    pred, bokeh, aif = (pictures(seed=i) for i in range(3))
    total = 0.0
    for p, b, a in zip(*map(sobel_of_scipy, (pred, bokeh, aif)), strict=True):
        total += float(((p - b).abs() * torch.maximum(b.abs(), a.abs())).mean())
    assert float(losses.edge_loss(pred, bokeh, aif, 1, losses.EDGE_PAPER)) == pytest.approx(total, rel=1e-5)
    second = losses.edge_loss(*(torch.nn.functional.avg_pool2d(x[..., :10], 2) for x in (pred, bokeh, aif)), 1, losses.EDGE_PAPER) / 4
    both = losses.edge_loss(*(x[..., :10] for x in (pred, bokeh, aif)), 2, losses.EDGE_PAPER)
    first = losses.edge_loss(*(x[..., :10] for x in (pred, bokeh, aif)), 1, losses.EDGE_PAPER)
    assert float(both) == pytest.approx(float(first + second), rel=1e-5)


@pytest.mark.parametrize("form", [losses.EDGE_PAPER, losses.EDGE_SCRIPT])
def test_edge_loss_is_least_at_the_truth(form):
    bokeh, aif = pictures(seed=1), pictures(seed=2)
    assert float(losses.edge_loss(bokeh, bokeh, aif, 3, form)) == 0
    assert float(losses.edge_loss(aif, bokeh, aif, 3, form)) > float(losses.edge_loss((aif + bokeh) / 2, bokeh, aif, 3, form)) > 0


# The discriminator


def test_the_head_keeps_its_gain_at_one_and_its_seed():
    before = torch.random.get_rng_state()
    head, again, other = losses.GanHead(12, 8, seed=3), losses.GanHead(12, 8, seed=3), losses.GanHead(12, 8, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(head.state_dict()["decoder.0.weight_orig"], again.state_dict()["decoder.0.weight_orig"])
    assert not torch.equal(head.state_dict()["decoder.0.weight_orig"], other.state_dict()["decoder.0.weight_orig"])
    features = torch.randn(2, 3, 3, 12, generator=torch.Generator().manual_seed(0))
    for _ in range(60):  # one power iteration each
        head(features)
    assert float(torch.linalg.svdvals(head.decoder[0].weight.detach())[0]) == pytest.approx(1, abs=1e-3)
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.eval()(features)
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in state.items())


def test_gan_loss_is_cross_entropy_per_sample():
    logits = torch.randn(3, 2, 4, 1, generator=torch.Generator().manual_seed(0))
    for target in (losses.REAL, losses.FAKE):
        p = logits.sigmoid()
        expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean((1, 2, 3))
        assert torch.allclose(losses.gan_loss(logits, target), expected, atol=1e-6)


def test_the_head_learns_to_tell_real_from_fake():
    head = losses.GanHead(6, 8)
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(16, 2, 2, 6, generator=generator) + 1, torch.randn(16, 2, 2, 6, generator=generator) - 1
    optimiser = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(60):
        loss = losses.gan_loss(head(real), losses.REAL).mean() + losses.gan_loss(head(fake), losses.FAKE).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert float(head(real).mean()) > 0 > float(head(fake).mean())


# The learning rate


def test_cosine():
    factors = [losses.cosine(step, 10, 110) for step in range(131)]
    assert factors[0] == 0 and factors[5] == 0.5 and factors[10] == 1
    assert factors[60] == pytest.approx(0.5) and factors[110] == 2e-7
    assert factors[120] == pytest.approx(0.5 * (1 - math.cos(0.1 * math.pi)))  # it rises again
    assert losses.cosine(0, 0, 5) == 1


# Feature networks


def filled(shapes):
    """Weights that anybody can make again: by sorted name, He-scaled, norms around 1."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        if tensor.ndim > 1:
            weights[name] = tensor * (2 / tensor[0].numel()) ** 0.5
        else:
            weights[name] = tensor * 0.1 + name.endswith(("norm.weight", "gamma", "stem.1.weight", "downsample.0.weight"))
    return weights


@pytest.fixture(scope="module")
def perceptual_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    shapes = {name: tensor.shape for name, tensor in Perceptual().state_dict().items() if name.startswith("features.")}
    shapes |= {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    weights = filled(shapes)
    torch.save({name: tensor.abs() for name, tensor in weights.items() if name.startswith("lin")}, folder / "vgg.pth")
    vgg = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def test_perceptual_is_that_of_the_package(perceptual_files):
    """0.182444 and 0.182725 are what lpips 0.1.4 gives for these weights and pictures."""
    network = perceptual(*perceptual_files)
    generator = torch.Generator().manual_seed(99)
    a, b = (torch.rand(2, 3, 40, 32, generator=generator) * 2 - 1 for _ in range(2))
    assert network(a, b).tolist() == pytest.approx([0.18244388699531555, 0.18272504210472107], rel=1e-5)
    assert network(a, a).tolist() == [0, 0]
    assert not any(p.requires_grad for p in network.parameters())
    flat = torch.full((1, 3, 32, 32), -0.03).requires_grad_()  # features may be all zero there
    network(flat, b[:1, :, :32]).sum().backward()
    assert bool(flat.grad.isfinite().all())


def test_perceptual_refuses_other_files(perceptual_files, monkeypatch):
    vgg, linear = perceptual_files
    with pytest.raises(BokehError, match="missing"):
        perceptual(vgg, vgg)
    with pytest.raises(BokehError, match="missing"):
        perceptual(linear, linear)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BokehError, match="install the package lpips"):
        perceptual(vgg)


def test_convnext_is_that_of_timm(tmp_path):
    """The numbers are what timm 1.0.31 gives for these weights and this picture."""
    shapes = {name: tensor.shape for name, tensor in ConvNeXt([8, 16, 24, 32], [1, 2, 1, 1]).state_dict().items()}
    save_file(filled(shapes) | {"head.fc.weight": torch.zeros(3, 32)}, tmp_path / "convnext.safetensors")
    network = convnext(tmp_path / "convnext.safetensors")
    features = network(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(7)))
    assert features.shape == (1, 2, 3, 32)
    expected = [0.49547088146209717, 1.8670132160186768, 2.353306531906128, -0.05790823698043823]
    assert features[0, 1, 2, :4].tolist() == pytest.approx(expected, abs=2e-5)
    assert float(features.mean()) == pytest.approx(0.06753910332918167, abs=1e-5)
    assert float(features.std()) == pytest.approx(2.0551977157592773, abs=1e-4)
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(BokehError, match="no ConvNeXt"):
        convnext(tmp_path / "other.safetensors")


def test_convnext_base_has_the_published_size():
    """timm's convnext_base: 340 tensors below its head, 87,564,416 numbers, 1024 channels."""
    with torch.device("meta"):
        network = ConvNeXt([128, 256, 512, 1024], [3, 3, 27, 3])
    state = network.state_dict()
    assert len(state) == 340 and sum(tensor.numel() for tensor in state.values()) == 87_564_416
