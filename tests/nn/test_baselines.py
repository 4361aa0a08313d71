"""Baselines: cases worked out by hand, slow loops, and what every head has to hold to."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_m2df import UserError
from clip_m2df.nn.baselines import (
    HEADS,
    BiMHMHead,
    CLIPFSARHead,
    LinearProbeHead,
    NearestPrototypeHead,
    OTAMHead,
    TipAdapterHead,
    ZeroShotHead,
    build_head,
    head_class,
    options_of,
)
from clip_m2df.nn.class_text import class_text_logits
from clip_m2df.nn.head import Embedded, Head
from tests.nn import references

BASELINES = [
    *("nearest_prototype", "otam", "zero_shot", "bi_mhm", "clip_fsar"),
    *("linear_probe", "tip_adapter", "trx", "ts_fsar"),
]
# Whose logits have no bound.
UNBOUNDED = ("linear_probe", "ts_fsar")
TRAINED = ("m2df", "clip_fsar", "trx", "ts_fsar")
SIZES: dict[str, dict[str, Any]] = {
    **{name: {"num_heads": 2, "hidden_dim": 12} for name in ("m2df", "clip_fsar")},
    "trx": {"width": 12},
    "ts_fsar": {"width": 6, "frames": 5},
}
# Cosine and cost of two vectors of norm 1 that are the same; of two at a right angle they are 0 and 1.
SAME = 1 / 1.01
NEAR = 1 - SAME


def make_head(name: str, dim: int = 8, **options: Any) -> Head:
    torch.manual_seed(0)
    return build_head(name, {"dim": dim} | SIZES.get(name, {}) | options).eval()


def episode(
    *leading: int, n_shot: int = 2, frames: int = 5, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """3-way, 4 queries: support, query and prompts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*leading, 3, n_shot, frames, dim), (*leading, 4, frames, dim), (*leading, 3, dim))
    support, query, prompts = (torch.randn(shape, generator=generator) for shape in shapes)
    return support, query, prompts


def otam_2x2(a: float, b: float, c: float, d: float, smoothing: float) -> float:
    """OTAM one way of the costs [[a, b], [c, d]], written out."""

    def least(*values: float) -> float:
        return -smoothing * math.log(sum(math.exp(-value / smoothing) for value in values))

    first = c + least(0, 0, a)  # the second row aligned with the first column, entered from either side
    second = d + least(a, first)
    return least(a + b, a + b, second)


# ---------------------------------------------------------------------------------------------- by hand


def test_nearest_prototype_by_hand() -> None:
    # Means of two shots of two frames: class 0 (2, 0), class 1 (0, 2). Of the queries' frames: (2, 0) and (3, 4).
    support = torch.tensor([[[[1.0, 0], [1, 0]], [[3, 0], [3, 0]]], [[[0, 1], [0, 1]], [[0, 1], [0, 5]]]])
    query = torch.tensor([[[4.0, 0], [0, 0]], [[3, 0], [3, 8]]])
    prompts = torch.zeros(2, 2)
    expected = torch.tensor([[4 / 4.01, 0], [6 / 10.01, 8 / 10.01]])
    torch.testing.assert_close(NearestPrototypeHead(dim=2)(support, query, prompts).logits, 10 * expected)


@pytest.mark.parametrize("smoothing", [0.5, 0.1])
def test_otam_by_hand(smoothing: float) -> None:
    # The mean of class 0's shots is the frames (1, 0), (0, 1); class 1 has them the other way round.
    support = torch.tensor([[[[2.0, 0], [0, 2]], [[0, 0], [0, 0]]], [[[0, 1], [1, 0]], [[0, 1], [1, 0]]]])
    query = torch.tensor([[[1.0, 0], [0, 1]]])
    prompts = torch.zeros(2, 2)
    in_order = otam_2x2(NEAR, 1, 1, NEAR, smoothing)
    reversed_ = otam_2x2(1, NEAR, NEAR, 1, smoothing)
    assert in_order < reversed_
    # Both matrices are their own transposes, so the two directions are the same.
    both = OTAMHead(dim=2, smoothing=smoothing)(support, query, prompts).logits
    torch.testing.assert_close(both, torch.tensor([[-2 * in_order, -2 * reversed_]]))
    one = OTAMHead(dim=2, smoothing=smoothing, single_direction=True)(support, query, prompts).logits
    torch.testing.assert_close(one, torch.tensor([[-in_order, -reversed_]]))


