"""Reading live objects as data: honest files come out whole, hostile ones are refused without a trace and without memory."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from bokeh_core.checkpoints.placeholders import LARGEST_PROGRAM, Name, Placeholder, module_tensors, read_with_placeholders
from bokeh_core.errors import BokehError
from tests.stand_ins.lora_pkl import CONFIG, lora_content, network_object, vanishing_classes, write_lora

ROOT = Path(__file__).resolve().parents[2]


def archive(program: bytes, parts: dict[str, bytes] | None = None, folder: str = "archive") -> bytes:
    """A PyTorch file around a pickle program written by hand."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in {"data.pkl": program, "byteorder": b"little", "version": b"3\n", "data/0": b"\0" * 64, **(parts or {})}.items():
            file.writestr(f"{folder}/{name}", data)
    return out.getvalue()


def call(module: str, name: str, arguments: bytes) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R"


def text(words: str) -> bytes:
    data = words.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def storage(count: int, key: str = "0", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(size, stride, count=16, offset=0, key="0") -> bytes:
    """A tensor of the 16 floats that `archive` stores, by its claims."""
    sizes, strides = (b"(" + b"".join(map(number, given)) + b"t" for given in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count, key) + number(offset) + sizes + strides + b"\x89}tR"


def entry(value: bytes) -> bytes:
    """A whole program: a dict with one entry."""
    return b"\x80\x02}" + text("x") + value + b"s."


def canary_call(module: str, name: str, canary: Path) -> bytes:
    """A call that would leave a file behind, were it made."""
    code = f"open({str(canary)!r}, 'w').close()"
    shell = f"touch {canary}"
    return call(module, name, text(shell if module in ("os", "posix", "nt", "subprocess", "commands") else code) + b"\x85")


class Runs:
    """What pickle makes of it runs `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved(thing, **options) -> bytes:
    out = io.BytesIO()
    torch.save(thing, out, **options)
    return out.getvalue()


def hostile(canary: Path) -> dict[str, bytes]:
    """Files by what is wrong with them. Each must be refused with `unsafe`, or as damaged where the name ends in `*`."""
    touch = f"touch {canary}"
    evil = call("os", "system", text(touch) + b"\x85")
    weights = tensor([16], [1])
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", entry(weights))
        file.writestr("archive/data/0", b"\0" * (64 << 20))
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file, pytest.warns(UserWarning):
        for program in (entry(weights), entry(evil)):
            file.writestr("archive/data.pkl", program)
    tiny = archive(entry(weights))
    huge_part = tiny.replace(struct.pack("<II", 64, 64), struct.pack("<II", 0xFFFFFF0, 0xFFFFFF0))
    cases = {
        "os.system": saved({"x": Runs(os.system, touch)}),
        "eval": saved({"x": Runs(eval, f"open({str(canary)!r}, 'w')")}),
        "exec": saved({"x": Runs(exec, f"open({str(canary)!r}, 'w')")}),
        "Popen": saved({"x": Runs(subprocess.Popen, ["touch", str(canary)])}),
        "open": saved({"x": Runs(open, str(canary), "w")}),
        "pickle in pickle": saved({"x": Runs(pickle.loads, pickle.dumps(Runs(os.system, touch)))}),
        "mention alone": archive(entry(b"cos\nsystem\n")),
        "getattr": archive(entry(call("builtins", "getattr", b"cfractions\nFraction\n" + text("x") + b"\x86"))),
        "import": archive(entry(canary_call("importlib", "import_module", canary))),
        "runpy": archive(entry(canary_call("runpy", "run_path", canary))),
        "function elsewhere": archive(entry(canary_call("numpy.testing._private.utils", "runstring", canary))),
        "torch function": archive(entry(call("torch.hub", "load", text("owner/repository") + b"\x85"))),
        "torch.load": archive(entry(call("torch", "load", text("x") + b"\x85"))),
        "old name of builtins": archive(entry(canary_call("__builtin__", "eval", canary))),
        "Python 2 name": archive(entry(canary_call("commands", "getoutput", canary))),
        "bytearray of 10 GB": archive(entry(call("builtins", "bytearray", number(10**10) + b"\x85"))),
        "nested reduce": archive(entry(call("any.where", "Class", b")") + b"(" + text("x") + b"tR")),
        "reduce of a made partial": archive(entry(call("functools", "partial", b"cany\nthing\n\x85") + b")R")),
        "set bomb": archive(b"\x80\x02](" + b"K\1" * 4000 + b"e\x85q\0" + b"c__builtin__\nset\nq\1" + b"h\1h\0R" * 4000 + b"."),
        "packed part": bomb.getvalue(),
        "two programs": twice.getvalue(),
        "climbing name": archive(entry(weights), {"../../outside": b"x"}),
        "absolute name": archive(entry(weights), folder=""),
        "windows name": archive(entry(weights), {"c:\\x": b"x"}),
        "tensor of 10 GB*": archive(entry(tensor([50000, 50000], [50000, 1]))),
        "tensor of 10 GB from one number*": archive(entry(tensor([50000, 50000], [0, 0]))),
        "tensor past its storage*": archive(entry(tensor([8], [3]))),
        "tensor before its storage*": archive(entry(tensor([4], [1], offset=-4))),
        "negative stride*": archive(entry(tensor([4], [-1]))),
        "size beyond 64 bits*": archive(entry(tensor([2**70], [1]))),
        "true as a size*": archive(entry(weights.replace(number(16) + b"t", b"\x88t", 1))),
        "storage of 10 GB*": archive(entry(tensor([16], [1], count=10**10))),
        "storage shorter than said*": archive(entry(tensor([16], [1], count=12))),
        "storage that is not there*": archive(entry(tensor([16], [1], key="9"))),
        "storage outside the file*": archive(entry(tensor([16], [1], key="../../../etc/passwd"))),
        "persistent id of another kind*": archive(entry(text("anything") + b"Q")),
        "claims of the zip*": huge_part,
        "deep tuple as a key*": archive(b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."),
        "long program*": archive(entry(b"N0" * LARGEST_PROGRAM)),
        "build on a class*": archive(entry(b"cany\nClass\n}b")),
        "new object of an object": archive(entry(b"cany\nClass\n)\x81)\x81")),
        "instruction INST*": archive(entry(b"(" + text("x") + b"ios\nsystem\n")),
        "instruction OBJ*": archive(entry(b"(cany\nClass\n" + text("x") + b"o")),
        "instruction STACK_GLOBAL*": archive(entry(text("os") + text("system") + b"\x93")),
        "instruction EXT1*": archive(entry(b"\x82\1")),
        "instruction PERSID*": archive(entry(b"Pstorage\n")),
        "protocol 4*": saved({"x": [1, 2]}, pickle_protocol=4),
        "before PyTorch 1.6*": saved({"x": Runs(os.system, touch)}, _use_new_zipfile_serialization=False),
        "plain pickle*": pickle.dumps(Runs(os.system, touch)),
        "big-endian*": archive(entry(weights), {"byteorder": b"big"}),
        "no program*": archive(entry(weights)).replace(b"data.pkl", b"data.txt"),
        "cut*": archive(entry(weights))[:-30],
        "cut program*": archive(entry(weights)[:-2]),
        "empty*": b"",
        "endless text*": archive(entry(b"X\xff\xff\xff\xff")),
        "endless bytes*": archive(entry(b"\x96" + b"\xff" * 8)),
        "empty stack*": archive(b"\x80\x02R."),
        "unpaired entries*": archive(b"\x80\x02}(" + text("x") + b"u."),
    }
    return cases


def refused(path: Path) -> str:
    with pytest.raises(BokehError) as caught:
        read_with_placeholders(path)
    return str(caught.value)


def test_hostile_files_are_refused(tmp_path):
    canary = tmp_path / "canary"
    files = hostile(canary)
    assert len(files) > 50
    modules = set(sys.modules)
    for name, data in files.items():
        path = tmp_path / "lora.pkl"
        path.write_bytes(data)
        message = refused(path)
        assert ("is a damaged PyTorch file" if name.endswith("*") else "is unsafe") in message, (name, message)
        assert message.isascii() and len(message) < 400
        assert {one.name for one in tmp_path.iterdir()} == {"lora.pkl"}, f"{name} left something behind"
    assert not {name for name in set(sys.modules) - modules if name.split(".")[0] in ("antigravity", "any", "runpy", "pty")}


WATCHED = """
import encodings.cp437, os, resource, sys  # the first is what zipfile reads names with
from pathlib import Path
from bokeh_core.checkpoints.placeholders import read_with_placeholders
from bokeh_core.errors import BokehError

folder = Path(sys.argv[1])
read_with_placeholders(folder / "honest")
said = []
LOUD = "import exec compile os.system subprocess.Popen os.exec os.posix_spawn os.fork os.remove os.mkdir pickle.find_class".split()
def watch(event, arguments):
    if event in LOUD or event == "open" and not (str(arguments[0]).startswith(str(folder)) and arguments[2] & os.O_ACCMODE == os.O_RDONLY):
        said.append((event, str(arguments)[:200]))
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
sys.addaudithook(watch)
wrong = []
for path in sorted(folder.iterdir()):
    try:
        read_with_placeholders(path)
        if path.name != "honest":
            wrong.append(path.name)
    except BokehError:
        pass
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10
print(f"wrong={wrong} said={said} grown={grown}")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_hostile_files_import_run_and_allocate_nothing(tmp_path):
    """In a process that records what Python imports, runs and opens, and that may not take a gigabyte more."""
    folder = tmp_path / "files"
    folder.mkdir()
    for index, data in enumerate(hostile(tmp_path / "canary").values()):
        (folder / f"{index:03}").write_bytes(data)
    write_lora(folder / "honest")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wrong, said, grown = (
        part.partition("=")[2] for part in done.stdout.strip().replace(" said", "\nsaid").replace(" grown", "\ngrown").split("\n")
    )
    assert (wrong, said) == ("[]", "[]"), done.stdout
    assert int(grown) < 400, "MB more at the peak; the longest program that is read at all becomes the most objects"
    assert not (tmp_path / "canary").exists()


def test_fuzzed_files_raise_only_readable_errors(tmp_path):
    """Bits flipped, ends cut, steps of the program exchanged: 500 times, always the same."""
    random_ = random.Random(7)
    honest = tmp_path / "honest"
    write_lora(honest)
    data = honest.read_bytes()
    with zipfile.ZipFile(honest) as file:
        folder = file.namelist()[0].split("/")[0]
        parts = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    program = parts.pop("data.pkl")
    start = data.index(program)
    path = tmp_path / "fuzzed"
    refusals = 0
    for round_ in range(500):
        kind = round_ % 5
        if kind == 0:
            altered = data[: random_.randrange(len(data))]
        elif kind == 1:  # anywhere, mostly tensors and the zip's own tables
            altered = flip(data, random_, [random_.randrange(len(data)) for _ in range(8)])
        elif kind == 2:  # the program
            altered = flip(data, random_, [start + random_.randrange(len(program)) for _ in range(3)])
        elif kind == 3:  # the directory at the end
            altered = flip(data, random_, [len(data) - 1 - random_.randrange(3000) for _ in range(3)])
        else:  # other steps in a zip that is right
            swapped = bytearray(program)
            for _ in range(3):
                swapped[random_.randrange(len(swapped))] = random_.choice(b"Rb\x81cQstue()}]0.\x85\x86\x87hjqrNKMX\x8a")
            altered = archive(bytes(swapped), parts, folder)
        path.write_bytes(altered)
        try:
            content = read_with_placeholders(path)
            if isinstance(content, dict) and isinstance(content.get("controlnet"), Placeholder):
                module_tensors(content["controlnet"])
        except BokehError:
            refusals += 1
    assert 200 < refusals < 500
    assert {one.name for one in tmp_path.iterdir()} == {"honest", "fuzzed"}


def flip(data: bytes, random_, places) -> bytes:
    altered = bytearray(data)
    for place in places:
        altered[place] ^= 1 << random_.randrange(8)
    return bytes(altered)


def test_honest_file_comes_out_whole(tmp_path):
    content = write_lora(tmp_path / "lora.pkl")
    assert "gone.library" not in sys.modules
    found = read_with_placeholders(tmp_path / "lora.pkl")
    assert list(found) == list(content)
    for name, value in content.items():
        if name == "controlnet":
            continue
        if isinstance(value, dict):
            assert list(found[name]) == list(value) and all(torch.equal(found[name][key], value[key]) for key in value)
        else:
            assert found[name] == value and type(found[name]) is type(value)
    network = found["controlnet"]
    assert isinstance(network, Placeholder) and network.name == "gone.library.Network"
    tensors = module_tensors(network)
    assert tensors.keys() == content["controlnet"].keys()
    assert all(torch.equal(tensors[name], content["controlnet"][name]) and not tensors[name].requires_grad for name in tensors)
    assert network.attribute("_internal_dict").entries == CONFIG
    assert network.attribute("seen") == {"a", "b"} and network.attribute("nothing") is None
    assert network.attribute("order").arguments == ("rgb",) and network.attribute("counts").entries == {"x": [1]}
    assert network.attribute("activation") == Name("torch.nn.functional.silu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"])
