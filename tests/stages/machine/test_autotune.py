"""What this machine computes with: measured once, remembered, never reduced in precision."""

import json

import pytest
import torch

from stages.errors import UsageError
from stages.machine import autotune, device
from stages.machine.autotune import Tuning, tuned


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "lampctl" / "tuning.json"


def test_the_first_measurement_is_kept_and_used_again(cache, monkeypatch):
    first = tuned("a processor")
    assert 1 <= first.num_threads <= torch.get_num_threads()
    monkeypatch.setattr(autotune, "_measure", lambda counts: pytest.fail("measured again"))
    assert tuned("a processor") == first
    assert len(json.loads(cache.read_text())) == 1


@pytest.mark.long
def test_another_processor_or_a_number_of_threads_is_measured_by_itself(cache):
    tuned("a processor")
    tuned("another")
    assert tuned("a processor", 1).num_threads == 1
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.long
@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"k": 1}', '{"k": {"num_threads": 0, "matmul_precision": "medium"}}', '{"k": {"x": 1}}']
)
def test_a_strange_file_is_measured_over(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert tuned("a processor").num_threads >= 1
    assert "a processor" in cache.read_text()


def test_it_measures_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuned("a processor").num_threads >= 1


def test_a_path_of_reduced_precision_is_never_chosen(monkeypatch):
    seconds = {"highest": 1.0, "medium": 0.1}
    monkeypatch.setattr(autotune, "_product_s", lambda: seconds[torch.get_float32_matmul_precision()])
    monkeypatch.setattr(autotune, "product_error", lambda: 1e-3)
    assert autotune._measure([1]) == Tuning(1, "highest")
    monkeypatch.setattr(autotune, "product_error", lambda: 3e-7)
    assert autotune._measure([1]) == Tuning(1, "medium")


def test_noise_alone_does_not_change_the_usual_choice(monkeypatch):
    seconds = {(4, "highest"): 1.0, (4, "medium"): 0.97, (2, "highest"): 0.96, (2, "medium"): 0.955}

    def now():
        return seconds[(torch.get_num_threads(), torch.get_float32_matmul_precision())]

    monkeypatch.setattr(autotune, "_product_s", now)
    monkeypatch.setattr(autotune, "product_error", lambda: 3e-7)
    assert autotune._measure([4, 2]) == Tuning(4, "highest")


def test_measuring_leaves_torch_as_it_was():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    tuned("a processor")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_the_choice_is_what_the_device_computes_with():
    choices = device.choose("cpu", "float32", threads=1)
    assert choices.num_threads == 1
    assert choices.matmul_precision in ("highest", "medium")
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        device.apply(choices)
        assert autotune.product_error() < 3e-6
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(False)
    with pytest.raises(UsageError, match="--dtype"):
        device.choose("cpu", "int8")


def test_short_samples_share_a_pass_and_long_ones_do_not():
    cpu = torch.device("cpu")
    assert device.micro_batches(cpu, 32) == [1, 2, 4, 8]
    assert device.micro_batches(cpu, 2048) == [1]
    assert device.micro_batches(torch.device("cuda"), 2048) == [1, 2]
    assert device.micro_batches(cpu, 32, wanted=5) == [5]
