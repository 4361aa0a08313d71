import itertools
from collections.abc import Sequence

import pytest
import torch

from clip_m2df.nn.distillation import (
    DIRECTIONS,
    Direction,
    ViewOutput,
    kl_divergence,
    mutual_distillation,
    reliable_groups,
)
from tests.nn import references

CONDITIONS: list[tuple[str, ...]] = [(), ("text",), ("visual",), ("text", "visual")]


def view_output(*shape: int, seed: int) -> ViewOutput:
    generator = torch.Generator().manual_seed(seed)
    distances = 6 * torch.rand(shape, generator=generator)
    return ViewOutput(distances, 2 * torch.rand(shape, generator=generator) - 1)


@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_equals_the_loop(conditions: tuple[str, ...], direction: Direction) -> None:
    local, global_ = view_output(4, 10, 5, seed=0), view_output(4, 10, 5, seed=1)
    term = mutual_distillation(local, global_, conditions=conditions, direction=direction)
    for b in range(4):
        loss, local_teaches, global_teaches = references.distillation(
            {"local": local.distances[b], "global": global_.distances[b]},
            {"local": local.text_similarities[b], "global": global_.text_similarities[b]},
            conditions,
            direction,
        )
        assert term.loss[b].item() == pytest.approx(loss, rel=1e-5)
        assert term.local_to_global[b].nonzero().flatten().tolist() == local_teaches
        assert term.global_to_local[b].nonzero().flatten().tolist() == global_teaches


def test_equally_confident_views_make_local_the_reliable_one() -> None:
    same = view_output(3, 5, seed=0)
    local, global_ = reliable_groups(same, same, ["text", "visual"])
    assert local.all()
    assert not global_.any()


@pytest.mark.parametrize("conditions", CONDITIONS[1:])
def test_an_empty_group_is_exactly_zero_with_gradients_defined(conditions: Sequence[str]) -> None:
    leaf = view_output(3, 5, seed=0).distances.requires_grad_()
    # The same output twice: local is reliable everywhere, and nobody is left to be taught by the global view.
    same = ViewOutput(leaf, leaf.detach())
    term = mutual_distillation(same, same, conditions=conditions, direction="global_to_local")
    assert term.loss.item() == 0
    term.loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize(("direction", "detach_teacher"), list(itertools.product(DIRECTIONS[:2], [False, True])))
def test_detaching_keeps_the_teacher_out_of_the_gradients(direction: Direction, detach_teacher: bool) -> None:
    leaves = [view_output(10, 5, seed=s) for s in (0, 1)]
    leaves = [ViewOutput(*(x.requires_grad_() for x in leaf)) for leaf in leaves]
    local, global_ = leaves
    term = mutual_distillation(local, global_, direction=direction, detach_teacher=detach_teacher)
    teacher, student = (local, global_) if direction == "local_to_global" else (global_, local)
    group = term.local_to_global | term.global_to_local
    gradients = torch.autograd.grad(
        term.loss, [teacher.distances, teacher.text_similarities, student.distances], materialize_grads=True
    )
    assert gradients[0].any().item() is not detach_teacher
    assert gradients[1].any().item() is not detach_teacher
    assert gradients[2][group].any(-1).all()
    assert not gradients[2][~group].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_under_autocast_within_a_thousandth_of_float64(dtype: torch.dtype, conditions: tuple[str, ...]) -> None:
    given = [ViewOutput(*((x * 10).to(dtype) for x in view_output(10, 5, seed=s))) for s in (0, 1)]
    with torch.autocast("cpu", dtype=dtype):
        loss = mutual_distillation(*given, conditions=conditions, direction="mutual").loss
    expected = references.distillation(
        {"local": given[0].distances, "global": given[1].distances},
        {"local": given[0].text_similarities, "global": given[1].text_similarities},
        conditions,
        "mutual",
    )[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_kl_is_the_sum_over_classes_and_finite_far_apart() -> None:
    teacher, student = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([2.0, 0.0, 1.0])
    p, q = references.softmax(teacher.tolist()), references.softmax(student.tolist())
    assert kl_divergence(teacher, student).item() == pytest.approx(references.kl(p, q), rel=1e-6)
    assert kl_divergence(torch.tensor([500.0, 0.0]), torch.tensor([0.0, 500.0])).item() == pytest.approx(500)