def test_zero_shot_by_hand() -> None:
    query = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [0, 1]]])
    prompts = torch.tensor([[1.0, 0], [0, 2]])
    # Cosines with the second prompt are 2 / (1 · 2 + 0.01).
    expected = 100 * torch.tensor([[SAME / 2, 2 / 2.01 / 2], [0, 2 / 2.01]])
    nothing = torch.full((2, 1, 2, 2), math.nan)  # the support is not looked at
    torch.testing.assert_close(ZeroShotHead(dim=2)(nothing, query, prompts).logits, expected)


def test_bi_mhm_by_hand() -> None:
    # Class 0: the mean of two shots is (1, 0), (0, 1). Class 1: (0, 1) twice.
    support = torch.tensor([[[[2.0, 0], [0, 2]], [[0, 0], [0, 0]]], [[[0, 1], [0, 1]], [[0, 1], [0, 1]]]])
    query = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [1, 0]]])
    # Query 0 with class 0: both its frames are near one; of the prototype's, one is near and the other at cost 1.
    # With class 1 all costs are 1. Query 1 has class 0's frames, in another order, which doesn't count; with class 1
    # one of its frames is near, and both of the prototype's.
    half = (NEAR + 1) / 2
    expected = -torch.tensor([[NEAR + half, 2], [2 * NEAR, half + NEAR]])
    torch.testing.assert_close(BiMHMHead(dim=2)(support, query, torch.zeros(2, 2)).logits, expected)


def test_tip_adapter_by_hand() -> None:
    # A query whose mean is (1, 0): one shot of class 0 is the same, the other at a right angle; class 1's is minus it.
    support = torch.tensor([[[[2.0, 0], [0, 0]], [[0, 1], [0, 1]]], [[[-1, 0], [-1, 0]], [[-1, 0], [-1, 0]]]])
    query = torch.tensor([[[1.0, 0], [1, 0]]])
    prompts = torch.tensor([[0.0, 1], [1, 0]])
    cache = [(math.exp(-5 * NEAR) + math.exp(-5)) / 2, math.exp(-5 * (1 + SAME))]
    expected = torch.tensor([[2 * cache[0], 100 * SAME + 2 * cache[1]]])
    logits = TipAdapterHead(dim=2, alpha=2.0, beta=5.0)(support, query, prompts).logits
    torch.testing.assert_close(logits, expected)
    # Without the cache it is zero-shot on the mean of the frames.
    support, query, prompts = episode()
    zero_shot = ZeroShotHead(dim=8)(support, query.mean(-2, keepdim=True), prompts).logits
    torch.testing.assert_close(TipAdapterHead(dim=8, alpha=0.0)(support, query, prompts).logits, zero_shot)


def test_tip_adapter_with_classes_of_other_numbers_of_shots_equals_the_loop() -> None:
    head, shots = TipAdapterHead(dim=8, alpha=7.0, beta=2.0), [episode(n_shot=n, seed=n)[0][0] for n in (1, 3, 2)]
    _, query, prompts = episode(seed=9)
    logits = references.logits_of_classes(head, shots, query, prompts)
    for q, video in enumerate(query.mean(-2).tolist()):
        for c, own in enumerate(shots):
            near = [math.exp(-2 * (1 - references.cosine(video, shot.mean(0).tolist()))) for shot in own]
            expected = 100 * references.cosine(video, prompts[c].tolist()) + 7 * sum(near) / len(near)
            assert logits[q, c].item() == pytest.approx(expected, abs=1e-4)


def normalised_means(videos: Tensor) -> Tensor:
    return F.normalize(videos.double().mean(-2), dim=-1)


