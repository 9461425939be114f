"""What the commands of a cell have taken so far, kept in its folder: a cell may be stopped and resumed."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

_NAME = "ledger.json"


class Ledger:
    """Processor time of each command over all calls, and the versions of the code that they ran with.

    A call that ended without an account (killed together with the benchmark) makes its command's time unknown.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        stored = json.loads(self._path.read_text()) if self._path.exists() else {"code": [], "calls": {}}
        self._code: list[str] = stored["code"]
        self._calls: dict[str, list[float | None]] = stored["calls"]  # None: began, no account of it

    def begin(self, command: Sequence[str], code: str) -> None:
        """Note a call before it starts."""
        if code not in self._code:
            self._code.append(code)
        self._calls.setdefault(shlex.join(command), []).append(None)
        self._write()

    def end(self, command: Sequence[str], cpu_s: float) -> None:
        """Account for the call that began last."""
        self._calls[shlex.join(command)][-1] = cpu_s
        self._write()

    def cpu_s(self, command: Sequence[str]) -> float | None:
        """Processor seconds of all calls of this command; None: not all of them are known."""
        calls = self._calls.get(shlex.join(command), [])
        known = [call for call in calls if call is not None]
        return sum(known) if len(known) == len(calls) else None

    @property
    def code(self) -> str:
        """The versions of the code, in the order of their use."""
        return " to ".join(self._code)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump({"code": self._code, "calls": self._calls}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._path)
