"""What metrics on text have in common: windows of tokens that do not overlap, each read by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from stages.errors import UsageError
from stages.metrics.base import EvaluationProtocol, Metric
from stages.metrics.details import Count, Details

if TYPE_CHECKING:
    from torch import Tensor

    from stages.data.base import DataSource
    from stages.models.base import BlockModel

_BOS = {"stream": "", "window": " with BOS", "none": " without BOS"}  # beside the tokens of a window


@dataclass(frozen=True)
class TextDetails(Details):
    """The windows of text that were read."""

    num_windows: Count
    num_tokens: Count  # in those windows
    num_tokens_available: Count  # in the whole text
    seqlen: Annotated[int, Interval(ge=1, le=2**31)]  # tokens of a window
    bos: Literal["stream", "window", "none"] = "stream"  # where BOS stands

    unit: ClassVar[str] = "tokens"

    @property
    def amount(self) -> int:
        return self.num_tokens

    @property
    def protocol(self) -> str:
        return f"{self.seqlen}{_BOS[self.bos]}"

    def described(self, *, is_partial: bool) -> str:
        partial = f", partial: first {self.num_tokens} tokens" if is_partial else ""
        return f"{self.seqlen} tokens a window{_BOS[self.bos]}{partial}"


class LanguageMetric(Metric):
    """Base of metrics on windows of text. `stages.metrics.streaming` reads the windows and runs the model on them."""

    task: ClassVar[str] = "language"
    details: ClassVar[type[Details]] = TextDetails

    def require_measurable(self, model: BlockModel, source: DataSource, protocol: EvaluationProtocol) -> None:
        """One window at least, in the tokens of this model."""
        from stages.data.base import require_contents
        from stages.data.bos import Framing
        from stages.data.text_source import TextSource
        from stages.data.tokenization import load_tokenizer, require_length

        require_contents(source, TextSource.contents, model)
        assert isinstance(source, TextSource)
        tokenizer = load_tokenizer(model.source.path, trusts_code=model.source.trusts_code)
        framing, remedy = Framing.of(tokenizer, protocol.bos), "lower --eval-seqlen or use more text"
        needed = framing.text_tokens(protocol.seqlen)
        source = source.for_model(tokenizer, protocol.chat_template)
        require_length(source, framing.tokenizer, "evaluation", needed, model.vocab_size, remedy)


def windows(tokens: Tensor, seqlen: int, max_tokens: int | None = None, max_windows: int | None = None) -> Tensor:
    """`tokens` (n,) cut into pieces (windows, seqlen); the tail is dropped.

    max_tokens: use only this number of tokens, from the start. Raises UsageError if there is not one whole window.
    """
    used = tokens if max_tokens is None else tokens[:max_tokens]
    count = len(used) // seqlen
    if max_windows is not None:
        count = min(count, max_windows)
    if count == 0:
        raise UsageError(
            f"{len(used):,} tokens do not fill one window of {seqlen}: use more text or less --eval-seqlen"
        )
    return used[: count * seqlen].view(count, seqlen)
