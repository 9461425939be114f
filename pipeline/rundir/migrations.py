"""Migrations: records of older schema versions in the form of the newest one. The files are not changed.

A migration is a function from the fields of one schema version to those of the next. It is never changed once it was
released, and it is tested on a run directory that the old version wrote (tests/golden).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]


def migrate(kind: str, fields: Mapping[str, Any], newest: int) -> Fields:
    """The fields of a record as schema version `newest` has them.

    Args:
        kind: Name of the record's class.
        fields: The fields as they were read.
        newest: The schema version to reach.

    Raises:
        ValueError: The schema version never existed, or the fields do not have its form.
    """
    migrated = dict(fields)
    version = migrated.get("schema_version")
    while version != newest:
        step = MIGRATIONS.get(kind, {}).get(version) if type(version) is int else None
        if step is None:
            raise ValueError(f"schema version {str(version)[:20]} never was")
        assert type(version) is int
        version += 1
        migrated = {**step(migrated), "schema_version": version}
    return migrated


def _manifest_1_to_2(fields: Fields) -> Fields:
    """`hold_aside` is called `held_out`."""
    config, origins, identity = (_part(fields, name) for name in ("config", "provenance", "identity"))
    if isinstance(identity.get("settings"), dict):
        identity = {**identity, "settings": _with_held_out(identity["settings"])}
    return {**fields, "config": _with_held_out(config), "provenance": _with_held_out(origins), "identity": identity}


def _with_held_out(settings: Fields) -> Fields:
    return {"held_out" if name == "hold_aside" else name: value for name, value in settings.items()}


def _commit_1_to_2(fields: Fields) -> Fields:
    """`figures` is called `result` and has parts: training, finished weights, calibration set, measurement."""
    rest = {name: value for name, value in fields.items() if name != "figures"}
    figures = _part(fields, "figures")
    step = fields.get("step")
    form = _FORMS.get(step.partition("/")[0]) if isinstance(step, str) else None
    return {**rest, "result": form(figures) if form is not None else figures}


def _part(fields: Fields, name: str) -> Fields:
    part = fields.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"{name} is no JSON object")
    return part


def _calibration(figures: Fields) -> Fields:
    unit = next((unit for unit in ("tokens", "images") if f"num_{unit}" in figures), None)
    if unit is None:
        return figures
    rest = {name: value for name, value in figures.items() if name != f"num_{unit}"}
    return {**rest, "unit": unit, "amount": figures[f"num_{unit}"]}


def _refined(figures: Fields) -> Fields:
    return _with_finished(_with_training(figures))


def _with_training(figures: Fields) -> Fields:
    names = ("loss_before", "loss_after", "loss_before_aside", "loss_after_aside", "epoch_losses", "kept_epoch")
    if "loss_before" not in figures:
        return figures
    epochs = figures.get("epoch_losses", [])
    if not isinstance(epochs, list) or not all(isinstance(epoch, dict) for epoch in epochs):
        raise ValueError("epoch_losses is no list of losses")
    training = {
        "before": {"trained": figures["loss_before"], "held_out": figures.get("loss_before_aside")},
        "after": {"trained": figures.get("loss_after"), "held_out": figures.get("loss_after_aside")},
        "epoch_losses": [{"trained": epoch.get("trained"), "held_out": epoch.get("aside")} for epoch in epochs],
        "kept_epoch": figures.get("kept_epoch"),
        "num_steps": figures.get("num_steps"),
    }
    rest = {name: value for name, value in figures.items() if name not in (*names, "num_steps")}
    return {**rest, "training": training}


def _with_finished(figures: Fields) -> Fields:
    names = ("num_masked", "num_other_zeros", "weights")
    if "num_masked" not in figures:
        return figures
    rest = {name: value for name, value in figures.items() if name not in names}
    counts = {"num_masked": figures["num_masked"], "num_other_zeros": figures.get("num_other_zeros")}
    return {**rest, "finished": {**counts, "layers": figures.get("weights", {})}}


def _evaluated(figures: Fields) -> Fields:
    metric = figures.get("metric", "perplexity")
    if not isinstance(metric, str) or metric not in figures:
        return figures
    about = ("which", "source", "source_digest", "is_partial")
    kept = {name: figures[name] for name in about if name in figures}
    details = {name: value for name, value in figures.items() if name not in (*about, "metric", metric)}
    return {**kept, "metric": metric, "value": figures[metric], "details": details}


# Kind of step -> the form of its result in schema 2. Other steps keep the form that they had.
_FORMS: dict[str, Callable[[Fields], Fields]] = {
    "calibrate": _calibration,
    "prune-block": _with_finished,
    "compensate-block": _with_training,
    "refine-block": _refined,
    "evaluate": _evaluated,
}

# Kind of record -> schema version -> how its fields become those of the next version. Version 1 is the first.
MIGRATIONS: dict[str, dict[int, Callable[[Fields], Fields]]] = {
    "RunManifest": {1: _manifest_1_to_2},
    "StepCommit": {1: _commit_1_to_2},
}
