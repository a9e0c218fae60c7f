"""Picture, mask and depth files: reading and writing with exact values.

What a number in a file means:
    PNG, JPEG, WebP, TIFF, BMP   integers, scaled to 0..1 by their full range (255 or 65535); display-encoded sRGB
    EXR                          floats as stored, half or single; linear light
    .npy                         [H, W], [H, W, 3] or [H, W, 4]: floats (16, 32 or 64 bit) as stored, uint8 and uint16 scaled to 0..1
"""

import contextlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from .errors import BokehError

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".exr", ".npy")
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".exr", ".npy")

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and what its file says about it.

    pixels   [3, H, W] float32, 0..1 (EXR and .npy: any finite value); grey files fill all three channels
    alpha    [H, W] float32 0..1, not multiplied into the pixels, or None
    linear   True: pixels are linear light; False: display-encoded sRGB
    bits     per channel in the file: 8, 16, or 32 for floats (a half-float EXR has 16)
    exif     EXIF block without its orientation, which is already applied; empty if none
    icc      colour profile; carried along, not applied; empty if none
    time     seconds from the start of the video, or None
    """

    pixels: torch.Tensor
    alpha: torch.Tensor | None = None
    linear: bool = False
    bits: int = 8
    exif: bytes = b""
    icc: bytes = b""
    time: Fraction | None = None


def read_picture(path: str | Path) -> Picture:
    """Read one picture file. JPEG orientation is applied. Raises BokehError when the file cannot be read or holds NaN or infinity."""
    picture = _read(Path(path))
    bad = int((~torch.isfinite(picture.pixels)).any(0).sum())
    if bad:
        raise BokehError(f"{path}: {bad} pixels are NaN or infinite; a picture needs finite values, so repair it first.")
    return picture


def read_plane(path: str | Path, what: str = "depth map") -> tuple[torch.Tensor, bool]:
    """Read a one-channel file (depth map, mask): ([H, W] float32, whether the file holds floats rather than integers).

    Integers are scaled to 0..1 by their full range; floats stay as stored, NaN and infinity included.
    A colour picture is accepted only when its channels agree. Raises BokehError.
    """
    picture = _read(Path(path))
    return one_channel(picture.pixels, f"{path}: this {what}"), picture.linear or picture.bits == 32


def one_channel(pixels: torch.Tensor, subject: str) -> torch.Tensor:
    """[3, H, W] whose channels agree (JPEG and video noise allowed) to [H, W]. `subject` starts the sentence of the error."""
    red, green, blue = pixels
    finite = green[torch.isfinite(green)]
    scale = float(finite.max() - finite.min()) if finite.numel() else 0.0
    # Not "<=": where both are infinite the difference is NaN and must not count.
    differs = torch.maximum((red - green).abs(), (blue - green).abs()) > max(0.1 * scale, 0.02)
    if differs.float().mean() > 0.01:
        raise BokehError(f"{subject} is in colour; expected one grey channel, so save the raw values instead of a coloured preview.")
    return green.contiguous()


def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a picture file as read_picture would return it, without decoding where the format allows."""
    path = Path(path)
    with _explained(path):
        if path.suffix.lower() == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
        elif path.suffix.lower() == ".exr":
            with open(path, "rb") as file:
                header = file.read(1 << 16)
            left, top, right, bottom = struct.unpack_from("<4i", header, _exr_attributes(header)[0]["displayWindow"][0])
            height, width = bottom - top + 1, right - left + 1
        else:
            with _pillow_open(path) as image:
                width, height = image.size
                if image.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 swap the sides
                    width, height = height, width
    _check_size(path, (height, width))
    return height, width


def write_picture(path: str | Path, picture: Picture, bits: int | None = None) -> None:
    """Write one picture; the suffix chooses the format. The pixels are written as they are: convert light before.

    bits: PNG and TIFF 8 or 16, EXR 16 (half) or 32; default: PNG and TIFF 16 when the picture has more than 8 bits, EXR 32.
    Integer formats clip to 0..1 and round to the nearest step; EXR and .npy (float32, [H, W, 3 or 4]) keep every value.
    Alpha is kept by PNG, TIFF, WebP, EXR and .npy and dropped by JPEG. EXIF and colour profile are kept by PNG, JPEG, WebP
    and 8-bit TIFF. The file appears complete or not at all.
    """
    path = Path(path)
    check_writable(path, bits)
    _check_size(path, picture.pixels.shape)
    with atomic(path) as temporary:
        temporary.write_bytes(_encode(path.suffix.lower(), picture, bits))


