"""The model files this library knows: where each comes from, where it belongs, its licence; and where files lie on this machine."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BokehError

SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".pkl")
DEPTH_FOLDERS = ("depthanything", "geometry_estimation")
APACHE, NON_COMMERCIAL, UNSTATED = "Apache-2.0", "CC BY-NC 4.0 (non-commercial)", "not stated"


@dataclass(frozen=True)
class Entry:
    """A published file.

    name     what the user types after `bokeh models get`
    title    words for users
    folder   the folder of ComfyUI's `models` it belongs to
    file     its name there
    licence  of the weights
    page     web page to read about it and to get it by hand
    url      the file itself; empty when only the page is known for certain
    size     in bytes, None when unknown
    sha256   of the file, empty when unknown
    """

    name: str
    title: str
    folder: str
    file: str
    licence: str
    page: str
    url: str = ""
    size: int | None = None
    sha256: str = ""

    @property
    def how_to_get(self) -> str:
        """What a user without the file has to do, as the end of a sentence."""
        if self.url:
            return f"run 'bokeh models get {self.name}', or put {self.file} from {self.page} into models/{self.folder}"
        return f"put {self.file} from {self.page} into models/{self.folder}"


def _hugging_face(name, title, repository, path, folder, licence, size=None, sha256=""):
    page = f"https://huggingface.co/{repository}"
    return Entry(name, title, folder, path.rpartition("/")[2], licence, page, f"{page}/resolve/main/{path}", size, sha256)


_SIZES = {"Small": ("vits", APACHE), "Base": ("vitb", NON_COMMERCIAL), "Large": ("vitl", NON_COMMERCIAL)}

# family -> (name, title, repository, file, then for small, base and large: bytes and SHA-256)
_DEPTH = [
    (
        ("depth-anything-v2", "Depth Anything V2 {}", "Depth-Anything-V2-{}", "depth_anything_v2_{}.pth"),
        (99218434, "715fade13be8f229f8a70cc02066f656f2423a59effd0579197bbf57860e1378"),
        (389961218, "0d2b7002e62d39d655571c371333340bd88f67ab95050c03591555aa05645328"),
        (1341395338, "a7ea19fa0ed99244e67b624c72b8580b7e9553043245905be58796a608eb9345"),
    ),
    (
        (
            "depth-anything-v2-indoor",
            "Depth Anything V2 {}, metres, indoor (Hypersim, up to 20 m)",
            "Depth-Anything-V2-Metric-Hypersim-{}",
            "depth_anything_v2_metric_hypersim_{}.pth",
        ),
        (99222290, "b782898d8a3e8be1f639de33837ed85e9b4b73e40f8f5e5cd99067588d722545"),
        (389965138, "9dc9e274c5eff55c6daf27b660c0ced0eca4e8593a6da90cdcb04d2b4d3f3fa2"),
        (1341401882, "6f82ff2bc543ac02ddff4aa31fa363676a8305dd3ccf04e80e2af115a044cb6d"),
    ),
    (
        (
            "depth-anything-v2-outdoor",
            "Depth Anything V2 {}, metres, outdoor (Virtual KITTI, up to 80 m)",
            "Depth-Anything-V2-Metric-VKITTI-{}",
            "depth_anything_v2_metric_vkitti_{}.pth",
        ),
        (99221808, "9203e538d35255c90dda4b7fedb47ff33fe725497bcca3b1e53b3a65ee63f0cb"),
        (389964656, "4dad67a7cc10b462bca48e6b8569c762b8eb3c1adada170a3851a6d3ba37bb3e"),
        (1341401064, "239b1054a369e66da2576e9a118d6d7c12d90dc8ebe609579a9a09cd8e05fe38"),
    ),
    (
        ("video-depth-anything", "Video Depth Anything {}", "Video-Depth-Anything-{}", "video_depth_anything_{}.pth"),
        (116440756, "13379300b739e659f076a59d52e9801bd8d38c541a7e71f73bbca4dcfb013609"),
        (458247082, "775e578e8f9431ec0496514aa466bd0a1f67c28d0f518267809f35a43c04329b"),
        (1538392012, "43df27c6b396042ba34ff7b798ab279f64d204d2e86d7a373968f8fa36d0e6fa"),
    ),
    (
        (
            "video-depth-anything-metric",
            "Video Depth Anything {}, metres",
            "Metric-Video-Depth-Anything-{}",
            "metric_video_depth_anything_{}.pth",
        ),
        (116444063, "3c28432b4e1f0d7bb31cad5151b6313b49457db5aa58d82e85bfb0f8b1311b33"),
        (458249567, "f6f58576b9680a112f2428d4f39aff92656d3ae85745b0164675ace8d5b1fade"),
        (1538348216, "24eba25342e7ee0f054be25da6a852ebd7cfa40cd6bf41a353ecb6abfe24e620"),
    ),
]

CATALOGUE = [
    *(
        _hugging_face(
            f"{name}-{size.lower()}",
            title.format(size),
            f"depth-anything/{repository.format(size)}",
            file.format(encoder),
            DEPTH_FOLDERS[0],
            licence,
            *facts,
        )
        for (name, title, repository, file), *sizes in _DEPTH
        for (size, (encoder, licence)), facts in zip(_SIZES.items(), sizes, strict=True)
    ),
    # Licences of these two repositories: magicbokeh SPEC section 17, bokehdiff SPEC section 10.
    _hugging_face(
        "magicbokeh-depth",
        "MagicBokeh's Depth Anything V2 Large for poor pictures",
        "LinxiaoShi/Magicbokeh",
        "depth_model/DAdepth.pth",
        DEPTH_FOLDERS[0],
        "not stated; made from a CC BY-NC 4.0 (non-commercial) model",
    ),
    _hugging_face("magicbokeh", "MagicBokeh", "LinxiaoShi/Magicbokeh", "lora.pkl", "loras", UNSTATED),
    # The place of this file in its repository is not certain, so it has no address of its own.
    Entry("bokehdiff", "BokehDiff", "loras", "pytorch_lora_weights.safetensors", UNSTATED, "https://huggingface.co/zcx65535/bokehdiff"),
    _hugging_face("bokehdiff-vae", "BokehDiff's VAE encoder", "zcx65535/bokehdiff", "small/vae.ckpt", "vae", UNSTATED),
]


@dataclass(frozen=True)
class Report:
    """What a checkpoint file is, found from its contents.

    title     words for users
    facts     (what, value) in the order to show them: architecture, sizes, ranks, answers to open questions
    problems  sentences: missing and unexpected names, wrong shapes; empty when the file can be used
    licence   of the weights as far as it follows from what the file is
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    licence: str = UNSTATED


