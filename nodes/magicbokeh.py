"""The nodes of MagicBokeh: bokeh and restoration of a photo in one diffusion step."""

from comfy_api.latest import io

from ..bokeh_core.checkpoints.catalogue import entry
from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics.defocus import fit_disparity
from . import host, inputs
from .schema import FIDELITY, Defocus, MagicBokehModel, choice, files, known, number, seed

BASES = "checkpoints"  # model folder; bases may be diffusers folders too
OWN = entry("magicbokeh")
PARTS = ("unet", "vae")  # what is needed of a diffusers folder
GET_BASE = (
    "put the folder stable-diffusion-2-1-base (its unet, vae and scheduler; https://huggingface.co/Manojb/stable-diffusion-2-1-base) into "
    "models/diffusers, or v2-1_512-ema-pruned.safetensors into models/checkpoints"
)
GET_OWN = f"put {OWN.file} from {OWN.page} into models/{OWN.folder}"
MODES = ("exact", "fast")
COLOUR_FIXES = ("in-focus parts", "whole picture", "wavelet", "none")


def _bases() -> list[str]:
    """Folders and files that may hold SD 2.1, those that say so first."""

    def other(name):
        name = name.lower().replace(".", "-").replace("_", "-")
        return not any(words in name for words in ("2-1-base", "2-1-512", "21-base"))

    return sorted([*host.model_folders(*PARTS), *host.model_files(BASES)], key=lambda name: (other(name), name))


def _own() -> list[str]:
    """Files that may be MagicBokeh's, the converted one first, then the released one."""

    def place(name):
        last = name.lower().rpartition("/")[2]
        return last != "magicbokeh.safetensors", last != OWN.file, "magicbokeh" not in name.lower(), name

    return sorted(host.model_files(OWN.folder), key=place)