@pytest.mark.parametrize("c", [0.1, 10.0])
@pytest.mark.parametrize("shots", [(2, 2), (1, 1, 1), (1, 3, 2)])
def test_the_linear_probe_is_where_the_loss_is_least(shots: tuple[int, ...], c: float) -> None:
    head = LinearProbeHead(dim=8, c=c)
    own = [episode(n_shot=n, seed=n)[0][i] for i, n in enumerate(shots)]
    query = episode(seed=9)[1]
    logits = references.logits_of_classes(head, own, query, torch.zeros(len(shots), 8))

    # By Newton's method; of two classes one vector has the whole penalty, the difference of both classes' weights.
    n_way, x = len(shots), torch.cat([normalised_means(videos) for videos in own])
    labels = torch.arange(n_way).repeat_interleave(torch.tensor(shots))

    def loss(weights: Tensor) -> Tensor:
        w, b = weights.view(n_way, 9).split((8, 1), 1)
        penalty = (w[1] - w[0]).square().sum() / 2 if n_way == 2 else w.square().sum() / 2
        tie = 1e-6 * weights.square().sum() / 2  # of what the loss leaves open
        total: Tensor = penalty + c * F.cross_entropy(x @ w.T + b.T, labels, reduction="sum") + tie
        return total

    weights = torch.zeros(n_way * 9, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(loss, weights)
        weights = weights - torch.linalg.solve(torch.autograd.functional.hessian(loss, weights), gradient)
    w, b = weights.view(n_way, 9).split((8, 1), 1)
    expected = normalised_means(query) @ w.T + b.T
    found = logits.double() - logits.double().mean(-1, keepdim=True)
    torch.testing.assert_close(found, expected - expected.mean(-1, keepdim=True), atol=2e-3, rtol=1e-2)
    assert logits.std(-1).min() > 1e-3


def test_the_linear_probe_of_mirrored_classes_by_hand() -> None:
    # Class 1 is minus class 0: no intercept, and weights along their axis, w = C σ(−w) for the second class alone.
    support = torch.tensor([[[[3.0, 0]]], [[[-3.0, 0]]]])
    query = torch.tensor([[[2.0, 0]], [[0.0, 4]]])
    logits = LinearProbeHead(dim=2, c=4.0)(support, query, torch.zeros(2, 2)).logits
    w = 0.0
    for _ in range(200):
        w = (w + 2 * 4.0 / (1 + math.exp(w))) / 2
    torch.testing.assert_close(logits, torch.tensor([[w / 2, -w / 2], [0.0, 0.0]]), atol=1e-3, rtol=0)


def test_the_linear_probe_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"linear_probe needs scikit-learn: pip install clip-m2df\[probe\]"):
        make_head("linear_probe")


def test_clip_fsar_without_its_transformer_is_otam() -> None:
    head: Any = make_head("clip_fsar", depth=2)
    support, query, prompts = episode()
    otam = OTAMHead(dim=8)(support, query, prompts).logits
    assert not torch.allclose(head(support, query, prompts).logits, otam, atol=1e-2)
    for layer in head.transformer.layers:
        for part in (layer.to_out[0], layer.feed_forward[3]):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    torch.testing.assert_close(head(support, query, prompts).logits, otam)
    one_way = OTAMHead(dim=8, single_direction=True, smoothing=0.2)(support, query, prompts).logits
    head.single_direction, head.smoothing = True, 0.2
    torch.testing.assert_close(head(support, query, prompts).logits, one_way)


def averaging_head() -> CLIPFSARHead:
    """Its attention adds to each token the mean of all, as the norm makes them; the feed-forward part adds nothing."""
    head = CLIPFSARHead(dim=2, num_heads=1, hidden_dim=4).eval()
    (layer,) = head.transformer.layers
    state = layer.state_dict()
    state["to_q.weight"].zero_()
    for name in ("to_v.weight", "to_out.0.weight"):
        state[name].copy_(torch.eye(2))
    for name in ("to_out.0.bias", "feed_forward.3.weight", "feed_forward.3.bias"):
        state[name].zero_()
    layer.load_state_dict(state)
    return head


def test_clip_fsar_by_hand() -> None:
    # The norm makes (1, 0) to (1, −1) and (0, 1) to (−1, 1), but for its epsilon. A query of both stays as it is, its
    # mean being 0. Beside the prompt (1, 0) the mean of three tokens is (1, −1)/3; beside (0, 1) it is (−1, 1)/3.
    frames: list[list[float]] = [[1.0, 0.0], [0.0, 1.0]]
    support = torch.tensor([[frames], [frames]])
    query = torch.tensor([frames])
    prompts = torch.tensor(frames)
    prototypes = [[[4 / 3, -1 / 3], [1 / 3, 2 / 3]], [[2 / 3, 1 / 3], [-1 / 3, 4 / 3]]]
    expected = []
    for prototype in prototypes:
        costs = [[1 - references.cosine(x, y) for y in prototype] for x in frames]
        (a, b), (c, d) = costs
        expected.append(-otam_2x2(a, b, c, d, 0.5) - otam_2x2(a, c, b, d, 0.5))
    logits = averaging_head()(support, query, prompts).logits
    torch.testing.assert_close(logits, torch.tensor([expected]), atol=1e-4, rtol=0)
    # Two shots with the means (1, 0) and (2/3, 1/3), which the norm makes (1, −1) both, as it does the prompt: that is
    # the mean, too. The frames become (2, −1) and (5/3, −2/3).
    shots = torch.tensor([[frames, [[1.0, 0], [4 / 3, -1 / 3]]]])
    costs = [[1 - references.cosine(x, y) for y in [[2.0, -1.0], [5 / 3, -2 / 3]]] for x in frames]
    (a, b), (c, d) = costs
    of_two = -otam_2x2(a, b, c, d, 0.5) - otam_2x2(a, c, b, d, 0.5)
    logits = averaging_head()(shots, query, prompts[:1]).logits
    torch.testing.assert_close(logits, torch.tensor([[of_two]]), atol=1e-4, rtol=0)


