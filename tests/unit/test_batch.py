"""`bokeh batch` and `bokeh farm`: what is lost on the way, and what is not done twice."""

import http.server
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bokeh_core import batch, farm, media
from bokeh_core.cli import main
from bokeh_core.errors import BokehError


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def photos(folder, names):
    for name in names:
        rng = np.random.default_rng(len(name))
        media.write_picture(folder / "in" / f"{name}.png", media.Picture(torch.from_numpy(rng.random((3, 24, 32), dtype=np.float32))))
        depth = torch.linspace(0, 1, 32).expand(3, 24, 32)
        media.write_picture(folder / "depth" / f"{name}.png", media.Picture(depth), 16)
    return [str(folder / "in"), "-o", str(folder / "out"), "--depth", str(folder / "depth"), "--workers", "2"]


def test_a_folder_is_rendered_once_and_one_failure_does_not_stop_the_rest(tmp_path, capsys):
    command = ["batch", *photos(tmp_path, ["a", "b", "c"]), "--options", "--k 3 --focus-disparity 0.2"]
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    assert main(command) == 2
    said = capsys.readouterr()
    assert "2 done, 0 skipped, 1 failed" in said.out and "b.png" in said.err
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [".bokeh-batch.json", "a.png", "c.png"]
    single = tmp_path / "single.png"
    words = ["--depth", str(tmp_path / "depth" / "a.png"), "--k", "3", "--focus-disparity", "0.2"]
    assert main(["render", str(tmp_path / "in" / "a.png"), "-o", str(single), *words]) == 0
    assert single.read_bytes() == (tmp_path / "out" / "a.png").read_bytes()

    photos(tmp_path, ["b"])  # mended
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    assert main(command) == 0
    assert "1 done, 2 skipped, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == before


def test_other_options_and_newer_inputs_are_rendered_again(tmp_path):
    photos(tmp_path, ["a"])
    folders = [tmp_path / name for name in ("in", "out", "depth")]
    (job,) = batch.find_jobs(*folders, ["--k", "3"])
    record = batch.Record(folders[1])
    assert not record.holds(job)
    media.write_picture(job.output, media.Picture(torch.zeros(3, 2, 2)))
    record.add(job)
    record = batch.Record(folders[1])
    assert record.holds(job)
    (other,) = batch.find_jobs(*folders, ["--k", "4"])
    assert not record.holds(other)
    later = time.time() + 10
    os.utime(job.inputs[1], (later, later))
    assert not record.holds(job)


def test_missing_depth_and_clashing_names_are_said_before_work_starts(tmp_path):
    photos(tmp_path, ["a"])
    folders = [tmp_path / name for name in ("in", "out", "depth")]
    media.write_picture(tmp_path / "in" / "a.jpg", media.Picture(torch.zeros(3, 4, 4)))
    with pytest.raises(BokehError, match="would both become"):
        batch.find_jobs(*folders, [], ".png")
    media.write_picture(tmp_path / "in" / "z.jpg", media.Picture(torch.zeros(3, 4, 4)))
    with pytest.raises(BokehError, match=r"no depth for z\.jpg"):
        batch.find_jobs(*folders, [])
    assert main(["batch", str(tmp_path / "in"), "-o", str(tmp_path / "in")]) == 2


