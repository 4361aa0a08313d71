import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from clip_m2df.nn.matching import cosine, frame_costs, otam, otam_alignment
from tests.nn import references


def random_costs(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_equals_the_definition_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    torch.testing.assert_close(cosine(x, y), references.cosines(x, y).float())


def test_cosine_is_finite_with_finite_gradients_at_zero_vectors_and_large_halves() -> None:
    zero = torch.zeros(1, 4, requires_grad=True)
    value = cosine(zero, torch.ones(1, 4))
    value.sum().backward()
    assert value.item() == 0
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    large = torch.full((1, 4), 226.0, dtype=torch.float16)  # norm 452: its square overflows float16
    assert cosine(large, large).item() == pytest.approx(1, abs=1e-5)
    assert cosine(large, large).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (2, 2), (8, 8), (5, 9), (9, 5)])
@pytest.mark.parametrize("single_direction", [True, False])
def test_otam_equals_the_loop(shape: tuple[int, int], single_direction: bool) -> None:
    costs = random_costs(3, 2, *shape)
    expected = references.otam_of(costs, single_direction=single_direction)
    distances = otam(costs, single_direction=single_direction)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-5)


def test_otam_by_hand() -> None:
    # One row: every column is aligned with it. One column: the soft minimum of the ways to enter and leave it.
    assert otam(torch.tensor([[1.0, 2.0, 4.0]]), single_direction=True).item() == pytest.approx(7)
    first = 3.0
    entered = 1 - 0.5 * math.log(2 + math.exp(-first / 0.5))
    expected = -0.5 * math.log(2 * math.exp(-first / 0.5) + math.exp(-entered / 0.5))
    assert otam(torch.tensor([[3.0], [1.0]]), single_direction=True).item() == pytest.approx(expected)


def test_otam_skips_leading_and_trailing_rows() -> None:
    # The second sequence is the middle of the first: aligning it costs nothing where rows may be skipped.
    costs = 2 - 2 * torch.eye(9)[:, 3:6]
    aligned = otam(costs, single_direction=True, smoothing=1e-3)
    assert aligned.item() == pytest.approx(0, abs=1e-2)
    assert otam(costs.T, single_direction=True, smoothing=1e-3).item() > 5


@pytest.mark.parametrize("single_direction", [True, False])
def test_otam_gradient_equals_the_numerical_one(single_direction: bool) -> None:
    costs = random_costs(2, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: otam(c, smoothing=0.3, single_direction=single_direction), (costs,))


@pytest.mark.parametrize("squared", [True, False])
def test_otam_refuses_a_gradient_of_its_gradient(squared: bool) -> None:
    # It would be left out without a word where what comes to it has no gradient, as here the ones.
    costs = random_costs(2, 5, 6).double().requires_grad_()
    distances = otam(costs).square().sum() if squared else otam(costs).sum()
    with pytest.raises(RuntimeError, match="the gradient of OTAM's distance has no gradient"):
        torch.autograd.grad(distances, costs, create_graph=True)
    assert torch.autograd.grad(otam(costs).sum(), costs)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("frames", "scale"), [(8, 1.0), (32, 1.0), (64, 1.0), (64, 0.0), (64, 100.0)])
def test_otam_under_autocast_is_within_a_thousandth_of_float64(dtype: torch.dtype, frames: int, scale: float) -> None:
    # Scale 0: no cost at all; 100: every cost at its largest.
    costs = (scale * random_costs(2, frames, frames, seed=frames)).clamp(0, 2)
    for given in (costs, costs.to(dtype)):
        leaf = given.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            distances = otam(leaf)
        distances.sum().backward()
        assert distances.dtype == torch.float32
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert (distances.double() - references.otam_of(given)).abs().max() < 1e-3


