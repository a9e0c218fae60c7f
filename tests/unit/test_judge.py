"""The judge: does it see what is good, what is bad, and say it right?"""

import json
import math
from functools import partial
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bokeh_core import judge, judge_report
from bokeh_core.errors import BokehError
from bokeh_core.metrics.image import judge as score
from bokeh_core.metrics.lights import disk_kernel
from bokeh_core.render import composite, render
from bokeh_core.synthesis.dataset import write_dataset
from bokeh_core.synthesis.scenes import FOCUS, flatten, make_case, make_scene

TINY = {"size": 96, "k": 16.0, "rays": 24}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_cases():
    return {
        "subject": partial(make_case, "portrait", 1, focus=0.8, **TINY),
        "slope": partial(make_case, "plane", 1, focus=0.45, **TINY),
    }


@pytest.fixture(scope="module")
def report():
    calls = []
    result = judge.judge_renderer(
        partial(render, linear=True),
        tiny_cases(),
        ceiling=composite,
        robust=1,
        clip_frames=2,
        clip_size=64,
        clip_rays=8,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(n, 5) for n in range(1, 6)]
    return result


def sharp(image, defocus, matte=None, clean_plate=None):
    """A renderer that does nothing."""
    return image.clone()


def exact(image, defocus, matte=None, clean_plate=None):
    """Level planes through a round aperture, by definition."""
    out = []
    for picture, radius in zip(image, defocus.signed_radius().abs().amax((1, 2)).tolist(), strict=True):
        kernel = disk_kernel(radius)
        reach = len(kernel) // 2
        out.append(F.conv2d(picture[:, None].double(), kernel[None, None], padding=reach)[:, 0])
    return torch.stack(out)


def test_regimes():
    wanted = {
        ("portrait", 0.8): "subject focus",
        ("portrait", 0.2): "foreground defocus",
        ("portrait", 0.95): "both blurred",
        ("three", 0.9): "subject focus",
        ("three", 0.5): "middle",
        ("three", 0.12): "foreground defocus",
        ("ground", 0.62): "subject focus",
        ("ground", 0.35): "middle",
        ("plane", 0.45): "single slope",
    }
    assert set(judge.SCENES) == set(wanted) and all(focus in FOCUS[kind] for kind, focus in wanted)
    assert set(wanted.values()) == set(judge.REGIMES)
    for (kind, focus), regime in wanted.items():
        for seed in range(2):
            scene = make_scene(kind, seed, 96)
            matte = scene.layers[-1].alpha.numpy() if len(scene.layers) > 1 else np.zeros(0)
            assert judge.regime({"disparity": flatten(scene)[1].numpy(), "matte": matte, "focus": focus}) == regime, (kind, focus, seed)


def test_scores_are_those_of_the_metrics(report):
    case = tiny_cases()["subject"]()
    wanted = {
        "composite": sharp_to_render(case),
        "matte": sharp_to_render(case, matte=torch.from_numpy(case["matte"])[None]),
        "plate": sharp_to_render(case, matte=torch.from_numpy(case["matte"])[None], clean_plate=chw(case["background_linear"])),
        "layers": composite(case["layers"], 16.0, 0.8),
    }
    found = report["cases"]["subject"]
    assert found["regime"] == "subject focus" and set(found["scores"]) == set(wanted)
    for given, result in wanted.items():
        for name, value in score(result, case).items():
            assert found["scores"][given][name] == pytest.approx(min(value, 100), abs=1e-3), (given, name)
    assert set(report["cases"]["slope"]["scores"]) == {"composite", "layers"}  # one layer has neither matte nor plate
    assert report["regimes"]["single slope"]["composite"] == {"cases": 1} | report["cases"]["slope"]["scores"]["composite"]
    assert report["cases"]["slope"]["scores"]["composite"]["edge8"] is None
    assert "known_methods" not in report


