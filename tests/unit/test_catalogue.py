"""Where models lie, what they are, and the only code that downloads, against a server on this machine that misbehaves."""

import hashlib
import http.server
import re
import socket
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bokeh_core import cli
from bokeh_core.checkpoints import catalogue
from bokeh_core.checkpoints import download as downloading
from bokeh_core.checkpoints.catalogue import CATALOGUE, model_files
from bokeh_core.checkpoints.download import download
from bokeh_core.errors import BokehError

DATA = bytes(range(256)) * 12000  # 3 MB: more than two blocks
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No ComfyUI, and a cache folder of our own."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Server(http.server.ThreadingHTTPServer):
    """/file is DATA, with ranges; /linked leads to it as a hub does; `cut`: bytes after which each connection breaks."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut, self.ranges, self.named, self.seen = None, True, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Range")))
        if self.path in ("/linked", "/astray"):
            self.send_response(302)
            self.send_header("Location", "/file" if self.path == "/linked" else "ftp://127.0.0.1/file")
            for key, value in server.named.items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path != "/file":
            self.send_error(int(self.path.strip("/")))
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if server.ranges and self.headers["Range"] else 0
        if start >= len(DATA):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(DATA) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        end = len(DATA) if server.cut is None else min(len(DATA), start + server.cut)
        self.wfile.write(DATA[start:end])
        self.close_connection = True


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def get(server, target, path="/file", **more):
    return download(server.url + path, target, schemes=("http",), **more)


def test_a_file_arrives_whole_and_tells_how_far_it_is(server, tmp_path):
    told = []
    path = get(server, tmp_path / "deep" / "model.pth", size=len(DATA), sha256=SHA, progress=lambda *now: told.append(now))
    assert path.read_bytes() == DATA and not path.with_name("model.pth.part").exists()
    assert told[-1] == (len(DATA), len(DATA)) and len(told) > 2


def test_only_https_also_after_a_redirect(server, tmp_path):
    with pytest.raises(BokehError, match="only https"):
        download(server.url + "/file", tmp_path / "a")
    with pytest.raises(BokehError, match=r"ftp://.*only http "):
        get(server, tmp_path / "a", "/astray")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_connection_is_taken_up_by_itself(server, tmp_path):
    server.cut = 1_200_000
    assert get(server, tmp_path / "a", sha256=SHA).read_bytes() == DATA
    assert [start for _, start in server.seen] == [None, "bytes=1200000-", "bytes=2400000-"]


def test_and_by_the_next_call(server, tmp_path):
    server.cut = 500_000
    with pytest.raises(BokehError, match=r"2\.0 MB are kept, and the same command goes on"):
        get(server, tmp_path / "a", sha256=SHA)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == 2_000_000
    server.cut = None
    assert get(server, tmp_path / "a", sha256=SHA).read_bytes() == DATA
    assert server.seen[-1] == ("/file", "bytes=2000000-")


def test_an_interrupted_download_goes_on(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "a", progress=stop)
    kept = (tmp_path / "a.part").stat().st_size
    assert 0 < kept < len(DATA)
    assert get(server, tmp_path / "a", sha256=SHA).read_bytes() == DATA
    assert server.seen[-1][1] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "a.part").write_bytes(b"old" * 1000)
    server.ranges = False
    assert get(server, tmp_path / "a", sha256=SHA).read_bytes() == DATA


def test_a_longer_part_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA + b"more")
    assert get(server, tmp_path / "a").read_bytes() == DATA


def test_a_complete_part_needs_no_request(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA)
    get(server, tmp_path / "a", size=len(DATA), sha256=SHA)
    assert server.seen == []


def test_what_the_hub_names_is_checked(server, tmp_path):
    server.named = {"X-Linked-Etag": f'"{SHA}"', "X-Linked-Size": str(len(DATA))}
    assert get(server, tmp_path / "a", "/linked").read_bytes() == DATA
    (tmp_path / "b.part").write_bytes(b"x" * 1000)  # damage in what is taken up
    with pytest.raises(BokehError, match="not the file that was asked for"):
        get(server, tmp_path / "b", "/linked")
    assert not list(tmp_path.glob("b*"))
    with pytest.raises(BokehError, match="no longer the known one"):
        get(server, tmp_path / "b", "/linked", sha256="0" * 64)
    with pytest.raises(BokehError, match="no longer the known one"):
        get(server, tmp_path / "b", "/linked", size=7)


def test_a_wrong_file_is_deleted(server, tmp_path):
    with pytest.raises(BokehError, match="SHA-256 differs"):
        get(server, tmp_path / "a", sha256="0" * 64)

    def refuse(part):
        raise BokehError("not a model")

    with pytest.raises(BokehError, match="not a model"):
        get(server, tmp_path / "a", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(server, tmp_path):
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(BokehError, match="already there"):
        get(server, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"mine" and server.seen == []


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file any more"), (403, "log-in .403.; get the file from"), (500, "500 .*try again later")]
)
def test_refusals_of_the_server_are_explained(server, tmp_path, status, words):
    with pytest.raises(BokehError, match=words):
        get(server, tmp_path / "a", f"/{status}")
    assert list(tmp_path.iterdir()) == [] and len(server.seen) == 1


def test_offline(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BokehError, match=r"127\.0\.0\.1 cannot be reached .*offline.*or get the file from http"):
        download(f"http://127.0.0.1:{port}/file", tmp_path / "a", schemes=("http",))


def test_no_room(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(BokehError, match=r"1\.0 MB free, 3\.1 MB are needed"):
        get(server, tmp_path / "a")
    monkeypatch.undo()
    # /dev/full accepts nothing: what a disk does that fills up on the way
    if Path("/dev/full").exists():
        (tmp_path / "a.part").symlink_to("/dev/full")
        with pytest.raises(BokehError, match=r"cannot be written .No space"):
            get(server, tmp_path / "a")


# The catalogue


def test_entries_are_whole():
    names = Counter(one.name for one in CATALOGUE)
    assert max(names.values()) == 1
    for one in CATALOGUE:
        assert one.page.startswith("https://huggingface.co/") and one.licence and Path(one.file).name == one.file
        assert not one.url or (one.url.startswith(one.page + "/resolve/main/") and one.url.endswith("/" + one.file))
        assert (one.size is None) == (one.sha256 == "") and re.fullmatch("([0-9a-f]{64})?", one.sha256)
    depth = [one for one in CATALOGUE if one.folder == "depthanything" and one.size]
    assert len(depth) == 15 and sum(one.licence == "Apache-2.0" for one in depth) == 5
    assert all((one.licence == "Apache-2.0") == ("vits" in one.file) for one in depth)
    # Four bytes for each number of the manifests, and little around them.
    millions = {"vits": 24.79, "vitb": 97.47, "vitl": 335.32}
    for one in depth:
        if "video" not in one.file:
            (count,) = [count for encoder, count in millions.items() if encoder in one.file]
            assert 0 < one.size - 4e6 * count < 4e5, one.name


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_files_are_found_in_every_place_once(tmp_path, monkeypatch):
    comfy, flat = tmp_path / "comfy", tmp_path / "flat"
    monkeypatch.setenv("COMFYUI_PATH", str(comfy))
    files = [
        touch(flat / "a.pth"),
        touch(comfy / "models" / "depthanything" / "sub" / "b.safetensors"),
        touch(tmp_path / "cache" / "bokeh" / "models" / "depthanything" / "c.pth"),
        touch(tmp_path / "more" / "depth" / "d.pth"),
        touch(comfy / "beside" / "e.pth"),
    ]
    touch(comfy / "models" / "depthanything" / "notes.txt")
    touch(comfy / "models" / "depthanything" / "f.pth.part")
    touch(comfy / "models" / "loras" / "g.pth")
    (comfy / "extra_model_paths.yaml").write_text(
        f"one:\n  base_path: {tmp_path / 'more'}\n  is_default: true\n  depthanything: |\n    depth\n    nowhere\n"
        "two:\n  depthanything: beside\nempty:\n"
    )
    (flat / "again.pth").symlink_to(files[1])
    found = model_files("depthanything", [flat])
    assert sorted(path.name for path in found) == ["a.pth", "again.pth", "c.pth", "d.pth", "e.pth"]
    assert sorted(path.name for path in model_files("depthanything")) == ["b.safetensors", "c.pth", "d.pth", "e.pth"]
    with pytest.raises(BokehError, match="is no folder"):
        model_files("depthanything", [tmp_path / "gone"])
    (comfy / "extra_model_paths.yaml").write_text("one: [")
    with pytest.raises(BokehError, match=r"extra_model_paths\.yaml cannot be read"):
        model_files("depthanything")


# The command


def bokeh(*words):
    return cli.main([str(word) for word in words])


def test_models_without_any(capsys):
    assert bokeh("models") == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("No model is installed.")
    assert all(one.name in out and one.file in out for one in CATALOGUE)


def test_get_puts_a_model_where_it_belongs(server, capsys, tmp_path, monkeypatch):
    (one,) = [one for one in CATALOGUE if one.name == "magicbokeh-depth"]
    fake = catalogue.Entry(one.name, one.title, "loras", one.file, one.licence, one.page, server.url + "/file", len(DATA), SHA)
    monkeypatch.setattr(catalogue, "CATALOGUE", [fake])
    monkeypatch.setattr(downloading, "download", partial(download, schemes=("http",)))
    assert bokeh("models", "get", fake.name) == 2  # DATA is no checkpoint, and that is found before it gets its name
    assert "neither a safetensors nor a complete PyTorch file" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("DAdepth*"))
    monkeypatch.setattr("bokeh_core.models_cli.identify", lambda path, name: catalogue.Report(name))
    assert bokeh("models", "get", fake.name) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "cache" / "bokeh" / "models" / "loras" / "DAdepth.pth"
    assert out == f"{path}\n" and one.licence in err and path.read_bytes() == DATA
    assert bokeh("models", "get", fake.name) == 2 and "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("get", "nonsense"), "'bokeh models' lists the names"),
        (("get", "bokehdiff"), "put pytorch_lora_weights.safetensors from https://huggingface.co/zcx65535/bokehdiff into models/loras"),
        (("get", "magicbokeh", "--models", "nowhere"), "nowhere is no folder"),
        (("check", "nowhere.pth"), "There is no file nowhere.pth"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, expected):
    assert bokeh("models", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err and err.count("\n") == 1 and err.startswith("bokeh: ")


def test_check_says_what_a_foreign_file_is(capsys, tmp_path):
    save_file({"a.one": torch.zeros(3, 5, dtype=torch.float16), "a.two": torch.zeros(2)}, tmp_path / "x.safetensors", {"author": "me"})
    assert bokeh("models", "check", tmp_path / "x.safetensors") == 2
    out, err = capsys.readouterr()
    assert out.startswith("nothing this library knows\n") and "cannot be used" in err
    for words in ("2 with 0.00 million", "float16, float32", "a.", "me", "PROBLEM: The names of its tensors are unknown (a.one, a.two"):
        assert words in out, words
