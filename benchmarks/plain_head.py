"""The head in its published structure, written plainly: what ``head`` measures ours against.

Support and queries go through each part one after the other, the global view computes every step, weights are normed
at each use, OTAM fills a table in place cell by cell, prompts are picked and views are held against each other a query
at a time. The weights have the names of published checkpoints.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def otam(costs: Tensor, smoothing: float = 0.5) -> Tensor:
    """OTAM of ``costs (…, rows, columns)``, one direction: ``(…)``."""
    costs = F.pad(costs, (1, 1))
    table = torch.zeros_like(costs)
    rows, columns = costs.shape[-2:]
    for j in range(1, columns):
        table[..., 0, j] = costs[..., 0, j] + table[..., 0, j - 1]
    for i in range(1, rows):
        for j in range(1, columns):
            total = torch.exp(-table[..., i - 1, j - 1] / smoothing) + torch.exp(-table[..., i, j - 1] / smoothing)
            if j in (1, columns - 1):
                total = total + torch.exp(-table[..., i - 1, j] / smoothing)
            table[..., i, j] = costs[..., i, j] - smoothing * torch.log(total)
    return table[..., -1, -1]


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each pair, see METHOD."""
    norms: Tensor = x.norm(dim=-1).unsqueeze(-1) @ y.norm(dim=-1).unsqueeze(-2)
    return x @ y.transpose(-1, -2) / (norms + 0.01)


class Convolution(nn.Module):
    """A causal convolution with a weight norm, padded on both sides and cut off at the end."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, dim, 3)
        self.weight_v = nn.Parameter(conv.weight.detach())
        self.weight_g = nn.Parameter(torch.norm_except_dim(self.weight_v.detach()))
        self.bias = conv.bias
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """``(videos, dim, frames)`` to the same."""
        padding = 2 * self.dilation
        weight = torch._weight_norm(self.weight_v, self.weight_g)
        y: Tensor = F.conv1d(x, weight, self.bias, padding=padding, dilation=self.dilation)
        return y[..., :-padding].contiguous()


class Block(nn.Module):
    """Two convolutions and a residual."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Convolution(dim, dilation), Convolution(dim, dilation)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """``(videos, dim, frames)`` to the same."""
        y = self.dropout(F.relu(self.conv1(x)))
        return F.relu(self.dropout(F.relu(self.conv2(y))) + x)


class Attention(nn.Module):
    """Pre-norm attention, each of query, key and value normed, with its residual."""

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.2))
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``(videos, tokens, dim)`` each, to the same."""
        parts = (self.to_q(self.norm(query)), self.to_k(self.norm(key)), self.to_v(self.norm(value)))
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        attended = torch.einsum("b h i j, b h j d -> b h i d", weights, v)
        return query + self.to_out(rearrange(attended, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """The feed-forward part, without its residual."""

    def __init__(self, dim: int, hidden_dim: int = 2048) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(0.05), nn.Linear(hidden_dim, dim), nn.Dropout(0.05)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(videos, tokens, dim)`` to the same."""
        return self.net(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The fusion encoder, of one layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Attention(dim), FeedForward(dim)])])

    def forward(self, query: Tensor, key_value: Tensor) -> Tensor:
        """``(videos, tokens, dim)`` both, to the same."""
        attention, feed_forward = cast(nn.ModuleList, self.layers[0])
        x: Tensor = attention(query, key_value, key_value)
        return x + feed_forward(x)  # type: ignore[no-any-return]


class PlainHead(nn.Module):
    """The whole head, for one episode at a time.

    Args:
        dim: width of the features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.context_conv1, self.context_conv2 = (nn.Conv1d(dim, dim, 3, padding=1) for _ in range(2))
        self.tcn = nn.ModuleDict({"network": nn.Sequential(*(Block(dim, dilation) for dilation in (1, 2, 4)))})
        self.context2, self.context_local = Encoder(dim), Encoder(dim)

    def forward(self, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor, labels: Tensor) -> Tensor:
        """The loss of an episode.

        Args:
            support: features ``(n_way, n_shot, frames, dim)``.
            query: ``(n_queries, frames, dim)``.
            prompts: ``(n_way, dim)``.
            draws: uniforms ``(n_queries)``.
            labels: int64 ``(n_queries)``.
        """
        n_shot = support.shape[1]
        support = support.flatten(0, 1)
        of_support = prompts.repeat_interleave(n_shot, 0).unsqueeze(1)
        of_query = prompts[self.pick(query, prompts, draws)].unsqueeze(1)

        distances, texts = [], []
        for context, encoder in ((self.local, self.context2), (self.global_, self.context_local)):
            fused = [
                encoder(torch.cat((prompt, context(videos)), 1), torch.cat((prompt, videos), 1))
                for prompt, videos in ((of_support, support), (of_query, query))
            ]
            prototypes = torch.stack([shots.mean(0) for shots in fused[0].split(n_shot)])
            distances.append(self.distances(fused[1][:, 1:], prototypes[:, 1:]))
            texts.append(cosines(fused[1][:, 0], prototypes[:, 0]))
        loss = F.cross_entropy(-(distances[0] + distances[1]), labels, reduction="sum")
        return loss + self.distillation(distances, texts)

    def pick(self, query: Tensor, prompts: Tensor, draws: Tensor) -> Tensor:
        """Whose prompt each query gets: a query at a time."""
        scores = cosines(prompts.repeat(len(query), 1, 1), query).topk(4, dim=-1).values.mean(-1)
        shares = (200 * scores).softmax(-1)
        return torch.stack([(share.cumsum(0) <= draw).sum() for share, draw in zip(shares, draws, strict=True)])

    def local(self, videos: Tensor) -> Tensor:
        """The local context ``(videos, frames, dim)``."""
        return self.context_conv2(self.context_conv1(videos.permute(0, 2, 1))).permute(0, 2, 1)  # type: ignore[no-any-return]

    def global_(self, videos: Tensor) -> Tensor:
        """The global context, as large."""
        context = self.tcn["network"](videos.transpose(1, 2)).transpose(1, 2)
        return context[:, -1].unsqueeze(1).repeat(1, videos.shape[1], 1) + videos  # type: ignore[no-any-return]

    def distances(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """OTAM's both ways ``(n_queries, n_way)``."""
        table = 1 - cosines(query.flatten(0, 1), prototypes.flatten(0, 1))
        costs = rearrange(table, "(q t) (p s) -> q p t s", q=len(query), p=len(prototypes))
        return otam(costs) + otam(costs.transpose(-1, -2))

    def distillation(self, distances: list[Tensor], texts: list[Tensor]) -> Tensor:
        """The global view teaches the local one where the text says that it is the reliable one, a query at a time."""
        of_texts = [text.softmax(-1).amax(-1) for text in texts]
        of_videos = (-distances[1]).softmax(-1).amax(-1)
        reliable = [i for i, (of_local, of_global) in enumerate(zip(*of_texts, strict=True)) if of_local < of_global]
        if not reliable:
            return distances[0].new_zeros(())
        teacher, student = (torch.stack([-distances[view][i] for i in reliable]) for view in (1, 0))
        weights = torch.stack([of_videos[i] + of_texts[1][i] for i in reliable])
        divergences = F.kl_div(student.softmax(-1).log(), teacher.softmax(-1), reduction="none").sum(1)
        return divergences @ weights / weights.sum()
