"""The pictures: their cells and bars hold the numbers' colours; the evidence is what the head did."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_m2df.evaluation import figures
from clip_m2df.evaluation.evidence import HardEpisode, QueryEvidence, Reliabilities, ValidationEvidence, query_evidence
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.matching import cosine

NAMES = ["a cat", "a car", "a tree"]


def colours(picture: Image.Image) -> dict[tuple[int, int, int], int]:
    """How many pixels have each colour."""
    found = picture.getcolors(maxcolors=1 << 24)
    assert found is not None
    return {colour: count for count, colour in found if isinstance(colour, tuple)}  # type: ignore[misc]


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def head(**options: object) -> M2DFHead:
    torch.manual_seed(0)
    return M2DFHead(dim=16, hidden_dim=32, heads=4, **options).eval()  # type: ignore[arg-type]


def played(frames: int = 5, n_shot: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((3, n_shot, frames, 16), (4, frames, 16), (3, 16))
    support, query, prompts = (torch.randn(size, generator=generator) for size in sizes)
    return support, query, prompts


def evidence_of(
    model: M2DFHead, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor | None = None
) -> QueryEvidence:
    """On a query of class 2, whose rival is class 0."""
    pair = torch.tensor([2, 0])
    own_prompts = prompts[pair].unsqueeze(-2).expand(*support[pair].shape[:-2], -1)
    return query_evidence(model, model.prototype(model.fuse(support[pair], own_prompts)), query, prompts, draws)


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


@pytest.mark.parametrize("options", [{}, {"single_direction": True}, {"views": ["global"]}, {"pps": False}])
def test_evidence_is_what_the_head_did(options: dict[str, object]) -> None:
    support, query, prompts = played()
    model = head(**options)
    output = model(support, query, prompts)
    evidence = evidence_of(model, support, query[1], prompts)
    assert evidence.alignments.keys() == evidence.distances.keys() == output.distances.keys()
    for view, distances in output.distances.items():
        assert evidence.distances[view] == pytest.approx((distances[1, 2].item(), distances[1, 0].item()), abs=1e-4)
        # Each frame of the class is aligned, and with both directions each one of the query.
        assert (evidence.alignments[view].sum(-2) > 1 - 1e-4).all()
        assert model.single_direction or (evidence.alignments[view].sum(-1) > 1 - 1e-4).all()
    assert torch.allclose(evidence.probabilities, output.prompt_probabilities[1], atol=1e-6)
    assert evidence.chosen == (int(output.prompt_indices[1]) if model.pps else None)
    assert torch.allclose(evidence.frame_scores, cosine(prompts, query[1]))
    assert evidence.counted.sum(-1).tolist() == [4, 4, 4]
    score = model.prompt_scores(query[1:2], prompts)[0]
    assert torch.allclose((evidence.frame_scores * evidence.counted).sum(-1) / 4, score, atol=1e-6)


def test_a_sampling_head_shows_the_prompt_that_was_drawn() -> None:
    support, query, prompts = played()
    model = head(selection="sample", temperature=1.0)
    draws = torch.tensor([0.1, 0.9, 0.5, 0.5])
    chosen = int(model(support, query, prompts, draws).prompt_indices[1])
    evidence = evidence_of(model, support, query[1], prompts, draws[1:2])
    assert evidence.chosen == chosen == 2


def test_the_confusion_matrix_is_dark_where_queries_went() -> None:
    confusion = torch.tensor([[9, 1, 0], [0, 0, 0], [0, 5, 5]])
    picture = figures.confusion_matrix(confusion, NAMES)
    cell, left, top = 30, 12 + sheet.column_width(NAMES) + 6, picture.height - 12 - 90

    def corner(row: int, column: int) -> int:
        return sum(picture.getpixel((left + column * cell + 2, top + row * cell + 2)))  # type: ignore[arg-type]

    assert corner(0, 0) < corner(2, 1) == corner(2, 2) < corner(0, 1) < corner(0, 2) == corner(1, 1) == 3 * 255


def test_bars_are_as_long_as_the_accuracies() -> None:
    right = torch.tensor([10, 5, 0])
    confusion = torch.diag(right) + torch.tensor([[0, 0, 0], [5, 0, 0], [0, 10, 0]])
    found = colours(figures.class_accuracies(confusion, NAMES))
    bars, rest = found[sheet.VIEW_COLOURS["local"]], found[sheet.LIGHT]
    assert bars / (bars + rest) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("with_frames", [True, False])
def test_an_episode_shows_its_queries_in_the_order_of_their_loss(with_frames: bool) -> None:
    hard = episode(with_frames=with_frames)
    assert hard.loss == pytest.approx(1.2)
    assert hard.hardest == 1
    found = colours(figures.hard_episode(hard))
    assert found[sheet.WRONG]
    assert found[sheet.RIGHT]
    less = figures.hard_episode(hard, most_queries=2)
    assert sheet.RIGHT not in colours(less)  # both that are left are wrong


def test_strips_hold_the_frames() -> None:
    clip = torch.arange(12, dtype=torch.uint8).mul(20).view(12, 1, 1, 1).expand(12, 3, 4, 4)
    shown = sheet.strip(clip, 4)
    assert shown.size == (32, 4)
    values: list[Any] = [shown.getpixel((4 * i + 1, 1)) for i in range(8)]
    assert values[0] == (0, 0, 0)
    assert values[-1] == (220, 220, 220)
    assert values == sorted(values)
    upright = sheet.strip(clip, 4, most=None, upright=True)
    assert upright.size == (4, 48)
    assert upright.getpixel((0, 47)) == (220, 220, 220)


@pytest.mark.parametrize("frames", [1, 5, 40])
@pytest.mark.parametrize("with_frames", [True, False])
def test_alignments_and_prompt_scores_of_any_length_fit(frames: int, with_frames: bool) -> None:
    hard = episode(with_frames=with_frames, frames=frames)
    assert hard.evidence is not None
    for picture in (figures.alignments(hard, hard.evidence), figures.prompt_scores(hard, hard.evidence)):
        assert 100 < picture.width < 2000
        assert 100 < picture.height < 2000
        assert len(colours(picture)) > 10


def test_evidence_aligns_with_as_many_classes_as_there_are_prototypes() -> None:
    support, query, prompts = played()
    model = head()
    prototype = model.prototype(model.fuse(support, prompts.unsqueeze(-2).expand(*support.shape[:-2], -1)))
    every = query_evidence(model, prototype, query[1], prompts)
    pair = evidence_of(model, support, query[1], prompts)
    distances = model(support, query, prompts).distances
    for view, found in every.alignments.items():
        assert found.shape == (3, 5, 5)
        assert torch.allclose(found[[2, 0]], pair.alignments[view], atol=1e-5)
        assert every.distances[view] == pytest.approx(distances[view][1].tolist(), abs=1e-4)


def test_the_frames_that_count_are_framed() -> None:
    hard = episode()
    assert hard.evidence is not None
    framed = colours(figures.prompt_scores(hard, hard.evidence))[sheet.WRONG]
    none = hard.evidence._replace(counted=torch.zeros_like(hard.evidence.counted))
    assert framed > 12 * 100
    assert sheet.WRONG not in colours(figures.prompt_scores(hard, none))


def test_reliabilities_have_a_bar_for_each_bin_and_share() -> None:
    confidences = {"visual": {"local": torch.tensor([0.2, 0.2, 1.0]), "global": torch.tensor([0.2, 1.0, 1.0])}}
    picture = figures.reliabilities(
        Reliabilities(confidences, {"local_to_global": 1.0, "global_to_local": 0.0}), bins=2
    )
    found = colours(picture)
    # Bars of 160 and of 80, each 7 wide, the sign of the view, and for local a whole share.
    assert found[sheet.VIEW_COLOURS["global"]] == pytest.approx(7 * (80 + 160) + 121, abs=10)
    assert found[sheet.VIEW_COLOURS["local"]] == pytest.approx(7 * (160 + 80) + 121 + 301 * 19, abs=10)


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


def test_names_come_in_letters_that_the_font_has() -> None:
    assert sheet.ascii_letters("café é → 走") == "cafe e ? ?"
    many = [f"class {i}" for i in range(120)]
    picture = figures.confusion_matrix(torch.eye(120, dtype=torch.long), many)
    assert picture.width < 1200


def test_names_take_little_room_and_are_told_apart() -> None:
    long = "a sentence about everything that can be seen in a video"
    names = ["a cat", long, "\u6253\u7bee\u7403", "\u8e22\u8db3\u7403", "caf\u00e9"]
    hard = episode()._replace(class_names=names[1:4])
    found = ValidationEvidence(names, torch.eye(5, dtype=torch.long), [hard], Reliabilities({}, {}))
    short = figures._with_short_names(found)
    cut = f"{long[:45]}..."
    assert short.class_names == ["a cat", cut, "class 2", "class 3", "cafe"]
    assert short.hardest[0].class_names == [cut, "class 2", "class 3"]


def test_classes_without_queries_come_last_and_titles_are_whole() -> None:
    confusion = torch.tensor([[5, 2, 0], [0, 0, 0], [0, 0, 7]])
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        text = sheet.Sheet.text

        def noted(page: Any, place: Any, line: str, **options: Any) -> float:
            written.append(line)
            end = text(page, place, line, **options)
            assert options.get("anchor", "la") != "la" or end <= page.image.width
            return end

        patch.setattr(sheet.Sheet, "text", noted)
        figures.class_accuracies(confusion, NAMES)
        assert [line for line in written if line in NAMES] == ["a cat", "a tree", "a car"]
        figures.confusion_matrix(confusion, NAMES)
        one_view = episode(views=["global"])
        assert one_view.evidence is not None
        figures.alignments(one_view, one_view.evidence)