def _pretend(command):
    """A job: ["write", FILE], or ["die", FILE]: writes its number, and is killed (the first time, or always)."""
    what, file = command[0], Path(command[1])
    with file.open("a") as out:
        out.write(f"{os.getpid()}\n")
    while what == "die" and not any(other.stat().st_size for other in file.parent.glob("1")):
        time.sleep(0.01)  # a worker that is still starting has not begun job 1, and its end would not count as one of that job
    if what == "die" or (what == "die once" and len(file.read_text().splitlines()) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return ""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills processes")
def test_two_workers_survive_the_loss_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_work", _pretend)
    monkeypatch.setattr(batch, "_begin", int)
    kinds = ["write", "die once", "write", "die", "write", "write"]
    jobs = [batch.Job(str(n), (), tmp_path / str(n), (kind, str(tmp_path / str(n)))) for n, kind in enumerate(kinds)]
    ended = {}

    def finished(job, sentence):
        assert job.name not in ended
        ended[job.name] = sentence

    batch.run(jobs, 2, finished)
    assert {name for name, sentence in ended.items() if sentence} == {"3"} and "killed" in ended["3"]
    assert set(ended) == {str(n) for n in range(6)}
    assert len({pid for n in (0, 2, 4, 5) for pid in (tmp_path / str(n)).read_text().split()}) > 1


class Server(http.server.ThreadingHTTPServer):
    """As much of ComfyUI's queue as the farm uses. Jobs named in `deadly` take the server down, those in `cut` while their file is sent."""

    daemon_threads = True

    def __init__(self, deadly=(), cut=()):
        self.jobs, self.deadly, self.cut, self.dead = {}, deadly, cut, False
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body, code=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        if self.server.dead:
            return self.connection.close()
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        name = prompt["1"]["inputs"]["name"]
        if name == "refused":
            error = {"message": "Value not in list", "details": "depth_model"}
            return self.answer({"error": {"message": "invalid"}, "node_errors": {"1": {"errors": [error]}}}, 400)
        number = f"{name}-{len(self.server.jobs)}"
        self.server.jobs[number] = name
        self.answer({"prompt_id": number})
        self.server.dead = name in self.server.deadly

    def do_GET(self):
        if self.server.dead:
            return self.connection.close()
        what, _, rest = self.path.strip("/").partition("/")
        if what == "system_stats":
            return self.answer({"system": {"comfyui_version": "stub"}})
        if what == "queue":
            return self.answer({"queue_running": [], "queue_pending": []})
        if what == "history":
            if self.server.jobs[rest] == "failing":
                status = {"status_str": "error", "messages": [["execution_error", {"exception_message": "no model"}]]}
                return self.answer({rest: {"status": status}})
            file = {"filename": "../" + self.server.jobs[rest] + ".png", "subfolder": "", "type": "output"}
            return self.answer({rest: {"status": {"status_str": "success"}, "outputs": {"2": {"images": [file]}}}})
        if any(f"{name}.png" in self.path for name in self.server.cut):
            self.server.dead = True
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            return self.connection.close()
        self.answer(self.server.url.encode())


def prompts(*names):
    return {name: {"1": {"class_type": "Any", "inputs": {"name": name}}} for name in names}


def test_the_farm_gives_the_job_of_a_lost_server_to_another(tmp_path):
    lost, good = Server(deadly=("a", "b")), Server()
    jobs, ended = prompts("a", "b", "c", "d", "failing", "refused"), {}

    def finished(name, server, sentence):
        assert name not in ended
        ended[name] = sentence

    farm.run(jobs, [lost.url, good.url], tmp_path, finished, every=0.02, comes_back=0.2)
    assert {name: bool(sentence) for name, sentence in ended.items()} == {name: name in ("failing", "refused") for name in jobs}
    assert ended["failing"] == "no model" and "depth_model" in ended["refused"]
    assert lost.dead
    for name in "abcd":
        assert (tmp_path / name / f"{name}.png").is_file()  # and never outside of its folder
    assert {(tmp_path / name / f"{name}.png").read_text() for name in "ab"} == {good.url}


def test_a_server_lost_while_it_sends_a_file_loses_nothing(tmp_path):
    lost, good, ended = Server(cut=("a", "b")), Server(), {}
    farm.run(
        prompts("a", "b", "c"),
        [lost.url, good.url],
        tmp_path,
        lambda *words: ended.update({words[0]: words[1:]}),
        every=0.02,
        comes_back=0.2,
    )
    assert lost.dead and set(ended) == set("abc") and not any(sentence for _, sentence in ended.values())
    assert {(tmp_path / name / f"{name}.png").read_text() for name in "ab"} == {good.url}


def test_a_farm_without_servers_says_so(tmp_path, capsys):
    server = Server(deadly=("a",))
    with pytest.raises(BokehError, match="No server answers"):
        farm.run(prompts("a", "b"), [server.url], tmp_path, lambda *_: None, every=0.02, comes_back=0.2)
    (tmp_path / "a.json").write_text(json.dumps(prompts("a")["a"]))
    assert main(["farm", str(tmp_path / "a.json"), "-o", str(tmp_path), "--server", "http://127.0.0.1:9"]) == 2
    assert main(["farm", str(tmp_path / "a.json"), "-o", str(tmp_path), "--server", "file:///etc"]) == 2
    assert "no address of a ComfyUI" in capsys.readouterr().err