def test_tensors_of_every_kind(tmp_path, dtype):
    base = (torch.randn(4, 6) * 3).to(getattr(torch, dtype))
    content = {"whole": base, "part": base[1:3, ::2], "turned": base.T, "none": base[:0], "one": base[2, 3], "again": base}
    torch.save(content, tmp_path / "x")
    found = read_with_placeholders(tmp_path / "x")
    for name, value in content.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype and found[name].stride() == value.stride()


def test_misaligned_parts_are_read(tmp_path):
    """Other tools do not align the parts of the zip as torch does."""
    numbers = struct.pack("<16f", *range(16))
    for pad in range(4):
        (tmp_path / "x").write_bytes(archive(entry(tensor([16], [1])), {"pad": b"x" * pad, "data/0": numbers}))
        assert read_with_placeholders(tmp_path / "x")["x"].tolist() == list(range(16))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="torch registers classes under other names since 2.7"
)
def test_same_as_torchs_restricted_unpickler(tmp_path):
    """magicbokeh SPEC section 3: inert classes under the names of the file, weights_only."""
    path = tmp_path / "lora.pkl"
    with vanishing_classes() as library:
        tensors = {f"blocks.{i}.weight": torch.randn(3, 4) for i in range(5)}
        network = network_object(library, tensors, odd=False)
        network.register_buffer("table", torch.arange(6))
        torch.save({"network": network, "table": {"a": tensors["blocks.1.weight"]}, "numbers": (1, -2, 2.5, None, True, 2**40, "ü")}, path)

    class Inert:
        def __init__(self, *arguments):
            pass

    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert "gone.library.Network" in names
    inert = [(OrderedDict if name.endswith("FrozenDict") else type("Inert", (Inert,), {}), name) for name in names]
    with torch.serialization.safe_globals(inert):
        theirs = torch.load(path, weights_only=True, map_location="cpu")
    ours = read_with_placeholders(path)
    assert ours["numbers"] == theirs["numbers"] and torch.equal(ours["table"]["a"], theirs["table"]["a"])

    def collect(module, prefix=""):
        own = {prefix + name: value for table in (module._parameters, module._buffers) for name, value in table.items()}
        for name, child in module._modules.items():
            own |= collect(child, f"{prefix}{name}.")
        return own

    expected, found = collect(theirs["network"]), module_tensors(ours["network"])
    assert found.keys() == expected.keys() and len(found) == 6
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert ours["network"].attribute("_internal_dict").entries == dict(theirs["network"]._internal_dict)


