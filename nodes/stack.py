"""Nodes for bokeh stacks: one scene sharp and with several strengths of blur, generated, rendered or photographed."""

import os
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics.defocus import Defocus as CoreDefocus
from ..bokeh_core.optics.lens import Lens as CoreLens
from ..bokeh_core.optics.stack import BokehStack, thin_lens_k
from ..bokeh_core.samplers.kontext_stack import recipe
from . import host, inputs
from .schema import Defocus, Lens, Stack, choice, files, known, number, whole

FILE, FOLDERS = "bokeh_lora.bin", ("loras", "model_patches")
BEST, AS_PUBLISHED = "best", "as published"
FIDELITIES = {BEST: recipe.BEST, AS_PUBLISHED: recipe.AS_PUBLISHED}
COLOURS = ("off", "mean", "mean and contrast")
BY_FIDELITY = "by fidelity"
TYPED, CAMERA, EXIF = "typed", "f-numbers", "EXIF"
WHOLE_RANGE, DIOPTRE = "whole depth range", "dioptre (1/m)"

_K_TIP = (
    "One picture for each K, parted by commas. K is the blur radius in pixels, for a picture 512 pixels wide, "
    "between the sharp plane and the other end of the depth range."
)


def _k_values(tooltip, **more):
    return known(io.String.Input, "k_values", default="10, 20, 30", tooltip=tooltip, **more)


def _adapters():
    """Local files, the likely ones first."""
    return sorted(host.model_files(*FOLDERS), key=lambda name: ("bokeh" not in name.lower(), name))