def chw(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


def sharp_to_render(case, **extra):
    from bokeh_core.optics.defocus import Defocus
    from bokeh_core.optics.lens import Lens

    defocus = Defocus(torch.from_numpy(case["disparity"])[None], torch.tensor([case["focus"]]), torch.tensor([case["k_px"]]), Lens(), False)
    return render(chw(case["image_linear"]), defocus, linear=True, **extra)[0]


def test_our_renderer_keeps_the_invariants(report):
    broken = {name: row for name, row in report["invariants"].items() if row["value"] > row["target"]}
    assert not broken
    assert report["temporal"]["static"] == 0
    assert report["monotonicity"]["spearman"] == pytest.approx(1) and report["monotonicity"]["slope_error"] < 0.02
    assert report["monotonicity"]["detail_falls"]


def test_exact_lights_are_perfect(monkeypatch):
    monkeypatch.setattr(judge, "RADII", (2.0, 6.0, 12.0))
    points = judge._lights(exact)
    assert max(points["shape_error"]) < 1e-9 and max(abs(m - 1) for m in points["mass"]) < 1e-9
    assert points["measured_px"] == pytest.approx(points["radius_px"], rel=0.02)
    steady = judge._monotonicity(exact, points)
    assert steady["spearman"] == pytest.approx(1) and steady["slope_error"] < 0.002 and steady["pull_roughness_px"] < 0.02


def test_no_blur_is_seen():
    points = judge._lights(sharp)
    assert max(points["measured_px"]) < 0.1 and min(points["shape_error"]) > 0.5
    steady = judge._monotonicity(sharp, points)
    assert steady["slope_error"] > 0.9 and steady["spearman"] < 0.5 and not steady["detail_falls"]
    assert all(row["value"] <= row["target"] for row in judge._invariants(sharp, points).values())  # it breaks no symmetry


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (lambda image, defocus: image + 1e-7 * (defocus.k == 0).view(-1, 1, 1, 1), {"k = 0 returns the picture"}),
        (lambda image, defocus: image * 1.01, {"k = 0 returns the picture", "a constant picture stays constant"}),
        (lambda image, defocus: image * torch.tensor([1, 1, 0.9]).view(3, 1, 1) if defocus.k.max() else image,
         {"a constant picture stays constant", "colours in another order"}),
        (lambda image, defocus: image.roll(1, -1) if defocus.k.max() else image, {"mirrored left to right", "transposed"}),
        (lambda image, defocus: image.roll(1, -2) if defocus.k.max() else image, {"mirrored top to bottom", "transposed"}),
        (lambda image, defocus: (image + 0.01 * torch.linspace(0, 1, image.shape[-1])) if defocus.k.max() else image,
         {"a constant picture stays constant", "mirrored left to right", "transposed",
          "shifted by whole pixels, radius 6", "shifted by whole pixels, radius 24"}),
        (lambda image, defocus: image * defocus.disparity[:, None] if defocus.k.max() else image,
         {"a constant picture stays constant", "disparity and focus + 0.25", "k x 2, disparity and focus / 2"}),
    ],
)  # fmt: skip
def test_broken_invariants_are_seen(wrong, seen):
    found = judge._invariants(wrong, {"mass": [1.0, 1.0]})
    assert {name for name, row in found.items() if row["value"] > row["target"]} == seen
    dim = judge._invariants(sharp, {"mass": [1.0, 0.99]})
    assert [name for name, row in dim.items() if row["value"] > row["target"]] == ["light of inner points is kept (out / in - 1)"]


def test_flicker_and_chance_are_seen():
    generator = torch.Generator().manual_seed(0)

    def noisy(image, defocus, matte=None, clean_plate=None):
        return image + 0.01 * torch.rand(image.shape, generator=generator)

    clip = judge._temporal(noisy, None, ("composite",), 1, 2, 64, 8)
    assert clip["static"] > 1e-3 and "layers" not in clip["moving"]
    assert judge._invariants(noisy, {"mass": [1.0]})["the same again"]["value"] > 0


