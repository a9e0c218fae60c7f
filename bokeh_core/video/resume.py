"""A clip in the making, kept as finished frames beside the output, so that a run that was stopped or killed goes on where it stopped."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import media
from ..errors import BokehError
from ..media import Picture
from .clips import Frames, VideoFile, check_clip_target, frame_names, write_clip

# Names in the folder that are no frames are hidden: frames never are.
_STATE, _CARRY, _DEPTH = ".run.json", ".carry_{}.npy", ".depth"


class Finished(NamedTuple):
    """The next frames of a clip, as a renderer hands them out.

    resumable  a later run can go on after these, given `carry`
    carry      what the renderer goes on from, a tensor or None
    """

    pictures: list[Picture]
    resumable: bool = True
    carry: torch.Tensor | None = None


class PartialClip:
    """Finished frames in the hidden folder .OUTPUT.partial.

    output    the file or folder that will hold the clip
    source    the clip it is made from
    settings  everything the frames depend on, as plain values; what was made with others is never gone on with
    bits      of the frames of a folder, as in media.write_picture

    done   frames that are finished and kept
    carry  what the renderer goes on from, a tensor or None

    The frames of a folder are kept as they will be, and at the end the folder becomes the output. Those of a video are kept as the
    8-bit pictures that its encoder takes. Either way the result is that of an uninterrupted run, bit for bit.
    Raises BokehError for a folder of other settings, and for one that is no such folder.
    """

    def __init__(self, output: Path, source: Frames | VideoFile, settings: dict, *, bits: int | None = None):
        self.output, self.source = Path(os.path.abspath(output)), source
        self.to_video = check_clip_target(self.output)
        self.names = [f"{index:06d}.png" for index in range(len(source))] if self.to_video else frame_names(source)
        self.bits = 8 if self.to_video else bits
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        self.settings = json.loads(json.dumps(settings))
        self.done, self.carry = 0, None
        self._added = 0
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self._continue()

    @property
    def depth_file(self) -> Path:
        """Where the clip's depth may be kept, for as long as the frames are."""
        return self.folder / _DEPTH

    @property
    def holds_work(self) -> bool:
        """Whether there is anything to go on from."""
        return self.done > 0 or self.depth_file.with_suffix(".json").exists()

    def begin(self) -> None:
        """Make the folder. Nothing is on disk before. Raises BokehError when it cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BokehError(f"{self.folder.parent}: the output folder cannot be created ({error.strerror}).") from error
        if not (self.folder / _STATE).exists():
            self._save_state()

    def _continue(self) -> None:
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            kept, self.done = state["settings"], int(state["done"])
            if state["carry"]:
                self.carry = torch.from_numpy(np.load(self.folder / state["carry"], allow_pickle=False))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BokehError(f"{self.folder} is not what a stopped run leaves behind; move it away or choose another output.") from error
        different = [name for name in {**kept, **self.settings} if kept.get(name) != self.settings.get(name)]
        if different:
            raise BokehError(
                f"{self.folder} holds {self.done} finished frames of a stopped run with other settings ({', '.join(sorted(different))}); "
                "give the same ones to go on from there, or say --anew to throw them away."
            )
        for file in self.folder.glob(".*.partial*"):  # what was being written when the run was killed
            file.unlink()
        self._added = self.done

    def add(self, pictures: Iterable[Picture]) -> None:
        """Keep the next frames."""
        for picture in pictures:
            media.write_picture(self.folder / self.names[self._added], picture, self.bits)
            self._added += 1

    def mark(self, carry: torch.Tensor | None = None) -> None:
        """From here a later run may go on: all frames so far are kept, and `carry` is what it needs to know."""
        self.done, self.carry = self._added, carry
        before = set(self.folder.glob(_CARRY.format("*")))
        self._save_state()
        for file in before - {self._carry_file()}:
            file.unlink()

    def finish(self, rate: Fraction | None = None) -> None:
        """Turn the frames into the output. rate: as in write_clip."""
        if self.done != len(self.names):
            raise BokehError(f"The clip ended after {self.done} of {len(self.names)} frames; check the file.")
        if self.to_video:
            video = self.folder / self.output.name
            times = (picture.time for picture in self.source) if self.source.rate else [None] * self.done
            with write_clip(video, self.source, rate=rate) as write:
                for name, time in zip(self.names, times, strict=True):
                    write(Picture(media.read_picture(self.folder / name).pixels, time=time))
            os.replace(video, self.output)
            self.remove()
            return
        if self.output.is_dir():
            self.output.rmdir()  # empty, as checked
        os.replace(self.folder, self.output)
        for file in self.output.glob(".*"):  # last: a run that is killed before can still go on
            file.unlink()

    def remove(self) -> None:
        """Throw everything away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _carry_file(self) -> Path:
        return self.folder / _CARRY.format(self.done)

    def _save_state(self) -> None:
        """The state is replaced last, in one step: a run that is stopped at any moment finds either the old or the new one whole."""
        name = ""
        if self.carry is not None:
            name = self._carry_file().name
            with media.atomic(self.folder / name) as temporary, temporary.open("wb") as file:
                np.save(file, self.carry.float().cpu().numpy())
                file.flush()
                os.fsync(file.fileno())
        with media.atomic(self.folder / _STATE) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "done": self.done, "carry": name}, indent=1), encoding="utf-8")


def discard(output: str | Path) -> None:
    """Throw away what a stopped run has kept for `output`, if anything. A folder of that name that is something else stays."""
    output = Path(os.path.abspath(output))
    folder = output.with_name(f".{output.name}.partial")
    if (folder / _STATE).is_file():
        shutil.rmtree(folder)


def fingerprint(path: str | Path) -> list:
    """What tells one version of a file or folder from another without reading it: names, sizes, times."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return [os.path.realpath(path), len(facts), hashlib.sha256(repr(facts).encode()).hexdigest()[:16]]
