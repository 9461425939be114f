"""Quantized folders: dequantized once, to the weights that the definition of each format gives; others are refused."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.errors import UsageError
from stages.formats.checkpoint_files import WeightFiles
from stages.models.quantized.compressed_tensors import CompressedTensors
from stages.models.registry import open_model
from stages.models.resolve import resolve
from tests import small_models

pytestmark = pytest.mark.long  # seconds of tokenizing, conversion or pruning

E4M3 = torch.float8_e4m3fn


def quantized(folder, code, settings):
    """A small Llama whose matrices in blocks are replaced by the tensors that `code(matrix)` names."""
    small_models.save(folder, "llama-gqa")
    dense, stored = load_file(folder / "model.safetensors"), {}
    expected = dict(dense)
    for name, tensor in dense.items():
        if tensor.ndim == 2 and "layers." in name:
            tensors, expected[name] = code(tensor)
            stored |= {name.removesuffix("weight") + part: value for part, value in tensors.items()}
            stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        else:
            stored[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    edit(folder, quantization_config=settings)
    return expected


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32", **changes}))


def fp8_blocks(matrix, block=(5, 7), scale_dtype=torch.float32):
    """Each block by its own scale; the last blocks are smaller."""
    grid = [math.ceil(size / side) for size, side in zip(matrix.shape, block, strict=True)]
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(0)).add(0.01)
    if scale_dtype == torch.uint8:  # exponents
        exponents = torch.randint(118, 130, grid, generator=torch.Generator().manual_seed(0))
        scales, kept = torch.pow(2.0, exponents - 127), exponents.to(torch.uint8)
    else:
        scales = scales.to(scale_dtype).float()
        kept = scales.to(scale_dtype)
    rows, cols = matrix.shape
    scale = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    codes = (matrix / scale).clamp(-448, 448).to(E4M3)
    return {"weight": codes, "weight_scale_inv": kept}, codes.float() * scale


def fp8_rows(matrix):
    scales = matrix.abs().amax(1, keepdim=True).div(448).bfloat16()
    codes = (matrix / scales.float()).clamp(-448, 448).to(E4M3)
    return {"weight": codes, "weight_scale": scales}, codes.double().mul(scales.double()).float()


def int8_rows(matrix):
    scales, zeros = matrix.abs().amax(1, keepdim=True).div(100), torch.full((len(matrix), 1), 3, dtype=torch.int8)
    codes = torch.round(matrix / scales + 3).to(torch.int8)
    tensors = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros}
    return tensors, ((codes.double() - 3) * scales.double()).float()


def words_of(numbers, bits):
    """Rows of unsigned numbers in 32-bit words, the first in the lowest bits."""
    count, packed = 32 // bits, []
    for row in numbers.tolist():
        row = row + [0] * (-len(row) % count)
        groups = (row[start : start + count] for start in range(0, len(row), count))
        packed.append([sum(number << (bits * place) for place, number in enumerate(group)) for group in groups])
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in packed]).to(torch.int32)


def groups_of(matrix, bits, group):
    """Codes (R, C), zero points and scales (R, groups) of an asymmetric grid, and the weight that they stand for."""
    rows, cols = matrix.shape
    zeros = torch.randint(0, 2**bits, (rows, cols // group), generator=torch.Generator().manual_seed(1))
    scales = matrix.abs().reshape(rows, -1, group).amax(2).div(2 ** (bits - 1)).half().float() + 2**-10
    scale, zero = scales.repeat_interleave(group, 1), zeros.repeat_interleave(group, 1)
    codes = torch.round(matrix / scale + zero).clamp(0, 2**bits - 1).to(torch.int64)
    return codes, zeros, scales, (codes - zero) * scale


def dense_words_of(numbers, bits):
    """Rows of unsigned numbers in 32-bit words, as one number of many bits for each row: no gaps."""
    packed = []
    for row in numbers.tolist():
        whole = sum(number << (bits * place) for place, number in enumerate(row))
        words = [whole >> (32 * place) & 0xFFFFFFFF for place in range(math.ceil(len(row) * bits / 32))]
        packed.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(packed).to(torch.int32)


def packed_ints(matrix, bits=4, group=8, dense=False):
    codes, zeros, scales, expected = groups_of(matrix, bits, group)
    pack = dense_words_of if dense else words_of
    return {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_zero_point": pack(zeros.T, bits).T,
        "weight_shape": torch.tensor(matrix.shape),
    }, expected


def gptq(matrix, bits=4, group=8, offset=1, order=None):
    codes, zeros, scales, expected = groups_of(matrix, bits, group)
    tensors = {
        "qzeros": words_of((zeros.T - offset) % 2**bits, bits),
        "scales": scales.T,
    }
    cols = matrix.shape[1]
    group_of = torch.arange(cols) // group
    if order is not None:  # activation order: neighbours are of different groups
        shuffled = torch.randperm(cols, generator=torch.Generator().manual_seed(order))
        group_of, codes, expected = group_of[shuffled], codes[:, shuffled], expected[:, shuffled]
        tensors["g_idx"] = group_of.to(torch.int32)
    tensors["qweight"] = words_of(codes, bits).T
    return tensors, expected


def awq(matrix, group=8):
    codes, zeros, scales, expected = groups_of(matrix, 4, group)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: place i of a word holds neighbour order[i]

    def words(numbers):
        turned = torch.stack([numbers[:, start + place] for start in range(0, numbers.shape[1], 8) for place in order])
        return words_of(turned.T, 4)

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T}, expected


def compressed(form, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


CASES = {
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [5, 7]}),
    "fp8-ue8m0": (
        lambda matrix: fp8_blocks(matrix, (8, 8), torch.uint8),
        {"quant_method": "fp8", "weight_block_size": [8, 8], "scale_fmt": "ue8m0"},
    ),
    "fp8-one-scale": (
        lambda matrix: fp8_blocks(matrix, tuple(matrix.shape)),
        {"quant_method": "fp8", "weight_block_size": None},
    ),
    "compressed-fp8-rows": (fp8_rows, compressed("float-quantized")),
    "compressed-fp8-blocks": (
        lambda matrix: (lambda t, e: ({"weight": t["weight"], "weight_scale": t["weight_scale_inv"]}, e))(
            *fp8_blocks(matrix)
        ),
        compressed("float-quantized", strategy="block", block_structure=[5, 7]),
    ),
    "compressed-int8": (int8_rows, compressed("int-quantized")),
    "compressed-fp8-blocks-as-text": (
        lambda matrix: (lambda t, e: ({"weight": t["weight"], "weight_scale": t["weight_scale_inv"]}, e))(
            *fp8_blocks(matrix)
        ),
        compressed("float-quantized", strategy="block", block_structure="5x7"),
    ),
    "compressed-packed-4": (packed_ints, compressed("pack-quantized", num_bits=4, group_size=8)),
    "compressed-packed-8": (
        lambda matrix: packed_ints(matrix, 8),
        compressed("pack-quantized", num_bits=8, strategy="group", group_size=8),
    ),
    **{
        f"compressed-packed-{bits}-{'without' if dense else 'with'}-gaps": (
            functools.partial(packed_ints, bits=bits, group=16, dense=dense),
            {"version": "0.18.0" if dense else "0.17.1", **compressed("pack-quantized", num_bits=bits, group_size=16)},
        )
        for bits in (1, 2, 3, 5, 6, 7)
        for dense in (True, False)
    },
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "gptq-2-v2": (
        lambda matrix: gptq(matrix, 2, 16, 0),
        {"quant_method": "gptq", "bits": 2, "group_size": 16, "checkpoint_format": "gptq_v2"},
    ),
    "gptq-v2-as-GPTQModel-says-it": (
        lambda matrix: gptq(matrix, offset=0),
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "format": "gptq_v2"},
    ),
    "gptq-one-group": (
        lambda matrix: gptq(matrix, group=matrix.shape[1]),
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
    ),
    "gptq-8-activation-order": (
        lambda matrix: gptq(matrix, 8, 8, 1, order=3),
        {"quant_method": "gptq", "bits": 8, "group_size": 8, "desc_act": True},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
}


@pytest.mark.parametrize("case", CASES)
def test_quantized_folders_become_the_weights_that_their_format_defines(tmp_path, case):
    code, settings = CASES[case]
    expected = quantized(tmp_path / "m", code, settings)
    found = resolve(str(tmp_path / "m"))
    weights = WeightFiles(found.path)
    assert set(weights.keys) == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights.load(name), tensor), name
    assert "quantization_config" not in json.loads((found.path / "config.json").read_text())
    assert (found.name, found.source) == (str(tmp_path / "m"), "folder")
    assert open_model(found).num_blocks == 3
    before = (found.path / "model-00000.safetensors").stat().st_mtime_ns
    assert resolve(str(tmp_path / "m")).path == found.path
    assert (found.path / "model-00000.safetensors").stat().st_mtime_ns == before, "it is dequantized once"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_gives_the_weights_that_transformers_gives(tmp_path, dtype):
    quantized(tmp_path / "m", lambda m: fp8_blocks(m, (8, 8)), {"quant_method": "fp8", "weight_block_size": [8, 8]})
    edit(tmp_path / "m", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=getattr(torch, dtype)).state_dict()
    weights = WeightFiles(resolve(str(tmp_path / "m")).path)
    names = [name for name in weights.keys if "layers." in name and weights.load(name).ndim == 2]
    assert len(names) == 21
    for name in names:
        assert torch.equal(weights.load(name), theirs[name]), name


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantized by bitsandbytes, and only fp8"),
        ({"load_in_4bit": True}, "is quantized by bitsandbytes"),
        ({"quant_method": "mxfp4"}, r"is quantized by mxfp4, and only .*save a plain copy where transformers can"),
        ({"quant_method": "gptq", "bits": 3}, "quantized by gptq with bits 3 are not read here"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "with the format marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "with the version gemv"),
        (compressed("nvfp4-pack-quantized"), "with the format nvfp4-pack-quantized"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "with expert_dtype fp4"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "is no size of blocks"),
        (compressed("pack-quantized") | {"config_groups": {"a": 1}}, "cannot be read"),
        ({"quant_method": "fp8"}, "its files hold no weight of that kind"),
        ({"quant_method": ["fp8"]}, r"quant_method \['fp8'\] in its config.json is no name"),
        (["fp8"], "quantization_config of its config.json is list, no mapping"),
        ({"quant_method": "gptq", "bits": 4, "format": "marlin"}, "with the format marlin"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "with the format marlin"),
        (
            {"quant_method": "gptq", "bits": 4, "format": "gptq_v2", "checkpoint_format": "gptq"},
            r"names several formats \(gptq, gptq_v2\)",
        ),
        *(
            ({"quant_method": method, "bits": 4, "group_size": size}, f"group_size {size!r} in its quantization_config")
            for method, size in (("gptq", "16"), ("gptq", 0), ("gptq", -2), ("gptq", True), ("awq", 8.0))
        ),
        *(
            (compressed("float-quantized", strategy="block", block_structure=size), "block_structure .* is no size")
            for size in ([0, 16], "16", "16x0", [16], "axb", 16, [True, True])
        ),
        (compressed("pack-quantized", num_bits=4, strategy="group", group_size="8"), "group_size '8'"),
        (compressed("pack-quantized", num_bits=9), "with num_bits 9"),
        (compressed("int-quantized", strategy="token"), "one scale for each 'token'"),
    ],
)
def test_other_quantized_models_are_refused_by_name(lampctl, tmp_path, settings, says):
    small_models.save(tmp_path / "m", "llama-gqa")
    edit(tmp_path / "m", quantization_config=settings)
    with pytest.raises(UsageError, match=says):
        resolve(str(tmp_path / "m"))
    answer = lampctl("run", tmp_path / "m", "--sparsity", "0.5", "--run-dir", tmp_path / "run")
    assert answer.code == 2
    assert not (tmp_path / "run").exists()


def change(part, to):
    """What to do with the tensors of a folder: `to` for each one with this last part of its name."""
    return lambda stored: {n: to(t) if n.endswith(f".{part}") else t for n, t in stored.items()}


def drop(part):
    return lambda stored: {name: tensor for name, tensor in stored.items() if not name.endswith(f".{part}")}


UNFIT = {
    "scales of another shape": ("fp8", change("weight_scale_inv", lambda t: torch.ones(11, 13)), r"\(1[13] scales for"),
    "no scales": ("fp8", change("weight_scale_inv", lambda t: torch.zeros(0)), "0 scales for"),
    "no rows of scales": ("fp8", change("weight_scale_inv", lambda t: t[:0]), "0 scales for"),
    "whole numbers as scales": (
        "fp8",
        change("weight_scale_inv", lambda t: t.to(torch.int64)),
        "scales in torch.int64",
    ),
    "blocks of 5, scales of 6": ("fp8", change("weight_scale_inv", lambda t: t[:1]), "1 scales for"),
    "no rows of blocks": ("compressed-fp8-blocks", change("weight_scale", lambda t: t[:0]), r"0 by \d+ scales"),
    "half of the groups": ("gptq", change("scales", lambda t: t[::2].contiguous()), "their shapes are"),
    "half of both": (
        "gptq",
        lambda stored: change("scales", lambda t: t[::2])(change("qzeros", lambda t: t[::2])(stored)),
        "group_size 8 gives . groups of .. inputs, not",
    ),
    "AWQ, half of both": (
        "awq",
        lambda stored: change("scales", lambda t: t[::2])(change("qzeros", lambda t: t[::2])(stored)),
        "group_size 8 gives . groups of .. inputs, not",
    ),
    "no zero points": ("gptq", drop("qzeros"), "'qzeros' is missing"),
    "codes as floating point": ("gptq", change("qweight", lambda t: t.float()), "not words of 32 bits"),
    "a group before the first": ("gptq-8-activation-order", change("g_idx", lambda t: t - 1), "names the groups -1 to"),
    "a group after the last": ("gptq-8-activation-order", change("g_idx", lambda t: t + 1), "names the groups 1 to"),
    "groups as floating point": (
        "gptq-8-activation-order",
        change("g_idx", lambda t: t.float()),
        "g_idx in torch.float32",
    ),
    "too few groups named": ("gptq-8-activation-order", change("g_idx", lambda t: t[1:]), "g_idx of shape"),
    "a shape of other rows": (
        "compressed-packed-4",
        change("weight_shape", lambda t: t + 1),
        "packed numbers of shape",
    ),
    "other packed words": ("compressed-packed-4", change("weight_packed", lambda t: t[:, 1:]), "words for .. columns"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_do_not_go_together_are_named_before_any_work(tmp_path, monkeypatch, case):
    name, spoil, says = UNFIT[case]
    quantized(tmp_path / "m", *CASES[name])
    spoiled = {n: t.contiguous() for n, t in spoil(load_file(tmp_path / "m" / "model.safetensors")).items()}
    save_file(spoiled, tmp_path / "m" / "model.safetensors")
    monkeypatch.setattr("stages.models.quantized.folder._write", None)  # nothing is dequantized
    with pytest.raises(UsageError, match=f"cannot be dequantized .*{says}"):
        resolve(str(tmp_path / "m"))


def test_an_fp8_weight_without_a_scale_is_named(tmp_path):
    quantized(tmp_path / "m", *CASES["fp8"])
    stored = drop("weight_scale_inv")(load_file(tmp_path / "m" / "model.safetensors"))
    save_file(stored, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UsageError, match="is stored in FP8 without a scale"):
        resolve(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("version", "dense"),
    [("0.17.1", False), ("0.9.4", False), ("0.18.0", True), ("1.0", True), ("0.15.0.1", False)]
    + [(version, None) for version in (None, "0.17.2a20260615", 18, "new")],
)
def test_the_release_tells_the_packing_where_the_words_do_not(version, dense):
    matrix = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    found = CompressedTensors.of({"version": version, **compressed("pack-quantized", num_bits=5, group_size=4)})
    forms = {form: packed_ints(matrix, 5, 4, form) for form in (False, True)}
    words = [tensors["weight_packed"] for tensors, _ in forms.values()]
    assert words[0].shape == words[1].shape == (3, 2)
    assert not torch.equal(*words)
    if dense is None:
        with pytest.raises(ValueError, match="depends on the release of compressed-tensors"):
            found.dense(forms[True][0])
    else:
        tensors, expected = forms[dense]
        assert torch.equal(found.dense(tensors), expected)


def test_an_fp8_model_is_pruned_and_exported_as_a_plain_one(lampctl, tmp_path):
    expected = quantized(tmp_path / "m", *CASES["fp8"])
    flags = ("--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir", "run")
    answer = lampctl("run", tmp_path / "m", *flags)
    assert answer.code == 0, answer.err
    theirs, said = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(said[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    found = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"]
    kept = found != 0
    assert torch.equal(found[kept], expected["model.layers.1.mlp.up_proj.weight"][kept])