def check_writable(path: str | Path, bits: int | None = None) -> None:
    """Raise BokehError unless the suffix names a picture format we write with these bits, and the place can take a file."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise BokehError(f"{path}: cannot write a picture with the suffix '{path.suffix}'; use one of {', '.join(WRITABLE)}.")
    if bits == 16 and suffix in (".jpg", ".jpeg", ".webp", ".npy"):
        raise BokehError(f"{path}: {suffix[1:]} files cannot hold 16 bits; use .png, .tif or .exr.")
    if path.is_dir():
        raise BokehError(f"{path} is a folder; expected a file name for the picture.")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with the same suffix; it becomes `path` on success and vanishes on any error or Ctrl-C."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BokehError(f"{path.parent}: the output folder cannot be created ({error.strerror}); choose another one.") from error
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BokehError):
            raise BokehError(f"{path}: cannot be written ({error.strerror or error}).") from error
        raise


# Reading


def _read(path: Path) -> Picture:
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise BokehError(f"{path}: unknown picture suffix '{suffix}'; use one of {', '.join(READABLE)}.")
    with _explained(path):
        if suffix == ".npy":
            with open(path, "rb") as file:
                picture = _from_array(path, np.load(file, allow_pickle=False))
        else:
            data = path.read_bytes()
            if suffix == ".exr":
                picture = _decode_exr(path, data)
            elif data.startswith(_PNG) and data[24:25] == b"\x10":
                picture = _decode_png16(data)
            else:
                picture = _decode_pillow(path, data)
    _check_size(path, picture.pixels.shape)
    return picture


def _check_size(path: Path, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise BokehError(f"{path}: the picture has size zero ({shape[-1]} x {shape[-2]}); expected at least one pixel.")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what decoders raise on missing, foreign and damaged files into one sentence, and keep their warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; medium format cameras exceed its limit
            yield
    except (BokehError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise BokehError(f"{path}: no such file; check the name.") from error
    except IsADirectoryError as error:
        raise BokehError(f"{path} is a folder; expected a picture file.") from error
    except PermissionError as error:
        raise BokehError(f"{path}: no permission to read it.") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error and classes of their own
        raise BokehError(
            f"{path}: cannot be read as {path.suffix[1:].upper()}; the file is damaged or of another format, so save it again."
        ) from error


def _from_array(path: Path, array: np.ndarray) -> Picture:
    """A .npy array as a picture."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BokehError(f"{path}: the array has shape {list(array.shape)}; expected [H, W], [H, W, 3] or [H, W, 4].")
    bits = {"uint8": 8, "uint16": 16}.get(array.dtype.name, 32)
    if bits == 32 and array.dtype.name not in ("float16", "float32", "float64"):
        raise BokehError(f"{path}: the array holds {array.dtype.name}; expected float16, float32, float64, uint8 or uint16.")
    return _picture(array, bits=bits)


def _picture(array: np.ndarray, bits: int, **more) -> Picture:
    """[H, W] or [H, W, 1..4] integers or floats to a Picture; two and four channels end with alpha."""
    values = torch.from_numpy(np.ascontiguousarray(array.astype(np.float32)))
    if array.dtype.kind == "u":
        values = values / np.iinfo(array.dtype).max
    if values.ndim == 2:
        values = values[..., None]
    channels = values.shape[2]
    alpha = values[..., -1].contiguous() if channels in (2, 4) else None
    colour = values[..., :3] if channels >= 3 else values[..., :1].expand(-1, -1, 3)
    return Picture(colour.permute(2, 0, 1).contiguous(), alpha, bits=bits, **more)


def _pillow_open(source):
    from PIL import Image

    return Image.open(source, formats=("PNG", "JPEG", "WEBP", "TIFF", "BMP"))


