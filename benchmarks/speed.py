"""Speed and memory: the table of docs/performance.md, measured on this machine.

    python benchmarks/speed.py [--only P1,P6] [--peer-python PYTHON]

The same as `python -m benchmarks.performance`, from any folder.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("benchmarks.performance", run_name="__main__")