def test_prompts_reach_their_own_classes_support_alone() -> None:
    head = make_head("clip_fsar")
    support, query, prompts = episode()
    logits = head(support, query, prompts).logits
    others = prompts.clone()
    others[1] = 3 - others[1]
    changed = head(support, query, others).logits
    assert changed[:, [0, 2]].equal(logits[:, [0, 2]])
    assert (changed[:, 1] - logits[:, 1]).abs().min() > 1e-3


@pytest.mark.parametrize("n_shot", [1, 5])
@pytest.mark.parametrize("depth", [1, 2])
def test_clip_fsar_equals_the_loop(n_shot: int, depth: int) -> None:
    head: Any = make_head("clip_fsar", depth=depth)
    support, query, prompts = episode(n_shot=n_shot, frames=3)

    def attended(sequence: Tensor) -> Tensor:
        tokens = sequence.tolist()
        for layer in head.transformer.layers:
            tokens = references.fusion_layer(layer, tokens, tokens)
        return torch.tensor(tokens)

    prototypes = torch.stack(
        [attended(torch.cat((p[None], s.mean(0))))[1:] for p, s in zip(prompts, support, strict=True)]
    )
    queries = torch.stack([attended(video) for video in query])
    pairs = queries[:, None].expand(4, 3, -1, -1), prototypes.expand(4, 3, -1, -1)
    expected = -references.otam_of(1 - references.cosines(*pairs)).float()
    torch.testing.assert_close(head(support, query, prompts).logits, expected, atol=1e-4, rtol=1e-4)


def test_clip_fsar_compares_the_mean_of_all_frames_with_prompts() -> None:
    head = make_head("clip_fsar", top_k=1)
    nn.init.constant_(head.scale, 3.0)
    support, query, prompts = episode()
    table = torch.cat((prompts, -2 * prompts[:1]))

    def logits(video: Tensor) -> list[float]:
        return [3 * references.cosine(video.mean(0).tolist(), prompt.tolist()) for prompt in table]

    of_support, of_query = class_text_logits(head, support, query, prompts, table)
    torch.testing.assert_close(of_support, torch.tensor([[logits(shot) for shot in shots] for shots in support]))
    torch.testing.assert_close(of_query, torch.tensor([logits(video) for video in query]))


# ----------------------------------------------------------------------------------- of all of them


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_classes_shots_and_episodes_may_come_in_any_order(name: str) -> None:
    head = make_head(name)
    support, query, prompts = episode(2, 3, n_shot=5)
    logits = head(support, query, prompts).logits
    order, shots = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 4, 0, 2])
    moved = head(support[:, :, order][..., shots, :, :], query, prompts[:, :, order]).logits
    torch.testing.assert_close(moved, logits[..., order])
    for i in range(2):
        for j in range(3):
            alone = head(support[i, j], query[i, j], prompts[i, j])
            torch.testing.assert_close(alone.logits, logits[i, j])
    assert (logits.argmax(-1) != 0).any()


@pytest.mark.parametrize("name", BASELINES)
def test_what_there_is_beside_the_scores(name: str) -> None:
    head = make_head(name, top_k=2, temperature=20.0).train()
    support, query, prompts = episode(2)
    output = head(support, query, prompts)  # nothing is drawn in training either
    for i in range(2):
        expected = torch.tensor(references.prompt_probabilities(query[i], prompts[i], 2, 20.0))
        torch.testing.assert_close(output.prompt_probabilities[i], expected)
        assert output.prompt_indices[i].equal(expected.argmax(-1))
    assert output.views == {}
    assert output.distillation_loss.tolist() == [0, 0]
    for taught in output.distillation[1:]:
        assert taught.tolist() == [[False] * 4] * 2


