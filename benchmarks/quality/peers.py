"""The peers' own Python environment, beside the project's: they hold other packages at other versions.

    python -m benchmarks.quality.peers [FOLDER]

makes it in FOLDER (default: runs/quality/peers-venv), once, and prints the path of its Python. The benchmark finds it
there; another one is named by --peer-python or the environment variable PEER_PYTHON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("llmcompressor==0.14.0.1",)
DEFAULT = Path("runs/quality/peers-venv")


def find(named: Path | None = None) -> Path | None:
    """The peers' Python: the one that was named, else PEER_PYTHON's, else the default environment's; None if there
    is none.

    Raises SystemExit if a Python was named that is not there.
    """
    chosen = named or (Path(os.environ["PEER_PYTHON"]) if os.environ.get("PEER_PYTHON") else None)
    if chosen is not None and not chosen.is_file():
        raise SystemExit(f"{chosen}: no such Python; make one with: python -m benchmarks.quality.peers")
    chosen = chosen or DEFAULT / "bin" / "python"
    # Not resolved: it is the link's own place that makes it an environment.
    return chosen.absolute() if chosen.is_file() else None


def make(folder: Path) -> Path:
    """An environment in `folder` that holds the peers. One that is there is brought up to the versions named here."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    subprocess.run(install, check=True, stdout=sys.stderr)
    return python.absolute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    print(make(parser.parse_args().folder))


if __name__ == "__main__":
    main()
