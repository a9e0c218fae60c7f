"""Picture, depth and video files: exact values, checked with Pillow and with small decoders written from the format specifications."""

import io
import struct
import weakref
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core import media
from bokeh_core.errors import BokehError
from bokeh_core.media import Picture
from bokeh_core.optics.lens import Lens
from bokeh_core.video import clips, streaming
from bokeh_core.video.clips import open_clip, write_clip


def picture(height=9, width=11, seed=0, top=1.0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * top


def steps16(height=256, width=256):
    """[3, H, W]: every 16-bit value once in each channel, in another order."""
    values = torch.arange(65536, dtype=torch.float64).reshape(height, width)
    return torch.stack([values, values.flip(0), values.T.contiguous()])


def png_chunks(data):
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def decode_png(data):
    """PNG specification: 16-bit, not interlaced. [H, W, C] uint16."""
    chunks = list(png_chunks(data))
    width, height, bits, colour = struct.unpack(">IIBB", chunks[0][1][:10])
    assert bits == 16
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    raw = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    stride, pixel = width * channels * 2, channels * 2
    above, rows = bytearray(stride), []
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for i in range(stride):
            a, b, c = (line[i - pixel], above[i], above[i - pixel]) if i >= pixel else (0, above[i], 0)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        rows.append(bytes(line))
        above = line
    return np.frombuffer(b"".join(rows), ">u2").reshape(height, width, channels).astype(np.uint16)


def encode_png(array):
    """16-bit PNG without filters; [H, W, C]."""
    height, width, channels = array.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 2: 4, 4: 6}[channels], 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


def encode_exr(channels, kind="float"):
    """Uncompressed OpenEXR file from {name: [H, W]}, after the file layout document."""
    code, dtype = {"half": (1, "<f2"), "float": (2, "<f4")}[kind]
    height, width = next(iter(channels.values())).shape
    names = sorted(channels)
    box = struct.pack("<4i", 0, 0, width - 1, height - 1)
    listing = b"".join(name.encode() + b"\0" + struct.pack("<iiii", code, 0, 1, 1) for name in names) + b"\0"
    header = struct.pack("<II", 20000630, 2)
    for name, type_, body in (
        (b"channels", b"chlist", listing),
        (b"compression", b"compression", b"\0"),
        (b"dataWindow", b"box2i", box),
        (b"displayWindow", b"box2i", box),
        (b"lineOrder", b"lineOrder", b"\0"),
        (b"pixelAspectRatio", b"float", struct.pack("<f", 1)),
        (b"screenWindowCenter", b"v2f", struct.pack("<2f", 0, 0)),
        (b"screenWindowWidth", b"float", struct.pack("<f", 1)),
    ):
        header += name + b"\0" + type_ + b"\0" + struct.pack("<i", len(body)) + body
    header += b"\0"
    lines = [b"".join(channels[name][y].astype(dtype).tobytes() for name in names) for y in range(height)]
    lines = [struct.pack("<ii", y, len(line)) + line for y, line in enumerate(lines)]
    starts = np.cumsum([len(header) + 8 * height] + [len(line) for line in lines[:-1]])
    return header + struct.pack(f"<{height}Q", *starts) + b"".join(lines)


# Integer pictures


def test_png8_values_are_exact_both_ways(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.stack([values, values[::-1], values.T], axis=-1)
    Image.fromarray(rgb).save(tmp_path / "in.png")
    found = media.read_picture(tmp_path / "in.png")
    assert torch.equal(found.pixels, torch.from_numpy(rgb.transpose(2, 0, 1)) / 255)
    assert (found.bits, found.linear, found.alpha) == (8, False, None)
    media.write_picture(tmp_path / "out.png", found)
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), rgb)


