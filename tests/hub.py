"""A stand-in for the Hugging Face hub: data sets by name, split and column, in memory."""

from __future__ import annotations

from typing import Any

# Repository -> split -> column -> rows.
Served = dict[str, dict[str, dict[str, list[Any]]]]


def serve(monkeypatch: Any, served: Served) -> list[tuple[Any, ...]]:
    """Make `datasets` and the hub's client serve these. Returns the calls of load_dataset."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    calls: list[tuple[Any, ...]] = []

    def dataset_info(api: Any, repo: str, **_: Any) -> None:
        if repo not in served:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    def load_dataset(repo: str, config: str | None = None, *, split: str) -> Any:
        calls.append((repo, config, split))
        if split not in served[repo]:
            raise ValueError(f'Unknown split "{split}". Should be one of {[*served[repo]]}.')
        return datasets.Dataset.from_dict(served[repo][split])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config=None: [*served[repo]])
    return calls


def refuse(monkeypatch: Any) -> None:
    """Put the hub out of reach, with an empty cache."""
    import datasets
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
