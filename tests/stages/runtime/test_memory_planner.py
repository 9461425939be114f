"""The memory planner: estimates before a run, choices that keep a limit, and refusals with numbers."""

from dataclasses import replace

import pytest
import torch

from stages.errors import ResourceError
from stages.models.base import LayerInfo
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.pruners.registry import PRUNERS
from stages.runtime.memory_estimate import (
    Shapes,
    Work,
    distillation,
    generation,
    least_room,
    peaks,
    statistics_room,
)
from stages.runtime.memory_planner import Room, fit
from tests.small_models import save

LAMP = Work(PRUNERS.get("sparsegpt"), trains=True, is_quantized=False, eval_tokens=2048)
GB = 10**9


def opt_6_7b(tokens=2048):
    width, inner = 4096, 16384
    sizes = [("q_proj", "q", width, width), ("k_proj", "k", width, width), ("v_proj", "v", width, width)]
    sizes += [("out_proj", "out", width, width), ("fc1", "fc1", inner, width), ("fc2", "fc2", width, inner)]
    layers = tuple(LayerInfo(f"b.{path}", path, role, rows, cols, False) for path, role, rows, cols in sizes)
    return Shapes(sum(x.rows * x.cols for x in layers), layers, width, 50272, tokens, 4, outside=50272 * width)


def test_a_trained_block_takes_five_copies_with_its_gradient_and_four_if_the_best_is_on_the_disk():
    shapes = opt_6_7b(tokens=16)
    block = 4 * shapes.block
    kept, spilt = (peaks(shapes, LAMP, 1, spills=spills)["training"] for spills in (False, True))
    assert kept - spilt == pytest.approx(1.05 * block, rel=1e-6)
    assert 5 * block < kept < 6 * block


def test_layers_that_read_one_input_share_a_hessian():
    shapes = opt_6_7b()
    assert sorted(len(group) for group in shapes.inputs.values()) == [1, 1, 1, 3]


def test_alps_takes_more_than_sparsegpt_and_magnitude_least():
    taken = {
        pruner: peaks(opt_6_7b(), Work(PRUNERS.get(pruner), False, False, 0), 1, spills=False)["prune-block"]
        for pruner in ("magnitude", "wanda", "sparsegpt", "alps")
    }
    assert taken["magnitude"] < taken["wanda"] < taken["sparsegpt"] < taken["alps"]


def test_more_samples_at_once_take_more_and_the_most_that_fit_are_taken():
    shapes, work = opt_6_7b(), Work(PRUNERS.get("wanda"), False, False, 0)
    taken = [max(peaks(shapes, work, samples, spills=False).values()) for samples in (1, 2, 4)]
    assert taken == sorted(set(taken))
    assert fit(shapes, work, GB, Room(10**15), [1, 2, 4]).samples_at_once == 4
    chosen = fit(shapes, work, GB, Room(0, GB + taken[1]), [1, 2, 4])
    assert chosen.samples_at_once == 2
    assert chosen.peak_bytes <= GB + taken[1]
    assert not chosen.spills


def test_the_best_weights_go_to_the_disk_only_where_nothing_else_helps():
    shapes = opt_6_7b()
    found = {spills: max(peaks(shapes, LAMP, 1, spills=spills).values()) for spills in (False, True)}
    assert not fit(shapes, LAMP, 0, Room(0, found[False]), [1, 2]).spills
    assert fit(shapes, LAMP, 0, Room(0, found[False] - 1), [1, 2]).spills


