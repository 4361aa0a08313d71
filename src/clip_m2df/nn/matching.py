"""Cosine and OTAM: how alike two embeddings, and two sequences of them, are. Pure functions.

Everything here runs in float32 whatever the autocast (float64 stays): in bfloat16 the costs alone move OTAM by 0.016,
and the cosine of two parallel float16 vectors of norm 452 is not a number.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from einops import rearrange
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Added to the product of the norms; part of the published numbers.
COSINE_EPS = 0.01


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it was in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside autocast, its half-precision tensors made float32.

    float64 stays float64.
    """

    def widen(value: object) -> object:
        return at_least_float32(value) if isinstance(value, Tensor) else value

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        device = "cpu" if tensor is None else tensor.device.type
        with torch.autocast(device, enabled=False):
            return function(*map(widen, args), **{k: widen(v) for k, v in kwargs.items()})  # type: ignore[arg-type]

    return wrapped


@full_precision
def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each pair, ``x·y / (|x||y| + 0.01)`` (METHOD, section 0).

    Args:
        x: ``(…, n, dim)``.
        y: ``(…, m, dim)``.

    Returns:
        ``(…, n, m)``, finite with finite gradients at zero vectors too.
    """
    # norm, not sqrt(Σx²): the latter's gradient at a zero vector is not a number.
    norms = x.norm(dim=-1).unsqueeze(-1) * y.norm(dim=-1).unsqueeze(-2)
    products: Tensor = x @ y.transpose(-1, -2)
    return products.div(norms + COSINE_EPS)


def frame_costs(query: Tensor, prototype: Tensor) -> Tensor:
    """Cost of aligning each frame of each query with each frame of each prototype, ``1 − cos``.

    Args:
        query: ``(…, n_queries, frames, dim)``.
        prototype: ``(…, n_way, frames, dim)``.

    Returns:
        ``(…, n_queries, n_way, frames, frames)``, rows the query's frames.
    """
    # One product for all frames of an episode, rather than one for each pair of videos.
    cosines = cosine(query.flatten(-3, -2), prototype.flatten(-3, -2))
    return 1 - rearrange(cosines, "... (m t) (n s) -> ... m n t s", m=query.shape[-3], n=prototype.shape[-3])


@full_precision
def otam(costs: Tensor, *, smoothing: float = 0.5, single_direction: bool = False) -> Tensor:
    """OTAM distance: soft dynamic time warping with free ends (Cao et al., CVPR 2020).

    Every column is aligned; leading and trailing rows may be skipped. By default the distance with the sequences'
    parts exchanged is added.

    Args:
        costs: ``(…, rows, columns)``, frame costs.
        smoothing: λ, the temperature of the soft minimum.
        single_direction: leave out the transposed distance.

    Returns:
        ``(…)``.
    """
    rows, columns = costs.shape[-2:]
    if single_direction:
        return _align(costs, smoothing)
    if rows == columns:  # both directions in one scan
        return _align(torch.stack((costs, costs.transpose(-1, -2))), smoothing).sum(0)
    return _align(costs, smoothing) + _align(costs.transpose(-1, -2), smoothing)


def _align(costs: Tensor, smoothing: float) -> Tensor:
    """One direction, column by column.

    With ``b = −a/λ`` the soft minimum is a log-sum-exp. Within a middle column no cell depends on the one above it in
    the same column, so a column is one ``logaddexp``; the two columns where it does are log-space cumulative sums.
    """
    # Columns first, then rows, then pairs, so that each step works on what lies together.
    scores = (costs.reshape(-1, *costs.shape[-2:]).permute(2, 1, 0) / -smoothing).contiguous()
    # First real column: B_i = w_i (2 + B_{i−1}), its left neighbours being the zeros of the padding; divided by the
    # running product of w this is a cumulative sum.
    first, *others = scores.unbind(0)
    running = first.cumsum(0)
    entries = torch.cat((torch.zeros_like(running[:1]), math.log(2) - running[:-1]))
    column = running + entries.logcumsumexp(0)
    for score in others:
        # Row 0 has one predecessor. It is built apart: logaddexp(−inf, −inf) has no gradient.
        column = score + torch.cat((column[:1], torch.logaddexp(column[:-1], column[1:])))
    # Last padded column, cost 0: C_i = C_{i−1} + A_{i−1} + A_i, of which the last row is wanted.
    distances: Tensor = -smoothing * torch.cat((column, column[:-1])).logsumexp(0)
    return distances.view(costs.shape[:-2])


@full_precision
def otam_alignment(costs: Tensor, *, smoothing: float = 0.5, single_direction: bool = False) -> Tensor:
    """Which frames OTAM aligns, softly: the gradient of its distance by the costs.

    OTAM's soft minimum weighs all alignments, the cheaper the more, with weights that sum to 1; an entry is the weight
    of those that the pair of frames is in. Each column sums to at least 1, and with both directions each row too.

    Args:
        costs: see :func:`otam`; whether or not gradients are recorded.
        smoothing: see :func:`otam`.
        single_direction: the same.

    Returns:
        ``(…, rows, columns)``, not negative, without a gradient of its own.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = costs.detach().clone().requires_grad_()
        distances = otam(leaf, smoothing=smoothing, single_direction=single_direction)
        (alignment,) = torch.autograd.grad(distances.sum(), leaf)
    return alignment
