"""Why a clip got its label: the numbers are the head's, and the figure holds them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_m2df.evaluation.evidence import query_evidence
from clip_m2df.evaluation.explanation import ANSWER, Explanation, explain, parts
from clip_m2df.evaluation.figures import GREY, WRONG, picture
from clip_m2df.nn.baselines import OTAMHead
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.matching import cosine
from tests.evaluation.drawn import NAMES, clips, colours, head, texts


def features(frames: int, shots: Sequence[int], seed: int = 3) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of the examples of each class, of a clip, and of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    support = [torch.randn((n, frames, 16), generator=generator) for n in shots]
    return support, torch.randn((frames, 16), generator=generator), torch.randn((len(shots), 16), generator=generator)


@torch.no_grad()
def prototypes(model: Head, support: Sequence[Tensor], prompts: Tensor) -> Embedded:
    """Of classes with a number of examples each."""
    each = zip(support, prompts, strict=True)
    return Embedded.cat([model.prototypes(videos.unsqueeze(0), prompt.unsqueeze(0)) for videos, prompt in each])


def explained(
    *,
    shots: Sequence[int] = (1, 2, 3),
    frames: int = 5,
    class_names: Sequence[str] = NAMES,
    draws: Tensor | None = None,
    head_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Explanation, HeadOutput, M2DFHead]:
    model = head(**(head_options or {}))
    support, query, prompts = features(frames, shots)
    prototype = prototypes(model, support, prompts)
    with torch.no_grad():
        output = model.score(query.unsqueeze(0), prompts, prototype, draws)
    probabilities = output.logits[0].softmax(-1)
    given = {
        "label": class_names[int(probabilities.argmax())],
        "probabilities": probabilities,
        "frames": clips(frames, seed=0),
        "examples": {name: clips(frames, seed=c + 1) for c, name in enumerate(class_names)},
        "video": "videos/x.mp4",
    }
    found = explain(model, output, prototype, query, prompts, draws, class_names=class_names, **(given | options))
    return found, output, model


def lines_of(found: Explanation) -> list[str]:
    """The lines of the figure."""
    left, right = parts(found)
    return texts(*left, *right)


@pytest.mark.parametrize(
    "head_options",
    [{}, {"single_direction": True}, {"view_weights": [1.0, 3.0]}, {"top_k": 2}, {"selection": "each"}],
)
def test_the_numbers_are_those_of_the_steps(head_options: dict[str, Any]) -> None:
    found, output, model = explained(head_options=head_options, threshold=4.0)
    support, query, prompts = features(5, (1, 2, 3))
    prototype = prototypes(model, support, prompts)
    probabilities = output.logits[0].softmax(-1).tolist()
    order = output.logits[0].argsort(descending=True).tolist()
    assert list(found.probabilities) == NAMES
    assert list(found.probabilities.values()) == pytest.approx(probabilities)
    assert found.distance == pytest.approx(-output.logits.max().item() - model.least_distance(5))
    assert found.compared == [NAMES[order[0]], NAMES[order[1]]]
    assert found.label == NAMES[order[0]]
    assert found.prompt == (NAMES[int(output.prompt_indices[0])] if model.query_prompt == "class" else None)
    assert list(found.prompt_probabilities.values()) == pytest.approx(output.prompt_probabilities[0].tolist())
    evidence = query_evidence(model, prototype, range(3), query, prompts)
    assert found.frame_scores.equal(evidence.frame_scores)
    assert found.counted.equal(evidence.counted)

    assert list(found.views) == list(found.alignments) == ["local", "global"]
    for view, vote in found.views.items():
        own = output.views[view]
        assert vote.label == NAMES[int(own.distances[0].argmin())]
        above = own.distances[0] - model.least_distance(5, view)
        assert list(vote.distances.values()) == pytest.approx(above.tolist())
        assert list(vote.text_similarities.values()) == pytest.approx(own.text_similarities[0].tolist())
        assert vote.visual_confidence == pytest.approx((-own.distances[0]).softmax(-1).max().item())
        assert vote.text_confidence == pytest.approx(own.text_similarities[0].softmax(-1).max().item())
        assert torch.allclose(found.alignments[view], evidence.alignments[view][order[:2]], atol=1e-5)


def test_shots_may_differ_and_count_alike() -> None:
    """Where all classes have as many examples, it is what the whole head says."""
    model = head()
    support, query, prompts = features(5, (2, 2, 2))
    whole = model(torch.stack(support), query.unsqueeze(0), prompts)
    found, output, _ = explained(shots=(2, 2, 2))
    least = model.least_distance(5)
    assert torch.allclose(output.logits, whole.logits, atol=1e-4)
    assert found.distance == pytest.approx(-whole.logits.max().item() - least, abs=1e-4)


def test_the_examples_are_those_of_the_compared_classes() -> None:
    found, _, _ = explained()
    assert list(found.examples) == found.compared
    for name in found.compared:
        assert torch.equal(found.examples[name], clips(5, seed=NAMES.index(name) + 1))
    some = {found.compared[1]: clips(5, seed=9)}
    assert list(explained(examples=some)[0].examples) == found.compared[1:]
    bare = explained(examples={})[0]
    assert bare.examples == {}
    assert bare.figure().height == found.figure().height


def test_who_teaches_is_what_distillation_says() -> None:
    seen = set()
    for reliability in (["text"], ["visual"], ["text", "visual"], []):
        for direction in ("local_to_global", "global_to_local", "mutual"):
            options = {"reliability": reliability, "direction": direction}
            for frames in (3, 5, 7):
                found, output, _ = explained(head_options=options, frames=frames)
                teach = output.distillation
                seen.add((bool(teach.local_to_global[0]), bool(teach.global_to_local[0]), found.teacher))
    expected = {(True, False, "local"), (False, True, "global"), (False, False, None), (True, True, None)}
    assert seen == expected


def test_no_one_prompt_is_chosen_without_pps_or_with_an_expectation_or_with_each() -> None:
    for options in ({"pps": False}, {"selection": "expectation"}, {"selection": "each"}):
        found, output, _ = explained(head_options=options)
        assert found.prompt is None
        assert list(found.prompt_probabilities.values()) == pytest.approx(output.prompt_probabilities[0].tolist())
        assert list(found.views) == ["local", "global"]


def test_a_drawn_prompt_is_the_one_of_the_draw() -> None:
    options = {"selection": "sample", "temperature": 1.0}
    names = [f"class {c}" for c in range(14)]
    shown = set()
    for draw in (0.02, 0.5, 0.98):
        found, output, _ = explained(
            head_options=options, shots=[1] * 14, class_names=names, draws=torch.tensor([draw])
        )
        assert found.prompt == names[int(output.prompt_indices[0])]
        shown.add(found.prompt)
        assert sum(", chosen" in line for line in lines_of(found)) == 1
    assert len(shown) > 1


def test_a_head_without_views_says_what_it_has() -> None:
    support, query, prompts = features(5, (2, 2, 2))
    model = OTAMHead(dim=16)
    with torch.no_grad():
        output = model(torch.stack(support), query.unsqueeze(0), prompts)
    found = explain(
        model,
        output,
        prototypes(model, support, prompts),
        query,
        prompts,
        class_names=NAMES,
        label=NAMES[int(output.logits.argmax())],
        probabilities=output.logits[0].softmax(-1),
        frames=clips(5, seed=0),
        examples={},
    )
    assert found.views == found.alignments == {}
    assert found.prompt is None
    assert found.teacher is None
    assert found.distance == pytest.approx(-output.logits.max().item() - model.least_distance(5))
    assert torch.allclose(found.frame_scores, cosine(prompts, query))
    lines = lines_of(found)
    assert any(line.startswith(f"a clip: {found.label} (") for line in lines)
    assert not any("alignment" in line or "view" in line for line in lines)


def test_a_single_view_and_a_single_class() -> None:
    found, output, model = explained(head_options={"views": ["global"]})
    assert list(found.views) == list(found.alignments) == ["global"]
    assert found.teacher is None
    distance = -output.logits.max().item() - model.least_distance(5)
    assert found.views["global"].distances[found.compared[0]] == pytest.approx(distance) == found.distance
    assert not any("teach" in line for line in lines_of(found))

    alone, _, _ = explained(shots=[2], class_names=["only"])
    assert alone.compared == ["only"]
    assert alone.probabilities == {"only": pytest.approx(1)}
    assert [a.shape for a in alone.alignments.values()] == [(1, 5, 5)] * 2
    lines = lines_of(alone)
    assert "x.mp4: only (100 %)" in lines
    assert not any("runner-up" in line for line in lines)


def test_the_title_tells_the_answer_and_a_rejection() -> None:
    probabilities = torch.tensor([0.125, 0.05, 0.825])  # as given, whatever the logits say
    found, output, model = explained(label="a tree", probabilities=probabilities)
    nearest, distance = found.compared[0], -output.logits.max().item() - model.least_distance(5)
    assert found.probabilities == pytest.approx(dict(zip(NAMES, probabilities.tolist(), strict=True)))
    lines = lines_of(found)
    assert "x.mp4: a tree (82 %)" in lines
    assert f"distance {distance:.2f} from the closest class, {nearest}" in lines
    assert {"82.5 %", "12.5 %", "5.0 %"} < set(lines)

    for threshold, said in ((distance - 1, "beyond"), (distance + 1, "within")):
        label = "none of these" if said == "beyond" else nearest
        found, _, _ = explained(label=label, threshold=threshold)
        assert found.rejected == (said == "beyond")
        lines = lines_of(found)
        expected = f"distance {distance:.2f} from the closest class, {nearest}, {said} the threshold {threshold:.2f}"
        assert expected in lines
        assert ("x.mp4: none of these" in lines) == found.rejected
    assert "x.mp4: none of these" in lines_of(found._replace(label=""))


def test_bars_are_as_long_as_the_probabilities() -> None:
    for share in (0.25, 0.75):
        found, _, _ = explained(label="a car", probabilities=torch.tensor([1 - share, share, 0.0]))
        answer = colours(picture(parts(found)[0][1]))
        rejected = colours(picture(parts(found._replace(label="none of these"))[0][1]))
        assert answer[ANSWER] / (answer[ANSWER] + answer[GREY]) == pytest.approx(share, abs=0.01)
        assert ANSWER not in rejected
        assert rejected[GREY] / (answer[ANSWER] + answer[GREY]) == pytest.approx(1, abs=0.02)


def test_the_likeliest_classes_alone_have_bars() -> None:
    names = [f"number {c}" for c in range(13)]
    probabilities = torch.arange(1, 14).float() / 91
    found, _, _ = explained(shots=[1] * 13, class_names=names, label=names[-1], probabilities=probabilities)
    lines = lines_of(found)
    assert "and 3 more, 6.6 % together" in lines  # 1, 2 and 3 of 91
    assert [line for line in texts(parts(found)[0][1]) if line in names] == names[:2:-1]


def test_the_likeliest_prompts_come_first() -> None:
    found, _, _ = explained()
    order = ["a car", "a tree", "a cat"]
    found = found._replace(prompt="a cat", prompt_probabilities=dict(zip(NAMES, (0.2, 0.5, 0.3), strict=True)))
    scores = found.prompt_scores()
    assert [score.class_name for score in scores] == order
    for score in scores:
        c = NAMES.index(score.class_name)
        assert score.cosines == found.frame_scores[c].tolist()
        assert score.counted == found.counted[c].tolist()
        assert score.chosen == (score.class_name == "a cat")
    assert [score.class_name for score in found.prompt_scores(2)] == ["a car", "a cat"]  # and what was chosen
    assert [line for line in texts(parts(found)[0][-1]) if line in NAMES] == order
    assert WRONG in colours(found.figure())
    assert WRONG not in colours(found._replace(counted=torch.zeros_like(found.counted)).figure())


def test_the_figure_has_the_frames_of_the_clip_and_the_examples() -> None:
    found, _, _ = explained()
    red, blue = (torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1) for colour in ((255, 0, 0), (0, 0, 255)))
    frames, example = red.expand(5, 3, 12, 12), blue.expand(5, 3, 12, 12)
    shown = colours(found._replace(frames=frames, examples={found.compared[1]: example}).figure())
    # The strip of the title, that of the prompts' map, beside each of the four alignments; below the runner-up's.
    assert shown["#ff0000"] == pytest.approx(5 * (64**2 + 42**2 + 4 * 32**2), rel=0.02)
    assert shown["#0000ff"] == pytest.approx(5 * 2 * 32**2, rel=0.1)  # but for the maps' outlines


def test_long_names_are_cut_off() -> None:
    long = "a sentence about everything that can be seen in a video"
    names = [long, "打篮球", "café"]
    found, _, _ = explained(class_names=names, label="打篮球", video=f"{'v' * 60}.mp4")
    lines = lines_of(found)
    assert any(line.startswith(rf"{'v' * 47}…: \u6253\u7bee\u7403 (") for line in lines)
    assert {f"{long[:47]}…", r"\u6253\u7bee\u7403", "café"} <= set(lines)
    assert long not in lines


@pytest.mark.parametrize(
    ("frames", "n_way", "head_options"),
    [
        (1, 1, {}),
        (30, 11, {}),
        (1, 2, {"views": ["local"]}),
        (8, 11, {"views": ["local"]}),
        (30, 2, {"pps": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:30 frames a video")
def test_figures_of_any_setting_fit(frames: int, n_way: int, head_options: dict[str, Any]) -> None:
    names = [f"class with a name {c}" for c in range(n_way)]
    found, _, _ = explained(shots=[1] * n_way, frames=frames, class_names=names, head_options=head_options)
    assert len(lines_of(found)) > 10
    page = found.figure()
    assert 300 < page.width < 2200
    assert 300 < page.height < 1400
