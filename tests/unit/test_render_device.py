"""The renderer keeps to the device of its picture: on a pretended one, where mixing devices fails as it does on a GPU."""

import pytest
import torch

from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import render, windows
from tests.pretend_device import Elsewhere, PretendDevice

LOOKS = {
    "plain": Lens(),
    "blades, cat's eye, colours": Lens(aperture=Aperture(blades=6, cats_eye=0.5, chromatic_lateral=0.5), highlights=3),
}


@pytest.mark.parametrize("quality", ["fast", "reference"])
@pytest.mark.parametrize("lens", LOOKS.values(), ids=LOOKS)
def test_no_step_mixes_devices(lens, quality):
    generator = torch.Generator().manual_seed(0)
    image, disparity = torch.rand(1, 3, 24, 32, generator=generator), torch.full((1, 24, 32), 0.2)
    disparity[:, 6:18, 8:20] = 0.9
    matte = (disparity > 0.5).float()
    radius = torch.tensor([8.0 if lens.aperture.blades else 26.0])  # the pyramid too

    def run(place):
        given = Defocus(place(disparity), torch.tensor([0.2]), radius, lens, False)
        return [
            render(place(image), given, quality=quality, rays=4),
            render(place(image), given, quality=quality, rays=4, matte=place(matte)),
            render(place(image), given, quality=quality, rays=4, snap_edges=True),
        ]

    expected = run(lambda t: t)
    with PretendDevice():
        found = run(lambda t: Elsewhere(t.clone()))
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, Elsewhere) and torch.allclose(a.here, b, atol=1e-6)


def test_no_window_mixes_devices(monkeypatch):
    monkeypatch.setattr(windows, "WHOLE", 45_000)
    monkeypatch.setattr(windows, "SMALL", 3_000)
    monkeypatch.setattr(windows, "SETTLED", 4)
    image, disparity = torch.rand(1, 3, 150, 400, generator=torch.Generator().manual_seed(0)), torch.full((1, 150, 400), 0.2)
    disparity[:, 40:110, 100:300] = 0.9
    matte = (disparity > 0.5).float()
    assert len(windows.plan(150, 400, 40)) > 1

    def run(place):
        given = Defocus(place(disparity), torch.tensor([0.2]), torch.tensor([4.0]), LOOKS["blades, cat's eye, colours"], False)
        return render(place(image), given, matte=place(matte), clean_plate=place(image / 2))

    expected = run(lambda t: t)
    with PretendDevice():
        found = run(lambda t: Elsewhere(t.clone()))
    assert isinstance(found, Elsewhere) and torch.allclose(found.here, expected, atol=1e-6)


def test_the_pretended_device_notices_a_mixture():
    with pytest.raises(RuntimeError, match="two devices"):
        Elsewhere(torch.ones(3)) + torch.ones(3)
