"""Every recipe, from start to end: killed and resumed, spread over two processes, and what it must leave alone."""

import hashlib
import json
import multiprocessing
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from bokeh_core.checkpoints.reading import read_checkpoint
from tests.stand_ins import training as stand_in

pytest.importorskip("accelerate")
if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("processes are started by a fork server", allow_module_level=True)
from bokeh_core.training import settings
from bokeh_core.training.engine import PROGRESS, TRAINED, fit

PROCESSES = 2
SHARED_STEPS = 2
# How far two processes may end from one, as a share of the way that the weights went. AdamW makes whole steps of gradients that are
# nothing but rounding (a bias before a normalisation): most recipes stay below 1e-3.
APART = 0.05


@pytest.fixture(scope="module")
def server():
    """A clean process that has everything imported, to start others from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bokeh_core.training.engine", "diffusers", "transformers", "accelerate", "tests.stand_ins.training"])
    return context


def contents_of(names, root):
    contents = {}
    for name in names:
        (root / name).mkdir()
        content = stand_in.tiny_recipe(name, root / name)
        contents[name] = {**content, "train": content["train"] | {"held_out": 0, "steps": 4, "checkpoint_every": 2}}
    return contents


class Runs:
    """The recipes' files, and for each, made when first asked for, its uninterrupted run and that of two processes."""

    def __init__(self, root, server):
        self.root, self.server = root, server
        self.contents = contents_of(stand_in.names(), root)
        self.finished, self.shared = {}, {}

    def whole(self, name):
        """(checkpoint folder, trained weights at the start, hashes of the frozen parameters before and after)."""
        if name not in self.finished:
            plan = settings.parse(self.contents[name], self.root)
            task = plan.build()
            groups = [group for groups in task.groups().values() for group in groups]
            start = {key: p.detach().clone() for group in groups for key, p in group.parameters.items()}
            before = hashes(task, start)
            outcome = fit(task, plan, self.root / name / "whole")
            self.finished[name] = outcome.checkpoint, start, before, hashes(task, start)
        return self.finished[name]

    def two(self, name):
        """The checkpoint of two processes; all recipes go through the same two, which start up once."""
        if not self.shared:
            outs = {name: self.root / name / "two" for name in self.contents}
            contents = {name: {**one, "train": one["train"] | {"steps": SHARED_STEPS}} for name, one in self.contents.items()}
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            workers = [
                self.server.Process(target=stand_in.train_among, args=(rank, PROCESSES, port, contents, outs)) for rank in range(PROCESSES)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(900)
                worker.kill()
            self.shared = {name: out / f"steps-{SHARED_STEPS}" for name, out in outs.items()}
        return self.shared[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server):
    return Runs(tmp_path_factory.mktemp("runs"), server)


def hashes(task, trained):
    return {name: hashlib.sha256(_bytes(p)).hexdigest() for name, p in task.named_parameters() if name not in trained}


def _bytes(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a, b):
    """Whether two tables of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and _bytes(a[name]) == _bytes(b[name]) for name in a)


@pytest.mark.parametrize("name", stand_in.names())
def test_training_moves_what_it_should_and_nothing_else(runs, name):
    checkpoint, start, before, after = runs.whole(name)
    assert before == after and before, "frozen parameters"
    trained = load_file(checkpoint / TRAINED)
    still = [key for key, value in start.items() if torch.equal(value, trained[key])]
    # Where a tiny network has one token left, its attention has no gradient.
    assert len(still) < 0.15 * len(start), f"trained parameters that did not move: {still[:5]}"
    assert all(tensor.isfinite().all() for tensor in trained.values())


@pytest.mark.parametrize("name", stand_in.names())
def test_killed_run_goes_on_to_the_same_bits(runs, server, name):
    whole, *_ = runs.whole(name)
    out = runs.root / name / "killed"
    child = server.Process(target=stand_in.train_alone, args=(runs.contents[name], out, 3))
    child.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.is_alive() and not _logged(out, 2):
        time.sleep(0.05)
    assert _logged(out, 2) and child.is_alive()
    child.kill()  # SIGKILL, a step beyond the checkpoint
    child.join()
    assert [path.name for path in out.glob("steps-*")] == ["steps-2"]

    torch.manual_seed(12345)  # whatever this process did before must not matter
    plan = settings.parse(runs.contents[name], runs.root)
    resumed = fit(plan.build(), plan, out, resume=True).checkpoint
    assert resumed.name == whole.name == "steps-4"
    assert same(load_file(resumed / TRAINED), load_file(whole / TRAINED))
    files = sorted(path.relative_to(whole) for path in (whole / "files").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(resumed) for path in (resumed / "files").rglob("*") if path.is_file()) != []
    for file in files:
        if file.suffix == ".json":
            assert (resumed / file).read_text() == (whole / file).read_text()
        else:
            assert same(read_checkpoint(resumed / file).tensors, read_checkpoint(whole / file).tensors), file


def _logged(out, step):
    """Whether every part of a step is in the log: the weights have gone beyond it."""
    path = out / "losses.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(f'"step": {step}' in line for line in lines)


@pytest.mark.parametrize("name", stand_in.names())
def test_two_processes_end_where_one_does(runs, name):
    whole, start, *_ = runs.whole(name)
    whole = whole.with_name(f"steps-{SHARED_STEPS}")
    two = runs.two(name)
    assert json.loads((two / PROGRESS).read_text())["processes"] == PROCESSES
    one, other = load_file(whole / TRAINED), load_file(two / TRAINED)
    assert one.keys() == other.keys()
    way = sum(float((one[key] - value).double().square().sum()) for key, value in start.items()) ** 0.5
    apart = sum(float((one[key] - other[key]).double().square().sum()) for key in start) ** 0.5
    print(f"{name}: {apart / way:.2e} of the way")
    assert 0 < way and apart <= APART * way
