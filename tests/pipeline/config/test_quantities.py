"""Sizes as people write them (times: test_watch.py)."""

import pytest

from pipeline.config.quantities import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("7.5GiB", int(7.5 * 2**30)),
        ("800M", 800 * 10**6),
        ("2TiB", 2 * 2**40),
        ("12345", 12345),
    ],
)
def test_sizes_are_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "-1GB", "0", "0.0GB", "1e9", "8GBB"])
def test_others_are_refused_with_examples(text):
    with pytest.raises(ValueError, match="8GB"):
        parse_size(text)
