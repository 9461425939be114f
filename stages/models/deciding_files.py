"""Which files of a model folder decide what the model computes: a run resumes only where they are the same."""

from __future__ import annotations

from collections.abc import Mapping

_DECIDING = {
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
}
# Runs that were begun earlier did not record these.
_RECORDED_LATER = {
    *("tekken.json", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
}


def decides(name: str, *, trusts_code: bool) -> bool:
    """Whether a file of a model folder decides what the model computes. trusts_code: its Python code may be run."""
    is_code = trusts_code and name.endswith(".py")
    return name in _DECIDING or name.endswith(".safetensors") or is_code or _is_recorded_later(name)


def changed_files(recorded: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """Names of the deciding files that are not as a run recorded them: changed, gone or new.

    A file of a kind that earlier versions did not record is no difference where the record lacks it.

    Args:
        recorded: Digests by name, when the run began.
        found: Digests by name, now.
    """
    names = {name for name in {**recorded, **found} if recorded.get(name) != found.get(name)}
    return sorted(name for name in names if name in recorded or not _is_recorded_later(name))


def _is_recorded_later(name: str) -> bool:
    return name in _RECORDED_LATER or name.endswith(".tiktoken")
