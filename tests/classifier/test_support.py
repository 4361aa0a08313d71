"""Scores against classes with any number of examples each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df import CLIPM2DF, UserError
from clip_m2df.classifier import support
from clip_m2df.classifier.support import QUERIES, ClassScorer, SupportClass, check_disjoint
from clip_m2df.nn.baselines import head_class
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.matching import cosine, frame_costs, otam
from clip_m2df.nn.prompts import SelectedPrompts
from tests.classifier.conftest import make_class, make_model, plain_model

DIM, FRAMES = 64, 6
LABELS = ["running fast", "eat", "a cat that jumps"]
# Of the model and of its head.
M2DF_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "argmax": ({}, {}),
    "expectation": ({"selection": "expectation"}, {"temperature": 3.0}),
    "each": ({"selection": "each"}, {"view_weights": [0.3, 2.0]}),
    "no pps": ({}, {"pps": False}),
    "local": ({}, {"views": ["local"]}),
    "global": ({}, {"views": ["global"]}),
    "weights": ({}, {"view_weights": [0.3, 2.0], "single_direction": True, "depth": 2}),
}
OF_MEANS = ["clip_fsar", "otam", "bi_mhm", "nearest_prototype", "zero_shot"]  # which compare with the mean of the shots
BASELINES = [*OF_MEANS, "linear_probe", "tip_adapter", "trx", "ts_fsar"]
OWN_HEADS = [f"{__name__}.{head}" for head in ("MeanOfDistances", "Doubled")]


class MeanOfDistances(Head):
    """A person's own head: a class is as far as its examples are on average, each by its own frames' mean."""

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        return Embedded(mean=videos.mean(-2))

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        shots = embedded["mean"]
        return Embedded(shots=shots, real=torch.ones(shots.shape[:-1], dtype=torch.bool))

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        of_shots = (query["mean"][..., :, None, None, :] - prototypes["shots"][..., None, :, :, :]).norm(dim=-1)
        real = prototypes["real"].unsqueeze(-3)
        return HeadOutput.of(-(of_shots * real).sum(-1) / real.sum(-1), selected)


class Doubled(M2DFHead):
    """A person's own change of one step of the method."""

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        output = super().match(query, prototypes, selected)
        return output._replace(logits=2 * output.logits)


def m2df(name: str, **options: Any) -> CLIPM2DF:
    of_model, of_head = M2DF_OPTIONS[name]
    return make_model("m2df", of_head, **of_model, **options)


def make_classes(model: CLIPM2DF, shots: Sequence[int], seed: int = 0) -> list[SupportClass]:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn((n, FRAMES, DIM), generator=generator) for n in shots]
    rows = zip(LABELS, features, strict=False)
    return [make_class(model, label, own, [f"{label} {i}.mp4" for i in range(len(own))]) for label, own in rows]


def make_queries(n: int, seed: int = 1) -> Tensor:
    return torch.randn((n, FRAMES, DIM), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def m2df_by_loops(model: CLIPM2DF, classes: Sequence[SupportClass], query: Tensor) -> Tensor:
    """Minus the fused distances: a query, a class, a view and an example at a time."""
    head: Any = model.model.head
    prompts = model.encode_prompts([c.text or "" for c in classes])
    logits = torch.zeros(len(query), len(classes))
    for q, frames in enumerate(query):
        scores = torch.stack([cosine(frames, prompt[None])[:, 0].topk(head.top_k).values.mean() for prompt in prompts])
        share = (head.temperature * scores).softmax(0)
        chosen = prompts[share.argmax()] if head.selection == "argmax" else (share[:, None] * prompts).sum(0)
        if not head.pps:
            chosen = torch.zeros_like(chosen)
        for c, own in enumerate(classes):
            chosen = prompts[c] if head.selection == "each" else chosen
            for name, view in head.views.items():
                of_examples = [view(example[None], prompts[c][None])[0, 1:] for example in own.features]
                prototype = torch.zeros_like(of_examples[0])
                for visual in of_examples:
                    prototype += visual / len(of_examples)
                costs = frame_costs(view(frames[None], chosen[None])[:, 1:], prototype[None])
                distance = otam(costs, smoothing=head.smoothing, single_direction=head.single_direction)
                logits[q, c] -= head.view_weights[name] * distance[0, 0]
    return logits


# As many examples of each class


@pytest.mark.parametrize("shots", [1, 4])
@pytest.mark.parametrize("name", [*M2DF_OPTIONS, *BASELINES, *OWN_HEADS])
@torch.no_grad()
def test_a_head_gives_what_an_episode_gives(name: str, shots: int) -> None:
    model = m2df(name) if name in M2DF_OPTIONS else plain_model(name)
    classes, query = make_classes(model, [shots] * 3), make_queries(5)
    prompts = model.encode_prompts(LABELS)
    expected = model.model.head(torch.stack([c.features for c in classes]), query, prompts)
    found = ClassScorer(model, classes).score(query)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.prompt_probabilities, expected.prompt_probabilities, atol=1e-5, rtol=1e-5)
    assert found.prompt_indices.equal(expected.prompt_indices)
    assert found.views.keys() == expected.views.keys()
    for view, compared in expected.views.items():
        torch.testing.assert_close(found.views[view], compared, atol=1e-5, rtol=1e-5)
    assert expected.logits.std() > 1e-4  # or the comparison would say nothing


