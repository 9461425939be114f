"""Write the report: a page, and its figures as PNG and CSV files in a folder beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lampctl.output.comparison import compare
from lampctl.report.contents import RunReport, contents, heading, pictures
from lampctl.report.folder import files_of, require_ours, write_folder
from lampctl.report.mask_samples import MaskSample, mask_samples
from lampctl.report.page import page
from lampctl.report.style import require_matplotlib
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigMismatch
from pipeline.rundir.redact import scrub
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.comparison import summary_of
from pipeline.runs.continuations import Continuation, continuations
from pipeline.runs.lifecycle import reopen
from pipeline.runs.status import status
from pipeline.steps.run_facts import environment_of, facts_of
from stages.errors import ResourceError, UsageError
from stages.interfaces import Watcher
from stages.version import VERSION

_NUM_PICTURES = 4


def write_report(
    places: Sequence[str], out: Path, prompts: Sequence[str], num_tokens: int, device: str, callbacks: Watcher
) -> list[Path]:
    """Write the report of these runs.

    Args:
        places: run directories.
        out: folder of the report.
        prompts: prompts that the models continue; none: no text.
        num_tokens: tokens that the models generate per prompt.
        device: where the models run.
        callbacks: receive progress.

    Returns:
        The written files, the page first.

    Raises:
        ConfigError: `out` holds other files, or matplotlib is missing.
    """
    require_matplotlib()
    require_ours(out, places)
    opened = [reopen(place) for place in places]
    texts: Sequence[tuple[Continuation, ...]] = [()] * len(opened)
    masks: Sequence[tuple[MaskSample, ...]] = [()] * len(opened)
    if prompts:
        try:
            texts = continuations(opened, prompts, num_tokens, device, callbacks)
            masks = mask_samples(opened, _NUM_PICTURES, device, callbacks)
        except (ResourceError, ConfigMismatch, UsageError) as error:  # an original that is gone, or another one by now
            raise type(error)(f"{error}; or leave the text out: --no-text") from error
    runs = [
        _report_of(run, config, written, answered)
        for (run, config), written, answered in zip(opened, texts, masks, strict=True)
    ]
    sections = contents(runs, compare([summary_of(run.state) for run in runs]))
    title, subtitle = heading(runs)
    footer = f"Made by lampctl {VERSION} from what the run directories hold."
    return write_folder(out, files_of(pictures(sections)), lambda files: page(title, subtitle, sections, footer, files))


def _report_of(
    run: RunDirectory, config: RunConfig, written: tuple[Continuation, ...], masks: tuple[MaskSample, ...]
) -> RunReport:
    model, environment = facts_of(run).model, environment_of(run)
    device = environment.device
    revision = f" at {model.revision[:12]}" if model.revision else ""
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return RunReport(
        state=status(run, config),
        created=f"{run.manifest.created_at:%Y-%m-%d}",
        model=f"{model.model_type}, {model.num_blocks} blocks of width {model.hidden_size}{revision}",
        environment={
            "computed on": f"{device.device_name}, {device.num_threads} thread(s), {device.dtype}",
            "versions": scrub(f"Python {environment.python}, {packages}"),
        },
        continuations=written,
        masks=masks,
    )
