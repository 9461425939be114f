"""Activation streams: bit for bit what was written, or an error with a name."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zarr
from torch import Tensor

from pipeline.errors import DamagedData, MissingChunk, Superseded
from pipeline.rundir import filesystem
from pipeline.rundir.activation_store import ActivationStream, ScratchStreams, open_stream, stream_spec, write_stream
from pipeline.rundir.records import Payload
from pipeline.rundir.storage.local import FolderStorage
from stages.errors import NumericalError
from stages.interfaces import Scratch, Stream

SHAPE = (6, 5)


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def bits(sample: Tensor) -> Tensor:
    return sample.contiguous().view(torch.uint8)


def hard_samples(dtype: torch.dtype) -> list[Tensor]:
    """Samples with every awkward value the dtype has; fp16 refuses those that are not finite."""
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [torch.tensor([info.min, info.max, -1, 0, 1] * 6, dtype=dtype).reshape(SHAPE) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    finfo = torch.finfo(dtype)
    samples = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3)]
    samples[0][0] = torch.tensor([finfo.max, finfo.min, finfo.tiny, finfo.smallest_normal / 4, -0.0])
    if dtype != torch.float16:
        samples[1][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        samples[2].fill_(float("nan"))  # a chunk that equals the fill value is there all the same
    return samples


def written(folder: Path, samples: list[Tensor]) -> Payload:
    dtype = samples[0].dtype
    stream = write_stream(new(folder / "s"), stream_spec(len(samples), tuple(samples[0].shape), dtype))
    for index, sample in enumerate(samples):
        stream.write(index, sample)
    return stream.seal("s")


def reopened(folder: Path, payload: Payload) -> ActivationStream:
    return open_stream(FolderStorage(folder), payload, "biased/3 of prune-block/2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = hard_samples(dtype)
    stream: Stream = reopened(tmp_path, written(tmp_path, samples))
    assert len(stream) == 3
    for index, sample in enumerate(samples):
        assert stream[index].dtype == dtype
        assert torch.equal(bits(stream[index]), bits(sample))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_samples_lie_in_memory_that_torch_aligned(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = [torch.zeros(33, 7, dtype=dtype) for _ in range(8)]
    stream = reopened(tmp_path, written(tmp_path, samples))
    kept = [stream[index] for index in range(8)]
    assert [sample.data_ptr() % 64 for sample in kept] == [0] * 8


def test_a_sample_may_be_changed_without_changing_the_stream(tmp_path: Path) -> None:
    stream = reopened(tmp_path, written(tmp_path, [torch.ones(SHAPE)] * 2))
    stream[0].fill_(7)
    assert torch.equal(stream[0], torch.ones(SHAPE))


def test_samples_of_another_dtype_or_layout_are_converted(tmp_path: Path) -> None:
    stream = write_stream(new(tmp_path / "s"), stream_spec(1, SHAPE, torch.bfloat16))
    sample = torch.randn(SHAPE[::-1], requires_grad=True).T
    stream.write(0, sample)
    assert torch.equal(stream[0], sample.detach().bfloat16())


def test_a_stream_ends(tmp_path: Path) -> None:
    stream = reopened(tmp_path, written(tmp_path, [torch.ones(SHAPE)] * 2))
    assert len(list(stream)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError):
            stream[index]
        with pytest.raises(IndexError):
            stream.write(index, torch.ones(SHAPE))


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    stream = write_stream(new(tmp_path / "s"), stream_spec(1, SHAPE, torch.float32))
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(6, 5\)"):
        stream.write(0, torch.ones(6, 4))
    with pytest.raises(ValueError, match="float64"):
        stream_spec(1, SHAPE, torch.float64)


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_float16_refuses_what_it_cannot_hold(tmp_path: Path, value: float) -> None:
    stream = write_stream(new(tmp_path / "s"), stream_spec(1, SHAPE, torch.float16))
    with pytest.raises(NumericalError, match="bfloat16"):
        stream.write(0, torch.full(SHAPE, value))


def test_a_sample_may_be_rewritten_until_the_stream_is_sealed(tmp_path: Path) -> None:
    stream = write_stream(new(tmp_path / "s"), stream_spec(1, SHAPE, torch.float32))
    stream.write(0, torch.zeros(SHAPE))
    stream.write(0, torch.ones(SHAPE))
    payload = stream.seal("s")
    assert torch.equal(reopened(tmp_path, payload)[0], torch.ones(SHAPE))
    with pytest.raises(ValueError, match="read-only"):
        stream.write(0, torch.zeros(SHAPE))


def test_the_payload_tells_the_truth_about_every_file(tmp_path: Path) -> None:
    payload = written(tmp_path, hard_samples(torch.bfloat16))
    assert {file.path for file in payload.files} == {f"s/{path.name}" for path in (tmp_path / "s").iterdir()}
    assert len(payload.files) == 4
    for file in payload.files:
        assert filesystem.hash_file(tmp_path / file.path) == filesystem.FileDigest(file.size, file.sha256)


def test_the_same_samples_make_the_same_payload(tmp_path: Path) -> None:
    payloads = []
    for name in "ab":
        (tmp_path / name).mkdir()
        payloads.append(written(tmp_path / name, hard_samples(torch.float32)))
    assert payloads[0] == payloads[1]


def test_a_sample_never_written_is_no_zeros(tmp_path: Path) -> None:
    stream = write_stream(new(tmp_path / "s"), stream_spec(2, SHAPE, torch.float32))
    stream.write(0, torch.ones(SHAPE))
    with pytest.raises(MissingChunk, match=r"c\.1\.0\.0.* was never written"):
        stream[1]
    with pytest.raises(MissingChunk, match="sample 1"):
        stream.seal("s")


def flip_byte(folder: Path) -> None:
    path = folder / "c.1.0.0"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "c.1.0.0"
    path.write_bytes(path.read_bytes()[:-8])


def truncate_to_nothing(folder: Path) -> None:
    (folder / "c.1.0.0").write_bytes(b"")


def swap(folder: Path) -> None:
    """Both chunks are whole, and their crc32c is right: only the commit knows better."""
    one, other = (folder / "c.0.0.0").read_bytes(), (folder / "c.1.0.0").read_bytes()
    (folder / "c.0.0.0").write_bytes(other)
    (folder / "c.1.0.0").write_bytes(one)


def remove(folder: Path) -> None:
    (folder / "c.1.0.0").unlink()


def link_away(folder: Path) -> None:
    (folder / "c.1.0.0").rename(folder.parent / "elsewhere")
    (folder / "c.1.0.0").symlink_to(folder.parent / "elsewhere")


def edit_metadata(folder: Path) -> None:
    path = folder / "zarr.json"
    path.write_text(path.read_text().replace("6,", "5,").replace("5", "6"))


def remove_metadata(folder: Path) -> None:
    (folder / "zarr.json").unlink()


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


DAMAGES = [
    flip_byte,
    truncate,
    truncate_to_nothing,
    swap,
    remove,
    link_away,
    edit_metadata,
    remove_metadata,
    remove_all,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_damage_is_an_error_that_names_file_and_step(
    tmp_path: Path, dtype: torch.dtype, damage: Callable[[Path], None]
) -> None:
    payload = written(tmp_path, [torch.full(SHAPE, index, dtype=dtype) for index in range(3)])
    damage(tmp_path / "s")
    with pytest.raises(
        DamagedData, match=r"s/(c\.[01]\.0\.0|zarr\.json).*biased/3 of prune-block/2.*Nothing was computed"
    ):
        list(reopened(tmp_path, payload))


@pytest.mark.parametrize("damage", [flip_byte, truncate, truncate_to_nothing, remove], ids=lambda d: d.__name__)
def test_damage_behind_the_back_of_an_open_stream_is_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """The crc32c guards what no commit knows yet."""
    stream = write_stream(new(tmp_path / "s"), stream_spec(3, SHAPE, torch.float32))
    for index in range(3):
        stream.write(index, torch.full(SHAPE, float(index)))
    damage(tmp_path / "s")
    with pytest.raises(DamagedData, match=r"c\.1\.0\.0"):
        stream[1]


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    payload = written(tmp_path, [torch.zeros(SHAPE), torch.ones(SHAPE)])
    checked: set[str] = set()
    stream = open_stream(FolderStorage(tmp_path), payload, checked=checked)
    assert {Path(path).name for path in checked} == {"zarr.json"}
    stream[0]
    assert {Path(path).name for path in checked} == {"zarr.json", "c.0.0.0"}


def test_a_missing_file_may_have_a_better_explanation(tmp_path: Path) -> None:
    def explain() -> None:
        raise Superseded("somebody else is ahead")

    payload = written(tmp_path, [torch.zeros(SHAPE)])
    (tmp_path / "s" / "c.0.0.0").unlink()
    with pytest.raises(Superseded):
        open_stream(FolderStorage(tmp_path), payload, explain_missing=explain)
    stream = write_stream(new(tmp_path / "w"), stream_spec(1, SHAPE, torch.float32), explain)
    shutil.rmtree(tmp_path / "w")
    with pytest.raises(Superseded):
        stream.write(0, torch.zeros(SHAPE))


def test_scratch_streams_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with ScratchStreams(tmp_path / "scratch") as streams:
        scratch: Scratch = streams
        one = scratch.stream("targets of q/k/v", 1, SHAPE, torch.float32)
        other = scratch.stream("targets of q/k/v", 1, SHAPE, torch.float32)
        one.write(0, torch.zeros(SHAPE))
        other.write(0, torch.ones(SHAPE))
        assert torch.equal(one[0], torch.zeros(SHAPE))
        assert torch.equal(other[0], torch.ones(SHAPE))
    assert list(tmp_path.iterdir()) == []
    streams.close()


def test_scratch_is_never_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoFlush(filesystem.Calls):
        def flush(self, descriptor: int) -> None:
            raise AssertionError("flushed")

    monkeypatch.setattr(filesystem, "calls", NoFlush())
    (tmp_path / "scratch").mkdir()
    with ScratchStreams(tmp_path / "scratch") as streams:
        streams.stream("x", 1, SHAPE, torch.float32).write(0, torch.zeros(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_zarr_itself_reads_a_stream_and_writes_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = hard_samples(dtype)
    written(tmp_path, samples)
    # Without it, zarr leaves out a chunk that equals the fill value.
    array = zarr.open_array(tmp_path / "s", mode="r+", zarr_format=3).with_config({"write_empty_chunks": True})
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    for index, sample in enumerate(samples):
        stored = sample.view(torch.uint16) if dtype == torch.bfloat16 else sample
        assert array[index].tobytes() == stored.numpy().tobytes()
        array[index] = stored.numpy()
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


@pytest.mark.parametrize("megabytes", [1, 3])
def test_large_chunks_are_hashed_beside_and_damage_anywhere_in_them_is_found(tmp_path: Path, megabytes: int) -> None:
    payload = written(tmp_path, [torch.randn(megabytes << 8, 1 << 10) for _ in range(2)])
    for file in payload.files:
        assert hashlib.sha256((tmp_path / file.path).read_bytes()).hexdigest() == file.sha256
    reopened(tmp_path, payload)[1]
    for place in (0, 1 << 19, (megabytes << 20) - 1, (megabytes << 20) + 3):
        chunk = tmp_path / "s" / "c.1.0.0"
        whole = bytearray(chunk.read_bytes())
        whole[place] ^= 1
        chunk.write_bytes(whole)
        with pytest.raises(DamagedData, match="sha256"):
            reopened(tmp_path, payload)[1]
        whole[place] ^= 1
        chunk.write_bytes(whole)
    chunk.write_bytes(bytes(whole) + b"\0")
    with pytest.raises(DamagedData):
        reopened(tmp_path, payload)
