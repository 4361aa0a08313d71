"""Cosine and OTAM: how alike two embeddings, and two sequences of them, are. Pure functions.

Everything here runs in float32 whatever the autocast (float64 stays): in bfloat16 the costs alone move OTAM by 0.016,
and the cosine of two parallel float16 vectors of norm 452 is not a number.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

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


def token_cosines(query: Tensor, prototype: Tensor) -> Tensor:
    """Cosine of each token of each query with each token of each prototype.

    Args:
        query: ``(…, n_queries, tokens, dim)``; or with an axis more, ``(…, n_queries, n_way, tokens, dim)``, where a
            query is another sequence for each class, which is compared with the prototype of that class alone.
        prototype: ``(…, n_way, tokens, dim)``.

    Returns:
        ``(…, n_queries, n_way, tokens, tokens)``, rows the query's tokens.
    """
    if query.ndim > prototype.ndim:
        return cosine(query, prototype.unsqueeze(-4))
    # One product for all tokens of an episode, rather than one for each pair of videos.
    cosines = cosine(query.flatten(-3, -2), prototype.flatten(-3, -2))
    return rearrange(cosines, "... (m t) (n s) -> ... m n t s", m=query.shape[-3], n=prototype.shape[-3])


def frame_costs(query: Tensor, prototype: Tensor) -> Tensor:
    """Cost of aligning each frame of each query with each frame of each prototype, ``1 − cos``.

    Args:
        query: ``(…, n_queries, frames, dim)``, or as :func:`token_cosines` takes it.
        prototype: ``(…, n_way, frames, dim)``.

    Returns:
        ``(…, n_queries, n_way, frames, frames)``, rows the query's frames.
    """
    return 1 - token_cosines(query, prototype)


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
    # Columns first, then rows, then pairs, so that each step works on what lies together.
    scores = costs.reshape(-1, *costs.shape[-2:]).permute(2, 1, 0).contiguous() / -smoothing
    align: Callable[[Tensor], Tensor] = _LogTotal.apply
    if single_direction:
        total = align(scores)
    elif costs.shape[-1] == costs.shape[-2]:  # both directions in one scan
        total = align(torch.cat((scores, scores.transpose(0, 1)), -1)).view(2, -1).sum(0)
    else:
        total = align(scores) + align(scores.transpose(0, 1))
    return (-smoothing * total).view(costs.shape[:-2])


class _LogTotal(torch.autograd.Function):
    """The logarithm of the sum over all alignments, one direction, of the exponential of an alignment's score.

    It goes through the table column by column, from ``scores (columns, rows, pairs)`` to ``(pairs)``. A cell holds the
    log-sum-exp of the alignments that end there. Within a middle column no cell depends on the one above it, so a
    column is one ``logaddexp``.

    Its gradient is the alignment itself, and has a closed form: back through the columns, the weight of a cell's
    alignments is shared out between the cells before it. Nothing is kept for it but the table.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        first, *others = scores.unbind(0)
        # First real column: B_i = w_i (2 + B_{i−1}), its left neighbours being the zeros of the padding.
        cells = [first[0]]
        two = torch.full_like(first[0], math.log(2))
        for score in first[1:]:
            cells.append(score + torch.logaddexp(two, cells[-1]))
        columns = [torch.stack(cells)]
        for score in others:
            # Row 0 has one predecessor. It is built apart: logaddexp(−inf, −inf) has no gradient.
            left = columns[-1]
            columns.append(score + torch.cat((left[:1], torch.logaddexp(left[:-1], left[1:]))))
        # Last padded column, cost 0: C_i = C_{i−1} + A_{i−1} + A_i, of which the last row is wanted.
        last = columns[-1]
        total = torch.cat((last, last[:-1])).logsumexp(0)
        ctx.save_for_backward(torch.stack(columns), total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # else what is asked of the gradient's gradient would be left out without a word
            raise RuntimeError("the gradient of OTAM's distance has no gradient: leave out create_graph")
        table, total = ctx.saved_tensors
        # By cell, the share of all alignments that go through it: of those through the cell itself to its own row, and
        # to the next one.
        weight = gradient * (table[-1] - total).exp()
        weight[:-1] *= 2
        weights = [weight]
        # Of what comes into a cell from the column before it, the part of its own row.
        own = (table[:-1, 1:] - table[:-1, :-1]).sigmoid()
        for share in own.flip(0):
            stayed = weight[1:] * share
            before = torch.cat((weight[:1], stayed))
            before[:-1] += weight[1:] - stayed
            weight = before
            weights.append(weight)
        # In the first column a cell's alignments come from above or begin there.
        above = (table[0, :-1] - math.log(2)).sigmoid()
        for row in range(len(above), 0, -1):
            weight[row - 1].addcmul_(weight[row], above[row - 1])
        return torch.stack(weights[::-1])


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
