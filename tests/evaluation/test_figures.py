"""The pictures: their cells and bars hold the numbers' colours; the evidence is what the head did."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from clip_m2df.evaluation import figures
from clip_m2df.evaluation.evidence import HardEpisode, QueryEvidence, Reliabilities, ValidationEvidence, query_evidence
from clip_m2df.evaluation.open_set import SCORES, OpenSet, OpenSetCurve, auroc, operating_curve, oscr
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.matching import cosine, frame_costs, otam_alignment
from clip_m2df.nn.prompts import prompt_scores
from tests.evaluation.drawn import NAMES, clips, colours, head, texts


def played(frames: int = 5, n_shot: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((3, n_shot, frames, 16), (4, frames, 16), (3, 16))
    support, query, prompts = (torch.randn(size, generator=generator) for size in sizes)
    return support, query, prompts


def evidence_of(
    model: M2DFHead, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor | None = None
) -> QueryEvidence:
    """On a query of class 2, whose rival is class 0."""
    pair = [2, 0]
    return query_evidence(model, model.prototypes(support[pair], prompts[pair]), pair, query, prompts, draws)


def episode(*, with_frames: bool = True, frames: int = 5, **options: object) -> HardEpisode:
    support, query, prompts = played(frames)
    evidence = evidence_of(head(**options), support, query[1], prompts)
    return HardEpisode(
        number=7,
        class_names=NAMES,
        labels=[0, 2, 1, 2],
        predicted=[0, 0, 1, 1],
        rivals=[1, 0, 2, 1],
        losses=[0.1, 3.0, 0.2, 1.5],
        support=clips(3, frames) if with_frames else None,
        query=clips(4, frames, seed=1) if with_frames else None,
        evidence=evidence,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"single_direction": True, "top_k": 2}, {"views": ["global"]}, {"pps": False}, {"selection": "each"}],
)
def test_evidence_is_what_the_head_did(options: dict[str, object]) -> None:
    support, query, prompts = played()
    model = head(**options)
    output = model(support, query, prompts)
    evidence = evidence_of(model, support, query[1], prompts)
    assert evidence.alignments.keys() == evidence.distances.keys() == output.views.keys()
    for view, own in output.views.items():
        distances = own.distances - model.least_distance(5, view)
        assert evidence.distances[view] == pytest.approx((distances[1, 2].item(), distances[1, 0].item()), abs=1e-4)
        fused, prototype = model.embed_queries(query[1:2], prompts)[0][view], model.prototypes(support, prompts)[view]
        fused = fused[:, [2, 0]] if model.selection == "each" else fused
        costs = frame_costs(fused[..., 1:, :], prototype[[2, 0], 1:])
        expected = otam_alignment(costs, smoothing=model.smoothing, single_direction=model.single_direction)[0]
        assert torch.allclose(evidence.alignments[view], expected, atol=1e-5)
    assert torch.allclose(evidence.probabilities, output.prompt_probabilities[1], atol=1e-6)
    one = -1 if model.selection == "each" else int(output.prompt_indices[1])
    assert evidence.chosen == (one if model.pps else None)
    assert torch.allclose(evidence.frame_scores, cosine(prompts, query[1]))
    assert evidence.counted.sum(-1).tolist() == [model.top_k] * 3
    score = prompt_scores(query[1:2], prompts, model.top_k)[0]
    assert torch.allclose((evidence.frame_scores * evidence.counted).sum(-1) / model.top_k, score, atol=1e-6)


def test_a_sampling_head_shows_the_prompt_that_was_drawn() -> None:
    support, query, prompts = played()
    model = head(selection="sample", temperature=1.0)
    draws = torch.tensor([0.1, 0.9, 0.5, 0.5])
    chosen = int(model(support, query, prompts, draws).prompt_indices[1])
    evidence = evidence_of(model, support, query[1], prompts, draws[1:2])
    assert evidence.chosen == chosen == 2


def test_the_confusion_matrix_is_dark_where_queries_went() -> None:
    confusion = torch.tensor([[9, 1, 0], [0, 0, 0], [0, 5, 5]])
    figure = figures.confusion_matrix(confusion, NAMES)
    lines = texts(figure)
    assert [line for line in lines if line.isdigit()] == ["9", "1", "5", "5"]
    assert [line for line in lines if line in NAMES] == 2 * NAMES
    (image,) = figure.axes[0].images
    shares = np.asarray(image.get_array())
    assert shares == pytest.approx(np.array([[0.9, 0.1, 0], [0, 0, 0], [0, 0.5, 0.5]]))
    found = colours(figures.picture(figure))
    shades = image.to_rgba(np.array([0, 0.1, 0.5, 0.9]), bytes=True)[:, :3]
    assert (np.diff(shades.sum(1, dtype=int)) < 0).all()
    for shade, cells in zip(shades, (5, 1, 2, 1), strict=True):
        assert 600 * cells < found["#" + bytes(shade).hex()] <= 900 * cells


@pytest.mark.parametrize("n", [24, 100])
def test_names_of_any_number_of_classes_can_be_read(n: int) -> None:
    names = [f"a cyan circle moving somewhere {c}" for c in range(n)]
    confusion = torch.full((n, n), 123)
    for figure in (figures.confusion_matrix(confusion, names), figures.class_accuracies(confusion, names)):
        lines = texts(figure)
        assert set(names) < set(lines)
        assert figures.picture(figure).width < 1200
    counts = texts(figures.confusion_matrix(confusion, names)).count("123")
    assert counts == (n * n if n <= 40 else 0)


def test_bars_are_as_long_as_the_accuracies() -> None:
    right = torch.tensor([10, 5, 0])
    confusion = torch.diag(right) + torch.tensor([[0, 0, 0], [5, 0, 0], [0, 10, 0]])
    found = colours(figures.picture(figures.class_accuracies(confusion, NAMES)))
    bars, rest = found[figures.VIEW_COLOURS["local"]], found[figures.LIGHT]
    assert bars / (bars + rest) == pytest.approx(0.5, abs=0.01)


def test_classes_without_queries_come_last() -> None:
    confusion = torch.tensor([[5, 2, 0], [0, 0, 0], [0, 0, 7]])
    lines = texts(figures.class_accuracies(confusion, NAMES))
    assert [line for line in lines if line in NAMES] == ["a cat", "a tree", "a car"]
    assert {"71% of 7", "100% of 7", "no queries"} < set(lines)


@pytest.mark.parametrize("with_frames", [True, False])
def test_an_episode_shows_its_queries_in_the_order_of_their_loss(with_frames: bool) -> None:
    hard = episode(with_frames=with_frames)
    assert hard.loss == pytest.approx(1.2)
    assert hard.hardest == 1
    lines = texts(figures.hard_episode(hard, rank=3))
    losses = [f"cross-entropy {loss}" for loss in ("3.00", "1.50", "0.20", "0.10")]
    assert [line for line in lines if line.startswith("cross")] == losses
    assert lines[lines.index(losses[0]) :][:6] == [losses[0], "a tree", "a cat", losses[1], "a tree", "a car"]
    assert lines.count("the same") == 2
    assert "hardest episode no. 3: episode 7, cross-entropy 1.20" in lines
    assert not any("0.10" in line for line in texts(figures.hard_episode(hard, most_queries=3)))


def test_an_episode_shows_the_frames_of_queries_and_classes() -> None:
    shades = torch.arange(7, dtype=torch.uint8).mul(30).view(7, 1, 1, 1, 1).expand(7, 5, 3, 16, 16)
    hard = episode()._replace(support=shades[:3], query=shades[3:])
    found = colours(figures.picture(figures.hard_episode(hard)))
    # By class 0 to 2 and query 0 to 3: whose classes are 0, 2, 1, 2, and taken for 0, 0, 1, 1.
    strips = [2, 2, 2, 1, 1, 1, 1]
    # White and black have letters too.
    shown = [found["#" + 3 * f"{30 * i:02x}"] for i in range(1, 7)]
    assert shown == pytest.approx([40 * 40 * 5 * n for n in strips[1:]], rel=0.01)


def test_strips_hold_the_frames() -> None:
    clip = torch.arange(12, dtype=torch.uint8).mul(20).view(12, 1, 1, 1).expand(12, 3, 4, 4)
    shown = figures.strip(clip, 4)
    assert shown.size == (32, 4)
    values: list[Any] = [shown.getpixel((4 * i + 1, 1)) for i in range(8)]
    assert values[0] == (0, 0, 0)
    assert values[-1] == (220, 220, 220)
    assert values == sorted(values)
    upright = figures.strip(clip, 4, most=None, upright=True)
    assert upright.size == (4, 48)
    assert upright.getpixel((0, 47)) == (220, 220, 220)


def pictures_of(hard: HardEpisode) -> tuple[Figure, Figure]:
    clip = None if hard.query is None else hard.query[hard.hardest]
    aligned = figures.alignment_maps(hard.alignments(), clip, "soft alignment")
    return aligned, figures.prompt_map(hard.prompt_scores(), clip, "prompt selection", own=2)


@pytest.mark.parametrize("frames", [1, 5, 40])
@pytest.mark.parametrize("with_frames", [True, False])
def test_alignments_and_prompt_scores_of_any_length_fit(frames: int, with_frames: bool) -> None:
    for figure in pictures_of(episode(with_frames=with_frames, frames=frames)):
        assert {"1", str(frames)} < set(texts(figure))
        picture = figures.picture(figure)
        assert 100 < picture.width < 2000
        assert 100 < picture.height < 2000
        assert len(colours(picture)) > 10


def test_an_alignment_says_what_is_aligned_with_what() -> None:
    hard = episode()
    evidence = hard.evidence
    assert evidence is not None
    lines = texts(pictures_of(hard)[0])
    for view, (own, rival) in evidence.distances.items():
        for distance, caption in ((own, "its class: a tree"), (rival, "taken for: a cat")):
            heading = lines.index(f"{view} view, distance {distance:.2f}")
            assert lines[heading + 1] == caption
    second = "runner-up: a cat"
    assert texts(pictures_of(hard._replace(predicted=[0, 2, 1, 1]))[0]).count(second) == 2


def test_evidence_aligns_with_as_many_classes_as_there_are_prototypes() -> None:
    support, query, prompts = played()
    model = head()
    every = query_evidence(model, model.prototypes(support, prompts), range(3), query[1], prompts)
    pair = evidence_of(model, support, query[1], prompts)
    views = model(support, query, prompts).views
    for view, found in every.alignments.items():
        assert found.shape == (3, 5, 5)
        assert torch.allclose(found[[2, 0]], pair.alignments[view], atol=1e-5)
        above = views[view].distances[1] - model.least_distance(5, view)
        assert every.distances[view] == pytest.approx(above.tolist(), abs=1e-4)


def rectangles(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_the_frames_that_count_are_framed() -> None:
    hard = episode()
    assert hard.evidence is not None
    figure = pictures_of(hard)[1]
    none = hard.evidence._replace(counted=torch.zeros_like(hard.evidence.counted))
    bare = pictures_of(hard._replace(evidence=none))[1]
    assert figures.WRONG in colours(figures.picture(figure))
    assert figures.WRONG not in colours(figures.picture(bare))
    frames = {patch.get_xy() for patch in rectangles(figure.axes[0]) if patch.get_edgecolor() == to_rgba(figures.WRONG)}
    expected = {(t - 0.45, c - 0.45) for c, t in hard.evidence.counted.nonzero().tolist()}
    assert frames == expected


def test_the_chosen_prompt_is_named() -> None:
    hard = episode()
    assert hard.evidence is not None
    lines = texts(pictures_of(hard)[1])
    said = [
        f"probability {p:.2f}" + ", chosen" * (c == hard.evidence.chosen)
        for c, p in enumerate(hard.evidence.probabilities.tolist())
    ]
    assert [line for line in lines if line.startswith("probability")] == said
    assert {f"{cosine:z.2f}" for row in hard.evidence.frame_scores.tolist() for cosine in row} < set(lines)


def test_reliabilities_have_a_bar_for_each_bin_and_share() -> None:
    confidences = {"visual": {"local": torch.tensor([0.2, 0.2, 1.0]), "global": torch.tensor([0.2, 1.0, 1.0])}}
    figure = figures.reliabilities(Reliabilities(confidences, {"local_to_global": 1.0, "global_to_local": 0.0}), bins=2)
    histogram, shares = figure.axes
    assert sorted(bar.get_height() for bar in rectangles(histogram)) == [1, 1, 2, 2]
    assert [bar.get_width() for bar in rectangles(shares)] == [1, 1, 1, 0]
    lines = texts(figure)
    assert {"visual confidence", "local", "global", "local teaches global", "100.0% of the queries"} < set(lines)
    (_,) = figures.reliabilities(Reliabilities(confidences, {})).axes


def test_what_is_missing_is_left_out() -> None:
    hard = episode(pps=False)
    every = ValidationEvidence(NAMES, torch.eye(3, dtype=torch.long), [hard], Reliabilities({}, {}))
    assert figures.validation_pictures(every).keys() == {
        "confusion_matrix", "class_accuracy", "hardest_episode_1", "alignment",
    }  # fmt: skip
    bare = ValidationEvidence(NAMES, torch.zeros(0, 0), [hard._replace(evidence=None)], Reliabilities({}, {}))
    assert figures.validation_pictures(bare).keys() == {"hardest_episode_1"}


def test_what_is_not_a_number_is_borne_with() -> None:
    support, query, prompts = played()
    evidence = evidence_of(head(), support * torch.nan, query[1], prompts)
    hard = episode()._replace(evidence=evidence, losses=[torch.inf] * 4)
    columns = {"visual local": torch.tensor([torch.nan]), "teaches local_to_global": torch.tensor([1.0])}
    found = ValidationEvidence(NAMES, torch.eye(3, dtype=torch.long), [hard], Reliabilities.of(columns))
    assert "alignment" in figures.validation_pictures(found)
    assert found.reliabilities == Reliabilities({}, {"local_to_global": 1.0})
    metric = OpenSet()
    metric.update(torch.zeros(2, 3), torch.tensor([False, False]), torch.tensor([[1.0, 0, 0], [torch.inf, 0, 0]]))
    metric.compute()
    assert metric.curves.keys() == {"distance", "margin", "energy"}  # inf - inf is not a number
    assert "open_set" in figures.validation_pictures(found._replace(open_set=metric.curves))


def test_names_take_little_room_and_hold_no_equations() -> None:
    long = "a sentence about everything that can be seen in a video"
    names = ["a cat", long, "打篮球", "café → $x^2$ and $y$", "two\nlines"]
    shown = ["a cat", f"{long[:47]}…", r"\u6253\u7bee\u7403", "café → $x^2$ and $y$", r"two\nlines"]
    hard = episode()._replace(class_names=names[1:4])
    confusion = torch.eye(5, dtype=torch.long)
    for figure in (
        figures.confusion_matrix(confusion, names),
        figures.class_accuracies(confusion, names),
    ):
        assert [line for line in texts(figure) if line in shown][:5] == shown
    for figure in (figures.hard_episode(hard), pictures_of(hard)[1]):
        assert set(shown[1:4]) < set(texts(figure))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.validation_pictures(ValidationEvidence(names, confusion, [hard], Reliabilities({}, {})))


def test_a_curve_of_unknown_queries_goes_through_the_shares_of_those_that_are_accepted() -> None:
    known, unknown = torch.tensor([3.0, 2.0, 1.0, 0.0]).double(), torch.tensor([2.5, 0.5]).double()
    points_of = operating_curve(known, torch.tensor([True, False, True, True]), unknown)
    found = dict.fromkeys(SCORES, OpenSetCurve(auroc(known, unknown), points_of))
    points = {round(share, 2): (accepted, right) for share, accepted, right in found["margin"].points.tolist()}
    assert points[0.0] == points[0.49] == (0.25, 0.25)
    assert points[0.5] == points[0.99] == (0.75, 0.5)
    assert points[1.0] == (1.0, 0.75)
    figure = figures.open_set_curves(found)
    accepted, right = figure.axes
    for axes, column in ((accepted, 1), (right, 2)):
        for line in axes.lines:
            assert np.array_equal(np.asarray(line.get_ydata()), found["margin"].points[:, column].numpy())
    assert [line.get_label() for line in accepted.lines] == [f"{score}, AUROC 0.500" for score in SCORES]
    assert figures.picture(figure).width > 600


def test_the_area_under_a_curve_is_the_auroc() -> None:
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(500, generator=generator) + 1, torch.randn(400, generator=generator)
    right = torch.rand(500, generator=generator) < 0.6
    points = operating_curve(known, right, unknown, points=401)
    assert torch.trapezoid(points[:, 1], points[:, 0]).item() == pytest.approx(auroc(known, unknown), abs=2e-3)
    assert torch.trapezoid(points[:, 2], points[:, 0]).item() == pytest.approx(oscr(known, right, unknown), abs=2e-3)