def _decode_pillow(path: Path, data: bytes) -> Picture:
    from PIL import ImageOps

    image = _pillow_open(io.BytesIO(data))
    bits_per_sample = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)
    if len(bits_per_sample) > 1 and max(bits_per_sample) > 8:  # Pillow would silently drop the low byte
        return _picture(_frame_array(_decode_frame("tiff", data)), bits=16)
    image = ImageOps.exif_transpose(image)
    more = {"exif": image.info.get("exif", b""), "icc": image.info.get("icc_profile", b"")}
    if image.mode == "F":
        return _picture(np.asarray(image), bits=32, **more)
    if image.mode.startswith("I;16"):
        return _picture(np.asarray(image).astype(np.uint16), bits=16, **more)
    if image.mode == "I":
        raise BokehError(f"{path}: 32-bit integers are not supported; save it with 8 or 16 bits or as floats.")
    return _picture(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")), bits=8, **more)


def _decode_png16(data: bytes) -> Picture:
    """16-bit PNG: Pillow keeps only 8 bits of its colours, ffmpeg keeps all."""
    image = _pillow_open(io.BytesIO(data))
    image.verify()  # checksums; ffmpeg alone is forgiving
    more = {"exif": image.info.get("exif", b""), "icc": image.info.get("icc_profile", b"")}
    return _picture(_frame_array(_decode_frame("png", data)), bits=16, **more)


def _decode_exr(path: Path, data: bytes) -> Picture:
    data, halves = _check_exr(path, data)
    array = _frame_array(_decode_frame("exr", data))
    return _picture(array, bits=16 if halves else 32, linear=True)


def _exr_attributes(data: bytes) -> tuple[dict[str, tuple[int, int]], int]:
    """The header of an EXR file (OpenEXR file layout): name -> (offset, size) of each attribute's value, and the header's end."""
    at = 8
    attributes = {}
    while data[at] != 0:
        name_end = data.index(b"\0", at)
        kind_end = data.index(b"\0", name_end + 1)
        (size,) = struct.unpack_from("<i", data, kind_end + 1)
        attributes[data[at:name_end].decode("latin-1")] = (kind_end + 5, size)
        at = kind_end + 5 + size
    return attributes, at + 1


def _check_exr(path: Path, data: bytes) -> tuple[bytes, bool]:
    """Refuse what ffmpeg would decode wrongly without a word. Returns the data and whether all channels are half floats.

    A single channel of any one-letter name (Z, V, ...: how depth is stored) is renamed to Y, the only one ffmpeg takes.
    """
    if not data.startswith(b"\x76\x2f\x31\x01"):
        raise ValueError("no OpenEXR file")
    attributes, offsets_at = _exr_attributes(data)
    at, size = attributes["channels"]
    first, end = at, at + size - 1
    names, kinds = [], []
    while at < end:
        name_end = data.index(b"\0", at)
        names.append(data[at:name_end].decode("latin-1"))
        kinds.append(struct.unpack_from("<i", data, name_end + 1)[0])
        at = name_end + 17
    if len(names) == 1 and len(names[0]) == 1:
        data = data[:first] + b"Y" + data[first + 1 :]
    elif not ({"R", "G", "B"} <= set(names) or "Y" in names):
        raise BokehError(f"{path}: found the EXR channels {', '.join(names)}; expected R, G, B (and A), or one channel such as Y or Z.")

    # A cut file: ffmpeg fills the missing lines with zeros. Only files of one part in scan lines have this simple table.
    if not data[5] & 0x1A:
        _, top, _, bottom = struct.unpack_from("<4i", data, attributes["dataWindow"][0])
        lines_per_chunk = (1, 1, 1, 16, 32, 16, 32, 32, 32, 256)[data[attributes["compression"][0]]]
        chunks = math.ceil((bottom - top + 1) / lines_per_chunk)
        for offset in struct.unpack_from(f"<{chunks}Q", data, offsets_at):
            if offset + 8 + struct.unpack_from("<i", data, offset + 4)[0] > len(data):
                raise EOFError
    return data, all(kind == 1 for kind in kinds)


def _decode_frame(codec: str, data: bytes):
    """Decode one still picture with ffmpeg, past its file layer (which takes '%' in a name for a numbered sequence)."""
    import av

    context = av.CodecContext.create(codec, "r")
    frames = [*context.decode(av.Packet(data)), *context.decode(None)]
    return frames[0]


# pixel format -> (numpy type, values per pixel in a plane, order of the planes that makes grey, RGB, or either plus alpha)
_LAYOUTS = {
    "gray16be": (">u2", 1, [0]),
    "gray16le": ("<u2", 1, [0]),
    "ya16be": (">u2", 2, [0]),
    "ya16le": ("<u2", 2, [0]),
    "rgb48be": (">u2", 3, [0]),
    "rgb48le": ("<u2", 3, [0]),
    "rgba64be": (">u2", 4, [0]),
    "rgba64le": ("<u2", 4, [0]),
    "grayf16le": ("<f2", 1, [0]),
    "gbrpf16le": ("<f2", 1, [2, 0, 1]),
    "gbrapf16le": ("<f2", 1, [2, 0, 1, 3]),
    "grayf32le": ("<f4", 1, [0]),
    "gbrpf32le": ("<f4", 1, [2, 0, 1]),
    "gbrapf32le": ("<f4", 1, [2, 0, 1, 3]),
}


def _frame_array(frame) -> np.ndarray:
    """The raw values of a 16-bit or float frame, [H, W, C]; no conversion, so nothing is rounded."""
    kind, per_pixel, order = _LAYOUTS[frame.format.name]
    planes = []
    for index in order:
        plane = frame.planes[index]
        rows = np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : frame.width * per_pixel]
        planes.append(rows.reshape(frame.height, frame.width, per_pixel))
    array = np.concatenate(planes, axis=2)
    return array.astype(array.dtype.newbyteorder("="))


