"""Read and write YAML as recipes use it.

Numbers are those of YAML 1.2: `1e-4` is one (YAML 1.1 reads text), `010` is ten (1.1: eight) and `1:30` is text (1.1:
ninety). A key occurs once.
"""

import re
from typing import Any

import yaml

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_INTEGER = re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
_LONGEST_TEXT, _MOST_VALUES = 1_000_000, 100_000  # characters; values after all aliases are replaced


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                text = f"the key {key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        digits = text.lstrip("+-")
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        return (-1 if text.startswith("-") else 1) * int(digits if base == 10 else digits[2:], base)


class _Dumper(yaml.SafeDumper):
    pass


def _without_numbers(resolvers: dict[str, Any]) -> dict[str, Any]:
    """Return the implicit resolvers without YAML 1.1's of numbers."""
    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    return {first: [one for one in found if one[0] not in numbers] for first, found in resolvers.items()}


for _class in (_Loader, _Dumper):  # the dumper too: it must quote text that would read as a float
    _class.yaml_implicit_resolvers = _without_numbers(_class.yaml_implicit_resolvers)
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: with a one-line reason, with the line where it is known.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"has {len(text)} characters; a recipe has at most {_LONGEST_TEXT}")
    try:
        value = yaml.load(text, _Loader)
        _require_few_values(value)
        return value
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{place}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _require_few_values(value: Any) -> None:
    """Check that aliases of aliases do not make a small text a huge value.

    Raises:
        ValueError: it has too many values, or contains itself.
    """
    count, waiting = 0, [value]
    while waiting:
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"has more than {_MOST_VALUES} values once its aliases are replaced")
        one = waiting.pop()
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def dump(value: Any) -> str:
    """Return `value` as YAML text that `parse` reads back to the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