def test_networks_that_contain_themselves_end(tmp_path):
    part = b"cany\nClass\n)\x81q\0}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}" + text("a")
    (tmp_path / "x").write_bytes(archive(b"\x80\x02" + part + b"h\0sub."))
    with pytest.raises(BokehError, match="contains itself"):
        module_tensors(read_with_placeholders(tmp_path / "x"))
    (tmp_path / "x").write_bytes(archive(b"\x80\x02]q\0h\0a."))
    endless = read_with_placeholders(tmp_path / "x")
    assert endless[0] is endless
    with pytest.raises(BokehError, match="Expected a network saved as an object at 'its top' and found list"):
        module_tensors(endless)


def test_deep_nesting_does_no_harm(tmp_path):
    (tmp_path / "x").write_bytes(archive(b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."))
    deep = read_with_placeholders(tmp_path / "x")
    assert isinstance(deep, list)
    del deep


def test_missing_file(tmp_path):
    assert "There is no file" in refused(tmp_path / "nothing.pkl")
    assert "There is no file" in refused(tmp_path)


def test_reading_changes_nothing_in_the_file_or_in_torch(tmp_path):
    write_lora(tmp_path / "lora.pkl", lora_content())
    before = (tmp_path / "lora.pkl").read_bytes()
    registered = torch.serialization.get_safe_globals() if hasattr(torch.serialization, "get_safe_globals") else []
    found = read_with_placeholders(tmp_path / "lora.pkl")
    found["state_dict_vae"]["quant_conv.lora_A.default_encoder.weight"].zero_()  # a private map
    assert (tmp_path / "lora.pkl").read_bytes() == before
    if registered:
        assert torch.serialization.get_safe_globals() == registered
