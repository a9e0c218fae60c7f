"""The training engine on a task small enough to know everything about, and the strictness of recipe files."""

import hashlib
import json
import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bokeh_core.errors import BokehError
from bokeh_core.training import engine, settings
from bokeh_core.training.engine import fit, load_trained, newest_checkpoint
from bokeh_core.training.settings import Settings, Train, fill
from bokeh_core.training.task import Group, Task, noise

pytest.importorskip("accelerate")
TRAIN = Train(steps=6, batch=4, checkpoint_every=2, preview_every=3, held_out=3, workers=0, seed=3)


@dataclass(frozen=True)
class Nothing:
    pass


@dataclass(frozen=True)
class Options:
    rate: float = 0.05
    optimiser: str = "adamw"
    kept: bool = False  # gradients of the second part
    poison: int = -1  # the step whose loss is not a number
    hungry: int = -1  # the step that runs out of memory


class Toy(Task):
    """Learns y = 3 x - 1 in two parts: the slope, then the offset; a frozen layer stands by."""

    Model, Data, Options = Nothing, Nothing, Options

    def __init__(self, model=None, data=None, options=None, seed=0):
        super().__init__()
        self.options, self.seed = options or Options(), seed
        self.slope, self.offset = nn.Linear(4, 4, bias=False), nn.Linear(1, 4, bias=False)
        self.frozen = nn.Linear(4, 4, bias=False)
        self.register_buffer("calls", torch.zeros(()))
        for i, layer in enumerate((self.slope, self.offset, self.frozen)):
            layer.weight.data = noise(torch.tensor([i]), tuple(layer.weight.shape))[0] * 0.1

    def groups(self):
        o = self.options
        first = Group({"slope.weight": self.slope.weight}, o.rate, o.optimiser, clip=1.0, schedule=lambda n: 1 / (1 + n))
        second = Group({"offset.weight": self.offset.weight}, o.rate, o.optimiser, keep_gradients=o.kept)
        return {"slope": [first], "offset": [second]}

    def sample(self, index):
        x = noise(torch.tensor([self.seed * 1000 + index]), (4,))[0]
        return {"x": x, "y": 3 * x - 1, "seed": torch.tensor(index)}

    def predict(self, batch):
        return self.slope(batch["x"]) + self.offset.weight[:, 0] + 0 * self.frozen(batch["x"])

    def forward(self, part, batch, step):
        if step == self.options.hungry:
            raise torch.cuda.OutOfMemoryError("made up")
        with torch.no_grad():
            self.calls += 1
        loss = (self.predict(batch) - batch["y"]).square().mean()
        return {"square": loss if step != self.options.poison else loss * float("nan")}

    def preview(self, batch):
        return self.predict(batch).sigmoid()[:, None, None].expand(-1, 3, 4, 4)

    def measure(self, batch):
        return {"minus error": -(self.predict(batch) - batch["y"]).square().mean(1)}

    def save(self, folder):
        (folder / "slope.txt").write_text(str(self.slope.weight.tolist()))
        return [folder / "slope.txt"]


def plan(train=TRAIN, **options):
    return Settings("toy", train, Nothing(), Nothing(), Options(**options))


def digest(*layers):
    return hashlib.sha256(b"".join(layer.weight.detach().numpy().tobytes() for layer in layers)).hexdigest()


def weights(task):
    return digest(task.slope, task.offset)


