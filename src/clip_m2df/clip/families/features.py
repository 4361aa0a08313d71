"""No tower at all: features that somebody computed elsewhere, and class embeddings in the place of a text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clip_m2df.clip.families import Family, Tower
from clip_m2df.errors import UserError, some


class ClassEmbeddings(nn.Module):
    """What stands for a text tower: the embeddings of some classes, which are its weights.

    Args:
        labels: The classes.
        dim: Width of the embeddings.
    """

    embeddings: Tensor

    def __init__(self, labels: Sequence[str], dim: int) -> None:
        super().__init__()
        self.index = {label: index for index, label in enumerate(labels)}
        if len(self.index) != len(labels) or not all(isinstance(label, str) for label in labels):
            raise UserError(f"labels is {labels!r:.80}: it must be a list of names, each once")
        self.register_buffer("embeddings", torch.zeros(len(labels), dim))

    def tokens(self, texts: Sequence[str], source: str) -> Tensor:
        """The numbers of classes, ``(n, 1)``.

        Raises:
            UserError: One is not known.
        """
        if unknown := [text for text in texts if text not in self.index]:
            raise UserError(
                f"backbone {source} has no embedding of the class {unknown[0]!r:.80}, but of {some(self.index)}: give a"
                " feature table with class embeddings of all its classes"
            )
        return torch.tensor([[self.index[text]] for text in texts], dtype=torch.long).reshape(-1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings ``(n, dim)`` of the classes of these numbers ``(n, 1)``."""
        return self.embeddings[tokens[:, 0]]


class Features(Family):
    """Features that are there already; images and texts can't be embedded."""

    def visual_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """Nothing that takes images: their size is 0."""
        if config["image_size"] != 0:
            raise UserError(f"image_size is {config['image_size']!r:.80}; of features it is 0")
        return nn.Identity()

    def text_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """Class embeddings, yet to be filled."""
        if config["max_position_embeddings"] != 1:
            raise UserError(f"max_position_embeddings is {config['max_position_embeddings']!r:.80}; of classes it is 1")
        return ClassEmbeddings(config["labels"], config["dim"])


FAMILY = Features(
    kind="features",
    name="features of one's own",
    visual=Tower(("dim", "image_size"), "dim"),
    text=Tower(("dim", "labels", "max_position_embeddings"), "dim"),
)
