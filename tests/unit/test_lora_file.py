"""MagicBokeh's file: as released and as converted, complete, altered and mistaken for another. Parity: lora_pkl_bytes_*."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bokeh_core import cli
from bokeh_core.errors import BokehError
from bokeh_core.samplers.magicbokeh import lora_file
from bokeh_core.samplers.magicbokeh.lora_file import convert, read_magicbokeh
from tests.stand_ins.lora_pkl import CONFIG, DECODER, ENCODER, lora_content, write_lora

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "magicbokeh"
TABLES = {"unet": "state_dict_unet", "vae": "state_dict_vae", "processors": "processor_state_dict", "controlnet": "controlnet"}


@pytest.fixture
def pkl(tmp_path):
    return tmp_path / "lora.pkl"


def manifest(name):
    path = REFERENCE / f"keys_lora_pkl_{name}.json"
    if not path.is_file():
        pytest.skip(f"THE MANIFEST IS MISSING: {path}")
    return json.loads(path.read_text())


def assert_holds(file, content):
    for field, entry in TABLES.items():
        table = getattr(file, field)
        assert table.keys() == content[entry].keys()
        assert all(torch.equal(table[name], content[entry][name]) for name in table)
    assert (file.rank_unet, file.rank_vae, file.rank_bokeh) == (3, 2, 5)
    assert (file.encoder_modules, file.decoder_modules) == (ENCODER, DECODER)
    assert file.controlnet_config == {**CONFIG, "block_out_channels": [8, 16]}


def test_both_forms_hold_the_same(pkl, tmp_path, capsys):
    content = write_lora(pkl)
    assert_holds(read_magicbokeh(pkl), content)
    target = tmp_path / "magicbokeh.safetensors"
    assert cli.main(["models", "convert", str(pkl), str(target)]) == 0
    assert "ranks 3 (UNet), 2 (VAE), 5 (bokeh)" in capsys.readouterr().out
    assert_holds(read_magicbokeh(target), content)
    assert {path.name for path in tmp_path.iterdir()} == {"lora.pkl", "magicbokeh.safetensors"}
    with safe_open(target, "pt") as file:
        assert file.metadata()["format"] == "magicbokeh" and json.loads(file.metadata()["rank_bokeh"]) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(pkl, tmp_path, dtype):
    content = lora_content()
    for entry in TABLES.values():
        content[entry] = {name: tensor.to(dtype) for name, tensor in content[entry].items()}
    write_lora(pkl, content)
    convert(pkl, tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in read_magicbokeh(tmp_path / "x.safetensors").unet.values()} == {dtype}


def test_published_names_with_any_rank(pkl):
    """All names of the manifests, with small shapes, through the file; the sizes are the next test's."""
    lists = manifest("module_lists")
    for ranks in ((4, 4, 128), (64, 16, 64)):
        content = lora_content(
            ranks,
            lists["unet_lora_encoder_modules"],
            lists["unet_lora_decoder_modules"],
            lists["vae_lora_encoder_modules"],
            [name for name, *_ in manifest("controlnet")],
        )
        write_lora(pkl, content)
        file = read_magicbokeh(pkl)
        assert (file.rank_unet, file.rank_vae, file.rank_bokeh) == ranks
        for field, entry in TABLES.items():
            published = [name for name, *_ in manifest(entry)]
            assert sorted(getattr(file, field)) == sorted(published), entry
        assert [len(getattr(file, field)) for field in TABLES] == [366, 64, 72, 250]
        assert len(file.encoder_modules) == 70 and len(file.decoder_modules) == 112


def test_published_shapes_with_any_rank(pkl):
    """The check of a file at full size, on tensors without memory."""
    small = read_magicbokeh(write_lora(pkl) and pkl)
    lists = manifest("module_lists")
    for ranks in ((4, 4, 128), (64, 16, 64)):
        sizes = dict(zip(("rank_unet", "rank_vae", "rank_bokeh"), ranks, strict=True))
        tables = {
            field: {name: torch.empty([sizes.get(number, number) for number in shape], device="meta") for name, shape, _ in manifest(entry)}
            for field, entry in TABLES.items()
        }
        full = replace(
            small,
            **sizes,
            **tables,
            encoder_modules=lists["unet_lora_encoder_modules"],
            decoder_modules=lists["unet_lora_decoder_modules"],
        )
        lora_file._check(pkl, full)
        with pytest.raises(BokehError, match=rf"rank_vae is 5, but its LoRA tensors have rank {ranks[1]};"):
            lora_file._check(pkl, replace(full, rank_vae=5))
        count = sum(tensor.numel() for name, tensor in full.unet.items() if "lora_" in name)
        assert count == 821_800 * ranks[0] and sum(tensor.numel() for tensor in full.controlnet.values()) == 247_105_040


