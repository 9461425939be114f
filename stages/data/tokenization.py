"""Token ids for calibration and evaluation, as the field draws them (SparseGPT's and GPTQ's code)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.data.drawing import Drawing
from stages.data.pieces import Ends, Progress, token_pieces
from stages.data.text_source import TextSource, Use
from stages.errors import UsageError
from stages.machine.hub import reason_of

# After this many documents in a row that are too short, a source is taken to have no long ones.
_MAX_REJECTIONS = 2000


def load_tokenizer(folder: Path, *, trusts_code: bool = False) -> Any:
    """The tokenizer that the model in `folder` ships with; code of its own is run only if that is trusted.

    Raises UsageError if it has none that works.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UsageError(f"{folder} holds no tokenizer that transformers can read ({reason_of(error)})") from error


def tokenize(tokenizer: Any, text: str, progress: Progress | None = None) -> Tensor:
    """Token ids (n,) of one text, with what the tokenizer puts at its head (BOS), once."""
    ends = Ends.of(tokenizer)
    pieces = token_pieces(tokenizer, text, progress)
    return torch.cat([_ids(ends.head), *pieces, _ids(ends.tail)])


def first_tokens(tokenizer: Any, text: str, needed: int) -> Tensor:
    """The first token ids of a text: at least `needed` of them, or all if the text has fewer.

    Reads a long text only as far as needed, if the tokenizer can tokenize it piece by piece.
    """
    ends = Ends.of(tokenizer)
    found, num_found = [_ids(ends.head)], len(ends.head)
    for piece in token_pieces(tokenizer, text):
        found.append(piece)
        num_found += len(piece)
        if num_found >= needed:
            return torch.cat(found)
    return torch.cat([*found, _ids(ends.tail)])


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)


def calibration_tokens(
    source: TextSource, tokenizer: Any, drawing: Drawing, progress: Progress | None = None
) -> Tensor:
    """Token ids (samples, tokens) of a drawing, with BOS where the tokenizer puts it.

    Args:
        source: The data source.
        tokenizer: Makes the tokens.
        drawing: Which samples. "contiguous": windows one after the other from the start; "random": windows anywhere in
            the text, or, where the source is made of documents (C4), one crop of one random document each.
        progress: Called while a long text is tokenized.

    Raises:
        UsageError: The source holds too few tokens; with the numbers.
    """
    num_samples, seqlen, skip = drawing.num_samples, drawing.tokens, drawing.skip
    if drawing.sampling == "random":
        rng = random.Random(drawing.seed)
        if source.has_documents:
            return _draw_from_documents(source, tokenizer, drawing, rng)[skip:]
        tokens = tokenize(tokenizer, source.text("calibration"), progress)
        return _draw_windows(source, tokens, skip + num_samples, seqlen, rng)[skip:]
    needed = (skip + num_samples) * seqlen
    tokens = _first_tokens(source, tokenizer, needed)
    if len(tokens) < needed:
        where = f"after skipping {skip} windows " if skip else ""
        raise UsageError(
            f"{source.name} has {len(tokens):,} tokens; {num_samples} samples of {seqlen} {where}need {needed:,}: "
            f"lower {drawing.flag}{' or --calibration-skip' if skip else ''} or --seqlen, or use more text"
        )
    return tokens[:needed].view(-1, seqlen)[skip:].clone()


def evaluation_tokens(source: TextSource, tokenizer: Any, progress: Progress | None = None) -> Tensor:
    """All token ids (n,) of the evaluation text, tokenized once."""
    return tokenize(tokenizer, source.text("evaluation"), progress)


def _first_tokens(source: TextSource, tokenizer: Any, needed: int) -> Tensor:
    """The first tokens of the calibration text; all of them if it has fewer than are needed."""
    if not source.has_documents:
        return first_tokens(tokenizer, source.text("calibration"), needed)
    num_documents = 256
    while True:
        tokens = first_tokens(tokenizer, source.text("calibration", num_documents), needed)
        if len(tokens) >= needed or num_documents >= len(source.documents("calibration")):
            return tokens
        num_documents *= 2


def _draw_windows(source: TextSource, tokens: Tensor, count: int, seqlen: int, rng: random.Random) -> Tensor:
    if len(tokens) <= seqlen:
        raise UsageError(f"{source.name} has {len(tokens):,} tokens, not more than one sample of --seqlen {seqlen}")
    starts = [rng.randint(0, len(tokens) - seqlen - 1) for _ in range(count)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def _draw_from_documents(source: TextSource, tokenizer: Any, drawing: Drawing, rng: random.Random) -> Tensor:
    documents = source.documents("calibration")
    count, seqlen = drawing.skip + drawing.num_samples, drawing.tokens
    samples: list[Tensor] = []
    rejected = 0
    while len(samples) < count:
        tokens = tokenize(tokenizer, documents[rng.randint(0, len(documents) - 1)])
        if len(tokens) <= seqlen:
            rejected += 1
            if rejected >= _MAX_REJECTIONS * (len(samples) + 1):
                raise UsageError(
                    f"of {rejected + len(samples):,} documents drawn from {source.name}, {len(samples)} have more than "
                    f"{seqlen} tokens, and {count} are needed: lower --seqlen or {drawing.flag}"
                )
            continue
        start = rng.randint(0, len(tokens) - seqlen - 1)
        samples.append(tokens[start : start + seqlen])
    return torch.stack(samples)


def require_length(
    source: TextSource,
    tokenizer: Any,
    use: Use,
    num_tokens: int,
    vocab_size: int,
    remedy: str,
    tokens_per_sample: int | None = None,
) -> None:
    """Raise UsageError if a local source has fewer tokens than that, or some that the model does not know.

    A source of the hub is not looked at. tokens_per_sample: the message says how many samples there are.
    """
    if source.is_local:
        tokens = first_tokens(tokenizer, source.text(use), num_tokens)
        if len(tokens) < num_tokens:
            has = f"{source.name} has {len(tokens):,} tokens for {use}"
            if tokens_per_sample is not None:
                has += f", which are {len(tokens) // tokens_per_sample:,} samples"
            raise UsageError(f"{has}; {num_tokens:,} are needed: {remedy}")
        require_vocabulary(tokens, vocab_size, "the model")


def require_vocabulary(tokens: Tensor, vocab_size: int, model: str) -> None:
    """Raise UsageError if the tokenizer gives tokens that the model has no embedding for."""
    if tokens.numel() and int(tokens.max()) >= vocab_size:
        raise UsageError(
            f"the tokenizer beside the weights gives token {int(tokens.max())}, and {model} has only {vocab_size} "
            "embeddings: it is the tokenizer of another model"
        )
