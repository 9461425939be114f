"""Packed models: every byte of the folder comes back, in as little room as promised, and damage is noticed."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.errors import DamagedFileError, ResourceError, UsageError
from stages.formats.base import FormatContext
from stages.formats.packed.layout import open_packed, packed_sizes, read_contents
from stages.formats.packed.reader import unpack
from stages.formats.packed.writer import pack
from stages.formats.safetensors_io import TensorFile, open_new
from stages.in_memory import NullCallbacks
from tests.pruned_folders import contents_of, pruned_folder, share, two_of_four

QUIET = FormatContext(NullCallbacks(), open_new)
MODELS = [
    ("llama", torch.bfloat16),
    ("gpt2", torch.float32),
    ("gpt2", torch.bfloat16),
    ("opt-350m", torch.float16),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {
    "sparse": {},
    "4 bits": {"bits": 4},
    "3 bits in groups": {"bits": 3, "group_size": 12},
    "2:4": {"mask_of": two_of_four},
    "nearly dense": {"mask_of": share(0.02)},
    "dense": {"mask_of": share(0)},
    "dense, 4 bits": {"mask_of": share(0), "bits": 4},
    "empty": {"mask_of": share(1)},
}


def packed_again(folder: Path, tmp_path: Path) -> tuple[dict, NullCallbacks]:
    """Packs and unpacks the folder, and compares every byte of every file."""
    callbacks = NullCallbacks()
    sizes = pack(folder, tmp_path / "small", FormatContext(callbacks, open_new))
    unpack(tmp_path / "small", tmp_path / "back", QUIET)
    assert contents_of(tmp_path / "back") == contents_of(folder)
    assert sizes.packed_bytes == (tmp_path / "small").stat().st_size
    parts = {name: size for name, size in sizes.record().items() if name.endswith("_bytes")}
    assert sum(parts.values()) - parts["dense_bytes"] - parts["packed_bytes"] == parts["packed_bytes"]
    return parts, callbacks


def num_pruned(folder: Path) -> tuple[int, int]:
    """Weights in pruned layers, and how many of them are masked, counted in the files."""
    size = masked = 0
    for path in (folder / "masks").iterdir():
        with safe_open(path, "pt") as file:
            layers = json.loads(file.metadata()["lampctl_masks"])["layers"]
            size += sum(about["rows"] * about["cols"] for about in layers.values())
            for name in layers:
                masked += sum(int(byte).bit_count() for byte in file.get_tensor(f"{name}.mask").flatten())
    return size, masked


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "dtype"), MODELS, ids=str)
def test_the_folder_comes_back_to_the_last_byte(family, dtype, kind, tmp_path):
    folder = pruned_folder(tmp_path / "m", family, dtype, **KINDS[kind])
    _, callbacks = packed_again(folder, tmp_path)
    assert not callbacks.warnings


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_unpacked_model_gives_the_same_logits(family, tmp_path):
    folder = pruned_folder(tmp_path / "m", family, torch.bfloat16, bits=4)
    packed_again(folder, tmp_path)
    ids = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto")(ids).logits for path in (folder, tmp_path / "back")
        )
    assert torch.equal(before, after)
    assert bool(before.isfinite().all())


def test_sizes_are_those_of_the_bits(tmp_path):
    sparse = pruned_folder(tmp_path / "a", "llama", torch.bfloat16, share(0.75))
    parts, _ = packed_again(sparse, tmp_path)
    size, masked = num_pruned(sparse)
    assert parts["masks_bytes"] == size / 8
    assert parts["values_bytes"] == 2 * (size - masked)
    assert parts["codes_bytes"] == parts["scales_bytes"] == 0
    assert parts["dense_bytes"] == sum(p.stat().st_size for p in sparse.glob("*.safetensors"))

    (tmp_path / "b-4").mkdir()
    quantized = pruned_folder(tmp_path / "b-4" / "m", "llama", torch.bfloat16, share(0.75), bits=3)
    parts, _ = packed_again(quantized, tmp_path / "b-4")
    rows = sum(t.shape[0] for p in (quantized / "masks").iterdir() for n, t in load_file(p).items() if "scale" in n)
    num_layers = len(read_layers(tmp_path / "b-4" / "small"))
    # Each layer's codes end with a whole byte.
    assert 0 <= parts["codes_bytes"] - 3 * (size - masked) / 8 < num_layers
    assert parts["values_bytes"] == 0
    assert parts["scales_bytes"] == 5 * rows


def read_layers(packed: Path):
    with open_packed(packed) as file:
        return read_contents(file).layers


def test_a_mask_that_costs_more_than_it_saves_is_not_stored(tmp_path):
    """At one bit a weight a mask pays from 1/16 of 16-bit weights on."""
    below, above = (
        pruned_folder(tmp_path / name, "llama", torch.float16, share(s)) for name, s in (("b", 0.05), ("a", 0.08))
    )
    for folder, form in ((below, ("zeros", False)), (above, ("stored", True))):
        pack(folder, tmp_path / f"{folder.name}-small", QUIET)
        assert {(layer.mask, layer.kept_only) for layer in read_layers(tmp_path / f"{folder.name}-small")} == {form}
    assert packed_sizes(tmp_path / "b-small").masks_bytes == 0


def odd_values(key, weight, mask):
    """NaN of two kinds, infinity and both zeros among the kept weights."""
    kept = (~mask).nonzero()[:5]
    odd = torch.tensor([float("nan"), -float("nan"), float("inf"), -0.0, 0.0])
    for (row, col), value in zip(kept.tolist(), odd, strict=True):
        weight[row, col] = value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.02, 0.7])
def test_nan_and_negative_zero_survive(dtype, sparsity, tmp_path):
    folder = pruned_folder(tmp_path / "m", "llama", dtype, share(sparsity), change=odd_values)
    packed_again(folder, tmp_path)
    assert any(
        bool(t.isnan().any()) for t in load_file(tmp_path / "back" / "model-00001-of-00004.safetensors").values()
    )


def test_a_masked_weight_that_is_not_plus_zero_keeps_its_bits(tmp_path):
    def negative(key, weight, mask):
        if key.endswith("q_proj.weight"):
            weight[mask] = -0.0

    folder = pruned_folder(tmp_path / "m", "llama", torch.float16, change=negative)
    packed_again(folder, tmp_path)
    layers = read_layers(tmp_path / "small")
    plain = [layer.weight.rsplit(".", 2)[-2] for layer in layers if layer.form.is_plain]
    assert plain == ["q_proj"] * 3


def test_a_weight_beside_its_grid_is_stored_by_its_value_with_a_warning(tmp_path):
    def move(key, weight, mask):
        if key.endswith("0.mlp.up_proj.weight"):
            row, col = (~mask).nonzero()[0].tolist()
            weight[row, col] *= 1.03
        if key.endswith("1.mlp.up_proj.weight"):
            weight[(weight == 0) & ~mask] = -0.0  # a point of the grid, but not its bits

    folder = pruned_folder(tmp_path / "m", "llama", torch.float16, bits=4, change=move)
    _, callbacks = packed_again(folder, tmp_path)
    moved = [layer.weight for layer in read_layers(tmp_path / "small") if layer.holds == "values"]
    assert [name.partition(":")[2] for name in moved] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert len(callbacks.warnings) == 2
    assert "model.layers.0.mlp.up_proj.weight is not on its grid" in callbacks.warnings[0]


def test_a_packed_file_is_safetensors_and_the_same_every_time(tmp_path):
    folder = pruned_folder(tmp_path / "m", "llama", torch.bfloat16, bits=4)
    pack(folder, tmp_path / "one", QUIET)
    pack(folder, tmp_path / "two", QUIET)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    embedding = load_file(folder / "model-00004-of-00004.safetensors")["model.embed_tokens.weight"]
    with safe_open(tmp_path / "one", "pt") as file:
        assert torch.equal(file.get_tensor("model-00004-of-00004.safetensors:model.embed_tokens.weight"), embedding)
        names = file.keys()  # of a file, which is no dictionary
        for name in names:
            file.get_tensor(name)


def test_other_files_and_folders_come_back_and_hidden_ones_do_not(tmp_path):
    folder = pruned_folder(tmp_path / "m")
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "more" / "deep" / "empty.txt").touch()
    (folder / "more" / "data.bin").write_bytes(bytes(range(256)))
    save_file({"weird:name": torch.zeros(0, 3), "scalar": torch.tensor(3)}, folder / "more" / "x.safetensors")
    packed_again(folder, tmp_path)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    pack(folder, tmp_path / "small2", QUIET)
    unpack(tmp_path / "small2", tmp_path / "back2", QUIET)
    assert contents_of(tmp_path / "back2") == contents_of(tmp_path / "back")


@pytest.fixture
def small(tmp_path):
    pack(pruned_folder(tmp_path / "m", "llama", torch.float16, bits=4), tmp_path / "small", QUIET)
    return tmp_path / "small"


@pytest.mark.parametrize(
    "entry",
    [
        "model-00002-of-00004.safetensors:model.layers.1.mlp.up_proj.weight::codes",
        "model-00002-of-00004.safetensors:model.layers.1.input_layernorm.weight",
        "model-00002-of-00004.safetensors::head",
        "masks/block-00001.safetensors:model.layers.1.mlp.up_proj.mask",
        "masks/block-00001.safetensors:model.layers.1.mlp.up_proj.scale",
        "masks/block-00001.safetensors:model.layers.1.mlp.up_proj.zero",
        "tokenizer.json::bytes",
        "::contents",
    ],
)
def test_one_flipped_bit_is_noticed(entry, small, tmp_path):
    with TensorFile(small) as file:
        place = file.entries[entry].start + file.entries[entry].size_bytes // 2
    data = bytearray(small.read_bytes())
    data[place] ^= 0x40
    small.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"small .*pack the model again"):
        unpack(small, tmp_path / "back", QUIET)


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_a_file_cut_short_is_damaged(keep, small, tmp_path):
    data = small.read_bytes()
    small.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DamagedFileError, match="is damaged"):
        unpack(small, tmp_path / "back", QUIET)
    assert not (tmp_path / "back").exists()


def test_what_is_no_packed_file_or_a_newer_one_is_refused(small, tmp_path):
    for name, contents in (("text", b"hello, world" * 9), ("short", b"x"), ("none", b"")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UsageError, match="is no packed model"):
            unpack(tmp_path / name, tmp_path / "back", QUIET)
    with pytest.raises(UsageError, match="is no packed model"):
        unpack(tmp_path / "m" / "model-00001-of-00004.safetensors", tmp_path / "back", QUIET)
    with pytest.raises(UsageError, match="no such file"):
        unpack(tmp_path / "gone", tmp_path / "back", QUIET)
    data = small.read_bytes()
    small.write_bytes(data.replace(b'"version":"1"', b'"version":"2"', 1))
    with pytest.raises(UsageError, match=r"newer lampctl .format 2"):
        unpack(small, tmp_path / "back", QUIET)


def test_a_filled_target_is_left_alone(small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for target in ("full", "file"):
        with pytest.raises(UsageError, match="name a new one"):
            unpack(small, tmp_path / target, QUIET)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "hollow").mkdir()
    unpack(small, tmp_path / "hollow", QUIET)
    assert (tmp_path / "hollow" / "config.json").exists()


@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "a/../../outside", ""])
def test_a_forged_path_does_not_lead_out_of_the_folder(path, tmp_path):
    contents = json.dumps({"files": [{"path": path, "size": 0, "sha256": ""}], "layers": []}).encode()
    header = json.dumps(
        {
            "__metadata__": {"format": "lampctl-packed", "version": "1"},
            "::contents": {"dtype": "U8", "shape": [len(contents)], "data_offsets": [0, len(contents)]},
        }
    ).encode()
    (tmp_path / "forged").write_bytes(struct.pack("<Q", len(header)) + header + contents)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DamagedFileError, match="not safe to unpack"):
        unpack(tmp_path / "forged", tmp_path / "back", QUIET)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_packed_says_why(tmp_path):
    folder = pruned_folder(tmp_path / "m")
    with pytest.raises(FileExistsError):
        pack(folder, folder / "config.json", QUIET)
    shard = (folder / "model-00003-of-00004.safetensors").read_bytes()
    (folder / "model-00003-of-00004.safetensors").write_bytes(shard[:-4])
    with pytest.raises(ResourceError, match=r"model-00003-of-00004.safetensors cannot be read"):
        pack(folder, tmp_path / "s1", QUIET)
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(UsageError, match=r"a mask for model.layers.2.* no such weight"):
        pack(folder, tmp_path / "s2", QUIET)
    for path in (folder / "masks").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="has no masks/"):
        pack(folder, tmp_path / "s3", QUIET)
    with pytest.raises(UsageError, match=r"no config.json"):
        pack(folder / "masks", tmp_path / "s4", QUIET)


def test_masks_of_another_model_are_refused(tmp_path):
    folder, other = pruned_folder(tmp_path / "m"), pruned_folder(tmp_path / "o", "llama-gqa")
    (folder / "masks" / "block-00000.safetensors").write_bytes(
        (other / "masks" / "block-00000.safetensors").read_bytes()
    )
    with pytest.raises(UsageError, match=r"its mask \(16, 32\).*not of this model"):
        pack(folder, tmp_path / "small", QUIET)


def test_progress_is_told_and_a_stop_is_heard(small, tmp_path):
    class Stop(Exception):
        pass

    class Callbacks(NullCallbacks):
        def __init__(self, stop_at):
            super().__init__()
            self.seen, self.stop_at = [], stop_at

        def report(self, done, total, unit, **figures):
            self.seen.append((done, total))

        def check_stop(self):
            if len(self.seen) == self.stop_at:
                raise Stop

    num_files = len(contents_of(tmp_path / "m"))
    for name, work, source in (("packed", pack, tmp_path / "m"), ("unpacked", unpack, small)):
        whole = Callbacks(None)
        work(source, tmp_path / name, FormatContext(whole, open_new))
        assert whole.seen == [(i + 1, num_files) for i in range(num_files)]
        with pytest.raises(Stop):
            work(source, tmp_path / f"part-{name}", FormatContext(Callbacks(2), open_new))
