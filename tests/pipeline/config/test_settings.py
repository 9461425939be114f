"""Each setting is declared once, and everything else follows from the declaration."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.config.declarations import flag_of, former_names, options, type_of
from pipeline.config.gather import gather
from pipeline.config.option import Option
from pipeline.config.run_config import LAMP_FIELDS, RUNTIME_FIELDS, Recorded, RunConfig, with_recorded_defaults
from pipeline.config.schema import json_schema
from pipeline.config.settings import Settings
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[3]
PANELS = ("What to prune", "Calibration", "Method", "Training", "Evaluation", "Machine", "Stopping", "Storage")


def test_every_setting_has_help_a_panel_and_a_known_type():
    assert set(options()) == {found.name for found in fields(Settings)}
    for name, option in options().items():
        assert isinstance(option, Option)
        assert option.help.endswith("."), name
        assert option.panel in PANELS, name
        assert type_of(name) is not None


def test_declarations_import_neither_pydantic_nor_torch():
    code = (
        "import sys; from pipeline.config.declarations import options; assert len(options()) > 50;"
        "assert not {'pydantic', 'torch', 'typer', 'pipeline.config.settings'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_scopes_and_methods_follow_the_declarations():
    assert {"evaluate", "memory_limit", "scratch_dir", "max_runtime"} <= set(RUNTIME_FIELDS)
    assert not {"sparsity", "seed", "calibration", "damping", "dtype"} & set(RUNTIME_FIELDS)
    assert set(LAMP_FIELDS) == {
        *("pruner", "effort", "epochs", "lr", "lr_decay", "loss"),
        *("held_out", "refine", "refine_epochs", "refine_lr"),
    }


def test_former_names_work_everywhere_and_are_shown_nowhere(lampctl, tmp_path):
    assert former_names() == {"hold_aside": "held_out"}
    given = {"model": "m", "sparsity": 0.5}
    assert gather({**given, "hold_aside": False}, environ={}).values.held_out is False
    assert gather(given, environ={"LAMPCTL_HOLD_ASIDE": "no"}).values.held_out is False
    (tmp_path / "a.yaml").write_text("hold-aside: false\n")
    gathered = gather(given, tmp_path / "a.yaml", environ={})
    assert gathered.values.held_out is False
    assert gathered.origins["held_out"].startswith("file")
    assert "hold-aside" not in lampctl("run", "--help").out
    shown = lampctl("config", "show", "m", "--sparsity", "0.5", "--no-hold-aside", "--json").json
    assert shown["settings"]["held_out"] == {"value": False, "origin": "flag"}
    # A flag under the current name wins over a file under the former one.
    assert gather({**given, "held_out": True}, tmp_path / "a.yaml", environ={}).values.held_out is True


def test_the_schema_accepts_the_example_file_and_refuses_what_lampctl_refuses():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    check.validate(yaml.safe_load((ROOT / "examples" / "config.yaml").read_text()))
    check.validate({"model": "m", "evaluate": "wikitext2,ptb", "ignore": "x", "num-samples": 3, "preset": "quick"})
    check.validate({"evaluate": ["a"], "ignore": ["a", "b"], "layer_sparsity": {"x": 0.5}, "hold_aside": False})
    for wrong in ({"sparsity": 1.5}, {"bits": 9}, {"sparsty": 0.5}, {"budget": "even"}, {"preset": "fast"}):
        assert not check.is_valid(wrong), wrong


def test_every_setting_is_in_the_schema_with_its_help():
    properties = json_schema()["properties"]
    for name, option in options().items():
        assert properties[name]["description"] == option.full_help, name
        assert "{" not in option.full_help, name
        assert name.replace("_", "-") in properties


def test_the_reference_is_up_to_date(lampctl):
    made = lampctl("config", "reference").out
    assert made == (ROOT / "docs" / "settings.md").read_text(), "lampctl config reference > docs/settings.md"
    for name in options():
        assert f"| `{name}` |" in made


def test_the_command_prints_the_schema(lampctl):
    assert json.loads(lampctl("config", "schema").out) == json.loads(json.dumps(json_schema()))


def test_show_names_value_and_origin(lampctl, monkeypatch):
    monkeypatch.setenv("LAMPCTL_SEED", "7")
    answer = lampctl("config", "show", "m", "--sparsity", "0.5", "--preset", "quick", "--json")
    assert answer.json["settings"]["seed"] == {"value": 7, "origin": "environment LAMPCTL_SEED"}
    assert answer.json["settings"]["effort"] == {"value": "low", "origin": "preset quick"}
    assert "num_samples" in lampctl("config", "show", "m", "--sparsity", "0.5", "--preset", "quick").out
    assert lampctl("config", "show", "m", "--sparsity", "70").code == 2


def test_each_option_stands_in_the_panel_of_its_declaration(lampctl):
    shown = lampctl("run", "--help").out
    positions = {panel: shown.index(f"\n{panel}:") for panel in PANELS}
    ends = [*sorted(positions.values())[1:], shown.index("\nOptions:")]
    for name, option in options().items():
        if option.form == "file only" or name == "model":
            continue
        start = positions[option.panel]
        end = next(found for found in ends if found > start)
        assert f"{flag_of(name)} " in shown[start:end], name


def config_of(**changes) -> RunConfig:
    return RunConfig.of({"model": "m", "sparsity": 0.5, "seqlen": 8, "eval_seqlen": 8, **changes})


def test_a_run_keeps_defaults_that_have_changed_since():
    began = Recorded(config_of(lr=1e-3, epochs=2), {"model": "flag", "sparsity": "flag", "epochs": "flag"})
    now, origins = config_of(lr=5e-4, epochs=3), {"model": "flag", "sparsity": "flag"}
    kept = with_recorded_defaults(now, origins, began)
    assert kept.lr == 1e-3  # a default then, a default now
    assert kept.epochs == 3  # given then: it must be given again
    assert with_recorded_defaults(now, {**origins, "lr": "flag"}, began).lr == 5e-4  # given now


def test_a_value_is_refused_with_its_name_and_origin():
    with pytest.raises(ConfigError, match=r"--bits 9 \(environment LAMPCTL_BITS\)"):
        gather({"model": "m", "sparsity": 0.5}, environ={"LAMPCTL_BITS": "9"})