def test_png16_values_are_exact_both_ways(tmp_path):
    values = steps16()
    array = values.permute(1, 2, 0).numpy().astype(np.uint16)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    found = media.read_picture(tmp_path / "in.png")
    assert found.bits == 16 and torch.equal(found.pixels, (values / 65535).float())
    media.write_picture(tmp_path / "out.png", found)
    assert np.array_equal(decode_png((tmp_path / "out.png").read_bytes()), array)
    media.write_picture(tmp_path / "eight.png", found, bits=8)
    with Image.open(tmp_path / "eight.png") as image:
        assert np.array_equal(np.asarray(image), np.round(array / 257).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png16_of_every_kind(tmp_path, channels):
    array = np.random.default_rng(channels).integers(0, 65536, (7, 5, channels)).astype(np.uint16)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    found = media.read_picture(tmp_path / "in.png")
    colour = array[..., :3] if channels > 2 else np.repeat(array[..., :1], 3, 2)
    assert np.array_equal(np.round(found.pixels.numpy() * 65535), colour.transpose(2, 0, 1))
    if channels in (2, 4):
        assert np.array_equal(np.round(found.alpha.numpy() * 65535), array[..., -1])
        media.write_picture(tmp_path / "out.png", found)
        assert np.array_equal(decode_png((tmp_path / "out.png").read_bytes()), np.dstack([colour, array[..., -1:]]))
    else:
        assert found.alpha is None


def test_rounding_is_to_the_nearest_and_clips():
    values = np.array([-0.2, 0.0, 0.49 / 255, 0.5 / 255, 1.49 / 255, 254.51 / 255, 1.0, 3.0])
    assert media.quantised(values, 8).tolist() == [0, 0, 0, 1, 1, 255, 255, 255]
    assert media.quantised(np.array([0.5 / 65535, 1.0]), 16).tolist() == [1, 65535]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_pillow_modes(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 4)).astype(np.uint8))
    (rgba if mode in ("LA", "RGBA") else rgba.convert("RGB")).convert(mode).save(path)
    found = media.read_picture(path)
    with Image.open(path) as image:
        assert np.array_equal(np.round(found.pixels.numpy() * 255), np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        if mode in ("LA", "RGBA"):
            assert np.array_equal(np.round(found.alpha.numpy() * 255), np.asarray(image.convert("RGBA"))[..., 3])
        else:
            assert found.alpha is None


@pytest.mark.parametrize(("suffix", "bits"), [(".png", 8), (".tif", 8), (".tif", 16), (".webp", 8)])
def test_alpha_survives(tmp_path, suffix, bits):
    alpha = torch.linspace(0, 1, 99).reshape(9, 11)
    media.write_picture(tmp_path / f"x{suffix}", Picture(picture(), alpha), bits)
    found = media.read_picture(tmp_path / f"x{suffix}")
    assert (found.alpha - alpha).abs().max() <= 0.5001 / (2**bits - 1)
    if suffix != ".webp":
        assert (found.pixels - picture()).abs().max() <= 0.5001 / (2**bits - 1)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_jpeg_orientation_is_applied_once(tmp_path, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255  # bright top left corner
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # stored so that the tag brings it back
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns))).save(tmp_path / "in.jpg", exif=exif, quality=95)
    found = media.read_picture(tmp_path / "in.jpg")
    assert tuple(found.pixels.shape[1:]) == media.picture_size(tmp_path / "in.jpg") == (32, 48)
    assert (found.pixels - torch.from_numpy(upright.transpose(2, 0, 1)) / 255).abs().max() < 0.05
    for name, bits in (("out.jpg", 8), ("out.png", 8), ("out16.png", 16)):
        media.write_picture(tmp_path / name, found, bits)
        with Image.open(tmp_path / name) as image:
            assert image.size == (48, 32) and image.getexif().get(0x0112, 1) == 1 and image.getexif()[0x010F] == "Maker"


def test_colour_profile_is_carried_along(tmp_path):
    profile = bytes(range(256))
    for name, bits in (("a.png", 8), ("b.png", 16), ("c.jpg", 8)):
        media.write_picture(tmp_path / name, Picture(picture(), icc=profile), bits)
        assert media.read_picture(tmp_path / name).icc == profile


def test_percent_sign_in_a_name_is_just_a_name(tmp_path):
    for suffix in (".png", ".exr"):
        media.write_picture(tmp_path / f"50%03d{suffix}", Picture(picture()), 16)
        assert (tmp_path / f"50%03d{suffix}").exists()
        assert media.read_picture(tmp_path / f"50%03d{suffix}").pixels.shape == (3, 9, 11)


# Float pictures


def test_exr_float_round_trip_keeps_every_value(tmp_path):
    pixels = picture(40, 33, top=50.0) - 1.0
    pixels[0, 0, 0], pixels[1, 0, 0] = 1e-20, 6e4
    for alpha in (None, picture(40, 33, 5)[0]):
        media.write_picture(tmp_path / "x.exr", Picture(pixels, alpha, linear=True))
        found = media.read_picture(tmp_path / "x.exr")
        assert torch.equal(found.pixels, pixels) and found.linear and found.bits == 32
        assert found.alpha is None if alpha is None else torch.equal(found.alpha, alpha)
    assert media.picture_size(tmp_path / "x.exr") == (40, 33)


