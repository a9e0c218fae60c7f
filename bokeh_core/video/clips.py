"""Clips: a folder of frames or a video file (or one picture, a clip of one), read and written frame by frame."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from .. import media
from ..errors import BokehError
from ..media import Picture

READABLE = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
WRITABLE = (".mp4", ".mov", ".m4v", ".mkv")
DEFAULT_RATE = Fraction(24)


class Frames:
    """Picture files in order: a folder in natural order (frame_2 before frame_10), or a single file.

    path, size (height, width), rate None, has_sound False, linear: EXR, is_picture: one file rather than a folder
    len() is the number of frames; iterating reads one Picture at a time.
    Raises BokehError for a folder without pictures, frames of different sizes, and EXR mixed with others.
    """

    rate = None
    has_sound = False

    def __init__(self, path: Path):
        self.path = path
        self.is_picture = not path.is_dir()
        self.files = [path] if self.is_picture else picture_files(path)
        self.linear = self.files[0].suffix.lower() == ".exr"
        if any((file.suffix.lower() == ".exr") != self.linear for file in self.files):
            raise BokehError(f"{path}: the folder mixes EXR (linear light) with other formats; keep one kind in it.")
        self.size = media.picture_size(self.files[0])
        for file in self.files[1:]:
            size = media.picture_size(file)
            if size != self.size:
                raise BokehError(
                    f"{file.name} is {size[1]} x {size[0]} but {self.files[0].name} is {self.size[1]} x {self.size[0]}; "
                    f"expected one size for all frames in {path}."
                )

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Picture]:
        return map(media.read_picture, self.files)

    def planes(self, what: str) -> Iterator[torch.Tensor]:
        """The frames as one-channel maps [H, W], see media.read_plane."""
        return (media.read_plane(file, what)[0] for file in self.files)

    def holds_floats(self) -> bool:
        """Whether the files hold floats, judged by the first."""
        return media.read_plane(self.files[0])[1]


class VideoFile:
    """A video file, display-encoded.

    path, size (height, width) as shown, linear False, rate (frames per second, a Fraction), has_sound
    len() is exact, found by decoding once; iterating decodes one Picture at a time, rotated as its file says.
    """

    is_picture = False
    linear = False

    def __init__(self, path: Path):
        self.path = path
        self._count = 0
        with self._open() as container:
            stream = container.streams.video[0]
            self.rate = Fraction(stream.average_rate or DEFAULT_RATE)
            self.has_sound = bool(container.streams.audio)
            for frame in container.decode(stream):
                if not self._count:
                    turned = frame.rotation % 180 == 90
                    self.size = (frame.width, frame.height) if turned else (frame.height, frame.width)
                self._count += 1
        if not self._count:
            raise BokehError(f"{path}: the video has no frames.")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Picture]:
        with self._open() as container:
            stream = container.streams.video[0]
            for index, frame in enumerate(container.decode(stream)):
                time = frame.pts * frame.time_base if frame.pts is not None else index / self.rate
                yield Picture(_pixels(frame), time=time)

    def planes(self, what: str) -> Iterator[torch.Tensor]:
        """The frames as one-channel maps [H, W], 0..1."""
        return (media.one_channel(frame.pixels, f"{self.path}: this {what}") for frame in self)

    def holds_floats(self) -> bool:
        return False

    @contextlib.contextmanager
    def _open(self):
        import av

        try:
            # An absolute path: a relative one with a colon would be taken for a network address.
            with av.open(os.fspath(self.path.resolve())) as container:
                if not container.streams.video:
                    raise BokehError(f"{self.path}: the file holds no video stream.")
                container.streams.video[0].thread_type = "AUTO"
                yield container
        except FileNotFoundError as error:
            raise BokehError(f"{self.path}: no such file; check the name.") from error
        except av.error.FFmpegError as error:
            raise BokehError(f"{self.path}: cannot be read as a video; the file is damaged or of another format.") from error


def open_clip(path: str | Path) -> Frames | VideoFile:
    """Open a picture, a folder of frames or a video file. Raises BokehError when there is none of them."""
    path = Path(path)
    if not path.exists():
        raise BokehError(f"{path}: no such file or folder; check the name.")
    if path.is_dir() or path.suffix.lower() in media.READABLE:
        return Frames(path)
    if path.suffix.lower() in READABLE:
        return VideoFile(path)
    raise BokehError(f"{path}: unknown suffix '{path.suffix}'; use a folder or one of {', '.join(media.READABLE + READABLE)}.")


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder in natural order; hidden files are left out."""

    def natural(file: Path):
        # re.split with a group gives text at even and digits at odd places, so like is compared with like
        return [int(part) if part.isdigit() else part.lower() for part in re.split(r"([0-9]+)", file.name)], file.name

    files = [f for f in folder.iterdir() if f.suffix.lower() in media.READABLE and not f.name.startswith(".") and f.is_file()]
    if not files:
        raise BokehError(f"{folder}: the folder has no picture files; expected {', '.join(media.READABLE)}.")
    return sorted(files, key=natural)


