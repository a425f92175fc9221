"""What can be set: every field of a config with its type, limits, default and description, from its JSON schema."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "minItems": "length >="}


def field_lines(schema: Schema) -> Iterator[tuple[str, str]]:
    """(`a.b: type = default`, description) of every field; a section comes before its fields.

    Args:
        schema: of a config, as `Config.model_json_schema` makes it.
    """
    yield from _lines(schema, schema.get("$defs", {}), "")


def _lines(section: Schema, models: Mapping[str, Schema], prefix: str) -> Iterator[tuple[str, str]]:
    required = section.get("required", ())
    for name, field in section["properties"].items():
        place, inner = f"{prefix}{name}", _section(field, models)
        described = " ".join((field.get("description") or (inner or {}).get("description") or "").split())
        if inner is None:
            default = "" if name in required or "default" not in field else f" = {json.dumps(field['default'])}"
            yield f"{place}: {_type(field, models)}{default}{' (required)' if name in required else ''}", described
            if each := _section(field.get("items", {}), models):
                yield from _lines(each, models, f"{place}.N.")
            continue
        absent = " null, or" if field.get("default", 0) is None else ""
        yield f"{place}:{absent} section{' (required)' if name in required else ''}", described
        yield from _lines(inner, models, f"{place}.")


def _section(field: Schema, models: Mapping[str, Schema]) -> Schema | None:
    """The model that a field holds, alone or as `Model | None`."""
    options = [field, *field.get("anyOf", ())]
    inner = (models[one["$ref"].rpartition("/")[2]] for one in options if "$ref" in one)
    return next((model for model in inner if "properties" in model), None)


def _type(field: Schema, models: Mapping[str, Schema]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return name if "properties" in models[name] else _type(models[name], models)
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_type(one, models) for one in field["anyOf"]))
    if "enum" in field or "const" in field:
        return " | ".join(json.dumps(one) for one in field.get("enum", [field.get("const")]))
    shown = str(field.get("format") or field.get("type", "any"))
    if shown == "array":
        inside: Schema = field.get("items") or next(iter(field.get("prefixItems", ())), {})
        shown = f"list of ({_type(inside, models)})"
    limits = [f"{sign} {field[name]:g}" for name, sign in _LIMITS.items() if name in field]
    return ", ".join([shown, *limits])
