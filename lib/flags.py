"""A command's flags from a dataclass: each field is a flag, with its default, its help, its choices and its range beside it.

Every number has a range, `within` (lowest, highest), both allowed: it stands in --help, and a number outside, nan among them,
is refused before anything begins. Commands without a dataclass give argparse the same range as a `type`: `number(...)`.
"""

import argparse
import math
import re
import shlex
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from lib.files import read_json
from lib.samples import is_number
from lib.terminal import printable


Range = tuple[float, float]

# Of flags that several commands have. The highest ones are no advice: what lies above them is a slip of the hand.
SEED: Range = (0, 2**32 - 1)
FRAME_RATE: Range = (0.01, 1000)
FRAMES: Range = (2, 100_000)
PIXELS: Range = (784, 10**10)  # one token
TOKENS: Range = (1, 10_000_000)
WORKERS: Range = (0, 256)
COUNT: Range = (1, 1_000_000)
SHARE: Range = (0, 1)


def flag(default, help: str, *, with_model=None, within: Range | None = None, choices: tuple = (), group: str = "",
         kind: type | None = None, required: bool = False, nargs: int | None = None, metavar=None):
    """A field of a dataclass of flags. `within`: the lowest and the highest value of a number. `with_model`: its default where
    --model is given, if another. `group`: under which title of --help it stands. `kind`: its type, where the default is None
    and does not tell."""
    metadata = {"help": help, "with_model": default if with_model is None else with_model, "choices": choices,
                "group": group, "kind": kind or type(default), "within": within, "required": required, "nargs": nargs,
                "metavar": metavar}
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The library takes -1e-6 and -inf for names of flags, and says that a value is missing.
        self._negative_number_matcher = re.compile(r"-(?:[0-9.]|inf$|nan$)")

    def error(self, message: str) -> None:
        """One sentence. The library prints the names of all flags in front of it, forty lines."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help explains every flag)\n")


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
    if f.metadata["within"]:
        kind = number(kind, *f.metadata["within"], about=f.metadata["help"])
    return {"type": kind, "choices": choices, "nargs": f.metadata["nargs"], "metavar": f.metadata["metavar"]}


def number(kind: type, lowest: float, highest: float, about: str = ""):
    """What argparse is to read a number of this range with: a `type` of add_argument. `about` stands behind the message."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # is in no range
        if not lowest <= value <= highest:
            wanted = range_in_words(kind, (lowest, highest))
            raise argparse.ArgumentTypeError(f"{text[:40]} is not {wanted}" + f" ({about})" * bool(about))
        return value

    return read


def range_in_words(kind: type, within: Range) -> str:
    return f"a {'whole ' * (kind is int)}number from {within[0]:.10g} to {within[1]:.10g}"


def range_problem(settings) -> str | None:
    """The first number outside of its range, for settings that did not come from a command line but from a file."""
    for f in fields(settings):
        within, value = f.metadata.get("within"), getattr(settings, f.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        if within and value is not None and not all(is_number(x) and within[0] <= x <= within[1] for x in values):
            return f"--{f.name} is {value}; it must be {range_in_words(f.metadata['kind'], within)} ({f.metadata['help']})"
    return None


def help_of(f) -> str:
    default, with_model = (" ".join(x) if isinstance(x, tuple) else x for x in (f.default, f.metadata["with_model"]))
    within = f.metadata["within"]
    notes = [f"{within[0]:.10g} to {within[1]:.10g}"] if within else []
    if f.default is not None and not f.metadata["required"]:
        other = "" if with_model == default else f"; with --model: {with_model}"
        notes.append(f"default: {default}{other}")
    return f"{f.metadata['help']} ({'; '.join(notes)})" if notes else f.metadata["help"]


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
