"""Many pictures and clips through one command, over several processes of this machine.

Every job is a command line of its own. A worker that dies (killed, out of memory) takes no other job with it: what its pool had in hand
is run again, each by itself, so that the one that kills workers is found and left out.
"""

import contextlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from . import media
from .errors import BokehError

RECORD = ".bokeh-batch.json"  # in the output folder: what was made of what, with which options
LOST = "the process that worked on it ended without a word, also when it had the machine for itself (killed, or out of memory?)"


@dataclass(frozen=True)
class Job:
    """name  of the input, in messages and in the record;  inputs  what is read;  output  what is written;  command  words after `bokeh`"""

    name: str
    inputs: tuple[Path, ...]
    output: Path
    command: tuple[str, ...]


def find_jobs(folder: Path, output: Path, depth: Path | None, options: list[str], suffix: str = "") -> list[Job]:
    """One job for every picture, video file and folder of frames in `folder`, in the order of their names.

    depth   folder with a depth map of the same name for each (any suffix, or a folder); None = estimated
    suffix  of the pictures to write, e.g. ".png"; "" = as the input has it
    Raises BokehError where there is nothing to do, a depth map is missing, or two inputs would be written to one place.
    """
    from .video import clips

    depths = {} if depth is None else {(path.name if path.is_dir() else path.stem): path for path in sorted(depth.iterdir())}
    jobs, taken = [], {}
    for path in sorted(folder.iterdir()):
        kind = path.suffix.lower()
        if path.name.startswith(".") or path.resolve() == output.resolve():
            continue
        if path.is_dir():
            if not any(file.suffix.lower() in media.READABLE for file in path.iterdir()):
                continue
            target, stem = output / path.name, path.name
        elif kind in media.READABLE:
            target, stem = output / (path.stem + (suffix or (kind if kind in media.WRITABLE else ".png"))), path.stem
        elif kind in clips.READABLE:
            target, stem = output / (path.stem + (kind if kind in clips.WRITABLE else ".mp4")), path.stem
        else:
            continue
        if target in taken:
            raise BokehError(f"{taken[target]} and {path.name} would both become {target}; rename one of them.")
        taken[target] = path.name
        words, inputs = ["render", str(path), "-o", str(target), *options], [path]
        if depth is not None:
            if stem not in depths:
                raise BokehError(f"{depth} holds no depth for {path.name}; expected {stem} with any suffix, or a folder {stem}.")
            words += ["--depth", str(depths[stem])]
            inputs.append(depths[stem])
        jobs.append(Job(path.name, tuple(inputs), target, tuple(words)))
    if not jobs:
        raise BokehError(f"{folder} holds no pictures, videos or folders of frames.")
    return jobs


class Record:
    """What was made, kept in the output folder: a job is done if it was recorded with these words and nothing it reads is newer."""

    def __init__(self, folder: Path):
        self.file = folder / RECORD
        try:
            self.made = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.made = {}

    def holds(self, job: Job) -> bool:
        if self.made.get(job.name) != list(job.command) or not job.output.exists():
            return False
        return _changed(job.output) >= max(map(_changed, job.inputs))

    def add(self, job: Job) -> None:
        self.made[job.name] = list(job.command)
        with media.atomic(self.file) as temporary:
            temporary.write_text(json.dumps(self.made, indent=1), encoding="utf-8")


def _changed(path: Path) -> float:
    """When a file, or the newest one in a folder, was last written."""
    if path.is_dir():
        return max([path.stat().st_mtime, *(file.stat().st_mtime for file in path.iterdir())])
    return path.stat().st_mtime


def run(jobs: Iterable[Job], workers: int, finished: Callable[[Job, str], None]) -> None:
    """Run all jobs, `workers` at a time; finished(job, sentence) is called as each ends, with an empty sentence where it went well.

    A stop (KeyboardInterrupt) ends the workers; nothing is left half-written.
    """
    suspects = _run(list(jobs), workers, finished)
    for job in suspects:
        for lost in _run([job], 1, finished):
            finished(lost, LOST)


def _run(jobs: list[Job], workers: int, finished: Callable[[Job, str], None]) -> list[Job]:
    """As `run`; returns the jobs that were in hand whenever a worker died."""
    waiting, suspects = jobs[::-1], []
    while waiting:
        threads = max(1, (os.cpu_count() or 1) // workers)
        # A fresh interpreter for each worker: a fork would copy the threads' locks of this one.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,))
        running = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running[pool.submit(_work, waiting[-1].command)] = waiting[-1]
                    waiting.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    sentence = future.result()
                    finished(running.pop(future), sentence)
        except BrokenProcessPool:
            suspects += running.values()
        finally:
            _end(pool)
    return suspects


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop the workers now, also in the middle of a job (after the last job they are idle)."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()
    pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _work(command: tuple[str, ...]) -> str:
    """Run `bokeh COMMAND`; returns what went wrong, or an empty text."""
    from .cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(command))
    return "" if code == 0 else said.getvalue().strip().splitlines()[-1].removeprefix("bokeh: ")
