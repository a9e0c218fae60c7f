"""The only file that talks to ComfyUI's services: devices, memory, models and their folders, progress, interruption, previews."""

import os
from dataclasses import replace
from fractions import Fraction

import folder_paths
import torch
from comfy import model_management, model_patcher, ops
from comfy.utils import ProgressBar
from comfy_api.latest import ui

from ..bokeh_core.errors import BokehError


def compute_device() -> torch.device:
    """Where the host wants work to be done."""
    return model_management.get_torch_device()


def output_device() -> torch.device:
    """Where the host wants the results of nodes to lie."""
    return model_management.intermediate_device()


def make_room(size: int) -> None:
    """Ask the host to unload models until `size` bytes are free on the compute device."""
    model_management.free_memory(size, compute_device())


def progress():
    """A progress callback for bokeh_core that moves the node's bar and raises when the user interrupts."""
    bar = ProgressBar(1)

    def step(done: float, total: int) -> None:
        model_management.throw_exception_if_processing_interrupted()  # the bar alone checks too rarely: its updates are throttled
        bar.update_absolute(round(done * 100), total * 100)  # parts of a frame count

    return step


def preview(images: torch.Tensor, node, most: int = 4) -> ui.PreviewImage:
    """Show images [B,H,W,3] on the node: all of them, or `most` spread evenly from the first to the last."""
    return ui.PreviewImage(images[spread(len(images), most)], cls=node)


def spread(count: int, most: int = 4) -> list[int]:
    """All of `count` indices, or `most` spread evenly from the first to the last."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def temporary(images: torch.Tensor, node) -> list[dict]:
    """Save images [B,H,W,3] 0..1 as 8-bit PNG where the front end can fetch them for now: filename, subfolder and type of each."""
    return ui.PreviewImage(images, cls=node).as_dict()["images"]


def video(images: torch.Tensor, rate: float, like=None):
    """A VIDEO of images [B,H,W,3] at `rate` frames per second, or with sound, rate and all else of `like` (the components of a VIDEO)."""
    from comfy_api.latest import InputImpl, Types

    if like is None:
        return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(rate)))
    return InputImpl.VideoFromComponents(replace(like, images=images))


class Managed:
    """A network under ComfyUI's memory management: what loader nodes hand out, alone or inside an object of their own.

    patcher  ComfyUI's handle; the host finds models by this attribute
    dtype    the dtype to compute in (weights may be stored in another one and are cast as they stream)
    """

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        holder = _Holder(network, dtype)
        if hasattr(model_management, "archive_model_dtypes"):  # dynamic VRAM wants to know the intended dtypes
            model_management.archive_model_dtypes(holder)
        patcher = getattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcher)  # rebound at start-up: look it up late
        self.patcher = patcher(
            holder, load_device=model_management.get_torch_device(), offload_device=model_management.unet_offload_device()
        )

    @property
    def network(self) -> torch.nn.Module:
        return self.patcher.model.network

    @property
    def device(self) -> torch.device:
        """Where to send the inputs: the weights come there by themselves."""
        return self.patcher.load_device


class Loaded:
    """A published system of several networks: what its loader node hands out.

    model     the library's model, made of `networks`
    networks  them by name, under the host's memory management; the biggest is "unet"
    """

    def __init__(self, model, networks: dict[str, Managed]):
        self.model, self.networks = model, networks

    @property
    def patcher(self):
        return self.networks["unet"].patcher

    def get_models(self):
        return [managed.patcher for managed in self.networks.values()]


class _Holder(torch.nn.Module):
    """A plain module with a writable `device`, which diffusers' own classes lack and the patcher needs."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.device = torch.device("cpu")

    def get_dtype(self) -> torch.dtype:
        return self.dtype


def managed(build, tensors: dict[str, torch.Tensor], compute_in=(torch.float16, torch.bfloat16, torch.float32)) -> Managed:
    """Build a network from its tensors, in the precision the host and the user's flags ask for.

    build       build(ops, tensors) -> the network with `tensors` as its weights; its leaf layers come from the namespace `ops`
    compute_in  dtypes its arithmetic allows, the preferred one first
    """
    device = model_management.get_torch_device()
    stored = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point() and tensor.ndim > 1), torch.float32)
    count = sum(tensor.numel() for tensor in tensors.values())
    weights = model_management.unet_dtype(device=device, model_params=count, supported_dtypes=list(compute_in), weight_dtype=stored)
    compute = model_management.unet_manual_cast(weights, device, list(compute_in)) or weights
    if compute not in compute_in:
        compute = compute_in[-1]
    operations = ops.disable_weight_init if compute == weights else ops.manual_cast
    tensors = {name: tensor.to(weights) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return Managed(build(operations, tensors), compute)


def casting(build, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Managed:
    """Build a small network that works inside a bigger one: stored in `dtype`, it computes in the dtype of whatever it is given."""
    return Managed(build(ops.manual_cast, {name: tensor.to(dtype) for name, tensor in tensors.items()}), dtype)


def vae_dtype() -> torch.dtype:
    """The dtype the host and the user's flags want for a VAE; not float16, in which Stable Diffusion's VAEs overflow."""
    dtype = model_management.vae_dtype(model_management.get_torch_device(), [torch.bfloat16])
    return torch.float32 if dtype == torch.float16 else dtype


def patched(model, key: str, attachment, inject, eject, wrapper, companions: list):
    """A clone of a core MODEL that calls inject(patcher) and eject(patcher) as it comes and goes, and wrapper around every forward pass.

    attachment  what `model.get_attachment(key)` gives
    companions  patchers to be loaded together with it
    """
    from comfy.patcher_extension import PatcherInjection, WrappersMP

    clone = model.clone()
    clone.set_additional_models(key, companions)
    clone.set_injections(key, [PatcherInjection(inject=inject, eject=eject)])
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, key)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    clone.set_attachments(key, attachment)
    return clone


def sample_euler(model, positive, noise: torch.Tensor, sigmas: torch.Tensor, seed: int, callback, options: dict) -> torch.Tensor:
    """Latents like `noise` by the host's Euler sampler, from noise alone and without CFG. options: transformer_options of this run."""
    from comfy import samplers

    guider = samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    own = model.model_options.get("transformer_options", {})
    guider.model_options = {**model.model_options, "transformer_options": {**own, **options}}
    euler = samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, callback=callback, disable_pbar=True, seed=seed)


