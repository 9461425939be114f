"""Families that the census expects to be refused, each by a message; and those that it does not take."""

from __future__ import annotations

from tests.census.configuration import WORKS, Kind, Verdict

_ENCODER = Verdict("refused", "each token sees those after it: this is an encoder", "an encoder")
_ENCODER_DECODER = Verdict("refused", "no decoder-only language model", "an encoder-decoder")
_SHARES = Verdict("refused", "are one weight", "blocks share weights")
_VERDICTS = {
    "cpmant": Verdict("refused", "a hidden state of an unknown shape", "it puts a prompt before the text"),
    "xlm": Verdict(
        "refused", "changes the hidden state between block 0 and block 1", "its loop is a part of its blocks"
    ),
    "xlnet": Verdict("refused", r"only \d+% of the matrix weights", "attention without linear layers"),
    "dory": Verdict("refused", "not each of them once", "blocks run several times"),
    "hrm_text": Verdict("refused", "has no list of 24 blocks", "two stacks of blocks, each run several times"),
    "trocr": Verdict("refused", "reads the output of an encoder", "half of an encoder-decoder"),
    "zamba": _SHARES,
    "zamba2": _SHARES,
    "jetmoe": Verdict(
        "refused", r"only \d+% of the matrix weights .* in a JetMoeParallelExperts", "attention is a mixture of experts"
    ),
    "reformer": Verdict("refused", "cannot be run one by one", "blocks take two hidden states"),
    "longcat_flash": Verdict("refused", "has no list of 4 blocks", "two layers of attention in a block"),
    "hy_v4": Verdict("refused", "indices from a previous full indexer", "blocks read indices of earlier ones"),
    "zaya": Verdict(
        "refused",
        "reads what an earlier block returned beside its hidden state",
        "routers read those of earlier blocks",
    ),
    "inkling2_loop_text": Verdict(
        "refused", "stored in a form that cannot be read", "blocks run several times, weights in another form"
    ),
    "siglip-vision": Verdict(
        "refused", "no decoder-only language model", "an image encoder that lampctl does not know"
    ),
    "gpt_oss": Verdict("works", reason="in bfloat16; the published mxfp4 form is refused"),
}
_VERDICTS_OF_KINDS: dict[Kind, Verdict] = {"encoder": _ENCODER, "encoder-decoder": _ENCODER_DECODER}
# Types of causal language models in transformers that are no configuration of the census, and why.
_TOWER_IS_TAKEN = "multimodal: the census takes its text tower"
_MORE_THAN_TEXT = "the text alone is no input for it"
NOT_TAKEN = {
    **dict.fromkeys(
        ("dots3_note", "gemma3n", "gemma4_unified", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _TOWER_IS_TAKEN
    ),
    **dict.fromkeys(
        (
            "emu3",
            "fuyu",
            "git",
            "got_ocr2",
            "mllama",
            "moshi",
            "moss_transcribe_diarize",
            "musicgen",
            "musicgen_melody",
            "phi4_multimodal",
            "whisper",
        ),
        _MORE_THAN_TEXT,
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, whose states it reads"
    ),
    "blt": "reads bytes in patches, by three stacks of blocks",
}


def verdict_of(name: str, kind: Kind) -> Verdict:
    """What the census expects of a configuration."""
    return _VERDICTS.get(name, _VERDICTS_OF_KINDS.get(kind, WORKS))
