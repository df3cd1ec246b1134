"""The text of `train --help`: every key with its section, type, default and meaning."""

from pydantic.fields import FieldInfo

from megatron_gkd.config import keys, yaml_text


def recipe_keys() -> str:
    """Return the recipe's keys, two lines each, by section."""
    blocks = []
    for section, leaves in keys.SECTIONS.items():
        lines = [f"{section}:"]
        for leaf, field in leaves.items():
            lines.append(f"  --{leaf}  {keys.describe_allowed(field)}  [{_describe_default(field)}]")
            lines.append(f"        {field.description}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _describe_default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"default: {default_text(field)}"


def default_text(field: FieldInfo) -> str:
    """Return the default of a field that has one, as YAML on one line."""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml_text.dump(value).splitlines()[0]