def without(table, name):
    return {key: value for key, value in table.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: without(c, "state_dict_vae"), r"is not MagicBokeh's lora\.pkl: it lacks state_dict_vae .*found: controlnet"),
        (lambda c: c | {"rank_unet": 4}, r"rank_unet is 4, but its LoRA tensors have rank 3;"),
        (lambda c: c | {"state_dict_attn": {}}, r"state_dict_attn is dict, but .* rank 5"),
        (lambda c: c | {"rank_vae": True}, r"rank_vae is bool, but"),
        (lambda c: c | {"state_dict_unet": without(c["state_dict_unet"], "conv_in.base_layer.bias")}, r"lacks conv_in\.base_layer\.bias"),
        (lambda c: c | {"state_dict_unet": c["state_dict_unet"] | {"more": torch.ones(1)}}, r"'state_dict_unet' has the unexpected more;"),
        (
            lambda c: c | {"state_dict_unet": without(c["state_dict_unet"], "conv_out.lora_B.default_decoder.weight")},
            r"'state_dict_unet' lacks conv_out\.lora_B\.default_decoder\.weight",
        ),
        (
            lambda c: c | {"state_dict_vae": without(c["state_dict_vae"], "quant_conv.lora_A.default_encoder.weight")},
            r"only one of their two tensors, for example quant_conv",
        ),
        (
            lambda c: c | {"processor_state_dict": dict(list(c["processor_state_dict"].items())[1:])},
            r"'processor_state_dict' lacks up_blocks\.1\.attentions\.0",
        ),
        (lambda c: c | {"state_dict_vae": [1, 2]}, r"'state_dict_vae' is not a table of tensors"),
        (lambda c: c | {"unet_lora_encoder_modules": [1]}, r"'unet_lora_encoder_modules' is not a list of module names"),
        (lambda c: c | {"vae_lora_encoder_modules": "all"}, r"'vae_lora_encoder_modules' is not a list of module names"),
        (
            lambda c: c | {"state_dict_unet": c["state_dict_unet"] | {"conv_out.lora_B.default_decoder.weight": torch.ones(2)}},
            r"conv_out\.lora_B\.default_decoder\.weight has shape \[2\]",
        ),
        (
            lambda c: c | {"processor_state_dict": {name: torch.ones(()) for name in c["processor_state_dict"]}},
            r"has shape \[\]",
        ),
        (lambda c: c | {"controlnet": {}}, r"its ControlNet has no tensors"),
    ],
)
def test_files_that_do_not_agree_with_themselves(pkl, change, message):
    write_lora(pkl, change(lora_content()))
    with pytest.raises(BokehError, match=rf"lora\.pkl.*{message}"):
        read_magicbokeh(pkl)


def test_controlnet_that_is_no_object(pkl):
    torch.save(lora_content(), pkl)
    with pytest.raises(BokehError, match="'controlnet' is not a ControlNet saved with its settings"):
        read_magicbokeh(pkl)


def test_other_files_are_refused(tmp_path):
    torch.save({"model": {"pretrained.cls_token": torch.ones(2)}}, tmp_path / "DAdepth.pth")
    with pytest.raises(
        BokehError, match=r"DAdepth\.pth is not MagicBokeh's lora\.pkl.*found: model\).*huggingface\.co/LinxiaoShi/Magicbokeh"
    ):
        read_magicbokeh(tmp_path / "DAdepth.pth")
    save_file({"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, str(tmp_path / "bokehdiff.safetensors"))
    with pytest.raises(BokehError, match=r"bokehdiff\.safetensors is not MagicBokeh's file .*unet\.conv_in\.lora_A\.weight.*convert"):
        read_magicbokeh(tmp_path / "bokehdiff.safetensors")
    torch.save([torch.ones(2)], tmp_path / "list.pkl")
    with pytest.raises(BokehError, match="found: list"):
        read_magicbokeh(tmp_path / "list.pkl")
    (tmp_path / "pointer.pkl").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BokehError, match="Git LFS pointer"):
        read_magicbokeh(tmp_path / "pointer.pkl")


@pytest.mark.parametrize("damage", [{"rank_unet": "three"}, {"rank_vae": None}, {"encoder_modules": "[" * 100_000}, {"rank_unet": "7"}])
def test_converted_file_that_was_altered(pkl, tmp_path, damage):
    write_lora(pkl)
    target = tmp_path / "magicbokeh.safetensors"
    convert(pkl, target)
    with safe_open(target, "pt") as file:
        metadata = {name: value for name, value in {**file.metadata(), **damage}.items() if value is not None}
    save_file(load_file(target), str(tmp_path / "altered.safetensors"), metadata)
    with pytest.raises(BokehError, match=r"altered\.safetensors"):
        read_magicbokeh(tmp_path / "altered.safetensors")


def test_convert_leaves_nothing_half_done(pkl, tmp_path, monkeypatch, capsys):
    write_lora(pkl)
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(BokehError, match=r"out\.safetensors exists already"):
        convert(pkl, target)
    assert target.read_bytes() == b"mine"
    target.unlink()
    with pytest.raises(BokehError, match="could not be written"):
        convert(pkl, tmp_path / "no folder" / "x.safetensors")
    real = lora_file._same
    monkeypatch.setattr(lora_file, "_same", lambda one, other: False)
    with pytest.raises(BokehError, match="does not hold what was written"):
        convert(pkl, target)
    monkeypatch.setattr(lora_file, "_same", real)
    assert {path.name for path in tmp_path.iterdir()} == {"lora.pkl"}
    pkl.write_bytes(pkl.read_bytes()[:-100])
    assert cli.main(["models", "convert", str(pkl), str(target)]) == 2
    assert re.search(r"lora\.pkl .*neither a safetensors nor a complete PyTorch file", capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"lora.pkl"}


def test_not_a_number_survives(pkl, tmp_path):
    content = lora_content()
    content["state_dict_vae"]["quant_conv.lora_A.default_encoder.weight"][0, 0] = float("nan")
    write_lora(pkl, content)
    convert(pkl, tmp_path / "x.safetensors")
