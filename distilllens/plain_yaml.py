"""YAML without its surprises: what no configuration needs is refused, never reinterpreted."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


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