def check_clip_target(path: str | Path) -> bool:
    """Raise BokehError unless a clip can be written here. Returns True for a video file, False for a folder.

    A path without suffix is a folder, created when needed; it must be empty, so that no older frames stay among the new ones.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        if path.is_file():
            raise BokehError(f"{path} is a file; frames need a folder, so choose another name.")
        if path.is_dir() and any(path.iterdir()):
            raise BokehError(f"{path}: the folder is not empty; choose a new or empty folder for the frames.")
        return False
    if path.suffix.lower() in WRITABLE:
        return True
    raise BokehError(
        f"{path}: cannot write a clip with the suffix '{path.suffix}'; use {', '.join(WRITABLE)}, or a folder name without suffix."
    )


@contextlib.contextmanager
def write_clip(path: str | Path, source: Frames | VideoFile, *, rate: Fraction | None = None, bits: int | None = None, suffix: str = ""):
    """Yield write(picture), to be called once per frame in order. The clip appears whole at the end, or not at all.

    A folder gets the frames of `source` under their own names (a video's frames: 00000.png, ...) as PNG, TIFF, EXR or .npy like
    the source, other formats as PNG. A video file gets H.264 (yuv420p, BT.709, crf 16); odd sizes grow by one repeated row or
    column, the frame times of a source video are kept and its sound is copied when the new file can hold it.
    rate: frames per second of a video made from a folder (default 24). bits: as in media.write_picture. suffix: of the frames in
    a folder, in place of the one above.
    """
    path = Path(path)
    if check_clip_target(path):
        with (
            media.atomic(path) as temporary,
            contextlib.closing(_Encoder(temporary, source, rate or source.rate or DEFAULT_RATE)) as encoder,
        ):
            yield encoder.write
            encoder.finish()
    else:
        names = iter(frame_names(source, suffix))
        with _atomic_folder(path) as temporary:
            yield lambda picture: media.write_picture(temporary / next(names), picture, bits)


def frame_names(source: Frames | VideoFile, suffix: str = "") -> list[str]:
    """File names for the frames of a clip made from `source`, all with `suffix` if one is given."""
    if isinstance(source, VideoFile):
        return [f"{index:05d}{suffix or '.png'}" for index in range(len(source))]
    kept = (".png", ".tif", ".tiff", ".exr", ".npy") if not suffix else ()
    names = [file.name if file.suffix.lower() in kept else f"{file.stem}{suffix or '.png'}" for file in source.files]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise BokehError(f"{source.path}: two frames would both be written as {double}; rename one of them.")
    return names


@contextlib.contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()  # empty, as checked
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise BokehError(f"{path}: the folder cannot be written ({error.strerror or error}).") from error
        raise


# YUV -> RGB is done here in floats: the 8-bit routine that PyAV offers darkens a picture by more than one step on average.

_LUMA = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}  # (red, blue) weights: BT.709, BT.2020
_BT601 = (0.299, 0.114)
_UNSPECIFIED = 2


def _pixels(frame) -> torch.Tensor:
    """[3, H, W] float32 0..1 display-encoded from a decoded video frame (ITU-T H.273, 8.3), turned upright."""
    deep = max(component.bits for component in frame.format.components) > 8
    name = frame.format.name
    if frame.format.is_rgb or name.startswith(("gray", "pal")):
        array = frame.to_ndarray(format="rgb48le" if deep else "rgb24")
        rgb = array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    else:
        full_range = name.startswith("yuvj") or frame.color_range == 2
        array = frame.to_ndarray(format="yuv444p16le" if deep else "yuvj444p" if name.startswith("yuvj") else "yuv444p")
        array = array if array.shape[0] == 3 else np.moveaxis(array, -1, 0)
        y, u, v = array.astype(np.float32) / np.float32(65536 if deep else 256)
        scale, black, chroma = (256 / 255, 0, 256 / 255) if full_range else (256 / 219, 16 / 256, 256 / 224)
        y, u, v = (y - black) * scale, (u - 0.5) * chroma, (v - 0.5) * chroma
        unspecified = _LUMA[1] if min(frame.width, frame.height) >= 720 else _BT601  # what players assume
        red, blue = unspecified if frame.colorspace == _UNSPECIFIED else _LUMA.get(frame.colorspace, _BT601)
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        rgb = np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=-1).clip(0, 1)
    rgb = np.rot90(rgb, frame.rotation // 90)
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


class _Encoder:
    """One H.264 file being written."""

    def __init__(self, path: Path, source: Frames | VideoFile, rate: Fraction):
        import av

        self._av = av
        self._rate = rate
        self._index = 0
        height, width = source.size
        self._grow = ((0, height % 2), (0, width % 2), (0, 0))  # yuv420p needs even sides
        self._container = av.open(os.fspath(path.resolve()), "w")
        self._source_sound = None
        # A time base finer than the rate keeps the times of videos with a changing rate.
        self._time_base = Fraction(1, 90000) if isinstance(source, VideoFile) else 1 / rate
        # With its macroblock tree x264 reads memory it has not written, on some widths, and the same frames give another file each time.
        options = {"crf": "16", "preset": "medium", "x264-params": "mbtree=0"}
        self._video = self._container.add_stream("libx264", rate=rate, options=options)
        context = self._video.codec_context
        context.width, context.height, context.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context.time_base = self._time_base
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        self._sound_source = self._sound_track = self._next_sound = None
        if source.has_sound:
            self._open_sound(source.path)

    def _open_sound(self, path: Path) -> None:
        """Packets of the source's first sound track, read beside the pictures so that both lie interleaved in the file."""
        self._sound_source = self._av.open(os.fspath(path.resolve()))
        track = self._sound_source.streams.audio[0]
        if track.codec_context.name in self._container.supported_codecs:
            self._sound_track = self._container.add_stream_from_template(track)
            self._sound = (packet for packet in self._sound_source.demux(track) if packet.dts is not None)
            self._next_sound = next(self._sound, None)

    def write(self, picture: Picture) -> None:
        array = media.quantised(picture.pixels.permute(1, 2, 0).cpu().numpy(), 8)
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(array, self._grow, mode="edge")), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        time = picture.time if picture.time is not None else self._index / self._rate
        frame.pts, frame.time_base = round(time / self._time_base), self._time_base
        self._index += 1
        self._mux(self._video.encode(frame))

    def finish(self) -> None:
        self._mux(self._video.encode())
        self._mux_sound_until(None)
        self._container.close()

    def close(self) -> None:
        self._container.close()
        if self._sound_source is not None:
            self._sound_source.close()

    def _mux(self, packets) -> None:
        for packet in packets:
            self._mux_sound_until(packet.dts * packet.time_base)
            self._container.mux(packet)

    def _mux_sound_until(self, time: Fraction | None) -> None:
        while (packet := self._next_sound) is not None and (time is None or packet.dts * packet.time_base <= time):
            packet.stream = self._sound_track
            self._container.mux(packet)
            self._next_sound = next(self._sound, None)
