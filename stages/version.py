"""The version of lampctl. pyproject.toml reads it from here, without an import."""

VERSION = "0.1.0"
