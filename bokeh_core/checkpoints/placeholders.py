"""Reads PyTorch files that hold live objects beside their tensors, without importing or running anything: objects become placeholders.

A pickle is a program for a small stack machine; its one dangerous step is to call whatever the file names. Here is such a machine
without that step: `pickletools` of the standard library takes the program apart (it only reads), plain containers and tensors are
built by the code below, and every other class becomes a `Placeholder` that remembers its name and contents. Names are never looked
up. torch's restricted unpickler could do it too (magicbokeh SPEC section 3), but needs torch 2.7, registers names for the whole
process, allocates what the file asks for (a bytearray of 10 GB) and crashes on deeply nested keys; the tests hold the two together.
"""

import math
import pickletools
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BokehError

# The objects of a whole network need 0.2 MB. Each of its bytes may become an object of 100 bytes here.
LARGEST_PROGRAM = 4 << 20
MOST_MEMBERS = 100_000

# From Python's own library only what stands for data. None of it is called: all but sets and tables become placeholders.
HARMLESS = {
    "builtins": "set frozenset list dict tuple str int float bool bytes complex object slice range",
    "collections": "OrderedDict defaultdict deque Counter",
    "functools": "partial",
    "_codecs": "encode",
    "types": "SimpleNamespace",
    "argparse": "Namespace",
    "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "datetime": "date datetime timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
}
HARMLESS = {f"{module}.{name}" for module, names in HARMLESS.items() for name in names.split()}

# Elsewhere a name in lower case is taken for a function. These are types, or make a single number.
LOWER_CASE_TYPES = {"torch.device", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}

# Values rather than objects: they may stand beside tensors in any file.
VALUES = {"torch.Size", "torch.device", "builtins.complex", "collections.Counter", "collections.defaultdict", "_codecs.encode"}

STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


# What an archive or a program that makes no sense leads to in the code below.
ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError, OSError, struct.error)


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function the file mentions, by its name alone."""

    full: str

    @property
    def is_function(self) -> bool:
        """By the custom that classes have capitals."""
        last = self.full.rpartition(".")[2].lstrip("_")
        return not last[:1].isupper() and self.full not in HARMLESS | LOWER_CASE_TYPES


class Placeholder:
    """An object of the file that was not made: what it would have been, and what would have gone into it.

    name       full name of its class
    arguments  of its constructor
    state      what would have become its attributes, mostly a dict
    entries    its items, where the class is a kind of dict
    elements   its items, where the class is a kind of list
    """

    __slots__ = ("arguments", "elements", "entries", "name", "state")

    def __init__(self, name: str, arguments: tuple):
        self.name, self.arguments = name, arguments
        self.state, self.entries, self.elements = None, {}, []

    def attribute(self, name: str):
        """What would have been the attribute `name`, None where there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Damaged(Exception):
    """The file contradicts itself."""


class _Unsafe(Exception):
    """The file asks for something no checkpoint needs."""


class _Objects(Exception):
    """The file holds an object, and none were wanted."""


def read_with_placeholders(path: str | Path, objects: bool = True):
    """What torch.save was given: tables, lists, strings, numbers and tensors as themselves, other objects as `Placeholder`.

    Ordered tables become dicts, parameters tensors, classes and functions that are only mentioned `Name`. Tensors are mapped from the
    file: never write into them. Works with every torch that ComfyUI uses.

    objects  False: refuse a file that holds any
    Raises BokehError for a file that is missing, damaged, or in the format before PyTorch 1.6, and for one that asks to call a
    function, names parts of Python that run code, or claims more data than it has. Nothing of the size of such a claim is allocated.
    """
    path = Path(path)
    if not path.is_file():
        raise BokehError(f"There is no file {path}; check the name and the folder.")
    try:
        return _Machine(_Members(path), objects).run()
    except _Objects as problem:
        raise BokehError(
            f"{path.name} holds Python objects beside its tensors ({problem}), so it was not opened; "
            "use a file of plain tensors or a .safetensors version of it."
        ) from None
    except _Unsafe as problem:
        raise BokehError(
            f"{path.name} is unsafe and was not opened: it {problem}, which no checkpoint needs. "
            "Nothing of it was run; delete it, and get the file from its authors' page."
        ) from None
    except (_Damaged, zipfile.BadZipFile, *ODD) as problem:
        told = f": it {problem}" if isinstance(problem, _Damaged) else ""
        raise BokehError(f"{path.name} is a damaged PyTorch file, or one from before PyTorch 1.6{told}; download it again.") from None


