"""From a command line to a configuration dataclass: YAML layers, flags over them, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from distilllens.errors import ConfigError
from distilllens.ranges import field_ranges, range_problem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

LARGEST_FILE = 1_000_000
"""Bytes of a YAML layer; ours have a few thousand."""
LONGEST_MESSAGE = 400
"""Characters of what the parser says about one value: it quotes the value whole."""


# --- YAML ---------------------------------------------------------------------------------------


class RefusedYamlError(yaml.MarkedYAMLError):
    """Something that YAML allows and a configuration has no use for."""


class PlainLoader(yaml.SafeLoader):
    """Mappings, lists and scalars only; what YAML would drop or reinterpret silently is refused.

    Refused are doubled keys (YAML keeps the last), anchors, aliases, merge keys and tags. Numbers
    are read as in YAML 1.2: no base 60, where 1:30:00 would be the number 5400, and no octals.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Looks at each node's properties before it is made."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RefusedYamlError(
                problem="anchors and aliases (& and *) are not read", problem_mark=event.start_mark
            )
        if tag := getattr(event, "tag", None):
            raise RefusedYamlError(
                problem=f"the tag {tag} is not read", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses keys that occur twice, and ``<<``."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            mark = key_node.start_mark
            if key == "<<":
                raise RefusedYamlError(problem="merge keys (<<) are not read", problem_mark=mark)
            if key is not None and key in lines:
                first = f"first in line {lines[key]}"
                raise RefusedYamlError(
                    problem=f"key {key!r:.80} occurs twice, {first}", problem_mark=mark
                )
            lines[key] = mark.line + 1
        return super().construct_mapping(node, deep)


PlainLoader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(t, r) for t, r in resolvers if t.endswith((":bool", ":null", ":merge"))])
}
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$"),
    list("-+0123456789"),
)
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load_plain_yaml(text: str) -> Any:
    """Returns the content of a YAML text, read by `PlainLoader`.

    Raises:
        yaml.YAMLError: Not YAML, or something that is refused, with its line where that is known.
    """
    loader = PlainLoader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise RefusedYamlError(problem="nested too deeply") from None
    except ValueError as error:  # a number of more than 4300 digits
        raise RefusedYamlError(problem=str(error)) from None
    finally:
        loader.dispose()


set_loader("plain_yaml", load_plain_yaml, exceptions=(yaml.YAMLError,))


# --- Command lines ------------------------------------------------------------------------------


class CommandParser(argparse.ArgumentParser):
    """Plain flags, of the commands without a configuration; wrong usage is a `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of ending the process."""
        raise ConfigError(message, fix=f"{self.prog} --help")


def parse_arguments(config_class: type[T], argv: Sequence[str] | None, *, prog: str) -> T:
    """Parses ``argv`` into ``config_class``, every value within its option's range.

    Raises:
        ConfigError: Unknown keys, all at once; a value of a wrong type; all that are out of range,
            not finite, beyond 64 bits, or with control characters; a file that is missing, not
            YAML, or more than plain YAML.
    """
    parser = build_parser(config_class, prog=prog)
    arguments = _spell_out_switches(sys.argv[1:] if argv is None else argv)
    raise_problems([*_yaml_problems(parser, arguments), *_flag_problems(parser, arguments)])
    try:
        namespace = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise _wrong_value(_one_line(str(error)), prog) from None
    values = vars(parser.instantiate(namespace))
    config = config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})
    raise_problems(list(_value_problems(config)))
    return config


