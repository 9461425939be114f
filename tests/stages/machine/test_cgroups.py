"""Limits of control groups, on copies of the files that Linux has."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stages.machine import device
from stages.machine.cgroups import memory_left

MB = 2**20
NONE_V1 = 0x7FFFFFFFFFFFF000


def system(root: Path, groups: str, files: dict[str, object]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def v2(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\nslab 5"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def v1(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    # The second field of the cache counts the groups below.
    stat = f"cache {cached}\ninactive_file 0\ntotal_inactive_file {cached}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"memory/{folder}{name}": value for name, value in zip(names, (limit, used, stat), strict=True)}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param("0::/", v2("", 800 * MB, 300 * MB, 100 * MB), 600 * MB, id="a container, version 2"),
        pytest.param("0::/", v2("", "max", 300 * MB), None, id="no limit"),
        pytest.param("0::/", {}, None, id="the root of the machine has no files"),
        pytest.param("0::/a/b", v2("a/", 500 * MB, 100 * MB) | v2("a/b/", "max", 50 * MB), 400 * MB, id="of a parent"),
        pytest.param(
            "0::/a/b", v2("a/", 500 * MB, 450 * MB) | v2("a/b/", 99 * MB, MB), 50 * MB, id="the parent is full"
        ),
        pytest.param("0::/../../x", v2("", 9 * MB, 4 * MB), 5 * MB, id="a path outside of the container"),
        pytest.param("4:memory:/", v1("", 800 * MB, 300 * MB, 100 * MB), 600 * MB, id="a container, version 1"),
        pytest.param("4:memory:/docker/5f", v1("", 8 * MB, 3 * MB), 5 * MB, id="a path that only the host has"),
        pytest.param("4:memory:/", v1("", NONE_V1, 300 * MB), None, id="no limit, version 1"),
        pytest.param("4:memory:/\n1:cpu:/\n0::/", v1("", 8 * MB, 3 * MB), 5 * MB, id="both versions"),
        pytest.param("0::/", v2("unified/", 8 * MB, 3 * MB), 5 * MB, id="version 2 beside version 1"),
        pytest.param("0::/", v2("", 8 * MB, 9 * MB), 0, id="over its limit"),
        pytest.param("nonsense", v2("", 8 * MB, 9 * MB), None, id="nonsense"),
        pytest.param("0::/", {"memory.max": "eight", "memory.current": ""}, None, id="no numbers"),
    ],
)
def test_the_tightest_group_counts(tmp_path, groups, files, expected):
    assert memory_left(system(tmp_path, groups, files)) == expected


def test_a_machine_without_groups_has_no_limit(tmp_path):
    assert memory_left(tmp_path) is None


def test_what_is_free_in_a_container_counts(monkeypatch):
    cpu = device.torch.device("cpu")
    monkeypatch.setattr(device, "memory_left", lambda: None)
    machine = device.memory_available(cpu)
    monkeypatch.setattr(device, "memory_left", lambda: 100 * MB)
    contained = device.memory_available(cpu)
    assert contained < machine
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 90 * MB <= contained <= resident + 100 * MB


def test_this_machine_is_read():
    """Whatever it has: a number or none, and no exception."""
    code = "from stages.machine.cgroups import memory_left; print(memory_left())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    for word in done.stdout.split():
        assert word == "None" or float(word) >= 0
