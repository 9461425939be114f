"""What a sweep varies: grids, ranges, and what is refused."""

from string import ascii_letters, digits

import pytest

from pipeline.config.gather import gather
from pipeline.errors import ConfigError
from pipeline.sweeps.spec import name_of, new_spec, points_of, settings_at

GIVEN = {"model": "m", "sparsity": 0.5}


def spec(*grids, search=None, trials=None, database=None, **given):
    return new_spec(gather({**GIVEN, **given}, environ={}), grids, search, trials, database)


def test_a_grid_is_every_combination():
    found = points_of(spec("sparsity=0.5,0.7", "method=lamp,wanda"))
    assert found == [
        {"sparsity": "0.5", "method": "lamp"},
        {"sparsity": "0.5", "method": "wanda"},
        {"sparsity": "0.7", "method": "lamp"},
        {"sparsity": "0.7", "method": "wanda"},
    ]


def test_ranges_hold_their_end_and_no_rounding():
    (axis,) = spec("alpha=0.6:1.0:0.1").grid.values()
    assert axis == ("0.6", "0.7", "0.8", "0.9", "1.0")
    (mixed,) = spec("num-samples=8,16:32:8").grid.values()
    assert mixed == ("8", "16", "24", "32")
    (patterns,) = spec("pattern=2:4,4:8", sparsity=None).grid.values()
    assert patterns == ("2:4", "4:8")


def test_what_a_method_does_not_have_is_left_out_for_it():
    gathered = gather({**GIVEN, "epochs": 3}, environ={})
    lamp = settings_at(gathered, {"method": "lamp", "lr": "1e-3"}).values
    plain = settings_at(gathered, {"method": "sparsegpt", "lr": "1e-3"}).values
    assert (lamp.epochs, lamp.lr) == (3, 1e-3)
    assert (plain.epochs, plain.lr) == (None, None)
    assert settings_at(gathered, {"method": "sparsegpt", "alpha": "0.8"}).values.alpha == 0.8


def test_names_are_plain_file_names_and_differ_where_values_do():
    assert name_of({"pattern": "2:4", "lr": 1e-3}) == "pattern-2of4_lr-0.001"
    odd = ["layers.0.self", "layers[.]0.self", "layers(.)0.self", f"text:/{'x' * 60}/a", f"text:/{'x' * 60}/b"]
    names = [name_of({"ignore": value}) for value in odd]
    assert len(set(names)) == len(odd)
    assert all(len(name) < 80 and set(name) <= set(ascii_letters + digits + "-._") for name in names)


def test_searches_have_usual_ranges():
    found = spec(search="alpha,lr=1e-5:1e-2:log", trials=3, evaluate=("pydocs",)).search
    assert [(r.field, r.low, r.high, r.is_log) for r in found] == [
        ("alpha", 0.5, 1.0, False),
        ("lr", 1e-5, 1e-2, True),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"grids": ()}, "something to vary"),
        ({"grids": ("sparsity",)}, "SETTING=VALUE"),
        ({"grids": ("sparsity=",)}, "there is no value"),
        ({"grids": ("model=a,b",)}, "a sweep cannot vary it"),
        ({"grids": ("evaluate=a,b",)}, "a sweep cannot vary it"),
        ({"grids": ("alpha=1:0:0.1",)}, "STOP no less than START"),
        ({"grids": ("alpha=0:1:0",)}, "STEP must be above 0"),
        ({"grids": ("alpha=0:1:1e-9",)}, "over 1000 values"),
        ({"grids": ("alpha=a:b:c",)}, "are three numbers"),
        ({"grids": ("alpha=0.5", "alpha=0.6")}, "twice"),
        ({"grids": ("alpha=0.5",), "search": "lr", "trials": 2}, "excludes --search"),
        ({"grids": (), "search": "lr"}, "needs --trials"),
        ({"grids": ("alpha=0.5",), "trials": 2}, "require --search"),
        ({"grids": (), "search": "damping", "trials": 2}, "give the range"),
        ({"grids": (), "search": "epochs=1:3", "trials": 2}, "a search samples numbers"),
        ({"grids": (), "search": "alpha,alpha=0.5:1", "trials": 2}, "names alpha twice"),
        ({"grids": (), "search": "alpha=0.5:5", "trials": 2}, "--alpha 5"),
        ({"grids": ("sparsity=0.5,2",)}, "--sparsity 2"),
        ({"grids": (), "search": "lr=1:0", "trials": 2}, "LOW must be below HIGH"),
        ({"grids": (), "search": "lr=0:1:log", "trials": 2}, "above 0 for log"),
        ({"grids": (), "search": "lr", "trials": 2, "evaluate": ()}, "needs --evaluate"),
    ],
)
def test_what_is_wrong_is_said(arguments, says):
    grids = arguments.pop("grids")
    with pytest.raises(ConfigError, match=says):
        spec(*grids, **arguments)


def test_a_value_that_is_none_of_the_setting_is_refused():
    with pytest.raises(ConfigError, match="--sparsity 2"):
        settings_at(gather(GIVEN, environ={}), {"sparsity": "2"})