class BokehStackAdapter(io.ComfyNode):
    """FLUX.1-Kontext learns what K means."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehStackAdapter",
            display_name="Bokeh Stack Adapter",
            category="bokeh/stack",
            description="Attaches the BokehDepth adapter to a FLUX.1-Kontext model, so that it blurs by a number K. Works with fp8, GGUF "
            "and partly loaded models alike: it never touches their weights. Connect the result to Generate Bokeh Stack.",
            search_aliases=["bokehdepth", "bokeh lora", "kontext", "flux", "dof_cond", "defocus stack"],
            inputs=[
                known(io.Model.Input, "model", tooltip="FLUX.1-Kontext-dev from Load Diffusion Model or a GGUF loader."),
                known(
                    io.String.Input,
                    "k_values",
                    default="20",
                    tooltip="For ordinary samplers: one K (1 to 30) for all pictures, or one for each of the batch, "
                    "parted by commas. Generate Bokeh Stack brings its own list.",
                ),
                files("adapter", _adapters(), f"{FILE} of BokehDepth, in models/loras or models/model_patches. It is no ordinary LoRA."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the adapter; the one connected is left as it is.")],
        )

    @classmethod
    def validate_inputs(cls, adapter=None):
        return True  # a file that is not there is explained below

    @classmethod
    def execute(cls, model, adapter=None, k_values="20") -> io.NodeOutput:
        from . import flux

        get = f"put {FILE} of the BokehDepth project (583 MB in 32 bit) into models/{FOLDERS[0]}"
        host.chosen(adapter, host.model_files(*FOLDERS), "adapter file", get)
        return io.NodeOutput(flux.attach(model, host.model_path(adapter, *FOLDERS), recipe.parse_k_list(k_values)))


class BokehGenerateStack(io.ComfyNode):
    """A bokeh stack from one picture, without depth."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehGenerateStack",
            display_name="Generate Bokeh Stack",
            category="bokeh/stack",
            description="Makes the same picture with several strengths of blur from one sharp picture, by FLUX.1-Kontext with the "
            "BokehDepth adapter. Needs no depth map; what is sharp is the model's choice. Depth can be measured from the result.",
            search_aliases=["bokehdepth", "focal stack", "defocus stack", "kontext", "depth from defocus", "bokeh"],
            inputs=[
                known(io.Image.Input, "image", tooltip="One sharp photo."),
                known(io.Model.Input, "model", tooltip="FLUX.1-Kontext with its adapter, from Bokeh Stack Adapter."),
                known(io.Clip.Input, "clip", tooltip="clip_l and t5xxl, from Load CLIP (dual) with type flux."),
                known(io.Vae.Input, "vae", tooltip="The FLUX VAE (ae.safetensors)."),
                _k_values(_K_TIP + " The network knows 1 to 30; 10, 20, 30 is the usual stack."),
                whole("steps", recipe.STEPS, 1, 200, 1, "Sampling steps of each picture. 10 for a look, the published run takes 50."),
                number("guidance", recipe.GUIDANCE, 0.0, 100.0, 0.1, "FLUX guidance. The published run takes 7; training was at 1."),
                known(
                    io.Int.Input,
                    "seed",
                    default=recipe.SEED,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise. Every picture of the stack starts from the same noise.",
                ),
                whole(
                    "resolution",
                    512,
                    64,
                    2048,
                    16,
                    "Short side of the generated pictures in pixels. The adapter was trained at 512; sides become multiples of 16.",
                ),
                choice(
                    "fidelity",
                    FIDELITIES,
                    "best: the picture's own shape, colours matched without raising contrast. as published: squashed to a square, mean and "
                    "contrast of the colours matched, noise and K rounded to 16 bit.",
                ),
                known(
                    io.Combo.Input,
                    "colours",
                    options=[BY_FIDELITY, *COLOURS],
                    default=BY_FIDELITY,
                    optional=True,
                    advanced=True,
                    tooltip="Colour transfer from the photo to each picture. mean: only the average. mean and contrast: also the spread, "
                    "which makes strong blur too contrasty. by fidelity: mean for best, mean and contrast for as published.",
                ),
                known(
                    io.String.Input,
                    "prompt",
                    default=recipe.PROMPT,
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="The instruction, as in training. {value} is the K; {aperture} is max(1, 30 / K).",
                ),
            ],
            outputs=_outputs("The blurred pictures, in the order of K, at the generated size."),
        )

    @classmethod
    def execute(
        cls,
        image,
        model,
        clip,
        vae,
        k_values,
        steps,
        guidance,
        seed,
        resolution,
        fidelity,
        colours=BY_FIDELITY,
        prompt=recipe.PROMPT,
    ) -> io.NodeOutput:
        from ..bokeh_core.samplers.kontext_stack.sampler import make_stack
        from . import flux

        flux.require_attached(model)
        k = recipe.parse_k_list(k_values)
        photo, chosen = inputs.one(image), FIDELITIES[fidelity]
        progress = flux.stack_progress(model, len(k), steps)

        def encode(reference, prompts):
            latent = vae.encode(reference.movedim(0, -1)[None])
            return latent, flux.encode_prompts(clip, prompts, guidance, latent)

        def sample(i, positive, noise, sigmas):
            return flux.sample(model, positive, k[i], noise, sigmas, seed, progress(i), chosen.rounding or torch.float32)

        def decode(i, sampled):
            return vae.decode(sampled)[0, ..., :3].movedim(-1, 0).float().clamp(0, 1)

        stack = make_stack(
            photo,
            k,
            encode=encode,
            sample=sample,
            decode=decode,
            fidelity=chosen,
            resolution=resolution,
            steps=steps,
            guidance=guidance,
            seed=seed,
            colour=None if colours == BY_FIDELITY else colours,
            template=prompt,
            device=host.output_device(),
        )
        return _result(stack, cls)


