"""Settings: where they come from, what is filled in, what is refused."""

import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.config import FREE_FIELDS, RunConfig, Settings, complete, differing_fields, gather
from pipeline.errors import ConfigError
from stages.defaults import measured, published

DEFAULTS = measured("llama", 0.7, 30)
GIVEN = {"model": "m", "sparsity": 0.7}


def completed(flags=None, max_positions=2048, preset=None):
    return complete(gather({**GIVEN, **(flags or {})}, preset=preset, environ={}), max_positions, DEFAULTS)


def test_lamp_gets_the_measured_defaults_and_others_are_uniform():
    config, origins, notices = completed()
    assert (config.alpha, config.beta, config.lr, config.epochs) == (0.7, 0.0, DEFAULTS.lr, 5)
    assert origins["alpha"] == "default"
    assert notices == []
    for method in ("sparsegpt", "wanda", "magnitude"):
        config, _, notices = completed({"method": method})
        assert (config.alpha, config.beta, config.lr, config.epochs) == (1.0, 0.0, None, None)
        assert notices == []


def test_a_setting_that_a_method_does_not_use_is_said_to_have_no_effect():
    config, _, notices = completed({"method": "magnitude", "num_samples": 8, "lr": 1e-3})
    assert config.num_samples is None
    assert notices == [
        "--lr has no effect: only --method lamp trains",
        "--num-samples has no effect: magnitude pruning looks at no data",
    ]


def test_seqlen_is_the_papers_unless_the_model_has_fewer_positions():
    config, _, notices = completed(max_positions=131_072)
    assert config.seqlen == config.eval_seqlen == 2048
    config, _, notices = completed(max_positions=512)
    assert config.seqlen == 512
    assert "512" in notices[0]
    with pytest.raises(ConfigError, match="use --seqlen 512 or less"):
        completed({"seqlen": 1024}, max_positions=512)
    assert completed({"seqlen": 4096}, max_positions=None)[0].seqlen == 4096


def test_the_paper_preset_is_what_was_published():
    config, _, _ = complete(gather({**GIVEN}, preset="paper", environ={}), 2048, published("opt", 0.7, 12))
    assert (config.calibration, config.num_samples, config.seqlen) == ("c4", 128, 2048)
    assert (config.epochs, config.lr, config.lr_decay, config.hold_aside) == (12, 1e-4, 0.87, False)
    assert (config.alpha, config.beta) == (0.691, 0.21)
    assert config.calibration_sampling == "random"
    llama = published("llama", 0.7, 32)
    assert (llama.epochs, llama.lr, llama.beta) == (1, 5e-4, 0.0)


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_the_rate_grows_with_sparsity_and_few_blocks_are_spared_less(model_type):
    rates = [measured(model_type, s / 100, 30).lr for s in range(10, 95, 5)]
    assert rates == sorted(rates)
    assert measured(model_type, 0.7, 30).alpha < measured(model_type, 0.7, 6).alpha < 1
    assert measured(model_type, 0.7, 1).alpha == 1


def test_every_wrong_value_is_told_at_once_with_where_it_came_from():
    path = Path("s.toml")
    path.write_text('num-samples = 0\nlr = "fast"\n')
    with pytest.raises(ConfigError) as caught:
        gather({"model": "m", "sparsity": 2.0}, path, environ={"LAMPCTL_SEED": "-1"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert any(line.startswith("--sparsity 2.0: ") for line in lines)
    assert any(line.startswith("--num-samples 0 (file s.toml): ") for line in lines)
    assert any(line.startswith("--lr fast (file s.toml): ") for line in lines)
    assert any(line.startswith("--seed -1 (environment LAMPCTL_SEED): ") for line in lines)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "[1, 2]", "one `name: value` a line"),
        ("a.yaml", "a: [", "while parsing"),
        ("a.toml", "a = ", "Invalid"),
        ("a.json", "{}", r"must end in \.toml, \.yaml or \.yml"),
        ("a.yaml", "layer_sparsity: {'x': 2}", "must lie in"),
        ("a.yaml", "preset: fast", "choose one of"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused(name, text, message):
    Path(name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        gather(GIVEN, Path(name), environ={})


def test_an_unknown_environment_variable_is_refused_and_the_caches_is_none_of_ours():
    with pytest.raises(ConfigError, match="environment LAMPCTL_SPARSTIY"):
        gather(GIVEN, environ={"LAMPCTL_SPARSTIY": "0.5"})
    gather(GIVEN, environ={"LAMPCTL_CACHE": "/x", "PATH": "/bin", "LAMPCTL_SEED": ""})


def test_yaml_and_toml_say_the_same():
    Path("a.yaml").write_text("ignore: ['a', 'b']\nnum-samples: 3\nevaluate: pydocs, ptb\n")
    Path("a.toml").write_text('ignore = ["a", "b"]\nnum_samples = 3\nevaluate = ["pydocs", "ptb"]\n')
    first, second = (gather(GIVEN, Path(name), environ={}).values for name in ("a.yaml", "a.toml"))
    assert first == second
    assert first.evaluate == ("pydocs", "ptb")


def test_identity_and_free_settings_share_out_all_fields():
    config, _, _ = completed()
    assert config.identity.keys() | config.free.keys() == set(RunConfig.model_fields) == set(Settings.model_fields)
    assert not config.identity.keys() & config.free.keys()
    other = config.with_free({"evaluate": ("pydocs",), "eval_max_tokens": 4096})
    assert other.identity == config.identity
    assert other.free == {"evaluate": ["pydocs"], "evaluate_dense": True, "eval_seqlen": 2048, "eval_max_tokens": 4096}
    assert set(other.free) == set(FREE_FIELDS)
    assert differing_fields({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == {"b": (2, 3), "c": (None, 4)}


def test_the_example_config_file_is_valid():
    path = Path(__file__).parents[2] / "examples" / "config.yaml"
    assert gather({}, path, environ={}).values.sparsity == 0.7
    # With every commented setting turned on, too.
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("# ignore:"))
    on = lines[:start] + [
        line.removeprefix("# ") if line[2:3].islower() or line.startswith("#   '") else line for line in lines[start:]
    ]
    Path("all.yaml").write_text("\n".join(on))
    assert {"ignore", "layer_sparsity", "damping", "column_block"} <= yaml.safe_load(
        Path("all.yaml").read_text()
    ).keys()
    gather({}, Path("all.yaml"), environ={})


def test_the_projects_own_version_is_one():
    root = Path(__file__).parents[2]
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version} " in (root / "CHANGELOG.md").read_text()
