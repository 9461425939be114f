"""Verify a run: compare its files with its commits, and say what is damaged and what `resume` does about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.engine.plan import Step, is_stream, needed
from pipeline.errors import DamagedData, FileGone
from pipeline.rundir.filesystem import FileDigest
from pipeline.rundir.records import PayloadFile, StepCommit
from pipeline.rundir.run_directory import RunDirectory


@dataclass(frozen=True)
class Damage:
    """A file that is not what was committed."""

    key: str  # relative to the run directory
    payload: str
    step: str
    reason: str
    is_needed: bool  # a later step reads it, or it is never released
    remedy: str  # what `lampctl resume` does about it


@dataclass(frozen=True)
class Report:
    """Result of a verification."""

    num_commits: int
    num_files: int  # checked
    num_bytes: int
    is_deep: bool
    damages: tuple[Damage, ...]
    released: tuple[str, ...]  # payloads that no later step reads, and whose files were deleted
    leftovers: tuple[str, ...]  # attempts that crashes left behind: `lampctl gc` deletes them


def verify(
    run: RunDirectory,
    steps: Sequence[Step],
    *,
    is_deep: bool,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compare every committed file with its record: presence and size, and its sha256 if `is_deep`. Changes nothing.

    advance: called after each file with the number of files done and their total.
    """
    done = [commit.step for commit in run.commits]
    wanted = set(needed(steps, done))
    newest = {name: commit for commit in run.commits for name in commit.payloads}
    released, damages, todo = [], [], []
    for name, commit in newest.items():
        payload = commit.payloads[name]
        if name not in wanted and not run.storage.exists(payload.root):
            released.append(name)
            continue
        sizes = run.storage.sizes(payload.root)
        todo += [(name, commit, file, sizes.get(file.path)) for file in payload.files]
    num_bytes = 0
    for count, (name, commit, file, size) in enumerate(todo, 1):
        reason = _size_damage(file, size) or (_digest_damage(run, file) if is_deep else None)
        if reason is not None:
            remedy = _remedy(name, commit, name in wanted, steps)
            damages.append(Damage(file.path, name, commit.step, reason, name in wanted, remedy))
        num_bytes += file.size
        advance(count, len(todo))
    return Report(
        len(run.log), len(todo), num_bytes, is_deep, tuple(damages), tuple(sorted(released)), tuple(run.leftovers())
    )


def damaged_payloads(run: RunDirectory, names: Sequence[str], *, is_deep: bool) -> dict[str, str]:
    """Those of the payloads that are not whole, with the first reason found."""
    found = {}
    for name in names:
        payload = run.payload(name)
        sizes = run.storage.sizes(payload.root)
        for file in payload.files:
            reason = _size_damage(file, sizes.get(file.path)) or (_digest_damage(run, file) if is_deep else None)
            if reason is not None:
                found[name] = f"{file.path} {reason}"
                break
    return found


def _size_damage(file: PayloadFile, size: int | None) -> str | None:
    if size is None:
        return "is missing"
    return None if size == file.size else f"has {size} bytes, {file.size} were committed"


def _digest_damage(run: RunDirectory, file: PayloadFile) -> str | None:
    try:
        found = run.storage.digest(file.path)
    except FileGone:
        return "is missing"
    except DamagedData:
        return "is a link that leads out of the run directory"
    return None if found == FileDigest(file.size, file.sha256) else "is not what was committed (sha256)"


def _remedy(name: str, commit: StepCommit, is_wanted: bool, steps: Sequence[Step]) -> str:
    if not is_wanted:
        return "nothing: no later step reads it"
    if is_stream(name, steps):
        return "makes it again by running finished blocks"
    return f"does {commit.step} once more and compares the result"
