"""Reading checkpoints: honest files of every container, damaged, mistaken and hostile ones."""

import json
import pickle
import random
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save, save_file

from bokeh_core.checkpoints.reading import container, read_checkpoint, strip_prefix
from bokeh_core.errors import BokehError

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3, dtype=torch.float16), "n": torch.tensor(7)}


def equal(found, wanted=TENSORS):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def safetensors_bytes(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin", "no-suffix"])
def test_containers_are_told_by_content(tmp_path, name):
    path = tmp_path / name
    save_file(TENSORS, str(path), {"made by": "me"})
    assert container(path) == "safetensors"
    assert equal(read_checkpoint(path).tensors) and read_checkpoint(path).metadata == {"made by": "me"}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(TENSORS, path, **options)
        assert container(path) == "torch" and equal(read_checkpoint(path).tensors)
    for key in ("model", "state_dict"):
        torch.save({key: TENSORS, "epoch": 3, "optimizer": {"state": {}}}, path)
        assert equal(read_checkpoint(path).tensors) and read_checkpoint(path).container == key


def test_prefix():
    assert strip_prefix({"m.a": 1, "m.b": 2}, "m.") == {"a": 1, "b": 2}
    assert strip_prefix({"m.a": 1, "b": 2}, "m.") == {"m.a": 1, "b": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"neither a safetensors nor a complete PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"GGUF" + b"\0" * 100, "neither"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8), "damaged safetensors"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, b"\0" * 12), "damaged safetensors"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [10**5, 10**5], "data_offsets": [0, 4 * 10**10]}}), "damaged safetensors"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}), "damaged safetensors"),
        (safetensors_bytes({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "damaged safetensors"),
        (
            safetensors_bytes(
                {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in (("a", [0, 8]), ("b", [4, 12]))}, b"\0" * 12
            ),
            "damaged safetensors",
        ),
        (struct.pack("<Q", 1 << 50) + b"{}" + b" " * 100, "damaged safetensors"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "damaged safetensors"),
        (safetensors_bytes(b"{" + b'"a":[' * 10000), "damaged safetensors"),
        (safetensors_bytes(b"{\xff\xfe}"), "damaged safetensors"),
        (safetensors_bytes({}), "holds no tensors"),
        (b"\x80\x02}q\0.", "damaged PyTorch file|holds no table"),
        (b"\x80\x02" + b"(" * 1000, "damaged PyTorch file"),
    ],
)
def test_damaged_and_mistaken_files(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(BokehError, match=message):
        read_checkpoint(tmp_path / "file")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BokehError, match="There is no file"):
            read_checkpoint(path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_live_objects_are_refused(tmp_path, options):
    torch.save({"model": TENSORS, "options": Namespace(epochs=3)}, tmp_path / "options", **options)
    with pytest.raises(BokehError, match="holds Python objects beside its tensors"):
        read_checkpoint(tmp_path / "options")
    torch.save({"model": TENSORS, "x": Touch(tmp_path / "canary")}, tmp_path / "evil", **options)
    with pytest.raises(BokehError, match=r"holds Python objects beside its tensors|is unsafe"):
        read_checkpoint(tmp_path / "evil")
    (tmp_path / "evil").write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
    with pytest.raises(BokehError):
        read_checkpoint(tmp_path / "evil")
    assert not (tmp_path / "canary").exists()


def test_other_contents(tmp_path):
    torch.save([1, 2], tmp_path / "x")
    with pytest.raises(BokehError, match=r"no table of tensors \(found: list\)"):
        read_checkpoint(tmp_path / "x")
    torch.save({"epoch": 1}, tmp_path / "x")
    with pytest.raises(BokehError, match=r"no table of tensors \(found: entries epoch\)"):
        read_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_numbers_that_are_claimed_but_not_there(tmp_path, options):
    torch.save({"a": torch.ones(1).expand(100_000, 100_000)}, tmp_path / "x", **options)
    with pytest.raises(BokehError, match=r"claims .*\[100000, 100000\]"):
        read_checkpoint(tmp_path / "x")


def test_bookkeeping_beside_the_tensors(tmp_path):
    """What training scripts store and torch's own restricted reader takes."""
    more = {"size": torch.Size([2]), "device": torch.device("cpu"), "dtype": torch.float16, "best": 1e-3, "seen": {1, 2}, "raw": b"abc"}
    torch.save({"model": TENSORS, **more, "history": [OrderedDict(loss=1.0), (1, None, True)], "c": 1j}, tmp_path / "x")
    assert equal(read_checkpoint(tmp_path / "x").tensors)
    assert torch.load(tmp_path / "x", weights_only=True)["model"].keys() == TENSORS.keys()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_fuzzed_files_raise_only_readable_errors(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "safetensors":
        data = save(TENSORS, {"made by": "me"})
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")
        data = path.read_bytes()
    random_, refusals = random.Random(11), 0
    program = range(len(data))
    if kind == "zip":
        with zipfile.ZipFile(path) as file:
            start = data.index(file.read("x/data.pkl"))
            program = range(start, start + file.getinfo("x/data.pkl").file_size)
    for round_ in range(300):
        altered = bytearray(data)
        if round_ % 5 == 0:
            altered = altered[: random_.randrange(len(data))]
        for _ in range(round_ % 4):
            place = random_.choice(program) if round_ % 2 else random_.randrange(len(data))
            if place < len(altered):
                altered[place] ^= 1 << random_.randrange(8)
        path.write_bytes(bytes(altered))
        try:
            read_checkpoint(path)
        except BokehError as error:
            refusals += 1
            assert "x" in str(error)
    assert 50 < refusals < 300
    assert {one.name for one in tmp_path.iterdir()} == {"x"}