class BokehStackRendered(io.ComfyNode):
    """A bokeh stack by the physical renderer."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehStackRendered",
            display_name="Render Bokeh Stack",
            category="bokeh/stack",
            description="Makes a bokeh stack from one photo with depth, by the physical renderer. Needs no model. "
            "The focus and the lens's looks come from Set Focus and Blur; its strength is replaced by each K.",
            search_aliases=["focal stack", "defocus stack", "aperture series", "bokeh", "depth from defocus"],
            inputs=[
                known(io.Image.Input, "image", tooltip="One sharp photo, the one Set Focus and Blur got."),
                known(Defocus.Input, "defocus", tooltip="From Set Focus and Blur: depth, focus and lens."),
                _k_values(_K_TIP),
                choice(
                    "k_per",
                    [WHOLE_RANGE, DIOPTRE],
                    "What K counts. whole depth range: as the BokehDepth networks were trained. dioptre (1/m): as a real lens does; needs "
                    "depth in metres, and makes depth from this stack metric.",
                ),
            ],
            outputs=_outputs("The blurred pictures, in the order of K, of the photo's size."),
        )

    @classmethod
    def execute(cls, image, defocus, k_values, k_per=WHOLE_RANGE) -> io.NodeOutput:
        from ..bokeh_core.render import activation_bytes
        from ..bokeh_core.render.stack import of_strength, render_stack

        photo, k = inputs.one(image), recipe.parse_k_list(k_values)
        inputs.require(defocus, CoreDefocus, "defocus", "Set Focus and Blur")
        if photo.shape[1:] != defocus.disparity.shape[1:]:
            (h, w), (height, width) = photo.shape[1:], defocus.disparity.shape[1:]
            raise BokehError(f"The image is {w}x{h} px and its defocus {width}x{height} px; connect the same photo to both nodes.")
        per_dioptre = k_per == DIOPTRE
        host.make_room(activation_bytes(*photo.shape[1:], of_strength(defocus, max(k), per_dioptre=per_dioptre)))
        stack = render_stack(photo, defocus, k, per_dioptre=per_dioptre, progress=host.progress(), device=host.compute_device())
        return _result(stack, cls)


class BokehStackFromImages(io.ComfyNode):
    """A photographer's own series."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehStackFromImages",
            display_name="Bokeh Stack From Images",
            category="bokeh/stack",
            description="Makes a bokeh stack of photos taken from a tripod with the same focus and growing aperture: the most stopped-down "
            "photo is the sharp one. K comes from your numbers, from f-numbers and a real lens, or from the photos' EXIF.",
            search_aliases=["aperture series", "focal stack", "defocus stack", "exif", "bracketing"],
            inputs=[
                known(io.Image.Input, "reference", tooltip="The sharp photo (largest f-number)."),
                known(io.Image.Input, "frames", tooltip="The blurred photos as a batch, of the same view."),
                choice(
                    "k_from",
                    [TYPED, CAMERA, EXIF],
                    "typed: k_values. f-numbers: f_numbers with the connected real lens. EXIF: the camera's data in the files in photos.",
                ),
                _k_values("Used by 'typed': one K for each photo. " + _K_TIP),
                known(
                    io.String.Input,
                    "f_numbers",
                    default="5.6, 2.8, 1.4",
                    tooltip="Used by 'f-numbers': one for each photo, in the order of the frames.",
                ),
                known(
                    io.String.Input,
                    "photos",
                    default="",
                    multiline=True,
                    tooltip="Used by 'EXIF': files in ComfyUI's input folder, one a line, in the frames' order. Only their EXIF is read.",
                ),
                number(
                    "focus_distance",
                    2.0,
                    0.0,
                    100000.0,
                    0.1,
                    "Used by 'f-numbers' and 'EXIF' where lens or file do not tell it: metres from camera to subject. 0: infinity.",
                ),
                known(
                    Lens.Input, "lens", optional=True, tooltip="Used by 'f-numbers': a real lens from Choose Lens; its f-number is ignored."
                ),
            ],
            outputs=_outputs("The blurred photos as they were connected."),
        )

    @classmethod
    def execute(
        cls, reference, frames, k_from=TYPED, k_values="10, 20, 30", f_numbers="", photos="", focus_distance=2.0, lens=None
    ) -> io.NodeOutput:
        inputs.image(frames, "frames")
        if k_from == TYPED:
            k = recipe.parse_k_list(k_values)
        else:
            lenses = _by_number(f_numbers, lens) if k_from == CAMERA else [CoreLens.from_exif(host.input_file(n)) for n in _names(photos)]
            k = [thin_lens_k(one, focus_distance) for one in lenses]
        if len(k) != len(frames):
            raise BokehError(
                f"There are {len(frames)} blurred photos and {len(k)} values of K ({k_from}); give one for each photo, in order."
            )
        pictures = frames[..., :3].movedim(-1, 1)
        return _result(BokehStack(inputs.one(reference, "reference"), pictures, k, per_dioptre=k_from != TYPED, source="photos"), cls)


