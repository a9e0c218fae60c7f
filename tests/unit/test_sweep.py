"""Depth from a sweep of apertures: the closed form against its statistics, and measured radii against ray-traced stacks."""

import math

import pytest
import torch
import torch.nn.functional as F

from bokeh_core.depth import sweep
from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.optics.stack import STACK_WIDTH, BokehStack
from bokeh_core.render.light import to_display
from bokeh_core.render.rays import trace
from bokeh_core.render.stack import render_stack
from bokeh_core.synthesis.scenes import flatten, make_scene

SIZE = 192


def traced(kind, focus, largest, seed=5, count=3, bare=None):
    """(a ray-traced 8-bit stack whose strongest frame blurs the whole depth range by `largest` px, true disparity).

    bare  rows and columns of the farthest surface that have no texture
    """
    scene = make_scene(kind, seed, SIZE)
    if bare:
        scene.layers[0].color[(slice(None), *bare)] = 0.2
    light, disparity = flatten(scene)
    k = [largest * (i + 1) / count for i in range(count)]
    frames = torch.stack([to_display(trace(scene, one, focus, rays=96).clamp(0, 1)) for one in k])
    reference = to_display(light.clamp(0, 1))
    to_8_bit = [(x.clamp(0, 1) * 255).round() / 255 for x in (reference, frames)]
    return BokehStack(*to_8_bit, [one * STACK_WIDTH / SIZE for one in k]), disparity


def errors(found, truth, sure=0.5):
    """|error| of the offsets inside the picture, everywhere and where the confidence is above `sure`."""
    inner = (slice(12, -12), slice(12, -12))
    off, confidence = (found.offset - truth).abs()[inner], found.confidence[inner]
    return off.flatten(), off[confidence > sure]


def test_gain_is_the_lens():
    """Two ways to say the same: SPEC section 10, and Lens.k."""
    for f, n, distance in ((50, 1.8, 2.0), (85, 1.4, 3.5), (24, 8, 0.5)):
        lens = Lens(f_number=n, focal_length=f, sensor_width=36.0)
        k = float(lens.k(1024, torch.tensor([1 / distance]), metric=True))
        assert sweep.gain(f / 1000, n, distance, 1024 / 0.036) == pytest.approx(k, rel=1e-5)


def test_the_slope_is_unbiased_and_as_uncertain_as_it_says():
    generator = torch.Generator().manual_seed(0)
    k, truth, noise = torch.tensor([5.0, 10.0, 20.0, 0.0]), 0.7, 0.4
    radii = k.view(-1, 1) * truth + noise * torch.randn(4, 200_000, generator=generator)
    offset, share = sweep.slope(k, radii)
    deviation = noise * math.sqrt(float(share))
    assert float(share) == pytest.approx(1 / 525) and float(offset.mean()) == pytest.approx(truth, abs=5 * deviation / 447)
    assert float(offset.std()) == pytest.approx(deviation, rel=0.02)
    assert torch.allclose(sweep.slope(k[:3], radii[:3])[0], offset), "a frame of K = 0 says nothing"
    assert torch.allclose(
        torch.from_numpy(__import__("numpy").linalg.lstsq(k[:, None].numpy(), radii[:, :5].numpy(), rcond=None)[0][0]), offset[:5]
    )


def test_weights_help_where_variances_differ():
    generator = torch.Generator().manual_seed(0)
    k, noise = torch.tensor([10.0, 10.0]), torch.tensor([[0.1], [3.0]])
    radii = 10 * 0.5 + noise * torch.randn(2, 10_000, generator=generator)
    plain, weighted = sweep.slope(k, radii)[0], sweep.slope(k, radii, noise.square().reciprocal().expand_as(radii))
    assert float(weighted[0].std()) < 0.1 * float(plain.std()) and float(weighted[0].std()) == pytest.approx(
        math.sqrt(float(weighted[1][0])), rel=0.05
    )


def test_the_two_sides():
    offset = torch.tensor([0.0, 0.1, 0.6])
    for behind in (True, False):
        sides = torch.full((3,), behind)
        expected = 0.5 - offset if behind else 0.5 + offset
        assert torch.allclose(sweep.inverse_depth(offset, 2.0, sides), expected)
    assert float(sweep.inverse_depth(torch.tensor(0.6), 2.0, torch.tensor(True))) < 0, "noise leads beyond infinity; no clamp here"


