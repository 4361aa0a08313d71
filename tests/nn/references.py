"""Slow, obvious versions of the method's functions: one number at a time, in Python's float64."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clip_m2df.nn.head import Embedded, Head

EPS = 0.01


def cosine(x: Sequence[float], y: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)) + EPS)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Of each pair of vectors: ``(…, n, dim)`` and ``(…, m, dim)`` to float64 ``(…, n, m)``."""
    shape = (*x.shape[:-1], y.shape[-2])
    sets = zip(x.double().flatten(0, -3).tolist(), y.double().flatten(0, -3).tolist(), strict=True)
    tables = [[[cosine(a, b) for b in many] for a in some] for some, many in sets]
    return torch.tensor(tables, dtype=torch.float64).reshape(shape)


def otam(costs: list[list[float]], smoothing: float = 0.5) -> float:
    """One direction, cell by cell, over costs padded with a zero column on either side."""
    rows = [[0.0, *row, 0.0] for row in costs]
    last = len(rows[0]) - 1
    total = [[0.0] * (last + 1) for _ in rows]
    for j in range(1, last + 1):
        total[0][j] = rows[0][j] + total[0][j - 1]
    for i in range(1, len(rows)):
        for j in range(1, last + 1):
            cells = [total[i - 1][j - 1], total[i][j - 1]]
            if j in (1, last):
                cells.append(total[i - 1][j])
            least = min(cells)  # taken out, so that nothing overflows
            total[i][j] = (
                rows[i][j] + least - smoothing * math.log(sum(math.exp(-(c - least) / smoothing) for c in cells))
            )
    return total[-1][-1]


def otam_of(costs: Tensor, smoothing: float = 0.5, single_direction: bool = False) -> Tensor:
    """The loop over a tensor ``(…, rows, columns)``: float64 ``(…)``."""
    flat = costs.double().flatten(0, -3) if costs.ndim > 2 else costs.double().unsqueeze(0)
    values = []
    for matrix in flat:
        value = otam(matrix.tolist(), smoothing)
        if not single_direction:
            value += otam(matrix.T.tolist(), smoothing)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64).reshape(costs.shape[:-2])


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def prompt_probabilities(
    query: Tensor, prompts: Tensor, top_k: int = 4, temperature: float = 200.0
) -> list[list[float]]:
    """PPS for ``query (n_queries, frames, dim)`` and ``prompts (n_way, dim)``."""
    rows = []
    for video in query.double().tolist():
        scores = []
        for prompt in prompts.double().tolist():
            cosines = sorted((cosine(prompt, frame) for frame in video), reverse=True)[:top_k]
            scores.append(sum(cosines) / len(cosines))
        rows.append(softmax([temperature * s for s in scores]))
    return rows


def draw(probabilities: Sequence[float], uniform: float) -> int:
    total = 0.0
    for i, p in enumerate(probabilities):
        total += p
        if total > uniform:
            return i
    return max(i for i, p in enumerate(probabilities) if p > 0)


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def distillation(
    distances: dict[str, Tensor],
    texts: dict[str, Tensor],
    conditions: Sequence[str],
    direction: str,
) -> tuple[float, list[int], list[int]]:
    """For one episode, tensors ``(n_queries, n_way)``: the term, and the queries on which each view teaches."""
    n_queries = len(distances["local"])
    p = {v: [softmax([-x for x in row]) for row in d.double().tolist()] for v, d in distances.items()}
    visual = {v: [max(row) for row in rows] for v, rows in p.items()}
    text = {v: [max(softmax(row)) for row in t.double().tolist()] for v, t in texts.items()}
    groups: dict[str, list[int]] = {"local": [], "global": []}
    for q in range(n_queries):
        votes = set()
        if "text" in conditions:
            votes.add("local" if text["local"][q] >= text["global"][q] else "global")
        if "visual" in conditions:
            votes.add("local" if visual["local"][q] >= visual["global"][q] else "global")
        for view in groups:
            if votes <= {view}:
                groups[view].append(q)
    total = 0.0
    taught: dict[str, list[int]] = {"local": [], "global": []}
    for teacher, student, name in (("local", "global", "local_to_global"), ("global", "local", "global_to_local")):
        if direction not in (name, "mutual"):
            continue
        taught[teacher] = groups[teacher]
        divergences = [kl(p[teacher][q], p[student][q]) for q in groups[teacher]]
        if not conditions:
            total += sum(divergences)
        elif divergences:
            weights = [visual[teacher][q] + text[teacher][q] for q in groups[teacher]]
            total += sum(w * d for w, d in zip(weights, divergences, strict=True)) / sum(weights)
    return total, taught["local"], taught["global"]


def linear(x: Sequence[float], weight: Tensor, bias: Tensor | None = None) -> list[float]:
    rows = weight.tolist()
    shift = [0.0] * len(rows) if bias is None else bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, shift, strict=True)]


def layer_norm(x: Sequence[float], norm: nn.LayerNorm) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [
        (v - mean) / math.sqrt(variance + 1e-5) * w + b
        for v, w, b in zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)
    ]


def fusion_layer(layer: Any, query: list[list[float]], key_value: list[list[float]]) -> list[list[float]]:
    """Attention head by head, token by token, then the feed-forward part, for one video."""
    heads = layer.num_heads
    q = [linear(layer_norm(t, layer.norm), layer.to_q.weight) for t in query]
    k = [linear(layer_norm(t, layer.norm), layer.to_k.weight) for t in key_value]
    v = [linear(layer_norm(t, layer.norm), layer.to_v.weight) for t in key_value]
    width = len(q[0]) // heads
    out = []
    for i, token in enumerate(query):
        attended: list[float] = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = [sum(a * b for a, b in zip(q[i][part], key[part], strict=True)) / math.sqrt(width) for key in k]
            weights = softmax(scores)
            attended += [sum(w * value[part][d] for w, value in zip(weights, v, strict=True)) for d in range(width)]
        mapped = linear(attended, layer.to_out[0].weight, layer.to_out[0].bias)
        x = [a + b for a, b in zip(token, mapped, strict=True)]
        hidden = linear(x, layer.feed_forward[0].weight, layer.feed_forward[0].bias)
        hidden = [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in hidden]
        y = linear(hidden, layer.feed_forward[3].weight, layer.feed_forward[3].bias)
        out.append([a + b for a, b in zip(x, y, strict=True)])
    return out


def logits_of_classes(head: Head, shots: Sequence[Tensor], query: Tensor, prompts: Tensor) -> Tensor:
    """Of the head itself: classes with different numbers of shots, each embedded alone, and padded."""
    embedded, selected = head.embed_queries(query, prompts)
    parts = zip(shots, prompts, strict=True)
    prototypes = Embedded.stack([head.prototype(head.embed(own, prompt), prompt) for own, prompt in parts])
    return head.match(embedded, prototypes, selected).logits
