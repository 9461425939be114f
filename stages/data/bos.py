"""Where BOS, which a tokenizer puts at the head of a text, stands in windows of tokens.

Many models attend to the first position far more than to any other. Some (Gemma 3) compute nonsense without BOS there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from stages.data.pieces import Ends
from stages.data.text_source import Bos
from stages.errors import UsageError


@dataclass(frozen=True)
class Framing:
    """How text becomes windows of T tokens.

    Attributes:
        tokenizer: Makes tokens of the text. Adds BOS at the head of the text only with "stream".
        head: Token ids at the head of every window.
    """

    tokenizer: Any
    head: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, bos: Bos) -> Self:
        """The framing of a mode.

        Args:
            tokenizer: The model's tokenizer.
            bos: "stream": as the tokenizer does it, at the head of the whole text (the published protocol of OPT and
                Llama-2). "window": at the head of each window. "none": nowhere.

        Raises:
            UsageError: "window", and the tokenizer knows no BOS.
        """
        if bos == "stream":
            return cls(tokenizer)
        plain = WithoutEnds(tokenizer)
        if bos == "none":
            return cls(plain)
        head = bos_of(tokenizer)
        if not head:
            raise UsageError(
                "BOS at the head of each window: the tokenizer has no BOS token; "
                "place BOS by `stream` or `none`, which are the same then"
            )
        return cls(plain, head)

    def text_tokens(self, seqlen: int) -> int:
        """Tokens of text in a window of `seqlen` tokens. Raises UsageError where no text fits."""
        if seqlen <= len(self.head):
            raise UsageError(f"{seqlen} tokens a window leave no room for text behind BOS: use more")
        return seqlen - len(self.head)

    def framed(self, windows: Tensor) -> Tensor:
        """Windows of text (N, text_tokens(T)) with their heads (N, T)."""
        head = torch.tensor(self.head, dtype=torch.long).expand(len(windows), -1)
        return torch.cat([head, windows], 1) if self.head else windows


class WithoutEnds:
    """A tokenizer that adds nothing at the ends of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        """As the tokenizer, without special tokens."""
        return self._tokenizer(text, **{**options, "add_special_tokens": False})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts anything at the head of a text."""
    return bool(Ends.of(tokenizer).head)


def bos_of(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts at the head of a text; if nothing, its BOS token; empty if it has none."""
    head = Ends.of(tokenizer).head
    if not head and tokenizer.bos_token_id is not None:
        return (tokenizer.bos_token_id,)
    return head
