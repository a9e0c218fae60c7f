"""The nodes of Any-to-Bokeh: video bokeh by a video diffusion network in one step."""

import torch
from comfy_api.latest import io

from ..bokeh_core.errors import BokehError
from ..bokeh_core.samplers.any_to_bokeh import mpi
from ..bokeh_core.samplers.any_to_bokeh.preparation import PUBLISHED_SIZE, working_size
from . import host, inputs
from .schema import FIDELITY, AnyToBokehModel, Defocus, choice, files, known, number, seed, switch, whole

FROM_FOLDER = "in the model's folder"
RULES = {"released (focus^1.5)": mpi.RELEASED, "paper (focus)": mpi.PAPER}


def release_folders() -> list[str]:
    """Folders below models/diffusers that hold a vae, and a unet one or two levels deep."""
    with_unet = {short for name in host.model_folders("unet") for short in (name, name.removesuffix("/unet"))}
    return [name for name in host.model_folders("vae") if name in with_unet]


class BokehLoadAnyToBokeh(io.ComfyNode):
    """The networks of Any-to-Bokeh from local files."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLoadAnyToBokeh",
            display_name="Load Any-to-Bokeh",
            category="bokeh/render",
            description="Loads Any-to-Bokeh for Render with Any-to-Bokeh: UNet, VAE and image encoder. The weights are for "
            "non-commercial use.",
            search_aliases=["any2bokeh", "any-to-bokeh", "video bokeh", "svd", "stable video diffusion", "loader", "refocus"],
            inputs=[
                files(
                    "model",
                    [*release_folders(), *host.model_files("diffusion_models")],
                    "The release's folder below models/diffusers (with unet, vae and image_encoder in it), or its UNet as one file in "
                    "models/diffusion_models.",
                ),
                choice(
                    "vae",
                    [FROM_FOLDER, *host.model_files("vae")],
                    "The release's own VAE, which has skip connections: in the model's folder, or a file in models/vae.",
                    optional=True,
                ),
                choice(
                    "image_encoder",
                    [FROM_FOLDER, *host.model_folders("image_encoder"), *host.model_files("clip_vision")],
                    "The CLIP image encoder of Stable Video Diffusion (ViT-H/14): in the model's folder, in another folder below "
                    "models/diffusers, or a file in models/clip_vision.",
                    optional=True,
                ),
                switch(
                    "mpi_masks",
                    "on (experiment)",
                    "off, as released",
                    "Leave it off. On: the network looks at the masks of the paper, which the released code blanks out; nothing shows that "
                    "the released weights learnt to use them.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[AnyToBokehModel.Output(display_name="model", tooltip="Connect to Render with Any-to-Bokeh.")],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return True  # a file that is not there is explained below

    @classmethod
    def execute(cls, model=None, vae=FROM_FOLDER, image_encoder=FROM_FOLDER, mpi_masks=False) -> io.NodeOutput:
        from ..bokeh_core.samplers.any_to_bokeh.checkpoint import ENCODER_SOURCE, SOURCE, read_files
        from ..bokeh_core.samplers.any_to_bokeh.sampler import AnyToBokeh

        folders = release_folders()
        if not model or model not in [*folders, *host.model_files("diffusion_models")]:
            missing = f"There is no '{model}'" if model else "Any-to-Bokeh is not installed"
            raise BokehError(
                f"{missing}: unpack {SOURCE} into models/diffusers/any_to_bokeh, so that unet/unet and vae lie in it, put {ENCODER_SOURCE} "
                "beside them, press R to refresh the lists, and choose the folder."
            )
        home = host.model_folder_path(model, "vae") if model in folders else host.model_path(model, "diffusion_models")
        paths = {
            "vae": None if vae == FROM_FOLDER else host.model_path(vae, "vae"),
            "image_encoder": None if image_encoder == FROM_FOLDER else cls.encoder_path(image_encoder),
        }
        read = read_files(home, **paths, visual=mpi_masks)
        float32_only = (torch.float32,)  # half precision overflows in the encoder; its latents are what the rest is built on
        networks = {
            name: host.managed(build, tensors, float32_only) if name == "encoder" else host.managed(build, tensors)
            for name, (build, tensors) in read.builders().items()
        }
        return io.NodeOutput(host.Loaded(AnyToBokeh(**networks, visual=mpi_masks), networks))

    @classmethod
    def encoder_path(cls, name: str) -> str:
        if name in host.model_folders("image_encoder"):
            return host.model_folder_path(name, "image_encoder")
        return host.model_path(name, "clip_vision")


class AnyToBokehRender(io.ComfyNode):
    """Frames and a defocus become video with bokeh."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="AnyToBokehRender",
            display_name="Render with Any-to-Bokeh",
            category="bokeh/render",
            description="Video bokeh by Any-to-Bokeh, in one step of a video diffusion network: steady over time, any length, focus pulls. "
            "The result has exactly the size and the number of frames of the input. Weights for non-commercial use.",
            search_aliases=["any2bokeh", "any-to-bokeh", "video bokeh", "dof", "depth of field", "refocus", "rack focus", "defocus"],
            inputs=[
                known(AnyToBokehModel.Input, "model", tooltip="From Load Any-to-Bokeh."),
                known(
                    io.MultiType.Input,
                    "frames",
                    [io.Image, io.Video],
                    tooltip="The sharp clip, as frames or as a video, which keeps sound and frame rate. Alpha of frames is kept as it is.",
                ),
                known(
                    Defocus.Input,
                    "defocus",
                    tooltip="Depth, focus and blur of these frames, from Set Focus and Blur. The network learnt strengths up to 32.",
                ),
                choice(
                    "fidelity",
                    FIDELITY,
                    "best: the picture's own shape, every segment by itself, no noise. as published: the released scripts with all "
                    "their habits: squashed to 1024 x 576, segments in pairs, noise in the latents.",
                ),
                whole(
                    "resolution",
                    PUBLISHED_SIZE[1],
                    128,
                    2048,
                    64,
                    "How large the network works: width in pixels of a 16:9 picture; other shapes get the same area. It learnt 1024. "
                    "Less is quicker, needs less memory and loses detail. Not used by 'as published'.",
                    optional=True,
                    advanced=True,
                ),
                switch(
                    "cuts",
                    "found by themselves",
                    "none",
                    "Clips with several shots: frames of different shots are then never mixed. Not used by 'as published'.",
                    optional=True,
                ),
                number(
                    "frame_rate",
                    24.0,
                    1.0,
                    240.0,
                    1.0,
                    "Frames per second of the video made from frames. A connected video keeps its own.",
                    optional=True,
                ),
                seed("Used by 'as published' only: another number gives other noise."),
            ],
            outputs=[
                io.Image.Output(display_name="frames", tooltip="The frames with bokeh, of the same size."),
                io.Video.Output(display_name="video", tooltip="The same as a video, with the sound of a connected video."),
            ],
        )

    @classmethod
    def execute(
        cls, model, frames, defocus, fidelity="best", resolution=PUBLISHED_SIZE[1], cuts=False, frame_rate=24.0, random_seed=0
    ) -> io.NodeOutput:
        from ..bokeh_core.samplers.any_to_bokeh.sampler import FIDELITIES, render

        parts = frames.get_components() if hasattr(frames, "get_components") else None
        image = frames if parts is None else parts.images
        count = inputs.scene(image, defocus)
        height, width = image.shape[1:3]
        pictures, chosen = image[..., :3].movedim(-1, 1), FIDELITIES[fidelity]
        size = PUBLISHED_SIZE if chosen.fixed_size else working_size(height, width, resolution)
        shots = (0,)
        if cuts and not chosen.across_cuts:
            from ..bokeh_core.video.stabilisation import find_shots

            shots = tuple(find_shots(pictures))
        host.load(list(model.networks.values()), model.model.activation_bytes(*size))
        result = image.new_empty((count, *image.shape[1:]), device=host.output_device())
        result[..., 3:] = image[..., 3:]
        render(
            model.model,
            pictures,
            defocus,
            fidelity=chosen,
            resolution=resolution,
            seed=random_seed,
            shots=shots,
            progress=host.progress(),
            shrinking=host.shrinking,
            out=result[..., :3].movedim(-1, 1),
        )
        return io.NodeOutput(result, host.video(result[..., :3], frame_rate, like=parts))


