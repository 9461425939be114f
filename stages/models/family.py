"""Model family: recognises its model folders by their configuration and opens them as block models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from stages.models.base import BlockModel, ModelFolder


class ModelFamily(ABC):
    """One way to read models block by block. Modules of families import torch and transformers only in `open`."""

    name: ClassVar[str]  # in the registry
    title: ClassVar[str]  # for people
    help: ClassVar[str]  # one line
    # The task of its models (`stages.tasks.registry.TASKS`).
    task: ClassVar[str]
    # Whether it is asked only after all other families.
    is_fallback: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model is of this family.

        Args:
            config: The contents of the folder's config.json; empty if it cannot be read.
        """

    @classmethod
    @abstractmethod
    def open(cls, folder: ModelFolder) -> BlockModel:
        """The model in a folder. Reads no weight.

        Raises:
            UsageError: The model cannot be pruned, with the reason.
            ResourceError: A file of the model is missing.
        """