def test_wrong_depth():
    disparity = torch.full((40, 40), 0.2)
    disparity[10:30, 10:30] = 0.8
    for pixels in (-3, 0, 5):
        near = torch.zeros(40, 40, dtype=torch.bool)
        near[10 - pixels : 30 + pixels, 10 - pixels : 30 + pixels] = True
        assert torch.equal(judge.grown(disparity, pixels) > 0.5, near)
    errors = judge._depth_errors(disparity, 0.8)
    assert torch.equal(errors["edge +0 px"], disparity)
    assert torch.allclose(errors["gain 1.1"], torch.where(disparity > 0.5, 0.8, 0.8 - 1.1 * 0.6))
    assert torch.allclose(errors["offset -0.02"], disparity - 0.02)
    assert torch.equal(judge._depth_errors(torch.tensor([[0.5, 0.71]]).expand(30, 2), 0.0)["8 bit"][0], torch.tensor([128, 181]) / 255)
    profile = errors["blur sigma 2 px"][20, :20]  # a normal distribution's cumulative function around the edge at 9.5
    wanted = [0.2 + 0.3 * (1 + math.erf((x - 9.5) / (2 * math.sqrt(2)))) for x in range(20)]
    assert np.allclose(profile.numpy(), wanted, atol=0.01)


def test_robustness_of_the_report(report):
    by_input = report["robustness"]["subject focus"]
    assert list(by_input) == ["composite", "matte"] and "foreground defocus" not in report["robustness"]
    row = by_input["composite"]
    assert row["edge +0 px"]["median"] == pytest.approx(report["cases"]["subject"]["scores"]["composite"]["all"], abs=1e-6)
    assert row["edge +4 px"]["median"] < row["edge +0 px"]["median"] - 1
    assert by_input["matte"]["edge +4 px"]["median"] > row["edge +4 px"]["median"] + 1
    assert judge._quartiles([{"composite": {"x": v}} for v in (1.0, 2.0, 3.0, 4.0, 5.0)]) == {
        "composite": {"x": {"q1": 2.0, "median": 3.0, "q3": 4.0, "cases": 5}}
    }


def test_known_methods_are_compared():
    def case(ours, **rows):
        return {"scores": {"composite": dict(zip(("all", "edge8", "in_focus"), ours, strict=True))}, "reference_psnr_db": rows}

    cases = {
        "one": case((40.0, 30.0, 60.0), a={"all": 38, "b8": 31, "foc": 50}, b={"all": 39, "b8": 20, "foc": None},
                    **{"oracle x": {"all": 99, "b8": 99, "foc": 99}}),
        "two": case((30.0, 20.0, math.nan), a={"all": 32, "b8": 10, "foc": None}, b={"all": 20, "b8": 19, "foc": None}),
    }  # fmt: skip
    found = judge._against_known(cases)
    assert found["best"]["one"]["all"] == {"method": "b", "best": 39, "ours": 40.0, "difference": 1.0}
    assert found["best"]["one"]["edge8"]["difference"] == -1 and found["best"]["two"]["edge8"]["method"] == "b"
    assert "in_focus" not in found["best"]["two"] and found["best"]["one"]["in_focus"]["difference"] == 10
    assert found["mean_difference"]["all"] == pytest.approx((1 - 2) / 2) and found["means"]["a"]["all"] == 35
    assert found["means"]["this renderer"]["all"] == 35


def test_report_files(report, tmp_path):
    speed = [{"size": 64, "radius": 4.0, "threads": 1, "seconds": 0.5, "peak_mib": None, "planes": None}]
    paths = judge_report.write_report(tmp_path / "new", report | {"speed": speed}, "A title")
    assert [path.name for path in paths] == ["judge.json", "radius.svg", "robustness.svg", "judge.md"]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths)

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(paths[0].read_text(), parse_constant=refuse) == report | {"speed": speed}
    text = paths[3].read_text()
    assert text.startswith("# A title\n") and "nan" not in text and "None" not in text
    assert "![robustness](robustness.svg)" in text and "64 x 64" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 8
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 2
    for path in paths[1:3]:
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")


