"""A command's flags from a dataclass: each field is a flag, with its default, its help and its choices beside it."""

import argparse
import shlex
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from lib.files import read_json


def flag(default, help: str, *, with_model=None, choices: tuple = (), group: str = "", kind: type | None = None,
         required: bool = False, nargs: int | None = None, metavar=None):
    """A field of a dataclass of flags. `with_model`: its default where --model is given, if another. `group`: under which
    title of --help it stands. `kind`: its type, where the default is None and does not tell."""
    metadata = {"help": help, "with_model": default if with_model is None else with_model, "choices": choices,
                "group": group, "kind": kind or type(default), "required": required, "nargs": nargs, "metavar": metavar}
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One sentence. The library prints the names of all flags in front of it, forty lines."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def make_parser(cls: type, description: str) -> argparse.ArgumentParser:
    """A flag for every field of `cls` that `flag` has made."""
    parser = Parser(description=description, allow_abbrev=False)
    groups: dict[str, Any] = {"": parser}
    for f in fields(cls):
        if not f.metadata:
            continue
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(f"--{f.name}", default=None, required=f.metadata["required"],
                                   help=help_of(f).replace("%", "%%"), **kind_of(f))
    return parser


def kind_of(f) -> dict:
    """How argparse is to read the value of a field."""
    kind, choices = f.metadata["kind"], f.metadata["choices"] or None
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is tuple:
        return {"type": str, "nargs": "+", "choices": choices}
    return {"type": kind, "choices": choices, "nargs": f.metadata["nargs"], "metavar": f.metadata["metavar"]}


def help_of(f) -> str:
    default, with_model = (" ".join(x) if isinstance(x, tuple) else x for x in (f.default, f.metadata["with_model"]))
    if f.default is None or f.metadata["required"]:
        return f.metadata["help"]
    other = "" if with_model == default else f"; with --model: {with_model}"
    return f"{f.metadata['help']} (default: {default}{other})"


def given_flags(parser: argparse.ArgumentParser, arguments: list[str] | None) -> dict[str, Any]:
    """Only those that were given."""
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


def default_of(f, with_model: bool):
    value = f.metadata.get("with_model", f.default) if with_model else f.default  # a field may be no flag
    return list(value) if isinstance(value, tuple) else value


def fill(cls: type, given: dict[str, Any], with_model: bool = False):
    """An instance of `cls`; a flag that was left out takes its default."""
    return cls(**{f.name: given[f.name] if f.name in given else default_of(f, with_model) for f in fields(cls)})


def settings_of_the_run(cls: type, given: dict, fixed: tuple[str, ...], parser: argparse.ArgumentParser) -> dict:
    """With --resume, flags left out keep the values of the run in --out; those in `fixed` cannot change."""
    out = next(f for f in fields(cls) if f.name == "out")
    file = Path(given.get("out") or default_of(out, bool(given.get("model")))) / "config.json"
    if not file.exists():
        return given
    saved = read_json(file)
    for name in fixed:
        if name in given and given[name] != saved.get(name):
            parser.error(f"--resume: this run has --{name} {saved.get(name)}, not {given[name]}; name another --out")
    return {**{f.name: saved[f.name] for f in fields(cls) if f.name in saved and f.name != "overwrite"}, **given}


def command_of(settings, script: str, leave_out: tuple[str, ...]) -> str:
    """The command that gives these settings: every flag whose value is not its default."""
    words = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name in leave_out or not f.metadata or value == default_of(f, bool(settings.model)):
            continue
        if isinstance(value, bool):
            words.append(f"--{f.name}" if value else f"--no-{f.name}")
        else:
            words += [f"--{f.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join([script, *words])
