"""Typed options. One dataclass per command defines the flags, the YAML keys, the types and the help.

Each source overrides the one before it: the dataclass defaults, the saved options of a resumed run,
`--config FILE.yaml`, the flags. This module and the dataclasses need only the standard library (and
PyYAML to read a file), so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..training.errors import UserError, reason

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: the default value; None for "not given".
        help: one sentence with units; "(default: ...)" is appended if there is a default.
        group: heading of the option in `--help`.
        minimum, above, maximum: bounds of a number (above is exclusive).
        metavar: placeholder in `--help`, e.g. "FILE".
        positional: whether the option is given without a flag.
    """
    metadata = dict(
        help=help,
        group=group,
        minimum=minimum,
        above=above,
        maximum=maximum,
        metavar=metavar,
        positional=positional,
    )
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Kind:
    """The type of an option: the type of one value, whether it is a list, whether None is allowed."""

    item: type
    is_list: bool
    optional: bool
    choices: tuple[Any, ...] | None

    @property
    def words(self) -> str:
        """The type in words, for error messages."""
        if self.choices:
            return f"{'a list of' if self.is_list else 'one of'} {', '.join(map(str, self.choices))}"
        one = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[self.item]
        many = {int: "whole numbers", float: "numbers", str: "texts such as [a, b]", bool: "true or false"}[
            self.item
        ]
        return f"a list of {many}" if self.is_list else one

    @classmethod
    def of(cls, hint: Any) -> Kind:
        optional = False
        if get_origin(hint) in (Union, types.UnionType):
            members = [member for member in get_args(hint) if member is not type(None)]
            if len(members) != 1:
                raise TypeError(f"an option is one type, or one type and None; got {hint}")
            optional, hint = True, members[0]
        is_list = get_origin(hint) in (list, tuple)
        item = get_args(hint)[0] if is_list else hint
        choices = get_args(item) if get_origin(item) is Literal else None
        if choices:
            item = type(choices[0])
        if item not in (int, float, str, bool):
            raise TypeError(f"options are int, float, str, bool, Literal or lists of them; got {hint}")
        return cls(item, is_list, optional, choices)