def module_tensors(module: Placeholder, most: int = 100_000) -> dict[str, torch.Tensor]:
    """name -> tensor of a network that was saved as an object: its parameters and buffers, named as its state_dict would.

    Raises BokehError where `module` is no network, or contains itself.
    """
    tensors: dict[str, torch.Tensor] = {}
    waiting = [(module, "")]
    for _ in range(most):
        if not waiting:
            return tensors
        module, prefix = waiting.pop()
        tables = [module.attribute(name) if isinstance(module, Placeholder) else None for name in ("_parameters", "_buffers", "_modules")]
        if not all(isinstance(table, dict) for table in tables):
            found = module.name if isinstance(module, Placeholder) else type(module).__name__
            raise BokehError(f"Expected a network saved as an object at '{prefix or 'its top'}' and found {_short(found)}.")
        parameters, buffers, children = tables
        tensors.update({f"{prefix}{name}": value for name, value in {**parameters, **buffers}.items() if torch.is_tensor(value)})
        waiting += [(child, f"{prefix}{name}.") for name, child in reversed(children.items()) if child is not None]
    raise BokehError(f"A network saved as an object has more than {most} parts or contains itself; the file is damaged.")


class _Members:
    """The parts of a PyTorch file: an uncompressed zip archive with one folder."""

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":
                raise _Damaged("does not begin like one")
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            self.spans = self._spans(file, members)
            self.program = self._read(file, "data.pkl", LARGEST_PROGRAM)
            if "byteorder" in self.spans and self._read(file, "byteorder", 16) != b"little":
                raise _Damaged("stores its numbers in another byte order")
        self._mapped = None

    def _spans(self, file, members) -> dict[str, tuple[int, int]]:
        """name less the folder -> (first byte, size) of each part."""
        spans, end = {}, 0
        if len(members) > MOST_MEMBERS:
            raise _Damaged(f"has {len(members)} parts")
        for member in sorted(members, key=lambda member: member.header_offset):
            folder, _, name = member.filename.partition("/")
            if not folder or not name or ".." in member.filename or "\\" in member.filename or ":" in member.filename:
                raise _Unsafe(f"has a part with the name '{_short(member.filename)}'")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size or member.flag_bits & 1:
                raise _Unsafe(f"packs its part '{_short(member.filename)}'")
            if name in spans:
                raise _Unsafe(f"has two parts '{_short(name)}'")
            file.seek(member.header_offset)
            header = file.read(30)
            if member.header_offset < end or header[:4] != b"PK\3\4":
                raise _Damaged("has parts that overlap")
            start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            end = start + member.file_size
            if end > self.size:
                raise _Damaged("claims more data than it has")
            spans[name] = (start, member.file_size)
        return spans

    def _read(self, file, name: str, most: int) -> bytes:
        if name not in self.spans:
            raise _Damaged(f"lacks its part {name}")
        start, size = self.spans[name]
        if size > most:
            raise _Damaged(f"has {size} bytes in its part {name}, where at most {most} are expected")
        file.seek(start)
        return file.read(size)

    def storage(self, key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        """[count] the numbers of a storage, mapped from the file."""
        if f"data/{key}" not in self.spans:
            raise _Damaged(f"lacks its part data/{_short(key)}")
        start, size = self.spans[f"data/{key}"]
        if count < 0 or count * dtype.itemsize != size:
            raise _Damaged(f"claims {count} numbers for its part data/{key}, which has {size} bytes")
        if size == 0:
            return torch.empty(0, dtype=dtype)
        if self._mapped is None:
            self._mapped = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        part = self._mapped[start : start + size]
        return (part if start % dtype.itemsize == 0 else part.clone()).view(dtype)


class _Machine:
    """The stack machine. What it can make is what is written here."""

    def __init__(self, members: _Members, objects: bool):
        self.members, self.objects = members, objects
        self.storages: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self.copies = len(members.program)  # items that may be copied into sets: each has a byte in an honest file

    def run(self):
        stack, marks, memo = [], [], {}

        def since_mark():
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for operation, argument, _ in pickletools.genops(self.members.program):
            match operation.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "GLOBAL":
                    stack.append(_name(argument))
                case "BINUNICODE" | "SHORT_BINSTRING" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(operation.name[-1])
                    if len(stack) < count:
                        raise IndexError
                    stack[-count:] = [tuple(stack[-count:])]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "APPEND":
                    item = stack.pop()
                    _elements(stack[-1]).append(item)
                case "APPENDS":
                    items = since_mark()
                    _elements(stack[-1]).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _entries(stack[-1])[_key(key)] = value
                case "SETITEMS":
                    items = since_mark()
                    _entries(stack[-1]).update({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})
                case "BINPERSID":
                    stack.append(self.storage(stack.pop()))
                case "NEWOBJ":
                    arguments, kind = stack.pop(), stack.pop()
                    stack.append(self.instance(kind, arguments))
                case "REDUCE":
                    arguments, kind = stack.pop(), stack.pop()
                    stack.append(self.call(kind, arguments))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Placeholder):
                        stack[-1].state = state
                    elif not isinstance(stack[-1], dict):  # attributes of a table, such as the versions of a state_dict, are dropped
                        raise TypeError
                case other:
                    raise _Damaged(f"uses the step {other}, which PyTorch does not write")
        raise EOFError

    def storage(self, claim) -> torch.Tensor:
        """The storage of a persistent id ("storage", type, key, device, count)."""
        word, kind, key, _, count = claim
        if word != "storage" or not isinstance(key, str) or type(count) is not int:
            raise TypeError
        dtype = STORAGES.get(kind.full)
        if dtype is None:
            raise _Damaged(f"stores tensors as {_short(kind.full)}, which is not supported")
        if (key, dtype) not in self.storages:
            self.storages[key, dtype] = self.members.storage(key, dtype, count)
        return self.storages[key, dtype]

    def call(self, function, arguments):
        """What takes the place of function(*arguments)."""
        match getattr(function, "full", None):
            case "collections.OrderedDict" if arguments == ():
                return {}
            case "builtins.set" | "builtins.frozenset":
                (items,) = arguments or ((),)
                self.copies -= len(items)
                if self.copies < 0:
                    raise _Unsafe("repeats its contents to fill the memory")
                made = {_key(item) for item in items}
                return frozenset(made) if function.full == "builtins.frozenset" else made
            case "torch._utils._rebuild_tensor_v2":
                return _tensor(*arguments[:4])
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return arguments[0]
            case _:
                if isinstance(function, Name) and function.is_function:
                    raise _Unsafe(f"calls the function {_short(function.full)}")
                return self.instance(function, arguments)

    def instance(self, kind, arguments) -> Placeholder:
        if not isinstance(kind, Name):
            raise _Unsafe("calls what an earlier call returned")
        if not isinstance(arguments, tuple):
            raise TypeError
        if not self.objects and kind.full not in VALUES:
            raise _Objects(_short(kind.full))
        return Placeholder(kind.full, arguments)