class BokehSaveStack(io.ComfyNode):
    """A stack on disk."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehSaveStack",
            display_name="Save Bokeh Stack",
            category="bokeh/stack",
            description="Saves a bokeh stack as PNG files with a manifest, in the form BokehDepth's own programs read and write.",
            search_aliases=["export stack", "manifest", "bokehdepth"],
            is_output_node=True,
            inputs=[
                known(Stack.Input, "stack", tooltip="The stack to save."),
                known(
                    io.String.Input,
                    "folder",
                    default="bokeh_stack",
                    tooltip="Name of the new folder below ComfyUI's output folder; a number is appended.",
                ),
            ],
            outputs=[io.String.Output(display_name="manifest", tooltip="Path of the manifest, below the output folder.")],
        )

    @classmethod
    def execute(cls, stack, folder="bokeh_stack") -> io.NodeOutput:
        from ..bokeh_core.stack_files import save_stack

        target = host.new_output_folder(folder)
        manifest = save_stack(target, stack)
        return io.NodeOutput(os.path.relpath(manifest, host.output_folder()), ui=host.preview(stack.frames.movedim(1, -1), cls))


class BokehLoadStack(io.ComfyNode):
    """A stack from disk."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLoadStack",
            display_name="Load Bokeh Stack",
            category="bokeh/stack",
            description="Loads a bokeh stack saved by Save Bokeh Stack or made by BokehDepth's own programs.",
            search_aliases=["import stack", "manifest", "bokehdepth"],
            inputs=[
                known(
                    io.String.Input,
                    "manifest",
                    default="bokeh_stack_00001/manifest.jsonl",
                    tooltip="The manifest (.jsonl or .json) or its folder, below ComfyUI's output or input folder.",
                ),
                whole("entry", 0, 0, 100000, 1, "Which stack, in a manifest that lists several; they count from 0."),
            ],
            outputs=_outputs("The blurred pictures, in the order of K."),
        )

    @classmethod
    def fingerprint_inputs(cls, manifest=None, entry=0):
        if manifest is None:
            return 0.0  # it comes from another node, which runs again when its own inputs change
        try:
            path = host.input_file(manifest, outputs=True)
        except BokehError:
            return 0.0
        return os.path.getmtime(os.path.join(path, "manifest.jsonl") if os.path.isdir(path) else path)

    @classmethod
    def execute(cls, manifest, entry=0) -> io.NodeOutput:
        from ..bokeh_core.stack_files import load_stack

        return _result(load_stack(host.input_file(manifest, outputs=True), entry), cls)


def _outputs(frames):
    return [
        Stack.Output(display_name="stack", tooltip="The sharp picture, the blurred ones and their K."),
        io.Image.Output(display_name="frames", tooltip=frames),
        io.Image.Output(display_name="reference", tooltip="The sharp picture."),
    ]


def _result(stack: BokehStack, node) -> io.NodeOutput:
    frames = stack.frames.movedim(1, -1)
    return io.NodeOutput(stack, frames, stack.reference.movedim(0, -1)[None], ui=host.preview(frames, node))


def _names(text):
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise BokehError("No photo is named; write the files in ComfyUI's input folder into 'photos', one a line.")
    return names


def _by_number(text, lens):
    if lens is None or not lens.is_physical:
        raise BokehError("K from f-numbers needs a real lens; connect Choose Lens with mode 'real lens'.")
    numbers = recipe.parse_k_list(text)
    return [replace(lens, f_number=n) for n in numbers]
