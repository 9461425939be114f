"""The model card of an exported model: README.md, with front matter for the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stages.formats.pruning_masks import FOLDER
from stages.metrics.registry import figure_text, metric_of
from stages.models.source_card import SourceCard
from stages.pruners.registry import method_title
from stages.tasks.registry import task_named

_TAGS = ("pruning", "sparsity", "lampctl")


@dataclass(frozen=True)
class CardFigure:
    """One line of the model card's table of results."""

    source: str
    metric: str  # "perplexity", "iou"
    dense: float | None
    pruned: float | None
    note: str  # "partial: first 10240 tokens", or ""


@dataclass(frozen=True)
class CardFacts:
    """What the model card tells."""

    task: str  # a name of `stages.tasks.registry.TASKS`
    loader: str  # class of transformers that opens the folder
    base_model: str
    is_on_hub: bool  # base_model is a name on the hub
    revision: str | None
    method: str
    goal: str  # "70%", "2:4, int4"
    num_masked: int
    num_prunable: int
    num_other_zeros: int
    is_quantized: bool
    settings: Mapping[str, object]
    figures: tuple[CardFigure, ...]  # perplexities
    accuracies: tuple[CardFigure, ...]  # of zero-shot tasks, as shares
    version: str
    source_card: SourceCard | None
    end_loss: str | None = None  # how far the output is from the original model's, in a few words; None: not measured


def model_card(facts: CardFacts) -> bytes:
    """README.md of the exported folder: what was done to which model, how, and what came of it."""
    revision = f" (revision {facts.revision})" if facts.revision else ""
    achieved = facts.num_masked / facts.num_prunable
    lines = [
        "---",
        *_front_matter(facts).splitlines(),
        "---",
        "",
        f"# {facts.base_model.rsplit('/', 1)[-1]} at {facts.goal}, pruned by {method_title(facts.method)}",
        "",
        f"Made from `{facts.base_model}`{revision} by lampctl {facts.version}. Of the {facts.num_prunable:,} prunable "
        f"weights (those of the linear layers inside the blocks), {facts.num_masked:,} ({100 * achieved:.4f}%) are "
        f"masked: exactly zero. A further {facts.num_other_zeros:,} weights are zero without being masked. "
        f"`{FOLDER}/` holds the masks{', scales and zero points' if facts.is_quantized else ''}.",
        "",
    ]
    if facts.source_card is not None:
        lines += [f"The card of the original model is [{facts.source_card.name}]({facts.source_card.name}).", ""]
    if facts.figures:
        lines += ["| | original | pruned | |", "|---|---|---|---|"]
        for figure in facts.figures:
            cells = (figure_text(figure.metric, value) for value in (figure.dense, figure.pruned))
            lines.append(
                f"| {metric_of(figure.metric).title} on {figure.source} | {' | '.join(cells)} | {figure.note} |"
            )
        lines.append("")
    if facts.accuracies:
        lines += ["| zero-shot accuracy on | original | pruned | |", "|---|---|---|---|"]
        lines += [f"| {f.source} | {_percent(f.dense)} | {_percent(f.pruned)} | {f.note} |" for f in facts.accuracies]
        lines.append("")
    if facts.end_loss is not None:
        lines += [f"{facts.end_loss}.", ""]
    task = task_named(facts.task)
    loading = (line.replace(task.loader, facts.loader) for line in task.loading)
    lines += ["```python", *loading, "```", "", "## Settings", ""]
    lines += [f"- {name}: {value}" for name, value in facts.settings.items() if value not in (None, (), [], {})]
    return ("\n".join(lines) + "\n").encode()


def _front_matter(facts: CardFacts) -> str:
    """What the hub reads of a card, as YAML: the source's licence and language, and what lampctl knows."""
    import yaml

    inherited = facts.source_card.entries if facts.source_card is not None else {}
    given = inherited.get("tags", [])
    tags = [str(tag) for tag in given] if isinstance(given, list) else [str(given)]
    entries: dict[str, object] = {
        "library_name": "transformers",
        **inherited,
        "tags": list(dict.fromkeys([*tags, *_TAGS])),
    }
    if facts.is_on_hub:  # else the base model of the source is the nearest name
        entries["base_model"] = facts.base_model
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=120)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