@cache
def build_parser(config_class: type, *, prog: str) -> ArgumentParser:
    """Returns the parser of a configuration class; its field docstrings are the help texts.

    Made once: it costs twice as much as a parse, and a sweep parses once for each method.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, default_env=False, parser_mode="plain_yaml"
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(config_class, as_group=True)
    ranges = field_ranges(config_class)
    for action in parser._actions:
        if told := ranges.get(action.dest):
            action.help = f"{action.help} Range: {told}."
    return parser


SWITCHES = ("dry_run", "debug", "overwrite", "download", "token_metrics", "exposure_bias")
"""Booleans that may stand without a value."""


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """``--dry_run`` alone becomes ``--dry_run=true``."""
    arguments: list[str] = []
    for position, argument in enumerate(argv):
        following = argv[position + 1] if position + 1 < len(argv) else ""
        if argument.removeprefix("--") in SWITCHES and following.lower() not in ("true", "false"):
            argument += "=true"
        arguments.append(argument)
    return arguments


def _known_keys(parser: ArgumentParser) -> set[str]:
    """Returns every dotted key; an optional dataclass brings the keys of its fields."""
    keys = set()
    for action in parser._actions:
        if action.option_strings:
            keys.add(action.dest)
            for part in get_args(getattr(action, "_typehint", None)):
                if dataclasses.is_dataclass(part):
                    keys |= {f"{action.dest}.{f.name}" for f in dataclasses.fields(part)}
    return keys


def did_you_mean(key: str, known: set[str]) -> str:
    """Returns a hint at the nearest known key: first as a whole, then by its last part."""
    last_parts = {k.rsplit(".", 1)[-1]: k for k in sorted(known, reverse=True)}
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(key.rsplit(".", 1)[-1], last_parts, n=1, cutoff=0.75)
    guess = whole[0] if whole else (last_parts[last[0]] if last else "")
    return f" (did you mean {guess}?)" if guess else ""


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{path}.")
        else:
            yield path


def scalars(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key whose value is no mapping."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _config_paths(argv: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(argv):
        if argument == "--config" and position + 1 < len(argv):
            yield Path(argv[position + 1])
        elif argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))


def _yaml_problems(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    known = _known_keys(parser)
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    optional = _optional_keys(parser)
    problems = []
    for path in _config_paths(argv):
        try:
            content = read_mapping(path)
        except ConfigError as error:
            problems.append(error.what)
            continue
        problems += [
            f"{path}: unknown key {key}{did_you_mean(key, known)}"
            for key in _flatten(content)
            if key not in known
        ]
        problems += [
            f"{path}: {section} must be a mapping of keys, got {value!r:.40}"
            for section, value in scalars(content)
            if section in sections and not (value is None and section in optional)
        ]
    return problems


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Returns the mapping that a YAML file holds, read by `PlainLoader`.

    Raises:
        ConfigError: It is not there, not readable, not YAML, more than plain YAML, or no mapping.
    """
    try:
        content = load_plain_yaml(_read_layer(path))
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a mapping of sections, got {content!r:.60}")
    return content


def _read_layer(path: Path) -> str:
    """Returns the text of a YAML file.

    Raises:
        ConfigError: It is not there, not readable, far too large, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"--config {path}: no such file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"--config {path}: {size:,} bytes are no configuration")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {str(path)[:80]}: {error.strerror}") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not YAML: invalid UTF-8 (0x{content[error.start]:02x})"
        ) from None


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    """Says what is wrong in a file, and where."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else f"{path}"
    told = _one_line(getattr(error, "problem", None) or str(error))
    return (
        f"{where}: {told}" if isinstance(error, RefusedYamlError) else f"{where}: not YAML: {told}"
    )


def _optional_keys(parser: ArgumentParser) -> set[str]:
    """Returns the keys that may be null."""
    hints = {a.dest: get_args(getattr(a, "_typehint", None)) for a in parser._actions}
    return {key for key, parts in hints.items() if type(None) in parts}


def _flag_problems(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    known = _known_keys(parser)
    extra = {"help", "print_config", "config"}
    problems = []
    for argument in argv:
        if not argument.startswith("--"):
            continue
        key = argument[2:].split("=", 1)[0].removesuffix("+")
        if key not in known | extra and not key.endswith(".help"):
            problems.append(f"unknown flag --{key}{did_you_mean(key, known)}")
    return problems


def _value_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Yields every value that is out of its option's range, or that no option can have."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _value_problems(value, f"{key}.")
        elif value is None and type(None) not in get_args(hints[field.name]):
            yield f"{key} must have a value, got null"
        else:
            for item in value if isinstance(value, list) else [value]:
                if problem := _item_problem(item) or range_problem(hints[field.name], item):
                    yield f"{key}={value!r:.80} {problem}"


def _item_problem(value: Any) -> str:
    """Says what is wrong with one value; empty if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must fit into 64 bits"
    if value == "":
        return "must not be empty; null stands for none"
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value):
        return "must not hold control characters or broken Unicode"
    return ""


def _wrong_value(told: str, prog: str) -> ConfigError:
    """Shortens what the parser says about a value of a wrong type."""
    text_wanted = re.fullmatch(
        r"""Parser key "([^"]+)": .*?Expected a <class 'str'>.*?(?:Got|Given) value: (.*)""", told
    )
    if text_wanted is None:
        return ConfigError(told[:LONGEST_MESSAGE], fix=f"python {prog} --help")
    key, value = text_wanted.groups()
    return ConfigError(
        f"{key}: expected a text, got {value:.80}",
        fix=f"quote it in YAML, as in {key.rpartition('.')[2]}: '…'",
    )


def _one_line(text: str) -> str:
    return _printable(re.sub(r"\s+", " ", text).strip())


def _printable(text: str) -> str:
    """Shows control characters and broken Unicode, which keys and flags may hold, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one ConfigError that tells all problems; does nothing if there are none."""
    if not problems:
        return
    count = len(problems)
    what = problems[0] if count == 1 else f"{count} problems: {'; '.join(problems)}"
    raise ConfigError(_printable(what), fix="--help lists every key with its meaning and default")
