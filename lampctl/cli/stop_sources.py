"""What may stop a command: signals, the cloud's announcement, the time limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.settings import Settings
    from pipeline.engine.stop import StopRequest


@contextmanager
def stopping(config: Settings) -> Iterator[StopRequest]:
    """A stop request that these sources set, as the settings say. Raises ConfigError for a wrong time limit."""
    from lampctl.cli.exit_codes import end_now
    from pipeline.engine.stop import StopRequest

    with StopRequest(end_now) as stop, watching(config, stop):
        yield stop


@contextmanager
def watching(config: Settings, stop: StopRequest) -> Iterator[None]:
    """Inside, the time limit and the cloud's announcement set `stop`. Raises ConfigError for a wrong time limit."""
    from pipeline.config.quantities import parse_duration
    from pipeline.engine.preemption import PreemptionWatcher, RunTimer

    with ExitStack() as watchers:
        if config.max_runtime is not None:
            watchers.enter_context(
                closing(RunTimer(config.max_runtime, parse_duration(config.max_runtime), stop.request_once_advanced))
            )
        if config.watch_preemption != "none":
            watcher = PreemptionWatcher(config.watch_preemption, stop.request, config.preemption_url)
            watchers.enter_context(closing(watcher))
        yield
