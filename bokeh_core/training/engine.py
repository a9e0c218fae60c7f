"""Runs a recipe: Hugging Face accelerate around the losses of a task, with checkpoints that are whole or not there at all.

In the folder of a run lie steps-N (checkpoints: accelerate's state, trained.safetensors, progress.json, recipe.json, and in files/ what
our loaders take), previews/*.png, losses.jsonl and tensorboard/. A task's samples and noise depend only on the seed and the number of the
sample, so a run that goes on from a checkpoint sees what the uninterrupted run would have seen.
"""

import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import BokehError
from .settings import Settings, Train, fill, plain
from .task import Group, Task

TRAINED, PROGRESS, RECIPE, FILES = "trained.safetensors", "progress.json", "recipe.json", "files"
GRADIENT = "gradient of "  # before the names of gradients that are kept from step to step
SHOWN = 4  # samples in a preview
FREE = ("steps", "workers", "checkpoint_every", "keep", "preview_every", "held_out")  # of [train]: may change when a run goes on


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done in all, means over the held-out samples before the first and after the last step, the last checkpoint."""

    step: int
    before: dict[str, float]
    after: dict[str, float]
    checkpoint: Path


def fit(
    task: Task,
    settings: Settings,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train a task as settings.train says, into the folder `out`. Frozen parameters are not touched.

    resume    go on from the newest checkpoint in `out`, if there is one; else `out` must hold no run
    progress  called as progress(steps done, steps in all); may raise to stop at once

    ^C or SIGTERM saves after the current step and raises KeyboardInterrupt with a sentence. Raises BokehError when a loss is not a number
    any more, memory runs out or a checkpoint cannot be written; the sentence names the checkpoint to go on from.
    """
    run = _Run(task, settings, Path(out))
    run.start(resume)
    train, batches = settings.train, iter(())
    try:
        batches = run.batches()
        with _stop_signals() as asked:
            while run.step < train.steps:
                run.update([_next(batches) for _ in range(train.accumulate)])
                if progress is not None:
                    progress(run.step, train.steps)
                last, stopping = run.step == train.steps, run.agreed(asked.is_set())
                if train.preview_every and (last or run.step % train.preview_every == 0):
                    run.preview()
                if stopping or last or run.step % train.checkpoint_every == 0:
                    run.save()
                if stopping and not last:
                    raise KeyboardInterrupt(f"stopped after step {run.step}, saved in {run.newest()}; --resume goes on from there.")
        after = run.measure()
        run.log({"step": run.step, "held_out": after}, {f"held out/{name}": value for name, value in after.items()})
    finally:
        del batches  # ends the data workers
        run.close()
    return Outcome(run.step, run.before, after, run.newest())


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the most steps in the folder of a run; None when there is none. Half-written ones have other names."""
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def load_trained(task: Task, checkpoint: Path) -> None:
    """Give the task the trained weights of a checkpoint. Raises BokehError where they are others than the task trains."""
    from safetensors.torch import load_file

    if not (checkpoint / TRAINED).is_file():
        raise BokehError(f"{checkpoint} is no checkpoint of 'bokeh train': it has no {TRAINED}.")
    tensors, kept = load_file(checkpoint / TRAINED), _changing(task)
    gradients = {name.removeprefix(GRADIENT): tensors.pop(name) for name in list(tensors) if name.startswith(GRADIENT)}
    shapes = [{name: tensor.shape for name, tensor in table.items()} for table in (tensors, kept)]
    if strange := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()} | gradients.keys() - kept.keys()):
        raise BokehError(f"{checkpoint} was trained by another recipe: {len(strange)} weights differ, such as {strange[0]}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            kept[name].copy_(tensor)
    for name, gradient in gradients.items():
        kept[name].grad = gradient.to(kept[name].device)


class _Run:
    def __init__(self, task: Task, settings: Settings, out: Path):
        self.task, self.settings, self.train, self.out = task, settings, settings.train, out
        self.groups = task.groups()
        self.trained = _trained(task)
        self.step = 0
        self.updates = dict.fromkeys(self.groups, 0)
        self.clean = True  # between steps: no part of the current one has changed weights yet
        self.before: dict[str, float] = {}
        self.accelerator = _accelerator(self.train, self.out)
        self.main, self.processes = self.accelerator.is_main_process, self.accelerator.num_processes
        share = self.processes * self.train.accumulate
        if self.train.batch % share:
            raise BokehError(
                f"[train] batch {self.train.batch} cannot be shared by {self.processes} processes in {self.train.accumulate} pieces each; "
                f"make it a multiple of {share}."
            )
        task.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.data = parameter.data.clone()  # files may be mapped into memory, and are never written into
            parameter.requires_grad_(True)
        optimisers = {part: _optimiser(part, groups) for part, groups in self.groups.items()}
        self.model, *prepared = self.accelerator.prepare(task, *optimisers.values())
        self.optimisers = dict(zip(optimisers, prepared, strict=True))
        # Checkpoints hold what changes, not the frozen base.
        self.accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    # Beginning and end

    def start(self, resume: bool) -> None:
        from accelerate.utils import set_seed

        checkpoint = newest_checkpoint(self.out)
        if checkpoint is not None and not resume:
            raise BokehError(f"{self.out} holds a run already ({checkpoint.name}); go on with --resume, or choose another folder with -o.")
        if self.out.exists() and not self.out.is_dir():
            raise BokehError(f"{self.out} is a file; expected a folder for the run.")
        self.accelerator.wait_for_everyone()  # all have looked before anybody writes
        set_seed(self.train.seed)
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            for left in self.out.glob(".writing-*"):
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if checkpoint is not None:
            self.load(checkpoint)
        if self.main:
            _cut_log(self.out / "losses.jsonl", self.step)
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step}})
        if checkpoint is None:
            self.before = self.measure()
            self.log({"step": 0, "held_out": self.before}, {f"held out/{name}": value for name, value in self.before.items()})
            if self.train.preview_every:
                self.preview()
        self.task.train()

    def close(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.only([])

    # A step

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        train, count = self.train, self.train.batch // (self.processes * self.train.accumulate)
        firsts = (
            step * train.batch + (piece * self.processes + self.accelerator.process_index) * count
            for step in range(self.step, train.steps)
            for piece in range(train.accumulate)
        )
        return iter(
            DataLoader(
                _Samples(self.task),
                batch_sampler=[range(first, first + count) for first in firsts],
                num_workers=train.workers,
                multiprocessing_context="fork" if train.workers and hasattr(os, "fork") else None,  # the networks are not copied
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # the loader draws a number; not from the global state, which a checkpoint restores
            )
        )

    def update(self, pieces: list[dict[str, torch.Tensor]]) -> None:
        from accelerate.utils import send_to_device

        self.clean = True
        try:
            pieces = [send_to_device(piece, self.accelerator.device) for piece in pieces]
            for part in self.task.parts(self.step):
                self._update_part(part, pieces)
                self.clean = False
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            pieces = None
            self.forget()
            torch.cuda.empty_cache()
            rescued = self.rescue(alone=True)
            raise BokehError(
                f"Memory ran out at step {self.step}. {rescued} Go on with --resume and a larger [train] accumulate, or precision bf16."
            ) from None
        self.step += 1
        self.clean = True

    def _update_part(self, part: str, pieces: list[dict[str, torch.Tensor]]) -> None:
        accelerator, groups, optimiser = self.accelerator, self.groups[part], self.optimisers[part]
        self.only([part])
        sums: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(pieces):
            with nullcontext() if i == len(pieces) - 1 else accelerator.no_sync(self.model):
                losses = self.model(part, batch, self.step)
                accelerator.backward(sum(losses.values()) / len(pieces))
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float() / len(pieces)
        means = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        means = dict(zip(sums, means, strict=True))
        accelerator.unscale_gradients(optimiser)
        norms = [float(torch.nn.utils.clip_grad_norm_(group.parameters.values(), group.clip or math.inf)) for group in groups]
        bad = next((f"the loss '{name}' is {value}" for name, value in means.items() if not math.isfinite(value)), None)
        if bad is None and self.train.precision != "fp16" and not all(map(math.isfinite, norms)):  # fp16 skips such steps by itself
            bad = "the gradient is not a number"
        if bad is not None:
            self.forget()
            raise BokehError(f"At step {self.step}, {bad} (part '{part}'); the step was not taken. {self.rescue()} A lower rate may help.")
        for entry, group in zip(optimiser.param_groups, groups, strict=True):
            entry["lr"] = group.learning_rate * group.schedule(self.updates[part])
        rates = [entry["lr"] for entry in optimiser.param_groups]
        optimiser.step()
        self.updates[part] += 1
        self.forget()
        self.log(
            {"step": self.step, "part": part, "losses": means, "gradient_norms": norms, "rates": rates},
            {f"{part}/{name}": value for name, value in means.items()}
            | {f"{part}/gradient norm {i}": value for i, value in enumerate(norms)}
            | {f"{part}/rate {i}": value for i, value in enumerate(rates)},
        )

    def only(self, parts: list[str]) -> None:
        """Let gradients reach the groups of these parts and nothing else."""
        active = {id(p) for part in parts for group in self.groups[part] for p in group.parameters.values()}
        for parameter in self.trained.values():
            parameter.requires_grad_(id(parameter) in active)

    def forget(self) -> None:
        kept = _kept_gradients(self.task)
        for name, parameter in self.trained.items():
            if name not in kept:
                parameter.grad = None

    def agreed(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum"))

    # What is seen

    def measure(self) -> dict[str, float]:
        """Means over the held-out samples, which the processes share."""
        from accelerate.utils import gather_object

        mine = range(self.accelerator.process_index, self.train.held_out, self.processes)
        rows = gather_object([{name: float(value) for name, value in self._look(self.task.measure, [i]).items()} for i in mine])
        return {name: math.fsum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}

    def preview(self) -> None:
        if self.main:
            from ..media import Picture, write_picture

            shown = [self._look(self.task.preview, [i])[0].float().clamp(0, 1).cpu() for i in range(SHOWN)]
            height, width = (max(picture.shape[axis] for picture in shown) for axis in (1, 2))  # they may differ
            pads = [(0, width - picture.shape[2], 0, height - picture.shape[1]) for picture in shown]
            shown = torch.stack([torch.nn.functional.pad(picture, pad) for picture, pad in zip(shown, pads, strict=True)])
            (self.out / "previews").mkdir(exist_ok=True)
            write_picture(self.out / "previews" / f"steps-{self.step:07}.png", Picture(torch.cat(list(shown), 1)))
            for tracker in self.accelerator.trackers:
                tracker.log_images({"preview": shown}, step=self.step)

    def _look(self, work: Callable, numbers) -> dict | torch.Tensor:
        from accelerate.utils import send_to_device

        was = self.task.training
        self.task.train(False)
        batch = send_to_device(default_collate([self.task.held_out(i) for i in numbers]), self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            result = work(batch)
        self.task.train(was)
        return result

    def log(self, line: dict, scalars: dict[str, float]) -> None:
        if self.main:
            with (self.out / "losses.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log(scalars, step=self.step)

    # Checkpoints

    def newest(self) -> Path | None:
        return newest_checkpoint(self.out)

    def save(self, prune: bool = True) -> None:
        """Write steps-N under another name first: a checkpoint with its right name is whole."""
        target = self.out / f"steps-{self.step}"
        if target.exists():
            return
        writing = self.out / f".writing-{target.name}"
        try:
            self.accelerator.save_state(str(writing))
            if self.main:
                self._write(writing)
            self.accelerator.wait_for_everyone()
            if self.main:
                _to_disk(writing)
                writing.rename(target)
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            shutil.rmtree(writing, ignore_errors=True)
            raise BokehError(
                f"The checkpoint of step {self.step} could not be written into {self.out} ({error}). {self._last_words()} "
                "Make room on the disk and go on with --resume."
            ) from error
        if self.main and prune:
            for old in _checkpoints(self.out)[: -self.train.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = _changing(self.task)
        tensors |= {GRADIENT + name: p.grad for name, p in _kept_gradients(self.task).items() if p.grad is not None}
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, folder / TRAINED)
        progress = {"step": self.step, "updates": self.updates, "before": self.before, "processes": self.processes}
        (folder / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
        (folder / RECIPE).write_text(json.dumps(plain(self.settings), indent=1), encoding="utf-8")
        (folder / FILES).mkdir()
        self.task.train(False)
        with torch.no_grad():
            self.task.save(folder / FILES)
        self.task.train()

    def load(self, folder: Path) -> None:
        now, then = plain(self.settings), plain(self._recorded(folder))
        told = [("recipe", now["recipe"], then["recipe"])]
        told += [
            (f"[{table}] {key}", value, then[table][key])
            for table in ("train", "model", "data", "options")
            for key, value in now[table].items()
            if table != "train" or key not in FREE
        ]
        for key, value, before in told:
            if value != before:
                raise BokehError(
                    f"{folder} was trained with {key} = {before}, and the recipe now says {value}; "
                    "set it back, or start a new run in another folder."
                )
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        self.step, self.updates, self.before = progress["step"], progress["updates"], progress["before"]
        load_trained(self.task, folder)
        self.accelerator.load_state(str(folder))

    def _recorded(self, folder: Path) -> Settings:
        """The settings that a checkpoint was trained with; what the recipe did not know yet has its default."""
        recorded = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        tables = {name: type(getattr(self.settings, name)) for name in ("train", "model", "data", "options")}
        return Settings(recorded["recipe"], **{name: fill(kind, recorded[name], f"[{name}]", folder) for name, kind in tables.items()})

    def rescue(self, alone: bool = False) -> str:
        """Save the weights as they were after the last whole step, if they still are, and say where to go on from.

        alone  the other processes do not know: with several, nothing can be saved
        """
        fine = all(bool(parameter.isfinite().all()) for parameter in self.trained.values())
        if self.clean and fine and not _kept_gradients(self.task) and not (alone and self.processes > 1):
            self.save(prune=False)
        return self._last_words()

    def _last_words(self) -> str:
        checkpoint = self.newest()
        return f"The last checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."


class _Samples(Dataset):
    def __init__(self, task: Task):
        self.task = task

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.task.sample(index)


def _next(batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    try:
        return next(batches)
    except BokehError as error:  # from a data worker it comes with a traceback in its words
        raise BokehError(str(error).strip().splitlines()[-1].removeprefix(f"{BokehError.__module__}.{BokehError.__name__}: ")) from None


def _accelerator(train: Train, out: Path):
    try:
        import tensorboard  # noqa: F401
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise BokehError(f"Training needs the package {error.name}; install it with: pip install 'bokeh-nodes[train]'") from error
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    # Parts leave parameters out, and buffers that change do so alike everywhere.
    spread = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(mixed_precision=train.precision, kwargs_handlers=[spread], log_with="tensorboard", project_dir=str(out))


def _optimiser(part: str, groups: list[Group]) -> torch.optim.Optimizer:
    kinds = {group.optimiser for group in groups}
    if len(kinds) != 1:
        raise ValueError(f"Part {part} has groups with {kinds}; expected one kind of optimiser.")
    tables = [
        {
            "params": list(group.parameters.values()),
            "lr": group.learning_rate,
            "betas": group.betas,
            "eps": group.eps,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if kinds == {"adamw"}:
        return torch.optim.AdamW(tables)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise BokehError("The optimiser Prodigy is a package of its own; install it with: pip install prodigyopt") from error
    return Prodigy(tables, use_bias_correction=True, safeguard_warmup=True)


def _trained(task: Task) -> dict[str, torch.nn.Parameter]:
    """All trained parameters by their names in the task."""
    named = {name: p for groups in task.groups().values() for group in groups for name, p in group.parameters.items()}
    there = dict(task.named_parameters())
    for name, parameter in named.items():
        if there.get(name) is not parameter or parameter.dtype != torch.float32:
            raise ValueError(f"{name} ({parameter.dtype}): groups must name float32 parameters as they are called in the task.")
    return named


def _kept_gradients(task: Task) -> dict[str, torch.nn.Parameter]:
    groups = [group for groups in task.groups().values() for group in groups if group.keep_gradients]
    return {name: p for group in groups for name, p in group.parameters.items()}


def _changing(task: Task) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: trained parameters, and all buffers."""
    frozen = dict(task.named_parameters()).keys() - _trained(task).keys()
    return {name: tensor for name, tensor in task.state_dict(keep_vars=True).items() if name not in frozen and torch.is_tensor(tensor)}


def _checkpoints(folder: Path) -> list[Path]:
    """steps-N by N."""
    found = [path for path in folder.glob("steps-*") if re.fullmatch(r"steps-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("steps-")))


def _cut_log(path: Path, step: int) -> None:
    """Leave out what was logged from this step on: it will be done again. A line cut off by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] < step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches data workers too; the training process decides


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first ^C or SIGTERM sets; the second one ends the program as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
