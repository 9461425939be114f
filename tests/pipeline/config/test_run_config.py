"""Settings: where they come from, what is filled in, what is refused."""

import json
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline.config.completion import check_combinations, complete
from pipeline.config.declarations import options, type_of
from pipeline.config.gather import gather
from pipeline.config.run_config import RUNTIME_FIELDS, RunConfig, differing_fields
from pipeline.errors import ConfigError
from stages.tasks.language import Language
from stages.training.loss import split_samples
from stages.training.presets import DEFAULT_EFFORT, distillation, measured, published
from stages.training.rates import Rate
from stages.version import VERSION

DEFAULTS = measured("llama", 0.7, 30, "medium", 128)
GIVEN = {"model": "m", "sparsity": 0.7}


def completed(flags=None, max_positions=2048, preset=None):
    return complete(gather({**GIVEN, **(flags or {})}, preset=preset, environ={}), max_positions, DEFAULTS, Language())


def test_lamp_gets_the_measured_defaults_and_others_are_uniform():
    config, origins, notices = completed()
    assert (config.alpha, config.beta, config.lr, config.epochs) == (0.7, 0.0, DEFAULTS.lr, DEFAULTS.epochs)
    assert (config.refine, config.refine_epochs, config.effort) == (True, DEFAULTS.refine_epochs, "medium")
    assert origins["alpha"] == "default"
    assert notices == []
    for method in ("sparsegpt", "wanda", "magnitude"):
        config, _, notices = completed({"method": method})
        assert (config.alpha, config.beta, config.lr, config.epochs) == (1.0, 0.0, None, None)
        assert notices == []


@pytest.mark.parametrize(("given", "kept"), [("1e-3", 1e-3), (0.002, 0.002), ("0.5 %", "0.5%"), ("2%", "2%")])
def test_a_rate_is_a_number_or_a_share_of_each_tensor(given, kept):
    config, _, _ = completed({"lr": given, "distill": True, "distill_lr": given})
    assert (config.lr, config.distill_lr) == (kept, kept)
    assert RunConfig.recorded(json.loads(json.dumps(config.as_json()))) == config


@pytest.mark.parametrize("given", [True, [1], "1%%", -1])
def test_what_is_no_rate_is_refused(given):
    with pytest.raises(ConfigError, match="--refine-lr"):
        completed({"refine_lr": given})


