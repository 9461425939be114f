"""`lampctl config`: what settings there are, what they are set to, and the schema of a configuration file."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lampctl.cli.options import Chosen, with_settings
from lampctl.cli.panels import PanelCommand

app = typer.Typer(
    help="Show settings: their values and origins, the JSON Schema of a configuration file, the reference.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.command(cls=PanelCommand)
@with_settings
def show(
    chosen: Chosen, as_json: Annotated[bool, typer.Option("--json", help="Print values and origins as JSON.")] = False
) -> None:
    """Show every setting that was given, and where it came from: flag, environment, file or preset.

    Reads no model. What is left out is filled in when a run begins (lampctl init shows it).

    \b
    lampctl config show MODEL --sparsity 0.7 --preset quick
    lampctl config show --config settings.yaml --json
    """
    from lampctl.output.console import console_here
    from lampctl.output.settings import given_table

    gathered = chosen.gather()
    values = gathered.values.as_json()
    if as_json:
        shown = {name: {"value": values[name], "origin": origin} for name, origin in gathered.origins.items()}
        print(json.dumps({"preset": gathered.preset, "settings": shown}, indent=2))
        return
    console_here().print(given_table(values, gathered.origins))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file. Editors complete and check YAML and TOML with it.

    \b
    lampctl config schema > lampctl.schema.json
    """
    from pipeline.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def reference() -> None:
    """Print the reference of all settings as Markdown (docs/settings.md).

    \b
    lampctl config reference > docs/settings.md
    """
    from lampctl.output.settings import reference as text

    print(text(), end="")
