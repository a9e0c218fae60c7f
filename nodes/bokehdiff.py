"""The nodes of BokehDiff: lens blur in one step of SDXL."""

from comfy_api.latest import io

from ..bokeh_core.checkpoints.catalogue import Entry, entry
from . import host, inputs
from .schema import FIDELITY, BokehDiffModel, Defocus, choice, files, known, seed

BASES = "checkpoints"  # model folder; bases may be diffusers folders too
LORA, ENCODER = entry("bokehdiff"), entry("bokehdiff-vae")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # what is needed of a diffusers folder
GET_BASE = (
    "put a full SDXL checkpoint, best RealVisXL V5.0 (https://huggingface.co/SG161222/RealVisXL_V5.0), as one file into models/checkpoints "
    "or as a diffusers folder into models/diffusers"
)


def _bases() -> list[str]:
    """Folders and files that may hold SDXL, those that say so first."""

    def place(name):
        name = name.lower()
        return "realvis" not in name, "xl" not in name, name

    return sorted([*host.model_folders(*PARTS), *host.model_files(BASES)], key=place)


def _own(published: Entry) -> list[str]:
    """Files that may be BokehDiff's, the likeliest first."""

    def place(name):
        last = name.lower().rpartition("/")[2]
        return "bokehdiff" not in name.lower(), last != published.file, name

    return sorted(host.model_files(published.folder), key=place)


def _chosen(name: str | None, published: Entry, what: str) -> str:
    """The path of one of BokehDiff's own files."""
    get = f"put {published.file} from {published.page} into models/{published.folder}"
    host.chosen(name, host.model_files(published.folder), what, get)
    return host.model_path(name, published.folder)


class BokehLoadBokehDiff(io.ComfyNode):
    """BokehDiff from local files."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLoadBokehDiff",
            display_name="Load BokehDiff",
            category="bokeh/render",
            description="Loads BokehDiff for Render with BokehDiff: an SDXL base model, BokehDiff's LoRA for its UNet and its weights "
            "for the VAE's encoder, put together. Other files are refused.",
            search_aliases=["bokehdiff", "bokeh diff", "sdxl", "realvisxl", "one step bokeh", "lens blur", "loader", "bokeh"],
            inputs=[
                files(
                    "base",
                    _bases(),
                    "A full SDXL checkpoint in models/checkpoints, or a folder in models/diffusers with unet, vae and both text encoders. "
                    "The weights were trained on RealVisXL V5.0; other SDXL models load too and give other results.",
                ),
                files("lora", _own(LORA), f"BokehDiff's LoRA in models/loras: {LORA.file} of the release, variant small."),
                files("encoder", _own(ENCODER), f"BokehDiff's weights for the VAE's encoder in models/vae: {ENCODER.file} of the release."),
            ],
            outputs=[BokehDiffModel.Output(display_name="bokehdiff", tooltip="Connect to Render with BokehDiff.")],
        )

    @classmethod
    def validate_inputs(cls, base=None, lora=None, encoder=None):
        return True  # a file that is not there is explained below

    @classmethod
    def execute(cls, base=None, lora=None, encoder=None) -> io.NodeOutput:
        from ..bokeh_core.samplers.bokehdiff.checkpoint import BokehDiff, read_bokehdiff
        from ..bokeh_core.samplers.bokehdiff.network import build_unet, build_vae

        host.chosen(base, _bases(), "base model", GET_BASE)
        own = [_chosen(lora, LORA, "BokehDiff LoRA"), _chosen(encoder, ENCODER, "BokehDiff encoder")]
        folder = base in host.model_folders(*PARTS)
        path = host.model_folder_path(base, *PARTS) if folder else host.model_path(base, BASES)
        weights = read_bokehdiff(path, *own)
        unet = host.managed(lambda ops, tensors: build_unet(weights.unet.config, tensors, ops), weights.unet.tensors)
        vae = host.casting(lambda ops, tensors: build_vae(weights.vae.config, tensors, ops), weights.vae.tensors, host.vae_dtype())
        return io.NodeOutput(host.Loaded(BokehDiff(unet, vae, weights.text, weights.pooled), {"unet": unet, "vae": vae}))


class BokehDiffRender(io.ComfyNode):
    """Bokeh by a diffusion network that knows how lenses spread light."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehDiffRender",
            display_name="Render with BokehDiff",
            category="bokeh/render",
            description="Renders depth of field with BokehDiff: one step of SDXL whose attention spreads light over circles of confusion. "
            "Forgives poor depth edges and hair better than a pure renderer; redraws the whole picture slightly. The result has exactly "
            "the size of the input. At strength 0 it is the input.",
            search_aliases=[
                *("bokehdiff", "bokeh diff", "bokeh", "dof", "depth of field", "lens blur", "portrait mode", "one step"),
                *("neural lens blur", "diffusion bokeh", "refocus"),
            ],
            inputs=[
                known(
                    io.Image.Input, "image", tooltip="The sharp photo, several, or the frames of a clip; any size. Alpha is kept as it is."
                ),
                known(BokehDiffModel.Input, "bokehdiff", tooltip="From Load BokehDiff."),
                known(
                    Defocus.Input,
                    "defocus",
                    tooltip="Depth, focus and blur strength from the node Set Focus and Blur. The network learnt blur radii "
                    "up to about 90 px.",
                ),
                choice(
                    "fidelity",
                    FIDELITY,
                    "best: repeatable, the same blur at every size, right geometry on pictures that are not square. as published: all "
                    "habits of the authors' script, its random noise included.",
                ),
                seed("Used by 'as published' only, whose attention drops and jitters at random; the authors do not fix it."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The image with bokeh, of the same size.")],
        )

    @classmethod
    def execute(cls, image, bokehdiff, defocus, fidelity, random_seed=0) -> io.NodeOutput:
        from ..bokeh_core.samplers.bokehdiff.sampler import FIDELITIES, render

        count = inputs.scene(image, defocus)
        result = image.new_empty((count, *image.shape[1:]), device=host.output_device())
        result[..., 3:] = image[..., 3:]
        render(
            bokehdiff.model,
            image[..., :3].movedim(-1, 1),
            defocus,
            fidelity=FIDELITIES[fidelity],
            seed=random_seed,
            progress=host.progress(),
            load=host.load,
            shrinking=host.shrinking,
            out=result[..., :3].movedim(-1, 1),
        )
        return io.NodeOutput(result)