def test_chart_places_points():
    svg = judge_report.chart("t & u", "x", "y", {"a": [(0, 0, 0, 0), (10, 5, 4, 6)], "b": [(5, 3, 3, 3)]})
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    (x0, y0), (x1, y1), (x2, y2) = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle")]
    assert x2 - x0 == pytest.approx((x1 - x0) / 2, abs=0.2) and y0 - y2 == pytest.approx(3 / 5 * (y0 - y1), abs=0.2)
    assert len(list(root.iter(f"{space}polygon"))) == 1 and "t & u" in [t.text for t in root.iter(f"{space}text")]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (27.3, 41.2), (-8, 8), (-0.05, 0.002), (3, 3)])
def test_ticks(low, high):
    ticks = judge_report._ticks(low, high)
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert 2 <= len(ticks) <= 9 and len(steps) == 1 and ticks[0] <= low and ticks[-1] >= high


def test_stored_cases(tmp_path):
    write_dataset(tmp_path, 1, size=64, rays=4, k=[8.0], kinds=["portrait"])
    (name, make), *rest = judge.stored_cases(tmp_path).items()
    assert name == "000000" and not rest
    case = make()
    assert judge._holds(case, "layers", composite) and not judge._holds(case, "layers", None) and judge._holds(case, "plate", None)
    # Recorded cases lack the wider band, the background and the layers.
    with np.load(tmp_path / "000000.npz") as file:
        kept = {key: file[key] for key in file.files if key not in ("edge24", "background_linear") and not key.startswith("layer")}
    np.savez(tmp_path / "000000.npz", **kept)
    again = make()
    assert np.array_equal(again["edge24"], case["edge24"])
    assert [given for given in judge.INPUTS if judge._holds(again, given, composite)] == ["composite", "matte"]
    (tmp_path / "000000.npz").write_bytes(b"PK nonsense")
    with pytest.raises(BokehError, match="cannot be read as a case"):
        make()
    np.savez(tmp_path / "000000.npz", **{key: value for key, value in kept.items() if key != "truth_linear"})
    with pytest.raises(BokehError, match="truth_linear"):
        make()


def test_seeded_cases_take_turns():
    cases = judge.seeded_cases((3, 4), ks=(8.0, 16.0), size=64, rays=2)
    assert len(cases) == 2 * len(judge.SCENES)
    assert "portrait 0.8, seed 3, k 8" in cases and "portrait 0.8, seed 4, k 16" in cases
    case = cases["three 0.9, seed 3, k 16"]()
    assert (case["kind"], case["seed"], case["k_px"], case["focus"], case["disparity"].shape) == ("three", 3, 16.0, 0.9, (64, 64))


def test_bad_calls(tmp_path):
    with pytest.raises(BokehError, match="no such folder"):
        judge.stored_cases(tmp_path / "nowhere")
    with pytest.raises(BokehError, match="holds no cases"):
        judge.stored_cases(tmp_path)
    with pytest.raises(BokehError, match="Unknown inputs"):
        judge.judge_renderer(sharp, tiny_cases(), inputs=("guess",))
    with pytest.raises(BokehError, match="No case holds the input plate"):
        judge.judge_renderer(sharp, {"slope": tiny_cases()["slope"]}, inputs=("plate",))


def test_interruption_is_not_swallowed():
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge.judge_renderer(sharp, tiny_cases(), robust=0, progress=stop)


def test_speed():
    (row,) = judge.measure_speed(sizes=(96,), radii=(4.0,))
    assert row["size"] == 96 and 0 < row["seconds"] < 30
    assert row["peak_mib"] is None or 0 <= row["peak_mib"] < 500