def lines(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: the task, its folder, what fit returned, the frozen layer's hash before."""
    folder, task = tmp_path_factory.mktemp("run") / "out", Toy()
    frozen = digest(task.frozen)
    return task, folder, fit(task, plan(), folder), frozen


# --- a run ------------------------------------------------------------------------------------------------------------------------------


def test_a_run_trains_what_it_should_and_writes_what_it_says(finished):
    task, folder, outcome, frozen = finished
    assert digest(task.frozen) == frozen and not any(p.requires_grad for p in task.parameters())
    assert outcome.step == 6 and outcome.after["minus error"] > outcome.before["minus error"] + 0.1
    assert sorted(path.name for path in folder.glob("steps-*")) == ["steps-4", "steps-6"], "keeps the newest two"
    assert outcome.checkpoint == folder / "steps-6" and (outcome.checkpoint / "files" / "slope.txt").exists()
    assert not list(folder.glob(".writing-*"))
    assert [path.name for path in sorted((folder / "previews").iterdir())] == [f"steps-{n:07}.png" for n in (0, 3, 6)]
    log = [line for line in lines(folder) if "part" in line]
    assert [(line["step"], line["part"]) for line in log] == [(n, part) for n in range(6) for part in ("slope", "offset")]
    assert log[0]["rates"] == [0.05] and log[2]["rates"] == [0.025], "schedules count a group's own updates"
    assert log[-1]["losses"]["square"] < log[0]["losses"]["square"]
    assert [line["step"] for line in lines(folder) if "held_out" in line] == [0, 6]
    assert not (outcome.checkpoint / "model.safetensors").exists(), "the frozen base is not in the checkpoint"


def test_tensorboard_holds_losses_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[1] / "tensorboard"))
    events.Reload()
    assert {"slope/square", "offset/square", "held out/minus error"} <= set(events.Tags()["scalars"])
    assert "preview" in " ".join(events.Tags()["images"])
    assert len(events.Scalars("slope/square")) == 6