def entry(name: str) -> Entry:
    """The entry of this name. Raises BokehError."""
    for one in CATALOGUE:
        if one.name == name.lower():
            return one
    raise BokehError(f"There is no model named '{name}'; 'bokeh models' lists the names.")


def user_folder() -> Path:
    """Where this user's models lie when no ComfyUI is named: bokeh/models in the folder for caches, such as ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "bokeh" / "models"


def model_roots(given: Iterable[str | Path] = ()) -> list[Path]:
    """Folders laid out like ComfyUI's `models`, the first to be searched first: those given, $COMFYUI_PATH/models, the user's own."""
    comfy = os.environ.get("COMFYUI_PATH")
    return [*map(Path, given), *([Path(comfy) / "models"] if comfy and Path(comfy).is_dir() else []), user_folder()]


def model_files(folder: str, given: Iterable[str | Path] = ()) -> list[Path]:
    """The model files of one folder key such as `depthanything`, subfolders included, in the order of the roots.

    Searched are ROOT/folder of every root, files that lie directly in a `given` root (it may be a flat folder), and the places
    that ComfyUI's extra_model_paths.yaml names for the key.
    Raises BokehError when a given root is no folder or the yaml file is damaged.
    """
    given = [Path(one) for one in given]
    for root in given:
        if not root.is_dir():
            raise BokehError(f"{root} is no folder; expected one with models in it, such as ComfyUI's models folder.")
    found = []
    for root in model_roots(given):
        found += sorted((root / folder).rglob("*"))
        found += sorted(root.iterdir()) if root in given else []
    for place in _extra_paths().get(folder, []):
        found += sorted(place.rglob("*"))
    files = [path for path in found if path.suffix.lower() in SUFFIXES and path.is_file()]
    return list({path.resolve(): path for path in reversed(files)}.values())[::-1]


def _extra_paths() -> dict[str, list[Path]]:
    """folder key -> places, from extra_model_paths.yaml in $COMFYUI_PATH (its format is ComfyUI's)."""
    comfy = os.environ.get("COMFYUI_PATH")
    path = Path(comfy or "") / "extra_model_paths.yaml"
    if not comfy or not path.is_file():
        return {}
    try:
        import yaml  # comes with ComfyUI and with diffusers
    except ImportError:
        return {}
    places: dict[str, list[Path]] = {}
    try:
        for section in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).values():
            section = dict(section or {})
            base = Path(os.path.expandvars(os.path.expanduser(section.pop("base_path", "") or "")))
            section.pop("is_default", None)
            for key, lines in section.items():
                places.setdefault(key, []).extend(path.parent / base / line.strip() for line in lines.splitlines() if line.strip())
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise BokehError(f"{path} cannot be read ({type(error).__name__}); repair it, or unset COMFYUI_PATH.") from error
    return places
