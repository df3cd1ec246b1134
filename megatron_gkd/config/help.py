"""The text of `train --help`: every key with its section, type, default and meaning."""

from pydantic.fields import FieldInfo

from megatron_gkd.config import keys, yaml_text


def recipe_keys() -> str:
    """The recipe's keys, two lines each, by section."""
    blocks = []
    for section, leaves in keys.SECTIONS.items():
        lines = [f"{section}:"]
        for leaf, field in leaves.items():
            lines.append(f"  --{leaf}  {keys.allowed(field)}  [{_default(field)}]")
            lines.append(f"        {field.description}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "default: " + yaml_text.dump(value).splitlines()[0]
