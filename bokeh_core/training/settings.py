"""What a recipe's TOML file says, read strictly: an unknown key, a wrong type or a missing file is refused before anything is built."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..errors import BokehError
from .task import Task

RECIPES = ("bokehdiff", "any_to_bokeh", "magicbokeh", "degraded_depth", "kontext_stack", "dsfa")  # modules with one Task each
SHIPPED = Path(__file__).parent / "recipes"
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Train:
    """The table [train]: what the engine does, whatever the recipe.

    steps             updates in all
    batch             samples of one update, over all processes together: a recipe means the same on one GPU and on eight
    accumulate        in how many pieces, one after the other, each process works on its share of the batch, to save memory
    precision         "no" (float32), "bf16" or "fp16": of the computing; trained weights stay float32
    checkpoint_every  steps from one checkpoint to the next; there is always one after the last step
    keep              newest checkpoints that are kept
    preview_every     steps from one preview picture to the next; 0: none
    held_out          samples that are never trained on, measured before the first and after the last step; 0: none
    workers           processes that make samples, for every training process; 0: the training process itself
    seed              decides samples, noise and first weights
    deterministic     on a GPU, only operations that give the same digits each time, at some cost in speed; a CPU always does
    """

    steps: int
    batch: int = 1
    accumulate: int = 1
    precision: str = "no"
    checkpoint_every: int = 1000
    keep: int = 2
    preview_every: int = 500
    held_out: int = 8
    workers: int = 4
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self):
        least = {"steps": 1, "batch": 1, "accumulate": 1, "checkpoint_every": 1, "keep": 1}
        for name, low in (least | dict.fromkeys(("preview_every", "held_out", "workers", "seed"), 0)).items():
            if getattr(self, name) < low:
                raise BokehError(f"[train] {name} is {getattr(self, name)}; expected {low} or more.")
        if self.precision not in PRECISIONS:
            raise BokehError(f"[train] precision is '{self.precision}'; use one of {', '.join(PRECISIONS)}.")
        if self.batch % self.accumulate:
            raise BokehError(f"[train] batch {self.batch} cannot be cut into {self.accumulate} equal pieces; make accumulate divide it.")


@dataclass(frozen=True)
class Settings:
    """A recipe, complete. model, data and options are the dataclasses of its task."""

    recipe: str
    train: Train
    model: typing.Any
    data: typing.Any
    options: typing.Any

    def build(self) -> Task:
        """The task on its networks. Raises BokehError where a file is not what it should be."""
        return task_class(self.recipe)(self.model, self.data, self.options, self.train.seed)


def task_class(recipe: str) -> type[Task]:
    """The class of a recipe."""
    if recipe not in RECIPES:
        raise BokehError(f"There is no recipe '{recipe}'; use one of {', '.join(RECIPES)}.")
    module = import_module(f".{recipe}", __package__)
    return next(
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Task) and kind.__module__ == module.__name__ and not kind.__abstractmethods__
    )


def shipped() -> dict[str, Path]:
    """The recipe files that come with the library, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def read(path: str | Path) -> Settings:
    """The settings of a TOML file. Relative paths in it count from its folder."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    path = Path(path)
    if not path.is_file():
        raise BokehError(f"There is no recipe file {path}; 'bokeh train --list' shows those of the library, to copy and change.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BokehError(f"{path} is not valid TOML: {error}.") from error
    try:
        return parse(content, path.parent)
    except BokehError as error:
        raise BokehError(f"{path}: {error}") from error


def parse(content: dict, folder: str | Path) -> Settings:
    """Settings from the tables of a TOML file; relative paths count from `folder`. Raises BokehError naming the key."""
    unknown = sorted(content.keys() - {"recipe", "train", "model", "data", "options"})
    if unknown:
        raise BokehError(f"'{unknown[0]}' is unknown; expected recipe, [train], [model], [data] and [options].")
    if not isinstance(content.get("recipe"), str):
        raise BokehError(f'the line recipe = "NAME" is missing; NAME is one of {", ".join(RECIPES)}.')
    kind = task_class(content["recipe"])
    tables = {"train": Train, "model": kind.Model, "data": kind.Data, "options": kind.Options}
    filled = {name: fill(table, content.get(name, {}), f"[{name}]", Path(folder)) for name, table in tables.items()}
    return Settings(content["recipe"], **filled)


def fill(kind: type, table: dict, where: str, folder: Path):
    """The dataclass `kind` from a table. Its annotations may be bool, int, float, str, Path (of something that exists), tuples and unions
    of these, Literal, and other dataclasses (as tables)."""
    if not isinstance(table, dict):
        raise BokehError(f"{where} is {_said(table)}; expected a table of keys.")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(table.keys() - fields.keys())
    if unknown:
        raise BokehError(f"{where} has no key '{unknown[0]}'; allowed are {', '.join(fields) or 'none'}.")
    empty = dataclasses.MISSING
    missing = [name for name, one in fields.items() if name not in table and one.default is empty and one.default_factory is empty]
    if missing:
        raise BokehError(f"{where} lacks the key '{missing[0]}'.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where} {name}", folder) for name, value in table.items()})


def _value(kind, value, where: str, folder: Path):
    if not _fits(kind, value):
        raise BokehError(f"{where} is {_said(value)}; expected {_called(kind)}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _value(next(one for one in arguments if _fits(one, value)), value, where, folder)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_value(one, part, f"{where}, entry {i}", folder) for i, (one, part) in enumerate(zip(kinds, value, strict=True), 1))
    if dataclasses.is_dataclass(kind):
        return fill(kind, value, where, folder)
    if kind is Path:
        path = (folder / Path(value).expanduser()).resolve()
        if not path.exists():
            raise BokehError(f"{where}: there is no {path}; give the path of an existing file or folder.")
        return path
    return float(value) if kind is float else value


def _fits(kind, value) -> bool:
    """Whether a value from TOML has the right shape for an annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        fitting = isinstance(value, list | tuple) and (arguments[-1] is Ellipsis or len(value) == len(arguments))
        kinds = arguments[:1] * len(value) if fitting and arguments[-1] is Ellipsis else arguments
        return fitting and all(_fits(one, part) for one, part in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str | Path) and str(value) not in ("", ".")
    return isinstance(value, kind)


def _called(kind) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_called(one) for one in arguments if one is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_called(arguments[0])}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} values"
    if dataclasses.is_dataclass(kind):
        return "a table"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}.get(kind, str(kind))


def _said(value) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def plain(settings: Settings) -> dict:
    """Settings as tables that JSON can hold and `parse` takes back, with absolute paths."""

    def written(value):
        if dataclasses.is_dataclass(value):
            return {field.name: written(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        if isinstance(value, list | tuple):
            return [written(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return written(settings)
