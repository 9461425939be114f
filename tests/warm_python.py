"""Python processes that start in milliseconds: one process imports torch and lampctl, and forks itself for each call.

A forked process has a memory, files and signals of its own: it can be killed like one started from nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

LAMPCTL = """
import sys
sys.argv[0] = "lampctl"
from lampctl.app import main
main()
"""

# As `python FILE arguments`: the file is the first argument.
SCRIPT = """
import runpy, sys
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

_IMPORTED = (
    *("lampctl.app", "lampctl.commands.run", "pipeline.steps.executor", "pipeline.runs.lifecycle", "stages.lamp"),
    *("transformers.models.opt.modeling_opt", "transformers.models.llama.modeling_llama", "segment_anything"),
)
_SERVER = """
import importlib, json, os, sys

requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in requests:
    request = json.loads(line)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
        continue
    requests.close()
    answers.close()
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-c", *request["arguments"]]
    exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    break
"""


def run(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -c code arguments`, with torch and lampctl imported beforehand.

    Args:
        code: the program.
        arguments: its `sys.argv[1:]`.
        cwd: its working directory. Default: that of this process.

    Returns:
        The exit code (negative: the signal that ended it) and what it printed.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with _file() as out, _file() as err:
        request = {"code": code, "arguments": [*map(str, arguments)], "out": str(out), "err": str(err)}
        request |= {"cwd": str(cwd or Path.cwd()), "environment": dict(os.environ)}
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
        except BaseException:  # a test's time limit: the answer would be taken for that of the next call
            server.kill()
            _server.cache_clear()
            raise
        assert answer, f"the process that forks has ended with {server.wait()}"
        return subprocess.CompletedProcess([sys.executable, "-c", code], int(answer), out.read_text(), err.read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks. It ends when this one closes its standard input, at the latest by ending."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", _SERVER, *_IMPORTED]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    )


@contextlib.contextmanager
def _file() -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()
