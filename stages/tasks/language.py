"""Language models: windows of tokens in, perplexity out."""

from __future__ import annotations

from typing import Any

from stages.calibrate import calibrate
from stages.data.base import DataSource
from stages.data.bos import Framing
from stages.data.drawing import Drawing
from stages.data.registry import source_kind
from stages.data.text_source import TextSource
from stages.data.tokenization import load_tokenizer, require_length, require_vocabulary
from stages.interfaces import Watcher
from stages.metrics.points import Points
from stages.models.base import BlockModel, ModelFolder
from stages.tasks.base import Drawn, Listed
from stages.tasks.registry import require_readable
from stages.training.end_loss import Divergence, EndLoss


class Language:
    """A `stages.tasks.base.Task`."""

    name = "language"
    title = "language"
    help = "Decoder-only language models: windows of tokens, perplexity and zero-shot accuracy."
    contents = "text"
    reads_text = True
    loader = "AutoModelForCausalLM"
    loader_dtype = "auto"
    loading = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")',
    )
    metric = "perplexity"
    end_loss: type[EndLoss] = Divergence
    default_calibration: str | None = "c4"
    default_evaluation: tuple[str, ...] = ("wikitext2",)
    default_points: Points | None = None
    missing_calibration = ""
    missing_evaluation: str | None = None

    def default_sampling(self, calibration: str) -> str:
        kind = source_kind(calibration)
        return kind.default_sampling if kind is not None else "contiguous"

    def require_samples(self, model: BlockModel, source: DataSource, drawing: Drawing) -> None:
        text = _text(source, model)
        is_random = drawing.sampling == "random"
        tokenizer = _tokenizer(model.source)
        text, framing = text.for_model(tokenizer, drawing.chat_template), Framing.of(tokenizer, drawing.bos)
        num_windows = 1 if is_random else drawing.skip + drawing.num_samples
        remedy = f"lower {drawing.flag}, --calibration-skip or --seqlen, or use more text"
        window = framing.text_tokens(drawing.tokens)
        needed, of_sample = num_windows * window + is_random, None if is_random else window
        require_length(text, framing.tokenizer, "calibration", needed, model.vocab_size, remedy, of_sample)

    def draw(self, model: BlockModel, source: DataSource, drawing: Drawing, watcher: Watcher) -> Drawn:
        text = _text(source, model)
        tokens = calibrate(text, model.source, drawing, watcher)
        require_vocabulary(tokens, model.vocab_size, model.source.name)
        return Drawn(Listed(tokens), tokens.numel(), "tokens", text.skipped("calibration"))


def _text(source: DataSource, model: BlockModel) -> TextSource:
    require_readable(source, model)
    assert isinstance(source, TextSource)
    return source


def _tokenizer(folder: ModelFolder) -> Any:
    return load_tokenizer(folder.path, trusts_code=folder.trusts_code)