# Writing


def _encode(suffix: str, picture: Picture, bits: int | None) -> bytes:
    planes = picture.pixels if picture.alpha is None or suffix in (".jpg", ".jpeg") else torch.cat([picture.pixels, picture.alpha[None]])
    array = np.ascontiguousarray(planes.permute(1, 2, 0).cpu().numpy(), dtype=np.float32)
    if suffix == ".npy":
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()
    if suffix == ".exr":
        if bits == 16:  # rounded here: ffmpeg cuts the low bits off
            array = array.clip(-65504, 65504).astype(np.float16).astype(np.float32)
        pixel_format = "gbrpf32le" if array.shape[2] == 3 else "gbrapf32le"
        return _encode_frame("exr", array, pixel_format, {"format": "half" if bits == 16 else "float", "compression": "zip16"})
    if bits is None:
        bits = 16 if picture.bits > 8 else 8
    if bits == 16 and suffix == ".png":
        data = _encode_frame("png", quantised(array, 16), "rgb48be" if array.shape[2] == 3 else "rgba64be", {})
        return _with_png_chunks(data, picture)
    if bits == 16 and suffix in (".tif", ".tiff"):
        return _encode_frame("tiff", quantised(array, 16), "rgb48le" if array.shape[2] == 3 else "rgba64le", {})
    return _encode_pillow(suffix, quantised(array, 8), picture)


def quantised(values: np.ndarray, bits: int) -> np.ndarray:
    """Floats 0..1, clipped, to the nearest of 2^bits - 1 steps (halves up), as uint8 or uint16."""
    top = 2**bits - 1
    return np.floor(np.clip(values, 0, 1).astype(np.float64) * top + 0.5).astype(np.uint8 if bits == 8 else np.uint16)


def _encode_pillow(suffix: str, array: np.ndarray, picture: Picture) -> bytes:
    from PIL import Image

    options = {
        ".png": {"format": "PNG"},
        ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
        ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
        ".webp": {"format": "WEBP", "quality": 95},
        ".tif": {"format": "TIFF", "compression": "tiff_deflate"},
        ".tiff": {"format": "TIFF", "compression": "tiff_deflate"},
    }[suffix]
    if picture.exif and options["format"] != "TIFF":
        options["exif"] = picture.exif
    if picture.icc:
        options["icc_profile"] = picture.icc
    file = io.BytesIO()
    Image.fromarray(array).save(file, **options)
    return file.getvalue()


def _encode_frame(codec: str, array: np.ndarray, pixel_format: str, options: dict[str, str]) -> bytes:
    import av

    context = av.CodecContext.create(codec, "w")
    context.height, context.width = array.shape[:2]
    context.pix_fmt = pixel_format
    context.time_base = Fraction(1, 1)
    context.options = options
    frame = av.VideoFrame.from_ndarray(array, format=pixel_format)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def _with_png_chunks(data: bytes, picture: Picture) -> bytes:
    """Add colour profile and EXIF right after the header chunk (PNG specification, sections 11.3.2.3 and 11.3.4.6)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    extra = b""
    if picture.icc:
        extra += chunk(b"iCCP", b"profile\0\0" + zlib.compress(picture.icc))
    if picture.exif:
        extra += chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    return data[:33] + extra + data[33:]
