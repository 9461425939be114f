"""Check before a run that every file which the export will write can have its name there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir.records import relative_path, require_text
from pipeline.steps.block_files import block_filename

if TYPE_CHECKING:
    from stages.models.base import BlockModel

_CARD = "README.md"
_SHOWN = 8


def check_export(config: RunConfig, model: BlockModel) -> tuple[str, ...]:
    """Notices about files of the model folder that an export leaves out.

    Raises:
        ConfigError: A file beside the weights has a name that no record can hold, or the name of a file that the export
            writes.
        ResourceError: A file cannot be read.
    """
    taken = set(_own_names(config, model))
    folders = {parent for name in taken for parent in _parents(name)}
    for name, _ in model.export_extras(config.export_dtype):
        where = f"{model.source.path}/{name}"
        try:
            relative_path(require_text(name))
        except ValueError as error:
            raise ConfigError(f"{where} cannot be exported ({error}): rename or remove it") from error
        if name in taken or name in folders or taken.intersection(_parents(name)):
            raise ConfigError(f"{where} has the name of a file that the export writes: rename or remove it")
        taken.add(name)
        folders.update(_parents(name))
    left_out = model.source.left_out
    if not left_out:
        return ()
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    return (
        f"not exported: {', '.join(left_out[:_SHOWN])}{more}, which lie beside the weights of {model.source.name} "
        "(weights among them would be those before pruning)",
    )


def _own_names(config: RunConfig, model: BlockModel) -> Iterator[str]:
    """Files that the export writes, whatever lies beside the weights."""
    from stages.export import ExportPlan
    from stages.formats.checkpoint_files import INDEX
    from stages.formats.pruning_masks import FOLDER

    plan = ExportPlan.of(model, config.export_dtype)
    yield from (plan.filename(number) for number in range(plan.num_blocks + len(plan.outside)))
    yield from (f"{FOLDER}/{block_filename(block)}" for block in range(model.num_blocks))
    yield from (name for name, _ in model.other_forms({}))
    yield from (INDEX, _CARD)


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")
    yield from ("/".join(parts[:end]) for end in range(1, len(parts)))
