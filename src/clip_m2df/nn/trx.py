"""TRX: tuples of a query's frames attend to the tuples of all shots of a class."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from clip_m2df.errors import UserError, require
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.matching import full_precision
from clip_m2df.nn.prompts import SelectedPrompts

# What the published code multiplies positions with before it adds them to the features.
POSITION_SCALE = 0.1
# Tuples of a video, at most: each of a query is compared with each of a shot.
MOST_TUPLES = 10_000


class TupleEncoder(nn.Module):
    """Keys and values of tuples of frames.

    Args:
        dim: width of the features.
        size: how many frames a tuple has.
        width: of keys and values.
    """

    def __init__(self, dim: int, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.keys = nn.Sequential(nn.Linear(size * dim, width), nn.LayerNorm(width))
        self.values = nn.Linear(size * dim, width)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(…, frames, dim)`` to two of ``(…, tuples, width)``, the frames of a tuple in their order."""
        indices = torch.tensor(list(combinations(range(frames.shape[-2]), self.size)), device=frames.device)
        tuples = frames[..., indices, :].flatten(-2)
        return self.keys(tuples), self.values(tuples)


class TRXHead(Head):
    """Temporal-relational cross-transformers (Perrett et al., CVPR 2021, arXiv 2101.06184) on frame features.

    Each ordered pair of a query's frames attends to the pairs of all shots of a class, and so has a prototype of its
    own; the logit is minus the squared distance between values and prototypes, a mean over the query's pairs.
    Note: the published model is trained from a ResNet with ImageNet's weights; here the features are the model's own
    tower's. Its default are pairs and triples, ``tuples: [2, 3]``, whose logits are averaged; here pairs alone.

    Args:
        dim: width of the features.
        tuples: how many frames a tuple has, each at most as many as a video has; the logits of several are averaged.
        width: of keys and values.
        dropout: dropout of the features with their positions.
        top_k: frames that count in a prompt's score, for the log alone.
        temperature: of PPS's softmax, for the log alone.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    uses_prompts = False

    def __init__(
        self,
        *,
        dim: int,
        tuples: Sequence[int] = (2,),
        width: int = 1152,
        dropout: float = 0.1,
        top_k: int = 4,
        temperature: float = 200.0,
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        require(least=1, width=width)
        require(least=0, below=1, dropout=dropout)
        sizes = list(tuples) if isinstance(tuples, list | tuple) else []
        if not sizes or len({*sizes}) < len(sizes) or any(type(size) is not int or size < 1 for size in sizes):
            raise UserError(f"tuples is {tuples!r:.80}; it must be a list of different whole numbers, such as [2, 3]")
        self.tuples = tuple(sizes)
        self.dropout = nn.Dropout(dropout)
        self.encoders = nn.ModuleList(TupleEncoder(dim, size, width) for size in sizes)

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """Keys and values ``(…, tuples, width)`` of the tuples of each size.

        Raises:
            UserError: a video has fewer frames than a tuple.
        """
        frames, dim = videos.shape[-2:]
        self.check_frames(frames)
        placed = self.dropout(videos + positions(frames, dim, device=videos.device).to(videos.dtype))
        embedded = Embedded()
        for size, encoder in zip(self.tuples, self.encoders, strict=True):
            embedded[f"keys {size}"], embedded[f"values {size}"] = encoder(placed)
        return embedded

    def check_frames(self, frames: int) -> None:
        """Refuse videos of fewer frames than a tuple, see :meth:`clip_m2df.nn.head.Head.check_frames`."""
        if frames < (most := max(self.tuples)):
            raise UserError(
                f"trx compares tuples of {most} frames, and videos have {frames}: take more frames (data.frames), or"
                " smaller tuples (model.head_options.tuples)"
            )
        for size in self.tuples:
            if (count := math.comb(frames, size)) > MOST_TUPLES:
                raise UserError(
                    f"trx compares tuples of {size} frames, of which videos of {frames} have {count}, more than"
                    f" {MOST_TUPLES}: take fewer frames (data.frames), or other tuples (model.head_options.tuples)"
                )

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The tuples of all shots, and which of them are real: all, as long as nothing is padded."""
        own = embedded.map(lambda tensor: tensor.flatten(-3, -2))
        for size in self.tuples:
            keys = own[f"keys {size}"]
            own[f"real {size}"] = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device)
        return own

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """Minus the distances, a mean over the sizes of tuples."""
        logits = []
        for size in self.tuples:
            keys, values, real = f"keys {size}", f"values {size}", prototypes[f"real {size}"]
            logits.append(-tuple_distances(query[keys], query[values], prototypes[keys], prototypes[values], real))
        return HeadOutput.of(torch.stack(logits).mean(0), selected)


def positions(frames: int, dim: int, *, device: torch.device) -> Tensor:
    """Sines and cosines of the frames' numbers, by turns, ``(frames, dim)``; times 0.1, as published."""
    numbers = torch.arange(frames, device=device).unsqueeze(1)
    angles = numbers * torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000.0) / dim))
    return POSITION_SCALE * torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[:, :dim]


@full_precision
def tuple_distances(query_keys: Tensor, query_values: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """The squared distance of a query's tuples from what each finds in a class, a mean over the tuples.

    Args:
        query_keys: ``(…, n_queries, tuples, width)``.
        query_values: the same.
        keys: those of the classes' shots, ``(…, n_way, tuples, width)``.
        values: the same.
        real: bool ``(…, n_way, tuples)``, False where there is padding.

    Returns:
        ``(…, n_queries, n_way)``.
    """
    distances = []
    for c in range(keys.shape[-3]):  # one class at a time: the prototypes of all take n_way times the memory
        scores = query_keys @ keys[..., c, :, :].unsqueeze(-3).mT / math.sqrt(keys.shape[-1])
        scores = scores.masked_fill(~real[..., c, :].unsqueeze(-2).unsqueeze(-3), -torch.inf)
        prototypes = scores.softmax(-1) @ values[..., c, :, :].unsqueeze(-3)
        distances.append((query_values - prototypes).square().sum(-1).mean(-1))
    return torch.stack(distances, -1)
