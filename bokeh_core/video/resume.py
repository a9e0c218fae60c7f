"""A clip that takes hours to make, kept as finished frames beside the output, so that a stopped run goes on where it stopped."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .. import media
from ..errors import BokehError
from ..media import Picture

_STATE = "run.json"


class PartialClip:
    """Finished frames in the folder OUTPUT.partial.

    output    the file or folder that will hold the clip
    settings  everything the frames depend on, as plain values; a folder made with others is refused, not overwritten
    deep      keep 16 bits per channel, else 8

    done   frames that are finished and kept
    carry  what the renderer goes on from, a tensor or None
    Raises BokehError for a folder of other settings, and for one that is no such folder.
    """

    def __init__(self, output: Path, settings: dict, *, deep: bool = False):
        self.folder = output.with_name(output.name + ".partial")
        self.settings = json.loads(json.dumps(settings))
        self.bits = 16 if deep else 8
        self.done, self.carry = 0, None
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self._continue()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
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
                f"{self.folder} holds {self.done} finished frames of a run with other settings ({', '.join(sorted(different))}); "
                "give the same ones to go on, or delete that folder to begin anew."
            )

    def add(self, frames: torch.Tensor, first: int) -> None:
        """Keep frames [n, 3, H, W] 0..1, the clip's frames from `first` on."""
        for index, pixels in enumerate(frames, start=first):
            media.write_picture(self._file(index), Picture(pixels.float().cpu()), self.bits)

    def mark(self, done: int, carry: torch.Tensor | None) -> None:
        """From here a later run may go on: `done` frames are kept, and `carry` is what it needs to know."""
        self.done, self.carry = done, carry
        before = set(self.folder.glob("carry_*.npy"))
        self._save_state()
        for file in before - {self._carry_file()}:
            file.unlink()

    def frames(self) -> Iterator[torch.Tensor]:
        """[3, H, W] float32, the finished frames in order."""
        return (media.read_picture(self._file(index)).pixels for index in range(self.done))

    def remove(self) -> None:
        """Delete the folder; the clip is written."""
        shutil.rmtree(self.folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def _carry_file(self) -> Path:
        return self.folder / f"carry_{self.done}.npy"

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


def fingerprint(path: str | Path) -> list:
    """What tells one version of a file or folder from another without reading it: names, sizes, times."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return [str(path.resolve()), len(facts), hashlib.sha256(repr(facts).encode()).hexdigest()[:16]]


def digest(values: torch.Tensor) -> str:
    """A short name of these numbers."""
    return hashlib.sha256(values.detach().double().cpu().numpy().tobytes()).hexdigest()[:16]