class BokehLoadMagicBokeh(io.ComfyNode):
    """MagicBokeh from local files."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLoadMagicBokeh",
            display_name="Load MagicBokeh",
            category="bokeh/render",
            description="Loads MagicBokeh for Render with MagicBokeh: Stable Diffusion 2.1-base and MagicBokeh's own file, put together. "
            "The files are read as data; nothing in them is run. Other files are refused.",
            search_aliases=["magicbokeh", "magic bokeh", "stable diffusion 2.1", "one step bokeh", "loader", "bokeh", "restoration"],
            inputs=[
                files(
                    "base",
                    _bases(),
                    "Stable Diffusion 2.1-base (the 512 px model, not the 768 px one): a folder in models/diffusers that holds unet and "
                    "vae, or a file in models/checkpoints. Only UNet and VAE are used.",
                ),
                files(
                    "magicbokeh",
                    _own(),
                    "MagicBokeh's own file in models/loras: lora.pkl as released, or magicbokeh.safetensors made from it with "
                    "'bokeh models convert', which loads faster.",
                ),
            ],
            outputs=[MagicBokehModel.Output(display_name="magicbokeh", tooltip="Connect to Render with MagicBokeh.")],
        )

    @classmethod
    def validate_inputs(cls, base=None, magicbokeh=None):
        return True  # a file that is not there is explained below

    @classmethod
    def execute(cls, base=None, magicbokeh=None) -> io.NodeOutput:
        from ..bokeh_core.samplers.magicbokeh.checkpoint import MagicBokeh, read_blueprints

        host.chosen(base, _bases(), "base model", GET_BASE)
        host.chosen(magicbokeh, host.model_files(OWN.folder), "MagicBokeh file", GET_OWN)
        folder = base in host.model_folders(*PARTS)
        path = host.model_folder_path(base, *PARTS) if folder else host.model_path(base, BASES)
        parts, scaling_factor = read_blueprints(path, host.model_path(magicbokeh, OWN.folder))
        networks = {name: host.managed(part.build, part.tensors, part.compute_in) for name, part in parts.items()}
        return io.NodeOutput(host.Loaded(MagicBokeh(**networks, scaling_factor=scaling_factor), networks))


class MagicBokehRender(io.ComfyNode):
    """Bokeh and restoration in one step."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="MagicBokehRender",
            display_name="Render with MagicBokeh",
            category="bokeh/render",
            description="Restores a zoomed, noisy or low-resolution photo and renders depth of field into it, in one diffusion step. "
            "Unlike Render Bokeh it redraws the whole picture, what is in focus too. Without a defocus, or at strength "
            "0, it only restores.",
            search_aliases=[
                *("magicbokeh", "magic bokeh", "bokeh", "dof", "depth of field", "lens blur", "portrait mode", "one step"),
                *("restore", "restoration", "denoise", "super resolution", "upscale", "zoom", "phone photo"),
            ],
            inputs=[
                known(io.Image.Input, "image", tooltip="A photo, or several; any size. Alpha, if any, is kept as it is."),
                known(MagicBokehModel.Input, "magicbokeh", tooltip="From Load MagicBokeh."),
                choice(
                    "fidelity",
                    FIDELITY,
                    "best: exact depth, repeatable, no rounding to 8 bits. as published: all habits of the authors' script, with its "
                    "colour fix of the whole picture.",
                ),
                choice(
                    "mode",
                    MODES,
                    "exact: patches of 512 px that overlap by half, as published. fast: large tiles and less overlap, less than half the "
                    "work; differs slightly. One patch alone is the same.",
                ),
                choice(
                    "colour_fix",
                    COLOUR_FIXES,
                    "How colours are brought back to the photo's. in-focus parts: judged by what is sharp, so blur stays soft. whole "
                    "picture: as published, adds contrast against blur. wavelet: the photo's coarse colours, may show halos at wide blur. "
                    "none. 'as published' always takes the whole picture.",
                ),
                number(
                    "upscale",
                    1.0,
                    1.0,
                    4.0,
                    0.25,
                    "Enlarges the photo this many times before it is restored; the result is that much larger. 1 keeps the size. For small "
                    "or heavily zoomed photos: the network restores at the size it is given.",
                ),
                known(
                    Defocus.Input,
                    "defocus",
                    optional=True,
                    tooltip="Depth, focus and blur strength from the node Set Focus and Blur. Not connected: restoration alone. The "
                    "network knows blur radii up to 32 px; more is a guess.",
                ),
                known(
                    io.Mask.Input,
                    "subject",
                    optional=True,
                    tooltip="Focus on this instead of the focus of the defocus: a mask of the subject, any size, one for all or one for "
                    "each frame. best: the median depth of the mask, by its weight. as published: every pixel that is not black counts.",
                ),
                seed("Used by 'as published' only, which adds a little noise to the photo's latent; the authors never fix it."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The restored image with bokeh, of the same size times upscale.")],
        )

    @classmethod
    def execute(
        cls, image, magicbokeh, fidelity, mode, colour_fix, upscale=1.0, defocus=None, subject=None, random_seed=0
    ) -> io.NodeOutput:
        from ..bokeh_core.samplers.magicbokeh.sampler import FIDELITIES, enlarged_size, render

        pictures, height, width, channels = inputs.image(image).shape
        frames = pictures if defocus is None else inputs.scene(image, defocus)
        if subject is not None and defocus is None:
            raise BokehError("A subject is connected but no defocus; connect Set Focus and Blur, or disconnect the subject.")
        if subject is not None:
            subject = inputs.mask(subject, "subject").float()
            subject = fit_disparity(subject, len(subject), height, width)
        size = enlarged_size(height, width, upscale)
        result = image.new_empty((frames, *size, channels), device=host.output_device())
        if channels == 4:
            result[..., 3] = fit_disparity(image[..., 3], frames, *size)
        render(
            magicbokeh.model,
            image[..., :3].movedim(-1, 1),
            defocus,
            subject=subject,
            fidelity=FIDELITIES[fidelity],
            mode=mode,
            colour_fix=colour_fix,
            upscale=upscale,
            seed=random_seed,
            progress=host.progress(),
            load=host.load,
            shrinking=host.shrinking,
            out=result[..., :3].movedim(-1, 1),
        )
        return io.NodeOutput(result)
