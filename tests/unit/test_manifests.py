"""BokehDepth's training lists: CSV to JSONL, what a record means, and the defocus of the training targets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core.errors import BokehError
from bokeh_core.optics.published_k import dof_cond
from bokeh_core.optics.stack import BokehStack
from bokeh_core.stack_files import save_stack
from bokeh_core.training.manifests import build_record, read_depth, read_photos, read_stack_truths, write_manifest
from bokeh_core.training.train_defocus import AS_PUBLISHED, BEST, focused_disparity


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png", "target.png"):
        Image.new("RGB", (60, 40), (90, 120, 30)).save(tmp_path / name)
    Image.new("L", (60, 40), 255).save(tmp_path / "mask.png")
    np.savez(tmp_path / "depth.npz", depth=np.linspace(1, 5, 2400, dtype=np.float32).reshape(40, 60))
    return tmp_path


def write_csv(path, *lines):
    path.write_text("input_image_path,dof_cond,N,fmm,f35mm,s1,target_image_path,depth_map_path,fg_mask_path,captions\n" + "\n".join(lines))
    return path


def test_table_becomes_manifest_becomes_photos(pictures):
    table = write_csv(
        pictures / "t.csv",
        "a.png,12.5,,,,,target.png,,,one | two",
        "b.png,,2,50,75,1.8,,depth.npz,mask.png,",
        ",3,,,,,,,,",
        "b.png,,2,50,75,0.05,,,,",  # the focus distance is the focal length: no K
        "missing.png,,2,50,,1.8,,,,",
    )
    count, skipped = write_manifest(table, pictures / "out" / "m.jsonl")
    assert count == 2 and [line.split(":")[0] for line in skipped] == ["line 4", "line 5", "line 6"]
    paired, sharp = read_photos(pictures / "out" / "m.jsonl")
    assert paired.target.samefile(pictures / "target.png") and paired.captions == ("one", "two") and not paired.render
    assert paired.k == pytest.approx(12.5 * 512 / 60)
    assert sharp.render and sharp.depth and sharp.mask and not sharp.target
    assert sharp.k == pytest.approx(dof_cond(2, 50, 75, 1.8, 60, 40) * 512 / 60 / 1.5)  # divided by the crop factor


def test_strict_names_file_and_line(pictures):
    with pytest.raises(BokehError, match=r"t\.csv, line 3: .*dof_cond"):
        write_manifest(write_csv(pictures / "t.csv", "a.png,3,,,,,,,,", "b.png,abc,,,,,,,,"), pictures / "m.jsonl", strict=True)
    assert not (pictures / "m.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"input_image_path\n", b"\xff\xfe\x00junk"])
def test_a_table_without_records_is_refused(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(BokehError, match=r"t\.csv"):
        write_manifest(tmp_path / "t.csv", tmp_path / "m.jsonl")


def test_record_defaults(pictures):
    record = build_record({"input_image_path": "a.png", "dof_cond": "2", "foreground_clear": "maybe", "fmm": "35", "f35mm": "0"}, pictures)
    assert record["input_image_path"] == str(pictures / "a.png") and record["foreground_clear"] is False
    assert record["camera_anns"] == {"dof-cond": 2.0, "fmm": 35.0, "f35mm": 35.0}
    sizes = {"input_image_path": "a.png", "N": "2", "fmm": "50", "s1": "2"}
    wide = build_record(sizes | {"image_width": "120.9"}, pictures)["camera_anns"]["dof-cond"]  # the height comes from the file
    assert wide == pytest.approx(dof_cond(2, 50, 50, 2, 120, 40))


def test_a_record_whose_files_are_gone_is_refused(pictures):
    write_manifest(write_csv(pictures / "t.csv", "a.png,3,,,,,target.png,,,"), pictures / "m.jsonl")
    (pictures / "target.png").unlink()
    with pytest.raises(BokehError, match=r"record 1.*target\.png"):
        read_photos(pictures / "m.jsonl")


def test_stacks_need_depth(pictures):
    stack = BokehStack(torch.rand(3, 40, 60), torch.rand(2, 3, 40, 60), [10.0, 20.0])
    manifest = save_stack(pictures / "run", stack)
    with pytest.raises(BokehError, match="no depth map"):
        read_stack_truths(manifest)
    entry = json.loads(manifest.read_text()) | {"gt_depth": "../depth.npz", "mask": "../mask.png"}
    manifest.write_text(json.dumps(entry) + "\n")
    (truth,) = read_stack_truths(manifest)
    assert truth.entry == 0 and read_depth(truth.depth).shape == (40, 60) and truth.mask.is_file()
    np.savez(pictures / "depth.npz", depth=np.zeros((2, 3, 4)))
    with pytest.raises(BokehError, match=r"\[2, 3, 4\]"):
        read_depth(truth.depth)


def scene(leaks: int):
    """A wall at 8 m and a subject at 2 m, whose mask holds some pixels of the wall too."""
    rng = np.random.default_rng(0)
    depth = rng.uniform(8, 8.5, (50, 40)).astype(np.float32)
    subject = np.zeros((50, 40), bool)
    subject[10:40, 10:30] = True
    depth[subject] = rng.uniform(1.9, 2.1, 600)
    rows, columns = subject.nonzero()
    depth[rows[:leaks], columns[:leaks]] = 8.2
    return depth, subject


def test_a_flat_subject_is_sharp_at_its_own_place():
    depth, subject = scene(leaks=18)
    placed = focused_disparity(depth, subject)
    blur = np.abs(placed.defocus(30))
    assert placed.flat and placed.focus > 0.85 and (blur[subject] == 0).mean() == pytest.approx(0.96, abs=0.01)
    assert np.median(blur[~subject]) > 25  # the wall is as blurred as K says


def test_published_focus_of_a_flat_subject():
    """It is put at the far end of the picture, so that the wall behind is hardly blurred, and as if it were in front."""
    depth, subject = scene(leaks=0)
    ours, published = (focused_disparity(depth, subject, quirks) for quirks in (BEST, AS_PUBLISHED))
    assert ours.focus > 0.85 and published.focus < 0.1
    assert np.abs(published.defocus(30))[~subject].max() < 5 and not published.defocus(30)[subject & (depth <= 2.08)].any()


def test_holes_no_depth_and_no_subject():
    depth = np.full((8, 8), 2.0, np.float32)
    for none in (depth, np.zeros_like(depth), np.full_like(depth, np.nan)):
        placed = focused_disparity(none)
        assert (placed.disparity == 0.5).all() and placed.focus == 0.5 and not placed.defocus(30).any()
    assert not focused_disparity(depth, np.ones((8, 8), bool)).defocus(30).any()
    depth[:, :4], depth[0, 0], depth[1, 1] = 1.0, np.inf, 0.0
    placed = focused_disparity(depth)
    assert placed.disparity[0, 0] == placed.disparity[1, 1] == 0  # the median of the others: 30 near, 32 far
    far = np.geomspace(1, 100, 64, dtype=np.float32).reshape(8, 8)  # a subject as deep as the picture is not flattened
    placed = focused_disparity(far, np.ones((8, 8), bool))
    assert not placed.flat and placed.disparity.max() == pytest.approx(1) and placed.disparity.min() == 0