def test_a_limit_that_cannot_be_kept_is_refused_with_the_smallest_that_can():
    shapes = opt_6_7b()
    with pytest.raises(ResourceError, match=r"--memory-limit 1\.00GB is too little: this run needs") as refused:
        fit(shapes, LAMP, GB // 2, Room(0, GB), [1, 2])
    smallest = float(str(refused.value).split("needs ")[1].split("GB")[0])
    assert fit(shapes, LAMP, GB // 2, Room(0, int(smallest * GB)), [1, 2]).spills
    with pytest.raises(ResourceError):
        fit(shapes, LAMP, GB // 2, Room(0, int((smallest - 0.1) * GB)), [1, 2])
    # What the process holds by then may be a little more.
    assert fit(shapes, LAMP, int(0.57 * GB), Room(0, int(smallest * GB)), [1, 2]).spills


def mixture(num_experts, per_token):
    width, inner = 1024, 512
    sizes = [("gate_proj", "gate", inner, width), ("up_proj", "up", inner, width), ("down_proj", "fc2", width, inner)]
    layers = tuple(
        LayerInfo(f"b.{n}.{p}", f"experts.{n}.{p}", role, r, c, False, f"experts.*.{p}", per_token / num_experts)
        for n in range(num_experts)
        for p, role, r, c in sizes
    )
    return Shapes(sum(x.rows * x.cols for x in layers), layers, width, 50272, 2048, 4)


def test_every_expert_has_statistics_of_its_own_and_only_those_of_a_token_keep_its_activations():
    work = Work(PRUNERS.get("sparsegpt"), False, False, 0)
    few, many = mixture(8, 2), mixture(16, 2)
    assert len(many.inputs) == 2 * 16
    more = peaks(many, work, 1, spills=False)["prune-block"] - peaks(few, work, 1, spills=False)["prune-block"]
    hessians, weights = 4 * 8 * (1024**2 + 512**2), 4 * 8 * 3 * 1024 * 512
    assert more >= hessians + weights
    assert many.remembered() == few.remembered() < mixture(8, 8).remembered()


def prune_peak(shapes, work, **rest):
    return peaks(shapes, work, 1, spills=False, **rest)["prune-block"]


def test_statistics_that_do_not_fit_get_the_room_that_is_left():
    shapes, work = mixture(64, 2), Work(PRUNERS.get("sparsegpt"), False, False, 0)
    one_pass, least = prune_peak(shapes, work), least_room(shapes, work)
    assert least == 2 * 4 * 1024**2  # the Hessian of gate and up of one expert, and the sum over all experts
    fewest = prune_peak(shapes, work, room_bytes=least)
    assert fewest < one_pass
    assert statistics_room(shapes, work, 1, None) is None
    assert statistics_room(shapes, work, 1, one_pass) is None
    for left in (one_pass - 1, (one_pass + fewest) // 2, fewest + 10):
        room = statistics_room(shapes, work, 1, left)
        assert least <= room < 64 * 4 * (1024**2 + 512**2)
        assert prune_peak(shapes, work, room_bytes=room) == pytest.approx(left, abs=2)


def test_a_limit_that_one_pass_would_exceed_is_kept_by_several_without_a_smaller_micro_batch():
    shapes, work = mixture(64, 2), Work(PRUNERS.get("sparsegpt"), False, False, 0)
    one_pass = max(peaks(shapes, work, 2, spills=False).values())
    plenty, tight = (fit(shapes, work, GB, Room(0, GB + left), [1, 2]) for left in (one_pass, one_pass - 1))
    assert (plenty.samples_at_once, plenty.spills) == (tight.samples_at_once, tight.spills) == (2, False)
    assert (plenty.left_bytes, tight.left_bytes) == (one_pass, one_pass - 1)
    assert plenty.peak_bytes == GB + one_pass
    assert tight.peak_bytes <= GB + one_pass - 1
    assert statistics_room(shapes, work, 2, plenty.left_bytes) is None
    assert statistics_room(shapes, work, 2, tight.left_bytes) is not None


@pytest.mark.parametrize("shapes", [mixture(64, 2), opt_6_7b()], ids=["experts", "dense"])
def test_only_a_limit_below_the_statistics_of_one_layer_is_refused(shapes):
    work = Work(PRUNERS.get("sparsegpt"), False, False, 0)
    fewest = prune_peak(shapes, work, room_bytes=least_room(shapes, work))
    assert fewest <= prune_peak(shapes, work)
    assert fit(shapes, work, 0, Room(0, fewest), [1]).peak_bytes <= fewest
    with pytest.raises(ResourceError, match="prune-block") as refused:
        fit(shapes, work, 0, Room(0, fewest - 1), [1])
    smallest = float(str(refused.value).split("needs ")[1].split("GB")[0]) * GB
    assert fewest <= smallest < fewest + 20_000_000


def test_a_pruner_without_statistics_needs_no_passes():
    shapes, work = mixture(8, 2), Work(PRUNERS.get("magnitude"), False, False, 0)
    assert least_room(shapes, work) == 0
    assert prune_peak(shapes, work) <= prune_peak(shapes, work, room_bytes=0)


def deep(num_blocks):
    shapes = opt_6_7b()
    return replace(shapes, num_blocks=num_blocks, all_blocks=num_blocks * shapes.block)


DISTILLED = replace(LAMP, distills=True, kept=0.3)


def test_distillation_streamed_does_not_grow_with_depth_and_resident_does():
    streamed, resident = (
        [distillation(deep(num), DISTILLED, is_resident=is_resident) for num in (2, 8)] for is_resident in (False, True)
    )
    assert streamed[0] == streamed[1]
    assert resident[0] < resident[1]
    block = 4 * opt_6_7b().block
    assert streamed[0] > 2.6 * block, "weights, gradients, and two moments of the kept 30%"
    assert resident[1] > 8 * 2.6 * block


def test_all_blocks_are_distilled_in_memory_only_where_limit_and_machine_have_room():
    shapes = deep(4)
    needed = int(1.05 * distillation(shapes, DISTILLED, is_resident=True))
    streamed = max(peaks(shapes, DISTILLED, 1, spills=True).values())
    assert streamed < needed

    def is_resident(limit, available):
        return fit(shapes, DISTILLED, 0, Room(available, limit), [1]).distills_resident

    assert is_resident(None, needed)
    assert not is_resident(None, needed - 1)
    assert not is_resident(needed - 1, 10 * needed)
    assert is_resident(needed, 10 * needed)
    assert not fit(shapes, LAMP, 0, Room(10 * needed), [1]).distills_resident


def test_samples_are_generated_with_all_blocks_in_memory_where_they_fit_without_what_trains_them():
    shapes = deep(16)
    work = replace(DISTILLED, num_at_once=8, cache_bytes=1000)
    needed = int(1.05 * generation(shapes, work, is_resident=True))
    assert needed < distillation(shapes, work, is_resident=True)
    found = fit(shapes, work, 0, Room(needed), [1])
    assert (found.generates_resident, found.distills_resident) == (True, False)
    assert found.peak_bytes >= needed
    assert not fit(shapes, work, 0, Room(needed - 1), [1]).generates_resident
    assert not fit(shapes, DISTILLED, 0, Room(100 * needed), [1]).generates_resident


def test_the_end_loss_takes_a_head_more_if_the_export_has_one_in_another_dtype():
    shapes, plain = opt_6_7b(), Work(PRUNERS.get("wanda"), False, False, 0)
    assert "end-loss" not in peaks(shapes, plain, 1, spills=False)
    two, three = (peaks(shapes, replace(plain, num_heads=n), 1, spills=False)["end-loss"] for n in (2, 3))
    assert three - two == pytest.approx(1.05 * 4 * shapes.vocabulary * shapes.hidden, rel=1e-3)


def test_without_a_limit_a_gpu_that_is_too_small_is_refused_and_short_memory_is_told():
    shapes, alps = opt_6_7b(), replace(LAMP, pruner=PRUNERS.get("alps"))
    whole = [max(peaks(shapes, alps, samples, spills=False).values()) for samples in (1, 2)]
    assert fit(shapes, alps, 0, Room(whole[1], is_device=True), [1, 2]).samples_at_once == 2
    assert fit(shapes, alps, 0, Room(whole[1] - 1, is_device=True), [1, 2]).samples_at_once == 1
    with pytest.raises(ResourceError, match=r"this run needs .* of GPU memory .*, and 4\.00GB are free: ") as refused:
        fit(shapes, alps, 0, Room(4 * GB, is_device=True), [1, 2])
    assert "--memory-limit" not in str(refused.value)
    # The micro-batch decides bits: what happens to be free does not decide it, and nothing is refused.
    enough = fit(shapes, alps, 0, Room(whole[1]), [1, 2])
    assert (enough.samples_at_once, enough.spills, enough.shortage) == (2, False, None)
    short = fit(shapes, alps, 0, Room(4 * GB), [1, 2])
    assert (short.samples_at_once, short.spills) == (2, True)
    assert "this run may need" in short.shortage
    assert "4.00GB are free here" in short.shortage


def test_what_is_taken_over_from_another_run_takes_no_memory_here():
    shapes = replace(deep(4), outside=10**6)
    work = replace(DISTILLED, takes_over=True)
    found = peaks(shapes, work, 1, spills=True)
    assert not {"capture", "prune-block", "training"} & found.keys()
    assert found["distill"] == peaks(shapes, DISTILLED, 1, spills=True)["distill"]
    least = max(found.values())
    assert least < max(peaks(shapes, DISTILLED, 1, spills=True).values())
    assert fit(shapes, work, 0, Room(0, least), [1]).peak_bytes == least
    assert statistics_room(shapes, work, 1, least) is None


def test_a_limit_that_a_run_begins_with_holds_in_processes_with_a_larger_baseline():
    shapes = opt_6_7b()
    needed = max(peaks(shapes, LAMP, 1, spills=True).values())
    enough = Room(0, needed + int(1.15 * GB))
    assert fit(shapes, LAMP, GB, enough, [1], is_new=True).spills
    with pytest.raises(ResourceError):
        fit(shapes, LAMP, GB, Room(0, enough.limit_bytes - 1), [1], is_new=True)
    fit(shapes, LAMP, int(1.15 * GB), Room(0, enough.limit_bytes), [1])


@pytest.mark.parametrize("is_tied", [True, False])
def test_ends_are_counted_as_the_model_has_them(tmp_path, is_tied):
    folder = save(tmp_path / "m", "llama-gqa" if is_tied else "llama")
    model = open_model(resolve(str(folder)))
    ends = model.load_ends(torch.device("cpu"), "all")
    numbers = sum(p.numel() for p in ends._model.parameters() if p.device.type != "meta")
    assert model.outside_numbers == Shapes.of(model, 16, 4).outside == numbers
    embedding = model.vocab_size * model.hidden_size
    assert numbers == (1 if is_tied else 2) * embedding + model.hidden_size  # and the final norm
    model.drop_ends()
    assert model._ends is None
    plain = Work(PRUNERS.get("wanda"), False, False, eval_tokens=1)
    shapes = replace(Shapes.of(model, 1, 4), vocabulary=10**6, outside=10**9)
    more = replace(shapes, outside=2 * 10**9)
    ends = [peaks(each, plain, 1, spills=True)["evaluate"] for each in (shapes, more)]
    assert ends[1] - ends[0] == pytest.approx(1.05 * 4 * 10**9, rel=1e-6)


def test_evaluation_holds_the_logits_of_a_slice():
    shapes = replace(opt_6_7b(), vocabulary=262_144)
    short, long = (
        peaks(shapes, Work(PRUNERS.get("wanda"), False, False, eval_tokens=tokens), 1, spills=True)["evaluate"]
        for tokens in (64, 2048)
    )
    assert short == long


def test_a_refusal_offers_to_generate_nothing_where_that_takes_most():
    shapes = opt_6_7b(tokens=16)
    work = replace(DISTILLED, num_at_once=8, cache_bytes=10**9)
    with pytest.raises(ResourceError, match=r"generate no samples \(--distill-generated 0\), which takes .*GB less"):
        fit(shapes, work, 0, Room(0, GB), [1])
    with pytest.raises(ResourceError) as refused:
        fit(shapes, replace(work, cache_bytes=1), 0, Room(0, GB), [1])
    assert "--distill-generated" not in str(refused.value)


def test_a_refusal_names_the_pruner_that_takes_less():
    shapes = opt_6_7b()
    with pytest.raises(ResourceError) as refused:  # where the vocabulary takes most, the pruner changes nothing
        fit(replace(shapes, vocabulary=10**7), replace(LAMP, pruner=PRUNERS.get("alps")), 0, Room(0, GB), [1])
    assert "SparseGPT" not in str(refused.value)
    alps, sparsegpt = (replace(LAMP, pruner=PRUNERS.get(name)) for name in ("alps", "sparsegpt"))
    for room in (Room(0, GB), Room(GB, is_device=True)):
        with pytest.raises(ResourceError, match=r"prune with SparseGPT, which takes \d\.\d\dGB less, or use a smaller"):
            fit(shapes, alps, 0, room, [1])
        with pytest.raises(ResourceError) as refused:
            fit(shapes, sparsegpt, 0, room, [1])
        assert "SparseGPT" not in str(refused.value)
