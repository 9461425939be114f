"""One setting, one value: names in files, variables and flags that are unknown, or mean the same setting."""

import re

import pytest

from pipeline.config.gather import gather
from pipeline.config.names import require_known_variables
from pipeline.errors import ConfigError

GIVEN = {"model": "m", "sparsity": 0.5}


@pytest.mark.parametrize(
    ("name", "text", "both"),
    [
        ("a.yaml", "hold_aside: false\nheld_out: true\n", ("hold_aside", "held_out")),
        ("a.yaml", "held-out: true\nhold-aside: false\n", ("held-out", "hold-aside")),
        ("a.toml", "held_out = true\nhold_aside = false\n", ("held_out", "hold_aside")),
        ("a.yaml", "num-samples: 3\nnum_samples: 4\n", ("num-samples", "num_samples")),
    ],
)
def test_two_names_of_one_setting_in_one_file_are_refused(tmp_path, lampctl, name, text, both):
    (tmp_path / name).write_text(text)
    answer = lampctl("config", "show", "m", "--sparsity", "0.5", "--config", name)
    assert answer.code == 2
    assert f"--config {name}: {both[0]} and {both[1]} are the same setting" in answer.err


@pytest.mark.parametrize(
    ("text", "name"),
    [("seed: 1\nseed: 2\n", "seed"), ("layer_sparsity:\n  a: 0.1\n  b: 0.2\n  a: 0.3\n", "a")],
)
def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path, text, name):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.yaml: {name} is there twice"):
        gather(GIVEN, tmp_path / "a.yaml", environ={})


def test_two_variables_of_one_setting_are_refused():
    environ = {"LAMPCTL_HOLD_ASIDE": "no", "LAMPCTL_HELD_OUT": "yes"}
    with pytest.raises(ConfigError, match="LAMPCTL_HOLD_ASIDE and LAMPCTL_HELD_OUT are the same setting"):
        gather(GIVEN, environ=environ)
    with pytest.raises(ConfigError, match="LAMPCTL_HOLD_ASIDE and LAMPCTL_HELD_OUT are the same setting"):
        require_known_variables(environ)


def test_two_flags_of_one_setting_are_refused(lampctl):
    answer = lampctl("config", "show", "m", "--sparsity", "0.5", "--held-out", "--no-hold-aside")
    assert answer.code == 2
    assert "--held-out and --hold-aside are the same setting" in answer.err
    with pytest.raises(ConfigError, match="held_out and hold_aside are the same setting"):
        gather({**GIVEN, "held_out": True, "hold_aside": False}, environ={})


def test_one_setting_under_two_names_in_two_places_follows_the_order_of_places(tmp_path):
    (tmp_path / "a.yaml").write_text("held_out: true\n")
    gathered = gather(GIVEN, tmp_path / "a.yaml", environ={"LAMPCTL_HOLD_ASIDE": "no"})
    assert gathered.values.held_out is False
    assert gathered.origins["held_out"] == "environment LAMPCTL_HOLD_ASIDE"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"LAMPCTL_SEDE": "5"}, "sede (environment LAMPCTL_SEDE) is not a setting of a run: did you mean seed?"),
        ({"LAMPCTL_HOLD_ASIDES": "1"}, "did you mean held_out?"),
        ({"LAMPCTL_XYZZY": "1"}, "xyzzy (environment LAMPCTL_XYZZY) is not a setting of a run; known: preset, allow"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_setting(environ, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        gather(GIVEN, environ=environ)
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_known_variables(environ)
    require_known_variables({"LAMPCTL_SEED": "3", "LAMPCTL_CACHE": "x", "LAMPCTL_PRESET": "quick", "LAMPCTL_X": ""})


@pytest.mark.parametrize(
    "command",
    [
        ("run", "m", "--sparsity", "0.5"),
        ("init", "m", "--sparsity", "0.5"),
        ("sweep", "m", "--grid", "sparsity=0.5,0.6"),
        ("config", "show", "m", "--sparsity", "0.5"),
        ("resume", "r"),
        ("evaluate", "m"),
        ("compare", "r", "s"),
    ],
)
def test_every_command_that_takes_settings_refuses_an_unknown_variable(lampctl, monkeypatch, command):
    monkeypatch.setenv("LAMPCTL_SEDE", "3")
    answer = lampctl(*command)
    assert answer.code == 2
    assert "sede (environment LAMPCTL_SEDE) is not a setting of a run: did you mean seed?" in answer.err


def test_files_and_sweeps_name_the_nearest_setting(tmp_path, lampctl):
    (tmp_path / "a.yaml").write_text("num-sample: 3\n")
    answer = lampctl("config", "show", "m", "--sparsity", "0.5", "--config", "a.yaml")
    assert (answer.code, "did you mean num_samples?" in answer.err) == (2, True)
    answer = lampctl("sweep", "m", "--sparsity", "0.5", "--grid", "efort=low,high")
    assert (answer.code, "--grid efort is not a setting: did you mean effort?" in answer.err) == (2, True)
    answer = lampctl("sweep", "m", "--sparsity", "0.5", "--grid", "seqlen=8,16", "--grid", "model=a,b")
    assert (answer.code, "--grid model: a sweep cannot vary it" in answer.err) == (2, True)