@pytest.mark.parametrize("smoothing", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (32, 32), (64, 64), (64, 5), (5, 64)])
def test_otam_in_float32_is_that_of_float64_gradients_included(rows: int, columns: int, smoothing: float) -> None:
    costs = 1.5 * random_costs(2, rows, columns, seed=rows) - 1  # from -1 to 2
    costs[0, :, : columns // 2] = 2.0  # where every way is as dear
    expected = references.otam_of(costs, smoothing)
    (gradient,) = torch.autograd.grad(otam(leaf := costs.double().requires_grad_(), smoothing=smoothing).sum(), leaf)
    distances = otam(costs.requires_grad_(), smoothing=smoothing)
    (found,) = torch.autograd.grad(distances.sum(), costs)
    assert (distances.double() - expected).abs().max() < max(2.4e-5, 1e-6 * expected.abs().max().item())
    # Costs in float32 are exact to 1e-7, which a small smoothing makes more of.
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=1e-4 * max(1.0, 0.05 / smoothing))


def test_frame_costs_pair_every_query_with_every_prototype() -> None:
    generator = torch.Generator().manual_seed(0)
    query, prototype = torch.randn(2, 3, 4, 8, generator=generator), torch.randn(2, 5, 6, 8, generator=generator)
    costs = frame_costs(query, prototype)
    assert costs.shape == (2, 3, 5, 4, 6)
    pairs = query.unsqueeze(2).expand(2, 3, 5, 4, 8), prototype.unsqueeze(1).expand(2, 3, 5, 6, 8)
    torch.testing.assert_close(costs, 1 - references.cosines(*pairs).float())


def paths_through(rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    """The cells of every alignment that OTAM weighs, padding left out: by the loop's own rules, one path at a time."""

    def backwards(i: int, j: int) -> Iterator[list[tuple[int, int]]]:
        if j == 0:
            yield []
            return
        before = [(i, j - 1)] if i == 0 else [(i - 1, j - 1), (i, j - 1)]
        if i > 0 and j in (1, columns + 1):
            before.append((i - 1, j))
        for place in before:
            for path in backwards(*place):
                yield [*path, (i, j - 1)]

    for path in backwards(rows - 1, columns + 1):
        yield [cell for cell in path if cell[1] < columns]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (3, 1), (2, 2), (3, 4), (4, 3), (4, 4)])
def test_the_alignment_is_the_share_of_each_pair_over_all_paths(rows: int, columns: int) -> None:
    costs = random_costs(rows, columns, seed=rows).double()
    paths = list(paths_through(rows, columns))
    totals = [sum(float(costs[cell]) for cell in path) for path in paths]
    weights = torch.tensor(totals, dtype=torch.float64) / -0.5
    # The distance itself is that of all paths together.
    assert otam(costs, single_direction=True).item() == pytest.approx(-0.5 * weights.logsumexp(0).item(), abs=1e-9)
    expected = torch.zeros_like(costs)
    for share, path in zip(weights.softmax(0), paths, strict=True):
        for cell in path:
            expected[cell] += share
    aligned = otam_alignment(costs, single_direction=True)
    torch.testing.assert_close(aligned, expected, rtol=1e-9, atol=1e-9)
    both = otam_alignment(costs)
    torch.testing.assert_close(both, aligned + otam_alignment(costs.T, single_direction=True).T)
    assert (aligned.sum(0) >= 1 - 1e-9).all()


def test_the_alignment_is_the_gradient_of_the_distance() -> None:
    costs = random_costs(2, 5, 6).double().requires_grad_()
    (expected,) = torch.autograd.grad(otam(costs, smoothing=0.3).sum(), costs)
    torch.testing.assert_close(otam_alignment(costs, smoothing=0.3), expected)


def test_the_alignment_needs_no_gradients_and_leaves_none() -> None:
    costs = random_costs(3, 4, 4).requires_grad_()
    expected = otam_alignment(costs)
    assert costs.grad is None
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(otam_alignment(costs * 1), expected)
    assert otam_alignment(costs.detach().bfloat16()).dtype == torch.float32
