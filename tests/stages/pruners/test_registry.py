"""Every pruner of the registry passes the conformance kit, and the kit detects each broken requirement."""

import subprocess
import sys

import pytest
import torch

from stages.errors import UsageError
from stages.pruners.base import PrunedMatrix, PruneOptions
from stages.pruners.magnitude import Magnitude
from stages.pruners.registry import (
    LAMP,
    PRUNERS,
    bit_methods,
    lamp_pruners,
    method_names,
    method_title,
    reads_data,
)
from stages.pruners.sparsegpt import SparseGPT
from stages.sparsity.nm_pattern import Pattern
from stages.testing.pruners import check_pruner


@pytest.mark.parametrize("name", PRUNERS.names)
def test_every_pruner_conforms(name):
    check_pruner(name)


class _OneTooFew(Magnitude):
    def prune(self, layer, prepared):
        pruned = super().prune(layer, prepared)
        mask = pruned.mask.clone()
        mask.view(-1)[mask.view(-1).nonzero()[:1]] = False
        return PrunedMatrix(pruned.weight, mask)


class _NotZero(Magnitude):
    def prune(self, layer, prepared):
        return PrunedMatrix(layer.weight, super().prune(layer, prepared).mask)


class _InPlace(Magnitude):
    def prune(self, layer, prepared):
        pruned = super().prune(layer, prepared)
        layer.weight.masked_fill_(pruned.mask, 0)
        return pruned


class _OffTheGrid(Magnitude):
    def keep(self, layer, mask):
        return PrunedMatrix(layer.weight.masked_fill(mask, 0), mask)


class _Restless(Magnitude):
    calls = 0

    def prune(self, layer, prepared):
        type(self).calls += 1
        scores = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(self.calls))
        return self.keep(layer, self.select(scores, layer))


class _IgnoresPatterns(Magnitude):
    def __init__(self, options):
        super().__init__(PruneOptions(bits=options.bits, group_size=options.group_size))


class _LongHelp(Magnitude):
    help = "One line.\nAnother."


class _Nameless(Magnitude):
    title = ""


class _TakesAnything(Magnitude):
    supports_bits = False

    def __init__(self, options):
        self.options = options


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (_OneTooFew, "weights are masked"),
        (_NotZero, "a masked weight is not zero"),
        (_InPlace, "the original weight was changed"),
        (_OffTheGrid, "distinct values"),
        (_Restless, "restored statistics give"),
        (_IgnoresPatterns, "of the groups hold 2:4"),
        (_LongHelp, "more than one line"),
        (_Nameless, "title is empty"),
        (_TakesAnything, "does not refuse"),
    ],
)
def test_the_kit_names_the_failed_requirement(pruner, message):
    with pytest.raises(AssertionError, match=message):
        check_pruner(pruner)


@pytest.mark.parametrize("options", [PruneOptions(bits=4), PruneOptions(pattern=Pattern(2, 4))])
def test_a_pruner_refuses_what_it_does_not_support(options):
    class Plain(Magnitude):
        supports_bits = supports_pattern = False

    with pytest.raises(UsageError, match="the pruner magnitude cannot"):
        Plain(options)
    check_pruner(Plain)


def test_methods_follow_the_registry():
    class Other(SparseGPT):
        name, title, help = "other", "Other", "A pruner of another package."
        supports_bits = False

    PRUNERS.register("other", Other)
    try:
        assert method_names() == (LAMP, "sparsegpt", "alps", "wanda", "magnitude", "other")
        assert lamp_pruners() == ("sparsegpt", "alps", "other")
        assert bit_methods() == (LAMP, "sparsegpt", "alps", "magnitude")
        assert method_title("other") == "Other"
        assert reads_data("other")
    finally:
        PRUNERS.unregister("other")
    assert method_title("other") == "other"  # a run of a pruner whose package is gone can still be shown
    assert not reads_data("magnitude")
    with pytest.raises(UsageError, match="no pruner is called other"):
        reads_data("other")


def test_titles_and_help_need_no_torch():
    code = (
        "import sys; from stages.pruners.registry import PRUNERS, method_title, lamp_pruners;"
        "print([(entry.title, entry.help) for entry in PRUNERS.entries()], lamp_pruners());"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.path[0] or None)
    assert done.returncode == 0, done.stderr