def _name(argument: str) -> Name:
    module, _, name = argument.partition(" ")
    if (module, name) in NAME_MAPPING:  # pickles of this protocol give Python's own library its names of Python 2
        module, name = NAME_MAPPING[module, name]
    module = IMPORT_MAPPING.get(module, module)
    full = f"{module}.{name}"
    if full.partition(".")[0] in sys.stdlib_module_names and full not in HARMLESS:
        raise _Unsafe(f"names {_short(full)}")
    return Name(full)


def _elements(target) -> list:
    return target.elements if isinstance(target, Placeholder) else _checked(target, list)


def _entries(target) -> dict:
    return target.entries if isinstance(target, Placeholder) else _checked(target, dict)


def _checked(value, kind: type):
    if type(value) is not kind:
        raise TypeError
    return value


def _key(value):
    """The value, if it can be a key: nested tuples are refused, for hashing them takes a step of the C stack per level."""
    flat = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(one, str | int | float | Name | Placeholder | None) for one in flat):
        raise TypeError
    return value


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple) -> torch.Tensor:
    """A view of the storage that lies inside it, and is not larger than it."""
    if not all(type(number) is int and 0 <= number < 1 << 40 for number in (offset, *size, *stride)) or len(size) != len(stride):
        raise TypeError
    if len(size) > 16:
        raise _Damaged(f"has a tensor of {len(size)} dimensions")
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
    if math.prod(size) > storage.numel() or (0 not in size and reach > storage.numel()):
        raise _Damaged(f"claims a tensor of size {list(size)} where it has {storage.numel()} numbers")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)  # the storage may be a part of a larger one


def _short(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