@pytest.mark.parametrize("optimiser", ["adamw", "prodigy"])
def test_resumed_run_ends_with_the_same_bits(tmp_path, optimiser):
    options = {"optimiser": optimiser, "kept": True, "rate": 1.0 if optimiser == "prodigy" else 0.05}
    whole, first, second = Toy(options=Options(**options)), Toy(options=Options(**options)), Toy(options=Options(**options))
    fit(whole, plan(**options), tmp_path / "whole")
    fit(first, plan(replace(TRAIN, steps=4), **options), tmp_path / "parts")
    torch.manual_seed(99)
    outcome = fit(second, plan(replace(TRAIN, workers=2), **options), tmp_path / "parts", resume=True)
    assert outcome.step == 6 and weights(second) == weights(whole) != weights(first)
    assert float(second.calls) == float(whole.calls) == 12, "buffers travel too"
    assert outcome.before == json.loads((tmp_path / "whole" / "steps-6" / "progress.json").read_text())["before"]
    strip = [{key: line[key] for key in line if key != "held_out"} for folder in ("whole", "parts") for line in lines(tmp_path / folder)]
    assert strip[: len(strip) // 2] == strip[len(strip) // 2 :], "the log has no step twice and none missing"


def test_pieces_make_the_same_step(tmp_path):
    tasks = Toy(), Toy()
    for task, pieces in zip(tasks, (1, 4), strict=True):
        fit(task, plan(replace(TRAIN, accumulate=pieces)), tmp_path / str(pieces))
    assert torch.allclose(tasks[0].slope.weight, tasks[1].slope.weight, atol=1e-6)
    assert torch.allclose(tasks[0].offset.weight, tasks[1].offset.weight, atol=1e-6)


def test_update_is_that_of_torch_by_hand(tmp_path):
    """One step of both parts against a loop written out here."""
    task, twin = Toy(), Toy()
    fit(task, plan(replace(TRAIN, steps=1)), tmp_path / "run")
    batch = torch.utils.data.default_collate([twin.sample(i) for i in range(4)])
    for layer, clip in ((twin.slope, 1.0), (twin.offset, 1e9)):
        optimiser = torch.optim.AdamW([layer.weight], 0.05, weight_decay=0.01)
        (twin.predict(batch) - batch["y"]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([layer.weight], clip)
        optimiser.step()
        twin.zero_grad()
    assert torch.equal(task.slope.weight, twin.slope.weight) and torch.equal(task.offset.weight, twin.offset.weight)


def test_kept_gradients_are_the_running_sum(tmp_path):
    task, twin = Toy(options=Options(kept=True)), Toy()
    fit(task, plan(replace(TRAIN, steps=2, checkpoint_every=1), kept=True), tmp_path / "run")
    sums = torch.zeros_like(twin.offset.weight)
    slope, offset = torch.optim.AdamW([twin.slope.weight], 0.05), torch.optim.AdamW([twin.offset.weight], 0.05)
    for step in range(2):
        batch = torch.utils.data.default_collate([twin.sample(4 * step + i) for i in range(4)])
        slope.param_groups[0]["lr"] = 0.05 / (1 + step)
        for layer, optimiser in ((twin.slope, slope), (twin.offset, offset)):
            twin.zero_grad()
            (twin.predict(batch) - batch["y"]).square().mean().backward()
            if layer is twin.slope:
                torch.nn.utils.clip_grad_norm_([layer.weight], 1.0)
            else:
                sums += layer.weight.grad
                layer.weight.grad = sums.clone()
            optimiser.step()
    assert torch.allclose(task.offset.weight, twin.offset.weight, atol=1e-7)


# --- when things go wrong ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trouble", "words"), [("poison", "the loss 'square' is nan"), ("hungry", "Memory ran out at step 3")])
def test_trouble_stops_with_a_sentence_and_usable_weights(tmp_path, trouble, words):
    task, options = Toy(options=Options(**{trouble: 3})), {trouble: 3}
    with pytest.raises(BokehError, match=words) as error:
        fit(task, plan(**options), tmp_path / "run")
    saved = newest_checkpoint(tmp_path / "run")
    assert saved.name == "steps-3" and str(saved) in str(error.value)
    short = Toy()
    fit(short, plan(replace(TRAIN, steps=3)), tmp_path / "short")
    fresh = Toy()
    load_trained(fresh, saved)
    assert weights(fresh) == weights(short), "the weights before the step that failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_saves_and_says_so(tmp_path, number):
    def progress(done, total):
        if done == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="steps-3; --resume"):
        fit(Toy(), plan(), tmp_path / "run", progress=progress)
    assert signal.getsignal(number) is before
    task, whole = Toy(), Toy()
    fit(task, plan(), tmp_path / "run", resume=True)
    fit(whole, plan(), tmp_path / "whole")
    assert weights(task) == weights(whole)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch, error):
    def full(self, folder):
        if self.step == 4:
            (folder / "some.bin").write_bytes(b"half")
            raise error
        return right(self, folder)

    right = engine._Run._write
    monkeypatch.setattr(engine._Run, "_write", full)
    with pytest.raises(BokehError, match=r"step 4 could not be written .*steps-2\. Make room"):
        fit(Toy(), plan(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir() if "steps" in path.name] == ["steps-2"]


def test_half_written_checkpoint_is_not_taken(tmp_path, finished):
    folder = tmp_path / "run"
    (folder / ".writing-steps-4").mkdir(parents=True)
    (folder / ".writing-steps-4" / "optimizer.bin").write_bytes(b"half")
    assert newest_checkpoint(folder) is None
    task = Toy()
    fit(task, plan(), folder, resume=True)
    assert weights(task) == weights(finished[0]) and not (folder / ".writing-steps-4").exists()


def test_progress_may_stop_a_run(tmp_path):
    class Stop(Exception):
        pass

    def progress(done, total):
        assert total == 6
        raise Stop

    with pytest.raises(Stop):
        fit(Toy(), plan(), tmp_path / "run", progress=progress)


def test_bad_starts_are_refused(tmp_path, finished):
    _, folder, *_ = finished
    with pytest.raises(BokehError, match="holds a run already"):
        fit(Toy(), plan(), folder)
    with pytest.raises(BokehError, match=r"trained with \[options\] rate = 0\.05, and the recipe now says 0\.1"):
        fit(Toy(options=Options(rate=0.1)), plan(rate=0.1), folder, resume=True)
    with pytest.raises(BokehError, match=r"trained with \[train\] batch = 4"):
        fit(Toy(), plan(replace(TRAIN, batch=8)), folder, resume=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BokehError, match="is a file"):
        fit(Toy(), plan(), file)


def test_bad_sample_in_a_worker_is_one_sentence(tmp_path):
    class Bad(Toy):
        def sample(self, index):
            if index == 9:
                raise BokehError("Picture nine is broken; replace it.")
            return super().sample(index)

    with pytest.raises(BokehError) as error:
        fit(Bad(), plan(replace(TRAIN, workers=1)), tmp_path / "run")
    assert str(error.value) == "Picture nine is broken; replace it."


def test_bfloat16_keeps_float32_weights(tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    task = Toy()
    outcome = fit(task, plan(replace(TRAIN, precision="bf16")), tmp_path / "run")
    AcceleratorState._reset_state()
    assert task.slope.weight.dtype == torch.float32 and outcome.after["minus error"] > outcome.before["minus error"]
    assert task(part="slope", batch=torch.utils.data.default_collate([task.sample(0)]), step=0)["square"].dtype == torch.float32


# --- recipe files -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    number: float
    whole: int = 1
    name: str = "a"
    file: Path | None = None
    files: tuple[Path, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    on: bool = False


def test_tables_are_filled(tmp_path):
    (tmp_path / "there.txt").write_text("")
    given = {"number": 2, "file": "there.txt", "files": ["there.txt"], "pair": [1, 2.5], "on": True}
    filled = fill(Table, given, "[x]", tmp_path)
    assert filled == Table(2.0, 1, "a", tmp_path / "there.txt", (tmp_path / "there.txt",), (1.0, 2.5), True)
    assert isinstance(filled.number, float) and isinstance(filled.pair[0], float)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nmber": 1}, r"\[x\] has no key 'nmber'; allowed are number, whole"),
        ({"number": "2"}, r"\[x\] number is '2'; expected a number"),
        ({"number": float("nan")}, "expected a number"),
        ({"number": True}, "is true; expected a number"),
        ({"whole": 1.5}, "expected a whole number"),
        ({"on": 1}, "expected true or false"),
        ({"file": "gone.txt"}, r"\[x\] file: there is no .*gone\.txt"),
        ({"files": ["gone.txt"]}, r"files, entry 1: there is no"),
        ({"file": ""}, "expected a path"),
        ({"pair": [1]}, "expected a list of 2 values"),
        ({"pair": 1}, "expected a list of 2 values"),
    ],
)
def test_bad_tables_are_refused(tmp_path, change, words):
    with pytest.raises(BokehError, match=words):
        fill(Table, {"number": 1} | change, "[x]", tmp_path)


def test_missing_key_and_bad_train_values_are_refused(tmp_path):
    with pytest.raises(BokehError, match=r"\[x\] lacks the key 'number'"):
        fill(Table, {}, "[x]", tmp_path)
    for values in ({"steps": 0}, {"steps": 1, "precision": "half"}, {"steps": 1, "batch": 3, "accumulate": 2}, {"steps": 1, "workers": -1}):
        with pytest.raises(BokehError, match=r"\[train\]"):
            Train(**values)


def test_bad_files_are_refused(tmp_path):
    file = tmp_path / "recipe.toml"
    with pytest.raises(BokehError, match="no recipe file"):
        settings.read(file)
    for text, words in (
        ("recipe = ", "not valid TOML"),
        ("steps = 1", "'steps' is unknown"),
        ("", "recipe = "),
        ('recipe = "nothing"', "no recipe 'nothing'"),
    ):
        file.write_text(text)
        with pytest.raises(BokehError, match=words):
            settings.read(file)


@pytest.mark.parametrize("name", sorted(settings.shipped()))
def test_shipped_recipes_name_only_keys_that_exist(tmp_path, name):
    """With a file in each place that the recipe names."""
    file = tmp_path / "recipe.toml"
    file.write_text(settings.shipped()[name].read_text())
    for _ in range(10):
        try:
            assert settings.read(file).recipe in settings.RECIPES
            return
        except BokehError as error:
            missing = re.search(rf"there is no ({re.escape(str(tmp_path))}\S+);", str(error))
            assert missing, error
            Path(missing[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(missing[1]).write_text("")
    pytest.fail("more than ten files")