@pytest.mark.parametrize("name", [name for name in BASELINES if head_class(name).differentiable])
def test_gradients_reach_all_that_counts(name: str) -> None:
    head = make_head(name).train()
    support, query, prompts = (part.requires_grad_() for part in episode())
    F.cross_entropy(head(support, query, prompts).logits, torch.tensor([0, 1, 2, 0])).backward()
    counting = {"support": name != "zero_shot", "query": True, "prompts": head_class(name).uses_prompts}
    for part, counts in zip((support, query, prompts), counting.values(), strict=True):
        assert (part.grad is not None) is counts
        assert part.grad is None or (part.grad.isfinite().all() and part.grad.abs().sum() > 0)
    without = [parameter for parameter, p in head.named_parameters() if p.grad is None]
    assert without == ["scale"]
    of_support, of_query = class_text_logits(head, support, query, prompts, prompts)
    (of_support.diagonal(dim1=0, dim2=2).sum() + of_query.sum()).backward()
    assert head.scale.grad is not None
    assert head.scale.grad.abs().item() > 0


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_bfloat16_features_are_scored_in_float32(name: str) -> None:
    head = make_head(name)
    support, query, prompts = episode(20)
    support, query = support.bfloat16(), query.bfloat16()  # as a tower gives them under autocast
    expected = head(support.float(), query.float(), prompts).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(support, query, prompts).logits
    assert logits.dtype == torch.float32
    if head_class(name).trained:  # the products with whose weights are not
        torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.02)
    else:
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"single_direction": True}, {"smoothing": 0.1}, {"view_weights": [0.5, 3.0]}])
@pytest.mark.parametrize("name", [name for name in HEADS if name not in UNBOUNDED])
def test_the_least_distance_is_that_of_one_picture_all_the_time(name: str, options: dict[str, Any]) -> None:
    known = options_of(head_class(name))
    model = make_head(name, **{key: value for key, value in options.items() if key in known})
    for frames in (2, 8) if name == "trx" else (1, 2, 8):  # trx needs two for a pair
        picture = 1e3 * torch.ones(1, frames, 8)
        # As the head's own comparison sees it, whatever its encoders make of a video.
        prompt = torch.ones(1, 8)
        query, prototypes = model.embed(picture, prompt), model.prototypes(picture.unsqueeze(0), prompt)
        query, prototypes = (kept.map(lambda values: torch.full_like(values, 1e3)) for kept in (query, prototypes))
        output = model.match(query, prototypes, model.select_prompts(picture, prompt))
        least = model.least_distance(frames)
        assert -output.logits.item() == pytest.approx(least, abs=1e-3)
        for view, own in output.views.items():
            assert own.distances.item() == pytest.approx(model.least_distance(frames, view), abs=1e-3)
        with torch.no_grad():
            assert (-model(*episode(frames=frames)).logits >= least).all()


@pytest.mark.parametrize("name", UNBOUNDED)
def test_logits_without_a_bound_are_counted_from_0(name: str) -> None:
    model = make_head(name)
    support, query, prompts = episode()
    assert (model(support, query, prompts).logits > 0).any()
    assert model.least_distance(5) == 0


def test_heads_by_name() -> None:
    assert list(HEADS) == ["m2df", *BASELINES]
    for name in HEADS:
        assert isinstance(make_head(name), Head)
        assert head_class(name).trained is (name in TRAINED)
        has_weights = [parameter for parameter, _ in make_head(name).named_parameters()] != ["scale"]
        assert has_weights is head_class(name).trained


class Bare(nn.Module):
    """No head at all."""


class WithForward(OTAMHead):
    """A head with a forward of its own, as heads once were written."""

    def forward(self, *inputs: Any) -> Any:
        return super().forward(*inputs)


class WithoutSteps(Head):
    """A head that lacks most steps."""

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        return Embedded(frames=videos)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("Bare", "no head"), ("WithForward", "forward of its own"), ("WithoutSteps", "no match and no prototype")],
)
def test_a_head_without_the_steps_of_one_is_refused_with_what_to_write(name: str, fault: str) -> None:
    path, remedy = f"{__name__}.{name}", r"clip_m2df\.nn\.head\.Head .*embed, prototype and match"
    with pytest.raises(UserError, match=f"head: '{path}' .*{fault}.*{remedy}"):
        head_class(path)


def test_sizes_beyond_the_memory_are_refused_by_name() -> None:
    for name, size in (("trx", "width"), ("ts_fsar", "width"), ("m2df", "hidden_dim")):
        with pytest.raises(UserError, match=f"head_options: .* does not take .*{size}"):
            build_head(name, {"dim": 64, size: 10**13})


@pytest.mark.parametrize(("head", "option"), [("linear_probe", "c"), ("tip_adapter", "beta"), ("trx", "width")])
def test_no_number_is_no_value_of_an_option(head: str, option: str) -> None:
    with pytest.raises(UserError, match=f"head_options: {option} is null; it must be a number"):
        build_head(head, {"dim": 8, option: None})