# Other numbers of them


@pytest.mark.parametrize("shots", [(1, 3, 2), (5, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", M2DF_OPTIONS)
def test_m2df_takes_the_mean_of_each_classs_own_fused_sequences(name: str, shots: tuple[int, ...]) -> None:
    model = m2df(name)
    classes, query = make_classes(model, shots), make_queries(3)
    with torch.no_grad():
        found = ClassScorer(model, classes).score(query).logits
    torch.testing.assert_close(found, m2df_by_loops(model, classes, query), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["m2df", *(name for name in BASELINES if not head_class(name).task_specific)])
@torch.no_grad()
def test_each_class_is_what_it_is_by_itself(head: str) -> None:
    model = plain_model(head)
    own = model.model.head
    classes, query = make_classes(model, (4, 1, 3)), make_queries(5)
    embedded, selected = own.embed_queries(query, model.encode_prompts(LABELS))
    columns = [own.match(embedded, own.prototypes(c.features[None], c.prompt[None]), selected).logits for c in classes]
    found = ClassScorer(model, classes).score(query).logits
    torch.testing.assert_close(found, torch.cat(columns, -1), atol=1e-5, rtol=1e-5)
    if head in OF_MEANS:  # of m2df it is that of fused sequences, above
        means = torch.stack([torch.stack(list(c.features)).mean(0)[None] for c in classes])
        of_means = own(means, query, model.encode_prompts(LABELS)).logits
        torch.testing.assert_close(found, of_means, atol=1e-5, rtol=1e-5)
    if head != "zero_shot":  # the numbers of examples matter
        fewer = ClassScorer(model, [c.only(model, [0]) for c in classes]).score(query).logits
        assert (fewer - found).abs().max() > 1e-3


@pytest.mark.parametrize("shots", [(4, 1, 3), (89, 97)])
def test_each_example_of_a_class_counts_the_same_for_a_persons_own_head(shots: tuple[int, ...]) -> None:
    model = plain_model(OWN_HEADS[0])
    classes, query = make_classes(model, shots), make_queries(5)
    found = ClassScorer(model, classes).score(query).logits
    for q, frames in enumerate(query):
        for c, own in enumerate(classes):
            distances = [float((frames.mean(0) - example.mean(0)).norm()) for example in own.features]
            assert float(found[q, c]) == pytest.approx(-sum(distances) / len(distances), abs=1e-5)


@pytest.mark.parametrize("head", ["linear_probe", "ts_fsar"])
@torch.no_grad()
def test_a_class_is_what_it_is_beside_the_others(head: str) -> None:
    model = plain_model(head)
    classes, query = make_classes(model, (4, 1, 3)), make_queries(5)
    of_all, of_two = (ClassScorer(model, some).score(query).logits for some in (classes, classes[:2]))
    assert (of_all[:, :2] - of_two).abs().min() > 1e-4


# Probabilities


@pytest.mark.parametrize("head", ["m2df", *BASELINES])
def test_a_class_alone_has_all_of_the_probability(head: str) -> None:
    model = plain_model(head)
    (only,), query = make_classes(model, (2,)), make_queries(4)
    with torch.no_grad():
        log_probabilities, distances = ClassScorer(model, [only]).label(query)
        logits = model.model.head(only.features[None], query, only.prompt[None]).logits
    expected = -logits - model.model.head.least_distance(query.shape[1])
    assert log_probabilities.equal(torch.zeros(4, 1))
    torch.testing.assert_close(distances, expected, atol=1e-5, rtol=1e-5)


def text_logits_by_loops(model: CLIPM2DF, query: Tensor, prompts: Tensor) -> Tensor:
    """METHOD, section 7: the mean of a query's closest frames to the prompt of its highest score, with each prompt."""
    head = model.model.head
    logits = torch.zeros(len(query), len(prompts))
    for q, frames in enumerate(query):
        closest = [cosine(frames, prompt[None])[:, 0].topk(head.top_k) for prompt in prompts]
        best = max(closest, key=lambda found: float(found.values.mean()))
        mean = frames[best.indices].mean(0) if isinstance(head, M2DFHead) else frames.mean(0)
        logits[q] = cosine(mean[None], prompts)[0] * head.scale.detach()
    return logits


@pytest.mark.parametrize("head", ["m2df", "clip_fsar"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_texts_share(head: str, share: float) -> None:
    model = make_model(head, text_fusion=share)
    with torch.no_grad():
        model.model.head.scale.fill_(20.0)  # so that the text has something to say
    classes, query = make_classes(model, (1, 3, 2)), make_queries(5)
    with torch.no_grad():
        scorer = ClassScorer(model, classes)
        log_probabilities, distances = scorer.label(query)
        visual = scorer.score(query).logits
    text = text_logits_by_loops(model, query, model.encode_prompts(LABELS))
    product = F.softmax(text, -1) ** share * F.softmax(visual, -1) ** (1 - share)
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(log_probabilities.exp(), expected, atol=1e-5, rtol=1e-5)
    least = model.model.head.least_distance(query.shape[1])
    assert distances.equal(-visual - least)  # of which the text has no share


@pytest.mark.parametrize("head", ["m2df", "otam"])
def test_many_clips_are_scored_as_one_by_one(head: str) -> None:
    model = plain_model(head)
    query = make_queries(QUERIES + 3)
    with torch.no_grad():
        scorer = ClassScorer(model, make_classes(model, (2, 1, 3)))
        log_probabilities, distances = scorer.label(query)
        assert log_probabilities.shape == distances.shape == (QUERIES + 3, 3)
        for k in (0, QUERIES - 1, QUERIES, QUERIES + 2):
            alone = scorer.label(query[k : k + 1])
            torch.testing.assert_close(alone[0][0], log_probabilities[k], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone[1][0], distances[k], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["m2df", "otam", "trx"])
@torch.no_grad()
def test_scores_do_not_depend_on_how_many_clips_are_scored_at_once(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, query = plain_model(head), make_queries(7)
    scorer = ClassScorer(model, make_classes(model, (2, 1, 3)))
    whole = scorer.label(query)
    for cells, at_once in ((1, 1), (2 * 3 * FRAMES**2, 2), (3 * 3 * FRAMES**2 - 1, 2), (3 * 3 * FRAMES**2, 3)):
        monkeypatch.setattr(support, "CELLS", cells)
        assert scorer.at_once(FRAMES) == at_once
        for found, expected in zip(scorer.label(query), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Classes


def test_some_of_the_examples_are_a_class_made_of_those() -> None:
    model = plain_model("m2df")
    whole = make_classes(model, (4,))[0]
    some = whole.only(model, [3, 1])
    anew = make_class(model, whole.label, whole.features[[3, 1]])
    assert some.examples == ("running fast 3.mp4", "running fast 1.mp4")
    assert some.features.equal(anew.features)
    torch.testing.assert_close(dict(some.embedded), dict(anew.embedded), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dict(some.prototype), dict(anew.prototype), atol=1e-6, rtol=1e-6)


def test_an_example_of_two_classes_is_refused_however_its_path_is_written() -> None:
    model = plain_model("otam")
    one, other, third = make_classes(model, (2, 2, 2))
    check_disjoint([one, other, third])
    check_disjoint([make_class(model, c.label, c.features) for c in (one, other)])  # in memory, without names
    twice = make_class(model, other.label, other.features, [other.examples[0], "./x/../running fast 1.mp4"])
    with pytest.raises(UserError, match=r"running fast 1.mp4 is an example of both 'running fast' and 'eat': leave it"):
        check_disjoint([one, twice, third])