def kinds(cls: type) -> dict[str, Kind]:
    """The kinds of all options of a dataclass, by name."""
    hints = get_type_hints(cls)
    return {field.name: Kind.of(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def flag(name: str) -> str:
    """The flag of an option: `max_steps` is `--max-steps`."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error message with the most similar valid word; "" if no word is similar."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f"; did you mean {found[0]}?" if found else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help at a readable width, with flags in one column and descriptions in the next."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class OptionParser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2; the error names the most similar flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def build_parser(cls: type, prog: str, summary: str, examples: str) -> OptionParser:
    """Make the argparse parser of a command from its dataclass of options."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    positionals = " ".join(field.name.upper() for field in fields if field.metadata.get("positional"))
    parser = OptionParser(
        prog=prog,
        usage=f"{prog} {positionals} [options]".replace("  ", " "),
        description=f"{summary}\n\nexamples:\n{examples}",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    all_kinds = kinds(cls)
    for field in fields:
        meta, kind = field.metadata, all_kinds[field.name]
        title = "arguments" if meta.get("positional") else meta.get("group", "options")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        help_text = meta.get("help", "")
        if not (default is None or default is False or default == "" or default is dataclasses.MISSING):
            shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else default
            shown = repr(shown) if isinstance(shown, str) and " " in shown else shown
            help_text += f" (default: {shown})"
        settings: dict[str, Any] = {"help": help_text.replace("%", "%%")}
        if kind.item is bool and not kind.is_list:
            groups[title].add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **settings)
            continue
        if kind.choices:
            settings.update(choices=kind.choices, type=kind.item)
            if kind.is_list:
                settings.update(nargs="+")
        elif kind.is_list and kind.item is not str:
            settings.update(type=_comma_list(kind), metavar=meta.get("metavar") or "N,N,...")
        else:
            settings.update(type=_converter(kind))
            fallback = {int: "N", float: "X", str: "TEXT"}[kind.item]
            settings.update(metavar=meta.get("metavar") or fallback)
            if kind.is_list:
                settings.update(nargs="+")
        if meta.get("positional"):
            groups[title].add_argument(field.name, nargs="?", **{**settings, "metavar": field.name.upper()})
        else:
            groups[title].add_argument(flag(field.name), **settings)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; flags override it")
    return parser


def _converter(kind: Kind) -> Any:
    def convert(text: str) -> Any:
        try:
            return kind.item(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.words}, got {text!r}") from None

    return convert


def _comma_list(kind: Kind) -> Any:
    def convert(text: str) -> list[Any]:
        try:
            return [kind.item(part) for part in text.split(",") if part.strip()]
        except ValueError:
            message = f"expected {kind.words} separated by commas, got {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return convert


def read_yaml(path: Path, cls: type) -> dict[str, Any]:
    """Read options from a YAML file and check their names and types.

    Raises:
        UserError: the file cannot be read or is not a mapping, a key is unknown (the message names the
            most similar valid key), or a value has the wrong type.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"bad YAML in {path}{where}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must contain 'option: value' lines, got {type(values).__name__}")
    all_kinds = kinds(cls)
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in all_kinds:
            raise UserError(f"unknown option {str(key)!r} in {path}{nearest(name, list(all_kinds))}")
        checked[name] = _checked(value, all_kinds[name], f"{name} in {path}")
    return checked


def _checked(value: Any, kind: Kind, where: str) -> Any:
    if value is None and kind.optional:
        return None
    if kind.is_list:
        if isinstance(value, list):
            return [_checked(item, dataclasses.replace(kind, is_list=False), where) for item in value]
    elif kind.item is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):  # YAML 1.1 reads 1e-3 as text
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is kind.item and (not kind.choices or value in kind.choices):
        return value
    raise UserError(f"{where}: expected {kind.words}, got {value!r}")


def check_bounds(options: Any) -> None:
    """Check the numbers of an options dataclass against their declared bounds; the UserError names the flag."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        meta = field.metadata
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            name = flag(field.name)
            if number != number or number in (float("inf"), float("-inf")):
                raise UserError(f"{name}: must be finite, got {number}")
            if meta.get("minimum") is not None and number < meta["minimum"]:
                raise UserError(f"{name}: must be at least {meta['minimum']}, got {number}")
            if meta.get("above") is not None and number <= meta["above"]:
                raise UserError(f"{name}: must be greater than {meta['above']}, got {number}")
            if meta.get("maximum") is not None and number > meta["maximum"]:
                raise UserError(f"{name}: must be at most {meta['maximum']}, got {number}")


def parse_options(parser: OptionParser, cls: type, arguments: Sequence[str]) -> Any:
    """Parse the arguments of one command into its dataclass.

    A dataclass may have a static method `saved(given)`. It gets the values of flags and YAML and returns
    values that override the defaults but not flags or YAML, e.g. the options of a resumed run. A dataclass with a
    field `further` gets the arguments after `--` there, as they are.

    Raises:
        UserError: a flag or key is unknown, a type is wrong, or a value is out of bounds.
    """
    own, further = list(arguments), []
    if "--" in own and any(field.name == "further" for field in dataclasses.fields(cls)):
        cut = own.index("--")
        own, further = own[:cut], own[cut + 1 :]
    # Intermixed: flags may stand between two positionals.
    namespace, unknown = parser.parse_known_intermixed_args(own)
    if unknown:
        word = unknown[0].split("=")[0]
        hint = nearest(word, parser.flags()) if word.startswith("-") else ""
        fits = "" if hint else f"; {' '.join(parser.format_usage().split())}"
        raise UserError(f"unknown argument {unknown[0]!r}{hint}{fits}")
    flags = vars(namespace)
    config = flags.pop("config", None)
    for field in dataclasses.fields(cls):
        if field.metadata.get("positional") and flags.get(field.name) is None:
            flags.pop(field.name, None)
    given: dict[str, Any] = {**(read_yaml(Path(config).expanduser(), cls) if config else {}), **flags}
    saved: Mapping[str, Any] = cls.saved(given) if hasattr(cls, "saved") else {}
    values = {**saved, **given}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.init and field.name not in values:
            what = field.name.upper() if field.metadata.get("positional") else flag(field.name)
            raise UserError(f"{what} is missing")
    options = cls(**values)
    if further:
        options.further = further
    check_bounds(options)
    return options


def as_yaml(options: Any) -> str:
    """The options as the text of a YAML file for `--config`."""
    import yaml

    values: dict[str, Any] = typing.cast("dict[str, Any]", dataclasses.asdict(options))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