def test_disks_hold_their_light_and_their_size():
    for radius in (0.0, 0.5, 1.3, 4.0, 17.5):
        disk = sweep._disk(radius)
        reach = len(disk) // 2
        distance = (torch.arange(-reach, reach + 1).float() ** 2)[:, None] + torch.arange(-reach, reach + 1).float() ** 2
        assert float(disk.sum()) == pytest.approx(1, abs=1e-5)
        # Of a disk r^2 / 2; sampling between two pixels spreads light by at most 1 / 4 px^2 in each direction.
        assert radius**2 / 2 - 0.01 <= float((disk * distance).sum()) <= radius**2 / 2 + 0.51


def test_a_known_blur_is_measured():
    """One radius everywhere, by a disk of our own making in another way: a sum of shifted pictures."""
    light = flatten(make_scene("plane", 2, SIZE))[0].clamp(0, 1)
    reference = to_display(light)
    for radius in (1.5, 4.0, 9.0):
        reach = math.ceil(radius)
        padded, total, count = F.pad(light[None], (reach,) * 4, mode="replicate")[0], torch.zeros_like(light), 0
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                if math.hypot(dx, dy) <= radius:
                    total += padded[:, reach + dy : reach + dy + SIZE, reach + dx : reach + dx + SIZE]
                    count += 1
        frame = to_display(total / count)
        measured, _, _ = sweep.measure_radii(reference, frame[None], torch.tensor([12.0]))
        truth = math.sqrt(count / math.pi)  # of a disk of as many pixels
        assert float(measured.median()) == pytest.approx(truth, abs=0.3), (radius, truth)


@pytest.mark.parametrize(("kind", "focus", "largest", "median", "sure"), [
    ("plane", 0.95, 12.0, 0.02, 0.02),
    ("portrait", 0.95, 12.0, 0.025, 0.02),
    ("ground", 0.95, 12.0, 0.02, 0.05),
])  # fmt: skip
def test_ray_traced_stacks(kind, focus, largest, median, sure):
    """Shares of the whole depth range. The numbers of the benchmark, with room."""
    stack, disparity = traced(kind, focus, largest)
    found = sweep.depth_from_sweep(stack)
    everywhere, confident = errors(found, focus - disparity)
    assert float(everywhere.median()) < median and float(confident.mean()) < sure and len(confident) > 0.2 * len(everywhere)
    assert torch.equal(found.disparity, -found.offset) and not found.metric


def test_more_blur_measures_better():
    results = []
    for largest in (2.0, 12.0):
        stack, disparity = traced("plane", 0.95, largest)
        results.append(errors(sweep.depth_from_sweep(stack, fill=False), 0.95 - disparity)[0].mean())
    assert results[1] < 0.6 * results[0]


def test_confidence_falls_where_it_should():
    stack, disparity = traced("portrait", 0.8, 12.0)
    found = sweep.depth_from_sweep(stack, side="from depth", depth=disparity, fill=False)
    off = (found.offset - (disparity - 0.8).abs()).abs()
    wrong, right = found.confidence[off > 0.2], found.confidence[off < 0.02]
    assert len(wrong) > 500 and float(wrong.median()) < 0.2 < 0.5 < float(right.median())


def test_without_texture_nothing_is_sure_and_the_surroundings_speak():
    stack, disparity = traced("plane", 0.95, 12.0, bare=(slice(60, 110), slice(60, 110)))
    middle, truth = (slice(77, 93), slice(77, 93)), 0.95 - disparity
    measured, filled = (sweep.depth_from_sweep(stack, fill=fill) for fill in (False, True))
    assert float(measured.confidence[middle].max()) < 0.1
    wrong, mended = (float((found.offset - truth)[middle].abs().mean()) for found in (measured, filled))
    assert mended < 0.03 and 3 * mended < wrong


def test_both_sides_of_the_focus():
    """The side comes from a rough depth map on another scale; the focus in it is found."""
    stack, disparity = traced("ground", 0.4, 24.0)
    rough = F.interpolate(3 * disparity[None, None] + 7, (31, 40), mode="bilinear")[0, 0]
    found = sweep.depth_from_sweep(stack, side="from depth", depth=rough)
    signed, truth = found.disparity, disparity - 0.4
    far = truth.abs() > 0.1
    sure = far & (found.confidence > 0.5)
    assert float((signed.sign() == truth.sign())[sure].float().mean()) > 0.97
    assert float((signed - truth)[sure].abs().median()) < 0.03
    behind = sweep.depth_from_sweep(stack, side="behind")
    assert torch.allclose(behind.disparity.abs(), signed.abs(), atol=1e-5) and (behind.disparity <= 0).all()