class BokehMPIMasks(io.ComfyNode):
    """How far pixels lie from the focus, in four steps."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehMPIMasks",
            display_name="Make Multi-Plane Masks",
            category="bokeh/optics",
            description="Splits a picture into four planes by the distance of its depth from the focus, as Any-to-Bokeh's paper does: a "
            "mask of what is near the focus, as wide as you like. For selective work on what is in or out of focus.",
            search_aliases=["mpi", "multi-plane image", "focus mask", "depth mask", "depth layers", "any2bokeh"],
            inputs=[
                known(Defocus.Input, "defocus", tooltip="Depth and focus, from Set Focus and Blur."),
                whole(
                    "level",
                    0,
                    0,
                    mpi.PLANES - 1,
                    1,
                    "How many planes the mask takes in beside the one in focus: 0 the narrowest, 3 everything.",
                ),
                choice(
                    "rule",
                    RULES,
                    "How the borders of the planes depend on the focus. With a far focus (small depth value) the planes become narrow, "
                    "in the released rule more so than in the paper's.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White from the plane in focus up to the chosen level."),
                io.Image.Output(display_name="planes", tooltip="All four planes: black is in focus, white the farthest from it."),
            ],
        )

    @classmethod
    def execute(cls, defocus, level, rule) -> io.NodeOutput:
        region = mpi.regions_of(defocus, RULES[rule])
        planes = (region.float() / (mpi.PLANES - 1))[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(mpi.masks(region, level), planes.contiguous())
