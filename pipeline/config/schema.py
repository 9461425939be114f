"""The JSON Schema of a configuration file. Editors complete and check YAML and TOML with it."""

from __future__ import annotations

from typing import Any

from pydantic import JsonValue, TypeAdapter

from pipeline.config.declarations import options
from pipeline.config.gather import PRESETS
from pipeline.config.settings import Settings

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, JsonValue]:
    """The schema (draft 2020-12): every setting, under its name with _ or - and under its former names."""
    schema: dict[str, Any] = TypeAdapter(Settings).json_schema()
    schema |= {"$schema": _DRAFT, "title": "lampctl configuration file"}
    schema.pop("required", None)  # flags may give what the file leaves out
    properties: dict[str, Any] = schema["properties"]
    for name, option in options().items():
        entry = properties[name]
        entry.pop("title", None)
        if option.form in ("list", "repeated"):
            properties[name] = entry = _or_text(entry)
        for other in {name.replace("_", "-"), *option.aliases} - {name}:
            properties[other] = entry
    properties["preset"] = {"enum": [*PRESETS], "description": f"Settings to begin with: {', '.join(PRESETS)}."}
    return schema


def _or_text(entry: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list that may also be a text: values separated by commas, or a single value."""
    about = {key: value for key, value in entry.items() if key in ("description", "default")}
    types = entry.get("anyOf", [{key: value for key, value in entry.items() if key not in about}])
    return {"anyOf": [*types, {"type": "string"}], **about}