def test_a_real_lens_gives_metres():
    """Thin-lens stack of the renderer: focus at 1.5 m, a slanted scene from 1.5 to about 10 m."""
    light, _ = flatten(make_scene("plane", 4, 256))
    image = to_display(light.clamp(0, 1))
    disparity = torch.linspace(1 / 1.5, 0.1, 256).view(1, 1, -1).expand(1, 256, 256).contiguous()
    lens = Lens(f_number=1.4, focal_length=50, sensor_width=36.0, focus_distance=1.5)
    defocus = make_defocus(disparity, lens, torch.tensor([1 / 1.5]), width=256, metric=True)
    stack = render_stack(image, defocus, [10.0, 20.0, 30.0], per_dioptre=True)
    found = sweep.depth_from_sweep(stack, side="behind", focus_distance=1.5)
    assert found.metric and float(found.disparity.min()) >= 0.99 * sweep.FARTHEST
    sure = (found.confidence > 0.5) & (disparity[0] < 0.6)
    relative = ((1 / found.disparity) * disparity[0])[sure]
    assert float((relative - 1).abs().median()) < 0.06 and sure.float().mean() > 0.3


def test_the_size_of_the_stack_does_not_matter():
    stack, disparity = traced("plane", 0.95, 12.0)
    large = stack.fitted(700, 700)
    found = sweep.depth_from_sweep(large)
    truth = F.interpolate((0.95 - disparity)[None, None], (700, 700), mode="bilinear")[0, 0]
    assert found.offset.shape == found.disparity.shape == found.confidence.shape == (700, 700)
    assert float((found.offset - truth).abs().median()) < 0.03
    for size in ((40, 200), (17, 9)):
        assert sweep.depth_from_sweep(stack.fitted(*size)).disparity.shape == size


def test_progress_may_stop_it():
    stack, _ = traced("plane", 0.95, 2.0, count=1)
    told = []
    sweep.depth_from_sweep(stack, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == len(told)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.depth_from_sweep(stack, progress=stop)


def test_wrong_calls_are_explained():
    stack = BokehStack(torch.rand(3, 20, 20), torch.rand(1, 3, 20, 20), [10.0], per_dioptre=True)
    with pytest.raises(BokehError, match="side is 'left'"):
        sweep.depth_from_sweep(stack, side="left")
    with pytest.raises(BokehError, match="depth map, but none is connected"):
        sweep.depth_from_sweep(stack, side="from depth")
    with pytest.raises(BokehError, match="focus distance is 0"):
        sweep.depth_from_sweep(stack, focus_distance=0)


def test_node(nodes):
    stack, disparity = traced("plane", 0.95, 12.0)
    pictures = stack.reference[None].movedim(1, -1), stack.frames.movedim(1, -1)
    k = ", ".join(f"{value:g}" for value in stack.k.tolist())
    packed = nodes["BokehStackFromImages"].execute(*pictures, k_values=k).args[0]

    def run(**inputs):
        return nodes["BokehDepthFromSweep"].execute(packed, **{"side": "behind the focus", "edges": "plain", **inputs}).args

    depth, geometry, confidence = run()
    found = sweep.depth_from_sweep(stack)
    d = found.disparity
    assert torch.allclose(depth[0, ..., 0], ((d - d.min()) / (d.max() - d.min())), atol=1e-3) and depth.shape == (1, SIZE, SIZE, 3)
    assert (
        not geometry["metric"]
        and torch.equal(geometry["disparity"], depth[..., 0])
        and torch.allclose(confidence[0], found.confidence, atol=1e-3)
    )
    corrcoef = torch.corrcoef(torch.stack([depth[0, ..., 0].flatten(), disparity.flatten()]))[0, 1]
    assert corrcoef > 0.97
    front, _, _ = run(side="in front of the focus")
    assert torch.allclose(front, 1 - depth, atol=1e-3)
    sides, _, _ = run(side="from depth", depth=disparity[None, :, :, None].expand(-1, -1, -1, 3))
    assert torch.corrcoef(torch.stack([sides[0, ..., 0].flatten(), disparity.flatten()]))[0, 1] > 0.97
    guided, _, _ = run(edges="follow the picture", as_measured=True)
    assert guided.shape == depth.shape
    with pytest.raises(Exception, match="depth has 2 frames"):
        run(side="from depth", depth=torch.rand(2, 8, 8))