def test_exr_half_round_trip(tmp_path):
    pixels = picture(40, 33, top=50.0)
    pixels[0, 0, 0] = 1e6
    media.write_picture(tmp_path / "x.exr", Picture(pixels), bits=16)
    found = media.read_picture(tmp_path / "x.exr")
    assert torch.equal(found.pixels, pixels.clamp(max=65504).half().float()) and found.bits == 16


@pytest.mark.parametrize("kind", ["half", "float"])
def test_exr_made_by_the_specification(tmp_path, kind):
    red, green, blue = (picture(5, 7, seed, 9.0)[0].numpy() for seed in range(3))
    (tmp_path / "x.exr").write_bytes(encode_exr({"R": red, "G": green, "B": blue}, kind))
    expected = np.stack([red, green, blue]).astype(np.float16 if kind == "half" else np.float32).astype(np.float32)
    assert np.array_equal(media.read_picture(tmp_path / "x.exr").pixels.numpy(), expected)
    for name in ("Y", "Z", "V"):
        (tmp_path / "d.exr").write_bytes(encode_exr({name: red}, kind))
        plane, floats = media.read_plane(tmp_path / "d.exr")
        assert floats and np.array_equal(plane.numpy(), expected[0])
    (tmp_path / "d.exr").write_bytes(encode_exr({"depth.left": red, "depth.right": red}, kind))
    with pytest.raises(BokehError, match=r"depth\.left, depth\.right"):
        media.read_plane(tmp_path / "d.exr")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_npy_floats_are_lossless(tmp_path, dtype):
    array = (np.random.default_rng(0).normal(size=(6, 5, 3)) * 4).astype(np.float16).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    found = media.read_picture(tmp_path / "x.npy")
    assert np.array_equal(found.pixels.numpy(), array.transpose(2, 0, 1)) and not found.linear
    media.write_picture(tmp_path / "y.npy", found)
    again = np.load(tmp_path / "y.npy")
    assert again.dtype == np.float32 and np.array_equal(again, array)
    assert media.picture_size(tmp_path / "x.npy") == (6, 5)


def test_npy_integers_are_scaled_and_grey_is_filled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[0, 65535]], np.uint16))
    assert media.read_picture(tmp_path / "x.npy").pixels.tolist() == [[[0.0, 1.0]]] * 3
    assert media.read_plane(tmp_path / "x.npy")[1] is False


# Depth


def test_depth_values(tmp_path):
    raw = np.array([[-3.5, 700.0], [0.25, 1e-3]], np.float32)
    np.save(tmp_path / "d.npy", raw)
    plane, floats = media.read_plane(tmp_path / "d.npy")
    assert floats and np.array_equal(plane.numpy(), raw)
    (tmp_path / "d16.png").write_bytes(encode_png(np.array([[[0], [1], [65535]]], np.uint16)))
    assert media.read_plane(tmp_path / "d16.png")[0].tolist() == [[0.0, torch.tensor(1 / 65535).item(), 1.0]]
    Image.fromarray(np.array([[0, 128, 255]], np.uint8)).save(tmp_path / "d8.png")
    assert torch.equal(media.read_plane(tmp_path / "d8.png")[0], torch.tensor([[0, 128, 255]]) / 255)


def test_coloured_depth_is_refused_but_jpeg_noise_is_not(tmp_path):
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "grey.jpg", quality=60)
    assert (media.read_plane(tmp_path / "grey.jpg")[0] - torch.from_numpy(grey) / 255).abs().mean() < 0.01
    Image.fromarray(np.dstack([grey, 255 - grey, grey])).save(tmp_path / "colour.png")
    with pytest.raises(BokehError, match="in colour"):
        media.read_plane(tmp_path / "colour.png")


# Errors


