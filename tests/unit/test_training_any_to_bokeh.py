"""Any-to-Bokeh's three stages on a tiny stand-in: what is trained, that it learns, and that its files load as the released ones do."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from bokeh_core.errors import BokehError
from bokeh_core.media import Picture, write_picture
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.any_to_bokeh import checkpoint, sampler
from bokeh_core.training import settings
from bokeh_core.training.any_to_bokeh import AnyToBokehTask, Data, Model, Options, is_trained, start_unet, start_vae
from bokeh_core.training.any_to_bokeh_clips import Cutouts, Shots, listed_frames, read_list, synthetic_shot, write_list
from tests.stand_ins import any_to_bokeh as stand_in
from tests.stand_ins.training import any_to_bokeh_list, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")
MANIFESTS = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "any2bokeh"
QUICK = Shots(published=True, samples=9)
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("base") / "release", vae=stand_in.VAE | {"layers": 2})


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return any_to_bokeh_list(tmp_path_factory.mktemp("clips"), clips=4)


def task_of(base, clips, **options):
    return AnyToBokehTask(Model(base), Data(clips=clips, **SIZE), Options(**options), 0)


def digest(tensors):
    return {name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors}


# What is trained


def manifest(name):
    path = MANIFESTS / f"keys_{name}.json"
    if not path.is_file():
        pytest.skip("the manifests of the reference are not beside the repository")
    return [(key, shape) for key, shape, _ in json.loads(path.read_text())]


def count_of(entries, stage):
    trained = [shape for name, shape in entries if is_trained(stage, name)]
    return len(trained), sum(int(np.prod(shape)) for shape in trained)


def test_the_stages_train_the_published_tensors():
    unet, vae = manifest("unet"), manifest("vae")
    assert count_of(unet, 1) == (1830, 1_876_296_074)
    tensors, numbers = count_of(unet, 2)
    assert tensors == 636 and numbers == pytest.approx(556.9e6, abs=5e4)
    tensors, numbers = count_of(vae, 3)
    assert tensors == 142 and numbers == pytest.approx(49.98e6, abs=5e3)


def test_the_decoder_has_the_published_names():
    """At full size, on the meta device, and stage 3 trains the same of them; for the UNet see test_any_to_bokeh."""
    vae = {name: torch.empty(shape, device="meta") for name, shape in manifest("vae")}
    decoder = {name.removeprefix("decoder."): tensor for name, tensor in vae.items() if name.startswith("decoder.")}
    network = checkpoint.build_decoder(checkpoint.vae_config(vae), decoder)
    assert sum(is_trained(3, f"decoder.{name}") for name, _ in network.named_parameters()) == 142


def test_plain_stable_video_diffusion_is_a_start(base, clips, tmp_path):
    """Without what Any-to-Bokeh adds, it is added: gates closed, conv_in_mpi a copy, skip connections 1e-5."""
    svd = shutil.copytree(base, tmp_path / "svd")
    shutil.move(svd / "unet" / "unet", svd / "deeper")
    shutil.rmtree(svd / "unet")
    shutil.move(svd / "deeper", svd / "unet")
    for name, added in (("unet", (".fuser.", "conv_in_mpi.")), ("vae", ("skip_conv_",))):
        file = svd / name / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        plain = {key: tensor for key, tensor in tensors.items() if not any(word in key for word in added)}
        assert len(plain) < len(tensors)
        save_file(plain, file)
    before = torch.random.get_rng_state()
    task = task_of(svd, clips, stage=1)
    assert torch.equal(before, torch.random.get_rng_state())
    unet, decoder = task.unet.state_dict(), task.decoder.state_dict()
    assert unet.keys() == load_file(base / "unet/unet/diffusion_pytorch_model.safetensors").keys()
    assert torch.equal(unet["conv_in_mpi.weight"], unet["conv_in.weight"][:, :4])
    assert torch.equal(unet["conv_in_mpi.bias"], unet["conv_in.bias"])
    assert all(float(tensor) == 0 for name, tensor in unet.items() if name.endswith((".alpha_attn", ".alpha_dense")))
    assert all(bool((decoder[f"skip_conv_{i}.weight"] == 1e-5).all()) for i in (1, 2, 3, 4))
    again = task_of(svd, clips, stage=1).unet.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in unet.items())
    task.save(tmp_path)
    checkpoint.read_files(tmp_path, image_encoder=base / "image_encoder")


def test_foreign_files_are_refused(base, clips, tmp_path):
    with pytest.raises(BokehError, match="no video UNet"):
        start_unet({"a.weight": torch.zeros(1)}, {}, 0)
    with pytest.raises(BokehError, match="no video VAE"):
        start_vae({"a.weight": torch.zeros(1)})
    with pytest.raises(BokehError, match="no vae"):
        AnyToBokehTask(Model(base / "unet"), Data(clips=clips, **SIZE), Options(), 0)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ({"height": 40}, {}, "multiples of 16"),
        ({"objects": 3}, {}, "1, 2, 4, 5 or 6"),
        ({"clips": None, "synthetic": 64}, {"frames": 26}, "have 25"),
        ({}, {"frames": 9}, "9 or more"),
        ({"foregrounds": Path()}, {}, "one or the other"),
        ({"clips": None, "backgrounds": Path()}, {}, "name both"),
        ({}, {"stage": 4}, "use 1, 2 or 3"),
    ],
)
def test_nonsense_is_refused_before_anything_is_built(base, clips, data, options, words):
    with pytest.raises(BokehError, match=words):
        AnyToBokehTask(Model(base), Data(**{"clips": clips, **SIZE, **data}), Options(**options), 0)


# Learning

LEARNING = {  # stage: (steps, metric, margin in dB it has to rise by on clips that training never shows)
    1: (20, "latent_snr", 3.0),
    2: (20, "latent_snr", 2.0),
    3: (20, "psnr", 2.0),
}


@pytest.fixture(scope="module", params=LEARNING)
def run(request, tmp_path_factory):
    """A short run of a stage: (stage, task, outcome, folder, hashes before)."""
    from bokeh_core.training.engine import fit

    stage = request.param
    folder = tmp_path_factory.mktemp(f"stage_{stage}")
    recipe = tiny_settings(f"any_to_bokeh_{stage}", folder, steps=LEARNING[stage][0], batch=1, held_out=3, checkpoint_every=1000)
    task = recipe.build()
    before = digest(task.named_parameters())
    return stage, task, fit(task, recipe, folder / "run"), folder, before


def test_the_loss_falls(run):
    _, _, _, folder, _ = run
    entries = [json.loads(line) for line in (folder / "run" / "losses.jsonl").read_text().splitlines()]
    losses = [sum(entry["losses"].values()) for entry in entries if "losses" in entry]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_held_out_clips_come_out_better(run):
    stage, _, outcome, _, _ = run
    _, metric, margin = LEARNING[stage]
    assert outcome.after[metric] >= outcome.before[metric] + margin


def test_only_what_the_stage_trains_changes(run):
    stage, task, _, _, before = run
    after, trained = digest(task.named_parameters()), set()
    for groups in task.groups().values():
        trained |= {name for group in groups for name in group.parameters}
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= trained
    # What never takes part in the result gets no gradient: queries and keys of single-key attention, feed-forwards never called.
    unused = (".attn2.to_q", ".attn2.to_k", ".norm2.", ".ff_k.")
    idle = {name for name in trained - changed if not any(word in name for word in unused)}
    assert not {name for name in idle if task.get_parameter(name).numel() > 1}, stage


def test_its_files_load_as_the_released_ones_do(run):
    _, task, outcome, folder, _ = run
    files = outcome.checkpoint / "files"
    read = checkpoint.read_files(files, image_encoder=folder / "any_to_bokeh/image_encoder", visual=True)
    loaded = checkpoint.load(read)
    batch = default_collate([task.held_out(0)])
    with torch.no_grad():
        ours, residuals = task.predict(batch, sampled=False)
        k_only = loaded["unet"].network(
            *(task.encode(batch[name].expand(-1, -1, 3, -1, -1), None, 0)[0] for name in ("sharp", "difference")),
            task.image_encoder(_prepared(batch, task)),
            batch["k"],
            region=batch["region"][:, :, 0],
            added_ids=torch.tensor([[7.0, 127.0, 0.0]]),
        )
        assert torch.allclose(k_only, ours, atol=1e-5)
        pictures = loaded["decoder"].network(ours[0], [level[0] for level in residuals])
        assert torch.allclose(pictures, task.decode(ours, residuals)[0], atol=1e-5)
    assert {one.name for one in files.iterdir()} == {"unet", "vae"}


def _prepared(batch, task):
    from bokeh_core.samplers.any_to_bokeh.image_encoder import prepare

    return prepare(batch["sharp"].flatten(0, 1), task.image_encoder.size, True)


def test_the_sampler_renders_better_with_the_trained_decoder(run):
    """Through what the node calls, on a clip of held-out frames: 2 dB."""
    stage, task, outcome, folder, _ = run
    if stage != 3:
        pytest.skip("a decoder with random weights shows no picture")
    encoder = folder / "any_to_bokeh/image_encoder"
    sample = task.held_out(1)
    frames = [
        sampler.Frame(picture, difference[0], float(k), region[0])
        for picture, difference, k, region in zip(sample["sharp"], sample["difference"], sample["k"], sample["region"], strict=True)
    ]

    def score(files):
        model = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(files, image_encoder=encoder, visual=True)), visual=True)
        with torch.no_grad():
            error = sampler.whole_shot(model, frames).clamp(-1, 1) - sample["bokeh"]
        return -10 * float((error / 2).square().mean().log10())

    assert score(outcome.checkpoint / "files") >= score(folder / "any_to_bokeh") + 2.0


def test_what_it_is_compared_with(run):
    """The physical renderer on the exact disparity comes closer to the truth than the sharp clip; the task says what it leaves out."""
    stage, task, _, _, _ = run
    rows = [task.baselines(default_collate([task.held_out(i)])) for i in range(3)]
    sharp, physical = (
        float(torch.stack([row[name]["psnr"] for row in rows]).mean()) for name in ("the sharp clip", "the physical renderer")
    )
    assert physical > sharp + 2
    notes = " ".join(task.notes())
    assert "mpi_masks" in notes and ("drawn figures" in notes) == (stage == 1)
    image, disparity = torch.rand(1, 3, 32, 32), torch.rand(1, 32, 32)
    given = Defocus(disparity, torch.tensor([0.5]), torch.tensor([8.0]), Lens(), False)
    assert task.renderer()(image, given).shape == image.shape


# Gradients


def test_gradients_are_those_of_the_published_form(base, clips):
    """The short form without visual tokens against the whole network behind its mask of zeros."""
    task = task_of(base, clips, stage=1, masks=False).requires_grad_(True)
    batch = default_collate([task.sample(0)])
    gradients = []
    for region in (None, torch.full_like(batch["region"][:, :, 0], sampler.ZERO_MASK)):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, 4, 4, 4, 4, generator=generator) for _ in range(2)]
        clip = torch.randn(4, 32, generator=generator)
        task.zero_grad()
        task.unet(*inputs, clip, batch["k"], region=region).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in task.unet.named_parameters() if p.grad is not None})
    short, dense = gradients
    assert len(short) > 400
    largest = max(float(gradient.abs().max()) for gradient in dense.values())
    assert max(float((short[name] - dense[name]).abs().max()) for name in short) < 1e-5 * largest
    assert all(float(dense[name].abs().max()) == 0 for name in dense.keys() - short.keys())  # the visual tokens learn nothing


def test_recomputing_changes_no_gradient(base, clips):
    for stage in (1, 3):
        gradients = []
        for recompute in (False, True):
            task = task_of(base, clips, stage=stage, frames=2, recompute=recompute).requires_grad_(False)
            ((part, (group,)),) = task.groups().items()
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
            sum(task(part, default_collate([task.sample(3)]), 0).values()).backward()
            gradients.append([p.grad for p in group.parameters.values()])
        assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(*gradients, strict=True))


def test_noise_and_batches_are_those_of_the_samples(base, clips):
    """The loss of two samples together is the mean of their losses."""
    task = task_of(base, clips, stage=1, frames=2)
    samples = [task.sample(i) for i in (0, 1)]
    together = float(task("stage_1", default_collate(samples), 0)["mse"])
    apart = [float(task("stage_1", default_collate([one]), 0)["mse"]) for one in samples]
    assert together == pytest.approx(sum(apart) / 2, rel=1e-4)


# Data


def test_samples_depend_on_seed_and_index_alone(base, clips):
    task = task_of(base, clips, stage=2, frames=3)
    first, again, held = task.sample(5), task.sample(5), task.held_out(5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["seed"], held["seed"])
    other = AnyToBokehTask(Model(base), Data(clips=clips, **SIZE), Options(2, frames=3), 1)
    assert not all(torch.equal(first[name], other.sample(5)[name]) for name in first)
    assert first["sharp"].shape == (3, 3, 32, 32) and first["difference"].shape == first["region"].shape == (3, 1, 32, 32)
    assert -1 <= float(first["sharp"].min()) and float(first["sharp"].max()) <= 1


def test_about_half_of_the_frames_are_disturbed_in_stage_2(base, clips):
    clean, disturbed = task_of(base, clips, stage=2, perturbed=0.0), task_of(base, clips, stage=2)
    pairs = [(clean.sample(i), disturbed.sample(i)) for i in range(12)]
    assert all(torch.equal(*(one["bokeh"].flatten().sort().values for one in pair)) for pair in pairs)  # some are mirrored
    differs = [(a["disparity"].sort(-1).values - b["disparity"].sort(-1).values).flatten(1).abs().max(1).values > 0 for a, b in pairs]
    assert 0.1 < float(torch.cat(differs).float().mean()) < 0.7  # clips whose focus moves never are


def test_a_list_reads_back_what_was_made(tmp_path):
    """8 bits, names and masks: a shot from disk is the shot that was written."""
    cutouts = Cutouts(None, None, 64)
    for shots in (replace(QUICK, ramps=1.0, pulls=0.0), replace(QUICK, pulls=1.0), replace(QUICK, pulls=0.0, ramps=0.0)):
        folder = tmp_path / f"{shots.pulls}{shots.ramps}"
        path = write_list(folder, 1, cutouts, size=(32, 48), objects=2, shots=shots, frames=3, seed=4)
        (row,) = read_list(path, 3)
        ours = synthetic_shot(cutouts, shots, (32, 48), 2, (4, 0), 3).frames(shots)
        read = listed_frames(row, 0, 3)
        for name in ("sharp", "bokeh", "disparity"):
            assert float((getattr(read, name) - getattr(ours, name)).abs().max()) <= 0.51 / 255
        assert torch.allclose(read.focus, ours.focus, atol=6e-6) and torch.equal(read.k, ours.k)
        assert (read.mask is None) == (ours.mask is None) and (ours.mask is None or torch.equal(read.mask, ours.mask))
        stamp = (folder / "00000/bokeh").stat().st_mtime_ns
        write_list(folder, 1, cutouts, size=(32, 48), objects=2, shots=shots, frames=3, seed=4)
        assert (folder / "00000/bokeh").stat().st_mtime_ns == stamp  # kept


def test_the_quick_lens_is_the_published_one():
    """Inside the border, where the published tracer loses rays: 40 dB, with four objects."""
    cutouts = Cutouts(None, None, 64)
    shots = Shots(pulls=0.0, ramps=0.0)
    shot = synthetic_shot(cutouts, shots, (64, 96), 4, (0,), 1)
    ours, theirs = (shot.frames(replace(shots, published=published, samples=17)).bokeh for published in (False, True))
    error = (ours - theirs)[..., 20:-20, 20:-20].square().mean()
    assert -10 * float(error.log10()) > 40, (shot.concept, shot.k)


def test_own_cut_outs_and_backgrounds(base, tmp_path):
    """A folder of pictures with alpha, or the published json of moving mattes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("foregrounds", "mattes", "backgrounds"):
        (tmp_path / name).mkdir()
    alpha = torch.zeros(40, 30)
    alpha[5:35, 5:25] = 1
    for i in range(2):
        color = torch.rand(3, 40, 30, generator=generator)
        write_picture(tmp_path / f"foregrounds/{i}.png", Picture(color, alpha))
        write_picture(tmp_path / f"mattes/{i}.png", Picture(alpha.expand(3, -1, -1)))
        write_picture(tmp_path / f"backgrounds/{i}.png", Picture(color))
    clip = {"clip_paths": ["foregrounds/0.png"] * 25, "clip_mask_paths": ["mattes/0.png"] * 25}
    (tmp_path / "mattes.json").write_text(json.dumps({"0": clip}))
    for foregrounds in ("foregrounds", "mattes.json"):
        data = Data(foregrounds=tmp_path / foregrounds, backgrounds=tmp_path / "backgrounds", objects=2, shots=QUICK, **SIZE)
        sample = AnyToBokehTask(Model(base), data, Options(1, frames=2), 0).sample(0)
        assert float((sample["sharp"] - sample["bokeh"]).abs().mean()) > 1e-3
    clip["clip_paths"][3] = "lost.png"
    (tmp_path / "mattes.json").write_text(json.dumps({"0": clip}))
    with pytest.raises(BokehError, match=r"lost\.png"):
        Cutouts(tmp_path / "mattes.json", tmp_path / "backgrounds")
    (tmp_path / "mattes.json").write_text("[]")
    with pytest.raises(BokehError, match="no list of foregrounds"):
        Cutouts(tmp_path / "mattes.json", tmp_path / "backgrounds")
    with pytest.raises(BokehError, match="no alpha channel"):
        Cutouts(tmp_path / "backgrounds", tmp_path / "backgrounds")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("concept_i", "concept"), "without the columns concept_i"),
        (lambda text: text.splitlines()[0], "without rows"),
        (lambda text: text.replace("00000/disp", "nowhere"), "line 2.*'nowhere' is no folder"),
        (lambda text: text.splitlines()[0] + "\n00000/aif,00000/bokeh,00000/disp,00000/mask,4,7", "concept_i is 7"),
        (lambda text: text.splitlines()[0] + "\n00000/aif,00000/bokeh,00000/disp,00000/mask,4,near", "concept_i is 'near'"),
        (lambda text: text.splitlines()[0] + "\n00000/aif,00000/bokeh,00000/disp,00000/mask,much,0", "k is 'much'"),
        (lambda text: text.splitlines()[0] + "\n00000/aif,00000/aif,00000/disp,00000/mask,4,0", "does not name its frame and focus"),
    ],
)
def test_a_bad_list_is_refused(clips, change, words):
    path = clips.with_name("bad.csv")
    path.write_text(change(clips.read_text()))
    with pytest.raises(BokehError, match=words):
        read_list(path, 2)


def test_a_clip_with_a_missing_frame_is_refused(clips, tmp_path):
    shutil.copytree(clips.parent, tmp_path / "clips")
    (tmp_path / "clips/00001/disp/3.png").unlink()
    with pytest.raises(BokehError, match=r"line 3.*7 disparity maps"):
        read_list(tmp_path / "clips/clips.csv", 2)


# Recipes


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_shipped_recipes_are_the_published_ones(stage, tmp_path):
    names = ("stable-video-diffusion-img2vid-xt/image_encoder", "any_to_bokeh_1/steps-50000/files", "any_to_bokeh_2/steps-20000/files")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    for suffix, options in (("", Options(stage)), ("_script", Options.script(stage))):
        file = f"any_to_bokeh_{stage}{suffix}.toml"
        recipe = settings.read(shutil.copy(settings.SHIPPED / file, tmp_path / file))
        assert recipe.options == options and recipe.data == Data()
        assert (recipe.train.batch, recipe.train.accumulate, recipe.train.seed) == (2, 2, 0)