def sampling_progress(model, total: int):
    """(done, x0) -> moves the node's bar, shows the picture so far and raises when the user interrupts."""
    import latent_preview

    bar = ProgressBar(total)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def step(done: int, x0: torch.Tensor) -> None:
        model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None)

    return step


def load(models: list[Managed], activations: int) -> None:
    """Bring networks that work together to the compute device, with `activations` bytes left to work in. Call before each phase."""
    model_management.load_models_gpu([model.patcher for model in models], memory_required=activations)


def shrinking(work, size: int, smallest: int = 1):
    """work(size), again with half the size whenever the device runs out of memory, down to `smallest`."""
    while True:
        try:
            return work(size)
        except Exception as error:
            if not _out_of_memory(error) or size <= smallest:
                raise
        model_management.soft_empty_cache()  # outside the except block: the error holds the failed attempt's tensors alive
        size = max(smallest, size // 2)


def _out_of_memory(error: Exception) -> bool:
    test = getattr(model_management, "is_oom", None)  # since 0.17; it also knows the errors of other accelerators
    return test(error) if test else isinstance(error, model_management.OOM_EXCEPTION)


def register_folder(key: str, *suffixes: str) -> None:
    """Make models/KEY a model folder of the host, beside any the user's own settings give it.

    suffixes  of files to list beside those the host knows; "" for names without one
    """
    folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
    paths, known = folder_paths.folder_names_and_paths[key]
    folder_paths.folder_names_and_paths[key] = (paths, {*known, *folder_paths.supported_pt_extensions, *suffixes})


def model_files(*keys: str) -> list[str]:
    """Names of the local model files in the folders of the host, subfolders and the user's extra paths included."""
    known = [key for key in keys if key in folder_paths.folder_names_and_paths]
    return sorted({name for key in known for name in folder_paths.get_filename_list(key)})


def model_path(name: str, *keys: str) -> str:
    """The full path of a file listed by `model_files`. Raises BokehError when it is no longer there."""
    for key in keys:
        path = folder_paths.get_full_path(key, name) if key in folder_paths.folder_names_and_paths else None
        if path:
            return path
    raise BokehError(f"There is no model file '{name}'; put it into models/{keys[0]}, press R to refresh the lists, and choose it again.")


def chosen(name: str | None, found: list[str], what: str, get: str) -> str:
    """`name`, a local model the user chose from `found`. Raises BokehError when it is not there; `get` says what to put where."""
    if name and name in found:
        return name
    missing = f"There is no {what} '{name}'" if name else f"No {what} is installed"
    raise BokehError(f"{missing}: {get}, press R to refresh the lists, and choose it.")


def model_folders(*parts: str) -> list[str]:
    """Names of the folders below models/diffusers, and the user's extra places for it, that hold a network in each of `parts`."""
    found = set()
    for place in folder_paths.get_folder_paths("diffusers"):
        for folder, inner, _ in os.walk(place, followlinks=True):
            if all(part in inner and os.path.isfile(os.path.join(folder, part, "config.json")) for part in parts):
                found.add(os.path.relpath(folder, place).replace(os.sep, "/"))
    return sorted(found)


def model_folder_path(name: str, *parts: str) -> str:
    """The full path of a folder listed by `model_folders(*parts)`. Raises BokehError when it is no longer there."""
    if name in model_folders(*parts):
        for place in folder_paths.get_folder_paths("diffusers"):
            if all(os.path.isdir(os.path.join(place, name, part)) for part in parts):
                return os.path.join(place, name)
    raise BokehError(f"There is no model folder '{name}'; put it into models/diffusers, press R to refresh the lists, and choose it again.")


def input_file(name: str, *, outputs: bool = False) -> str:
    """The full path of a file or folder below the host's input folder (`outputs`: or its output folder), named by the user.

    Raises BokehError when it is not there; names that lead elsewhere count as not there.
    """
    homes = [*([output_folder()] if outputs else []), folder_paths.get_input_directory()]
    for home in map(os.path.realpath, homes if "\0" not in name else ()):  # no name holds a NUL, and Python's own error is no sentence
        path = os.path.realpath(os.path.join(home, name))
        if path.startswith(home + os.sep) and os.path.exists(path):
            return path
    raise BokehError(f"There is no '{name}' in ComfyUI's {'output or ' if outputs else ''}input folder; check the name.")


def output_folder() -> str:
    """The host's output folder."""
    return folder_paths.get_output_directory()


def new_output_folder(name: str) -> str:
    """The path of a folder NAME_00001, NAME_00002, ... below the output folder that is not there yet."""
    folder, stem, number, *_ = folder_paths.get_save_image_path(name, output_folder())  # it refuses names that lead elsewhere
    while os.path.exists(path := os.path.join(folder, f"{stem}_{number:05}")):
        number += 1
    return path