def save_bytes(path, kind):
    file = io.BytesIO()
    array = (np.random.default_rng(0).random((40, 50, 3)) * 255).astype(np.uint8)
    if kind == "png16":
        return encode_png(array.astype(np.uint16) * 257)
    if kind == "exr":
        return encode_exr({c: array[..., i].astype(np.float32) for i, c in enumerate("RGB")})
    if kind == "npy":
        np.save(file, array)
    else:
        Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".png", "png"), (".png", "png16"), (".jpg", "jpeg"), (".tif", "tiff"), (".exr", "exr"), (".npy", "npy")]
)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_cut_files_are_refused(tmp_path, suffix, kind, keep):
    data = save_bytes(tmp_path, kind)
    (tmp_path / f"x{suffix}").write_bytes(data)
    media.read_picture(tmp_path / f"x{suffix}")
    (tmp_path / f"x{suffix}").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(BokehError, match="cannot be read"):
        media.read_picture(tmp_path / f"x{suffix}")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((0, 5, 3), np.float32), "size zero"),
        (np.zeros((4, 5, 2, 3), np.float32), r"shape \[4, 5, 2, 3\]"),
        (np.zeros((4, 5, 7), np.float32), r"shape \[4, 5, 7\]"),
        (np.zeros((4, 5), np.int64), "int64"),
        (np.full((4, 5, 3), np.nan, np.float32), "20 pixels are NaN"),
        (np.array([["a"]], object), "cannot be read"),
    ],
)
def test_bad_arrays(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(BokehError, match=words):
        media.read_picture(tmp_path / "x.npy")


def test_missing_folder_and_unknown(tmp_path):
    for name, words in (("no.png", "no such file"), ("x.xyz", "unknown picture suffix"), ("", "suffix")):
        with pytest.raises(BokehError, match=words):
            media.read_picture(tmp_path / name)
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(BokehError, match="folder"):
        media.read_picture(tmp_path / "dir.png")
    with pytest.raises(BokehError, match="cannot write"):
        media.write_picture(tmp_path / "x.gif", Picture(picture()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "x.png"
    target.write_bytes(b"old")
    with pytest.raises(error), media.atomic(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert [f.name for f in tmp_path.iterdir()] == ["x.png"] and target.read_bytes() == b"old"
    with media.atomic(target) as temporary:
        temporary.write_bytes(b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["x.png"] and target.read_bytes() == b"new"


# Clips


def folder_of_frames(folder, count=4, height=48, width=64):
    """Blocks of flat colour, 8 px wide, moving by 8 px a frame."""
    folder.mkdir()
    blocks = picture(height // 8, width // 8, 3)
    for i in range(count):
        pixels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2).roll(8 * i, 2)
        media.write_picture(folder / f"frame_{i}.png", Picture(pixels))
    return open_clip(folder)


def block_centres(pixels):
    return pixels[:, 4::8, 4::8]


def test_folder_in_natural_order(tmp_path):
    for name in ("f10.png", "f9.png", "f1.png", ".hidden.png", "notes.txt"):
        media.write_picture(tmp_path / name, Picture(picture())) if name.endswith("png") else (tmp_path / name).write_text("x")
    assert [f.name for f in open_clip(tmp_path).files] == ["f1.png", "f9.png", "f10.png"]
    media.write_picture(tmp_path / "f2.png", Picture(picture(5, 6)))
    with pytest.raises(BokehError, match=r"f2\.png is 6 x 5 but f1\.png is 11 x 9"):
        open_clip(tmp_path)


def test_video_round_trip(tmp_path):
    source = folder_of_frames(tmp_path / "f", count=12)
    with write_clip(tmp_path / "x.mp4", source, rate=Fraction(30000, 1001)) as write:
        for frame in source:
            write(frame)
    video = open_clip(tmp_path / "x.mp4")
    assert len(video) == 12 and video.rate == Fraction(30000, 1001) and video.size == (48, 64)
    for index, (before, after) in enumerate(zip(source, video, strict=True)):
        error = block_centres(after.pixels - before.pixels) * 255
        assert error.abs().mean() < 3 and error.mean().abs() < 0.5  # compressed, but not darkened
        assert after.time == index / video.rate
    with av.open(str(tmp_path / "x.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 1, 1)


def test_odd_sizes_grow_by_one_repeated_line(tmp_path):
    (tmp_path / "f").mkdir()
    pixels = picture(5, 6, 1).repeat_interleave(9, 1).repeat_interleave(9, 2)[:, :41, :51]
    media.write_picture(tmp_path / "f" / "0.png", Picture(pixels))
    with write_clip(tmp_path / "x.mp4", open_clip(tmp_path / "f")) as write:
        write(Picture(pixels))
    video = open_clip(tmp_path / "x.mp4")
    assert video.size == (42, 52) and video.rate == 24
    assert (next(iter(video)).pixels[:, 4:41:9, 4:51:9] - pixels[:, 4::9, 4::9]).abs().mean() < 0.02


@pytest.mark.parametrize(("pixel_format", "matrix"), [("yuv420p", "709"), ("yuv420p10le", "709"), ("yuv444p", "601"), ("yuvj420p", "601")])
def test_yuv_is_decoded_by_the_standard(tmp_path, pixel_format, matrix):
    """Lossless video with hand-made YUV of known colours (ITU-T H.273)."""
    red, blue = {"709": (0.2126, 0.0722), "601": (0.299, 0.114)}[matrix]
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.8, 0.6, 0.35], [0.2, 0.5, 0.7], [0.5, 0.5, 0.5]])
    y = colours @ [red, 1 - red - blue, blue]
    u, v = (colours[:, 2] - y) / (2 - 2 * blue), (colours[:, 0] - y) / (2 - 2 * red)
    full = pixel_format.startswith("yuvj")
    scale = 4 if "10" in pixel_format else 1
    code = np.stack([y * 255, u * 255 + 128, v * 255 + 128] if full else [16 + 219 * y, 128 + 224 * u, 128 + 224 * v])
    code = np.round(code * scale).clip(0, 256 * scale - 1).astype(np.uint16 if scale == 4 else np.uint8)
    luma = np.repeat(np.repeat(code[0][None], 32, 0), 32, 1)
    step = 1 if "444" in pixel_format else 2
    chroma = [np.repeat(np.repeat(c[None], 32 // step, 0), 32 // step, 1) for c in code[1:]]
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 256, 32, pixel_format
        stream.codec_context.colorspace = 1 if matrix == "709" else 6
        frame = av.VideoFrame(256, 32, pixel_format)
        for plane, values in zip(frame.planes, [luma, *chroma], strict=True):
            rows = np.zeros((values.shape[0], plane.line_size // values.itemsize), values.dtype)
            rows[:, : values.shape[1]] = values
            plane.update(rows.tobytes())
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    (found,) = open_clip(tmp_path / "x.mkv")
    assert (found.pixels[:, 16, 16::32].T.numpy() - colours).__abs__().max() < 2.5 / 255 / scale


def test_phone_rotation_is_applied(tmp_path):
    source = folder_of_frames(tmp_path / "f", 1)
    with write_clip(tmp_path / "x.mp4", source) as write:
        for frame in source:
            write(frame)
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # ISO 14496-12, 8.3.2: the track's matrix; a quarter turn clockwise
    struct.pack_into(">9i", data, at, 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    straight, turned = open_clip(tmp_path / "x.mp4"), open_clip(tmp_path / "turned.mp4")
    assert turned.size == (64, 48)
    assert torch.equal(next(iter(turned)).pixels, torch.rot90(next(iter(straight)).pixels, -1, (1, 2)))


def test_sound_and_frame_times_are_kept(tmp_path):
    times = [0, 1, 2, 5, 6, 9]  # a changing rate
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=30)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=48000)
        for pts in times:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * pts, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 30)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for n in range(16):
            tone = av.AudioFrame.from_ndarray(np.sin(np.arange(1024) / (n + 5))[None].astype(np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 48000, 1024 * n
            container.mux(sound.encode(tone))
        container.mux(sound.encode())
    source = open_clip(tmp_path / "in.mp4")
    with write_clip(tmp_path / "out.mp4", source) as write:
        for frame in source:
            write(frame)
    assert [frame.time for frame in open_clip(tmp_path / "out.mp4")] == [Fraction(t, 30) for t in times]

    def packets(name):
        with av.open(str(tmp_path / name)) as container:
            return b"".join(bytes(packet) for packet in container.demux(audio=0))

    assert len(packets("in.mp4")) > 1000 and packets("out.mp4") == packets("in.mp4")


def test_the_same_frames_give_the_same_file(tmp_path):
    """Whatever lies in unused memory: x264's macroblock tree takes some of it in, on this width too."""
    y, x = torch.meshgrid(torch.linspace(0, 6, 192), torch.linspace(0, 9, 320), indexing="ij")
    for i in range(24):
        frame = torch.stack([(x + i / 3).sin(), (y - i / 5).cos(), (x * y).sin()]) / 2 + 0.5
        frame[:, 40:120, 30 + 5 * i : 110 + 5 * i] = 0.9
        media.write_picture(tmp_path / f"f/{i:02d}.png", Picture(frame))
    source, found = open_clip(tmp_path / "f"), set()
    for seed in range(8):
        generator = np.random.default_rng(seed)
        litter = [generator.integers(0, 256, int(size), dtype=np.uint8) for size in generator.choice([3000, 6144, 9216, 12288, 50000], 400)]
        del litter[::2]
        with write_clip(tmp_path / "out.mp4", source) as write:
            for frame in source:
                write(frame)
        found.add((tmp_path / "out.mp4").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("target", ["out.mp4", "out"])
def test_a_failed_clip_leaves_nothing(tmp_path, target):
    source = folder_of_frames(tmp_path / "f")
    with pytest.raises(KeyboardInterrupt), write_clip(tmp_path / "new" / target, source) as write:
        write(next(iter(source)))
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []


def test_folder_targets(tmp_path):
    source = folder_of_frames(tmp_path / "f", 2)
    with write_clip(tmp_path / "out", source) as write:
        for frame in source:
            write(frame)
    assert [torch.equal(a.pixels, b.pixels) for a, b in zip(source, open_clip(tmp_path / "out"), strict=True)] == [True, True]
    assert [f.name for f in clips.picture_files(tmp_path / "out")] == ["frame_0.png", "frame_1.png"]
    with pytest.raises(BokehError, match="not empty"):
        clips.check_clip_target(tmp_path / "out")
    with pytest.raises(BokehError, match=r"suffix '\.gif'"):
        clips.check_clip_target(tmp_path / "out.gif")


def test_bad_videos(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(BokehError, match="cannot be read as a video"):
        open_clip(tmp_path / "x.mp4")
    with pytest.raises(BokehError, match="no such file"):
        open_clip(tmp_path / "y.mp4")
    with pytest.raises(BokehError, match="no picture files"):
        open_clip(tmp_path)


# Streaming


def test_ten_thousand_frames_need_the_memory_of_one_chunk():
    alive = most = 0

    class Frame:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    total = 0
    for chunk in streaming.chunks((Frame() for _ in range(10_000)), 16):
        total += len(chunk)
        del chunk
    assert total == 10_000 and most <= 32
    assert list(streaming.chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert streaming.chunk_length(1080, 1920) == 1 and streaming.chunk_length(64, 64) == 16


def test_rendering_a_long_clip_holds_one_chunk(tmp_path, monkeypatch):
    np.save(tmp_path / "d.npy", np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8))
    alive, most, asked = weakref.WeakSet(), 0, []

    class Long:
        path, size, is_picture = tmp_path, (6, 8), False

        def __len__(self):
            return 2000

        def __iter__(self):
            nonlocal most
            for i in range(2000):
                frame = Picture(torch.full((3, 6, 8), i / 2000))
                alive.add(frame)
                most = max(most, len(alive))
                yield frame

    monkeypatch.setattr(streaming, "render", lambda image, defocus, **_: (asked.append(defocus.focus), image.clone())[1])
    depth = streaming.DepthClip(tmp_path / "d.npy", 2000, (6, 8))
    focus = torch.linspace(0, 1, 2000)
    frames = streaming.render_frames(Long(), depth, focus, torch.ones(2000), Lens(), linear=False)
    assert [round(float(frame.pixels[0, 0, 0]) * 2000) for chunk in frames for frame in chunk] == list(range(2000))
    assert most <= 40 and torch.equal(torch.cat(asked), focus)


def test_one_range_for_the_whole_clip(tmp_path):
    for i, high in enumerate((2.0, 8.0, 4.0)):
        np.save(tmp_path / f"{i}.npy", np.linspace(1, high, 12, dtype=np.float32).reshape(3, 4))
    depth = streaming.DepthClip(tmp_path, 3, (3, 4))
    assert depth.span == (1.0, 8.0) and not depth.metric
    assert [float(d.max()) for d in depth] == [2.0, 8.0, 4.0]
    mirrored = streaming.DepthClip(tmp_path, 3, (3, 4), far_is_bright=True)
    assert [float(d.min()) for d in mirrored] == [7.0, 1.0, 5.0]
    metres = streaming.DepthClip(tmp_path, 3, (3, 4), "metres")
    assert metres.metric and metres.span == (0.125, 1.0)