def test_a_setting_that_a_method_does_not_use_is_said_to_have_no_effect():
    config, _, notices = completed({"method": "magnitude", "num_samples": 8, "lr": 1e-3})
    assert config.num_samples is None
    assert notices == [
        "--lr has no effect: only --method lamp uses it",
        "--num-samples has no effect: magnitude pruning reads no data",
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
    config, _, _ = complete(gather({**GIVEN}, preset="paper", environ={}), 2048, published("opt", 0.7), Language())
    assert (config.calibration, config.num_samples, config.seqlen) == ("c4", 128, 2048)
    assert (config.epochs, config.lr, config.lr_decay, config.held_out) == (12, 1e-4, 0.87, False)
    assert (config.pruner, config.loss, config.refine, config.refine_epochs) == ("sparsegpt", "mse", False, None)
    assert (config.alpha, config.beta) == (0.691, 0.21)
    assert config.calibration_sampling == "random"
    llama = published("llama", 0.7)
    assert (llama.epochs, llama.lr, llama.beta) == (1, 5e-4, 0.0)


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_the_rate_grows_with_sparsity_and_few_blocks_are_spared_less(model_type):
    rates = [measured(model_type, s / 100, 30, "medium", 128).lr for s in range(10, 95, 5)]
    assert rates == sorted(rates, key=lambda rate: Rate.parse(rate).value)
    assert all(Rate.parse(rate).is_relative for rate in rates)
    alphas = [measured(model_type, 0.7, num_blocks, "low", 128).alpha for num_blocks in (30, 6, 1)]
    assert alphas == sorted(set(alphas))
    assert alphas[-1] == 1


@pytest.mark.parametrize("num_samples", [1, 8, 32, 64, 128, 480, 4096])
def test_more_effort_trains_longer_and_a_large_set_for_fewer_epochs(num_samples):
    efforts = get_args(type_of("effort"))
    found = [measured("llama", 0.7, 30, effort, num_samples) for effort in efforts]
    steps = [(d.epochs + d.refine_epochs) * num_samples for d in found]
    sets = [d.distill_samples or num_samples for d in found]
    passes = [distillation(effort, size)[0] * size for effort, size in zip(efforts, sets, strict=True)]
    assert steps == sorted(steps)
    assert passes == sorted(passes)
    assert steps[0] < steps[-1]
    fewer = [measured("llama", 0.7, 30, effort, 2 * num_samples) for effort in efforts]
    assert all(few.refine_epochs <= d.refine_epochs for few, d in zip(fewer, found, strict=True))
    assert all(d.refine_epochs >= 1 for d in found)


def test_distillation_after_another_method_may_hold_out_nothing():
    given = {"method": "wanda", "held_out": False}
    config, _, notices = completed({**given, "distill": True})
    assert config.held_out is False
    assert not notices
    config, _, notices = completed(given)
    assert config.held_out is None
    assert notices == ["--no-held-out has no effect: only --method lamp and distillation use it"]


def test_the_effort_of_another_method_is_that_of_its_distillation():
    found = {}
    for effort in ("low", "medium", "high"):
        given = {**GIVEN, "method": "wanda", "distill": True, "effort": effort, "num_samples": 64}
        defaults = measured("llama", 0.7, 30, effort, 64)
        config, _, notices = complete(gather(given, environ={}), 2048, defaults, Language())
        assert not notices
        found[effort] = (config.distill_epochs, config.distill_samples)
    assert found == {"low": (1, None), "medium": (2, None), "high": (1, 480)}
    assert completed({"method": "wanda", "effort": "high"})[2] == [
        "--effort has no effect: only --method lamp and distillation use it"
    ]


def test_no_distillation_and_no_generated_samples_are_one_wish():
    config, _, _ = completed({"distill": False, "distill_generated": 0})
    assert (config.distill, config.distill_generated) == (False, None)


def test_an_option_of_distillation_that_switches_it_on_is_said():
    _, _, notices = completed({"method": "wanda", "distill_epochs": 2, "distill_lr": "1%"})
    assert notices == ["--distill-epochs, --distill-lr: the model is distilled at the end, as by --distill"]
    assert not completed({"distill_epochs": 2})[2], "LAMP does so by itself"


def test_the_table_of_efforts_in_the_readme_is_that_of_the_defaults():
    lines = (Path(__file__).parents[3] / "README.md").read_text().splitlines()
    for effort in get_args(type_of("effort")):
        found = measured("llama", 0.7, 30, effort, 128)
        drawn = found.distill_samples or 128
        generated = drawn if found.distill_generates else 0
        trained, own = (len(split_samples(num, holds_out=True)[0]) for num in (128, drawn))
        epochs, _ = distillation(effort, drawn + generated)
        cells = (found.epochs * trained, found.refine_epochs * trained, epochs * (own + generated), epochs * generated)
        name = f"{effort} (default)" if effort == DEFAULT_EFFORT else effort
        assert f"| {name} | {' | '.join(map(str, cells))} |" in lines


@pytest.mark.parametrize(
    ("given", "drawn", "epochs"),
    [
        ({"effort": "high"}, 480, 1),
        ({"effort": "high", "num_samples": 32}, 480, 1),
        ({"effort": "high", "num_samples": 480}, None, 1),
        ({"effort": "high", "num_samples": 512}, None, 1),
        ({"effort": "high", "distill_samples": 128}, None, 2),  # the user's own choice: the calibration set
        ({"effort": "medium"}, None, 1),
        ({"effort": "high", "distill": False}, None, None),
    ],
)
def test_effort_high_distils_on_a_larger_set(given, drawn, epochs):
    defaults = measured("llama", 0.7, 30, given["effort"], given.get("num_samples", 128))
    config, _, _ = complete(gather({**GIVEN, **given}, environ={}), 2048, defaults, Language())
    assert (config.distill_samples, config.distill_epochs) == (drawn, epochs)


@pytest.mark.parametrize(
    ("num_samples", "epochs", "batch"), [(1, 2, 1), (16, 2, 1), (32, 2, 2), (128, 1, 8), (480, 1, 16)]
)
def test_distillation_has_about_sixteen_updates_an_epoch_and_at_most_two_epochs(num_samples, epochs, batch):
    assert distillation("medium", num_samples) == (epochs, batch)
    config, _, _ = completed({"distill": True, "distill_samples": num_samples, "distill_generated": 0})
    assert (config.distill_epochs, config.distill_batch) == (epochs, batch)
    assert config.distill_lr == "auto"


def test_what_the_model_writes_counts_as_samples_of_distillation():
    config, _, _ = completed({"num_samples": 64})
    assert (config.distill_generated, config.distill_epochs, config.distill_batch) == (64, 1, 8)
    config, _, _ = completed({"num_samples": 64, "distill_generated": 10})
    assert (config.distill_generated, config.distill_batch) == (10, 5)
    for flags in ({"method": "wanda", "distill": True}, {"distill_generated": 0}):  # effort low: presets
        config, _, _ = completed(flags | {"num_samples": 64})
        assert config.distill_generated == 0
    assert not measured("llama", 0.7, 30, "low", 128).distill_generates
    config, _, _ = completed({"method": "wanda", "distill_generated": 0})
    assert config.distill is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sparsity": None}, "--sparsity is missing, or --pattern N:M instead"),
        ({"pattern": "2:4"}, "--pattern 2:4 fixes the sparsity of every group .* it excludes --sparsity"),
        ({"sparsity": None, "pattern": "2:4", "alpha": 0.7}, "it excludes --alpha"),
        ({"sparsity": None, "pattern": "2:4", "beta": 0.0}, "it excludes --beta"),
        ({"sparsity": None, "pattern": "2:4", "layer_sparsity": {"x": 0.5}}, "it excludes --layer-sparsity"),
        ({"bits": 4, "method": "wanda"}, "--bits 4: Wanda .* cannot quantize; use --method lamp"),
        ({"group_size": 128}, "--group-size 128 requires --bits"),
        ({"refine": False, "refine_epochs": 2}, "--no-refine excludes --refine-epochs"),
        ({"sparsity": None, "pattern": "2:4", "budget": "outliers"}, "it excludes --budget"),
        ({"method": "magnitude", "budget": "outliers"}, "--budget outliers: magnitude pruning reads no data"),
        ({"budget_spread": 0.1}, "--budget-spread 0.1 requires --budget outliers"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_by_both_names(flags, message):
    with pytest.raises(ConfigError, match=message):
        check_combinations(gather({**GIVEN, **flags}, environ={}))


def test_the_origin_of_what_excludes_is_told():
    Path("s.yaml").write_text("sparsity: 0.5\n")
    with pytest.raises(ConfigError, match=r"excludes --sparsity \(file s.yaml\)"):
        check_combinations(gather({"model": "m", "pattern": "2:4"}, Path("s.yaml"), environ={}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bits": 9}, "--bits 9"),
        ({"bits": 1}, "--bits 1"),
        ({"pattern": "4:2"}, "^--pattern 4:2: '4:2' is no pattern: expected N:M"),
    ],
)
def test_values_out_of_range_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        gather({"model": "m", **flags}, environ={})


def test_a_pattern_sets_the_sparsity_and_names_the_run():
    config, _, _ = completed({"sparsity": None, "pattern": "2:4", "bits": 4, "group_size": 64})
    assert (config.target_sparsity, config.alpha, config.beta) == (0.5, None, None)
    assert (config.goal, config.slug) == ("2:4, int4 in groups of 64", "2of4-int4g64")
    assert (completed()[0].goal, completed()[0].slug) == ("70%", "s70")


def test_refinement_alone_and_none_at_all():
    config, _, _ = completed({"epochs": 0})
    assert (config.epochs, config.refine) == (0, True)
    config, _, _ = completed({"refine": False})
    assert (config.refine, config.refine_epochs, config.refine_lr) == (False, None, None)
    assert config.epochs == 1, "the budget of refinement goes to compensation"
    with pytest.raises(ConfigError, match="trains nothing"):
        completed({"epochs": 0, "refine": False})
    assert completed({"refine_epochs": 2}, preset="paper")[0].refine


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
        ("a.yaml", "[1, 2]", "as `name: value`"),
        ("a.yaml", "a: [", "while parsing"),
        ("a.toml", "a = ", "Invalid"),
        ("a.json", "{}", r"must end in \.toml, \.yaml or \.yml"),
        ("a.yaml", "layer_sparsity: {'x': 2}", "must be in"),
        ("a.yaml", "preset: fast", "choose one of"),
        ("a.yaml", "pattern: 2:4", 'a pattern in a file needs quotes, as in "2:4"'),
        ("a.toml", "pattern = 24", 'a pattern in a file needs quotes, as in "2:4"'),
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
    assert config.identity.keys() | config.runtime.keys() == set(options())
    assert not config.identity.keys() & config.runtime.keys()
    other = config.with_runtime({"evaluate": ("pydocs",), "eval_max_tokens": 4096})
    assert other.identity == config.identity
    changed = {"evaluate": ["pydocs"], "evaluate_dense": True, "eval_seqlen": 2048, "eval_max_tokens": 4096}
    assert {field: other.runtime[field] for field in changed} == changed
    assert set(other.runtime) == set(RUNTIME_FIELDS)
    assert differing_fields({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == {"b": (2, 3), "c": (None, 4)}


def test_the_example_config_file_is_valid():
    path = Path(__file__).parents[3] / "examples" / "config.yaml"
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
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stages.version.VERSION"}
    assert f"## {VERSION} " in (root / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["a\0b", "x" * 256, "fine/" + "é" * 200])
def test_a_scratch_folder_that_cannot_be_is_refused(name):
    with pytest.raises(ConfigError, match="--scratch-dir"):
        gather({"model": "m", "sparsity": 0.5, "scratch_dir": name}, environ={})
