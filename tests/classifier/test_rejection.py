"""When a clip is none of the classes."""

from __future__ import annotations

import itertools
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df import FewShotClassifier, UserError
from clip_m2df.classifier.rejection import calibrate, near_identical
from clip_m2df.classifier.support import NONE_OF_THESE, ClassScorer, SupportClass
from clip_m2df.nn.baselines import Baseline
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.prompts import SelectedPrompts, prompt_probabilities, prompt_scores, select_prompts
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.reader import read_frames
from tests.classifier.conftest import SMALL, Make, make_class, make_model, noise, plain_model

DIM, FRAMES = 64, 6


class Ruler(Baseline):
    """A class lies where its examples are on average, on a line: their first feature."""

    def compare(self, query: Tensor, prototypes: Tensor) -> Tensor:
        positions = prototypes[..., 0].mean(-1)
        return -(query[..., 0].mean(-1).unsqueeze(-1) - positions.unsqueeze(-2)).abs()


class Chooser(M2DFHead):
    """Gives each query the prompt that fits it least."""

    def select_prompts(self, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> SelectedPrompts:
        return select_prompts(prompt_probabilities(-prompt_scores(query, prompts, self.top_k), 1.0), prompts, "argmax")


RULER, CHOOSER = f"{__name__}.Ruler", f"{__name__}.Chooser"


def model_of(head: str) -> CLIPM2DF:
    """The model of a head, or of CLIP-M²DF's with a way to select prompts."""
    if head in ("each", "expectation"):
        return make_model(selection=head)
    return make_model(head, SMALL) if head == CHOOSER else plain_model(head)


def on_the_ruler(*places: Sequence[float]) -> tuple[CLIPM2DF, list[SupportClass]]:
    """A model, and a class for each sequence of places of examples."""
    model = plain_model(RULER)
    rows = [torch.tensor(row)[:, None, None].expand(-1, FRAMES, DIM) for row in places]
    return model, [make_class(model, f"class {k}", row) for k, row in enumerate(rows)]


def at_random(model: CLIPM2DF, shots: Sequence[int], spread: float) -> list[SupportClass]:
    """Classes whose examples scatter around a place of their own."""
    generator = torch.Generator().manual_seed(0)
    classes = []
    for k, n in enumerate(shots):
        centre = torch.randn((1, FRAMES, DIM), generator=generator)
        examples = centre + spread * torch.randn((n, FRAMES, DIM), generator=generator)
        classes.append(make_class(model, f"class {k}", examples))
    return classes


@torch.no_grad()
def distances_by_loops(model: CLIPM2DF, classes: Sequence[SupportClass]) -> tuple[list[float], list[float]]:
    """Of each example to its own class made anew without it, and to the closest of the others made anew."""
    belongs, strange = [], []
    least = model.model.head.least_distance(FRAMES)
    for k, own in enumerate(classes):
        for i, example in enumerate(own.features):
            others = [make_class(model, c.label, c.features) for c in classes if c.label != own.label]
            if others:
                strange.append(min((-ClassScorer(model, others).score(example[None]).logits[0] - least).tolist()))
            rest = [features for j, features in enumerate(own.features) if j != i]
            if rest:
                without = list(classes)
                without[k] = make_class(model, own.label, torch.stack(rest))
                belongs.append(-float(ClassScorer(model, without).score(example[None]).logits[0, k]) - least)
    return belongs, strange


def balanced(cut: float, belongs: Sequence[float], strange: Sequence[float]) -> float:
    """The mean share of right decisions on either side."""
    within = sum(d <= cut for d in belongs) / len(belongs)
    beyond = sum(d > cut for d in strange) / len(strange)
    return (within + beyond) / 2


def best_balanced(belongs: Sequence[float], strange: Sequence[float]) -> float:
    values = sorted([*belongs, *strange])
    cuts = [*((one + other) / 2 for one, other in itertools.pairwise(values)), values[-1]]
    return max(balanced(cut, belongs, strange) for cut in cuts)


def widest_best(belongs: Sequence[float], strange: Sequence[float]) -> float:
    """The middle of the widest gap in which a cut is best; the largest distance where none is better than chance."""
    values, best = sorted([*belongs, *strange]), best_balanced(belongs, strange)
    if best < 0.5 + 1e-9:
        return values[-1]
    pairs = [(then - one, (then + one) / 2) for one, then in itertools.pairwise(values)]
    return max(pair for pair in pairs if balanced(pair[1], belongs, strange) > best - 1e-9)[1]


# The threshold


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("shots", [(3, 3, 3), (4, 1, 2), (2, 5)])
@pytest.mark.parametrize(
    "head",
    ["m2df", "each", "expectation", CHOOSER, "otam", "nearest_prototype", "linear_probe", "tip_adapter", "trx"],
)
def test_the_threshold_sorts_the_examples_best(head: str, shots: tuple[int, ...], spread: float) -> None:
    model = model_of(head)
    classes = at_random(model, shots, spread)
    belongs, strange = distances_by_loops(model, classes)
    assert len(belongs) == sum(n for n in shots if n > 1)
    assert len(strange) == sum(shots)
    threshold = calibrate(model, classes)
    assert threshold is not None
    assert balanced(threshold, belongs, strange) == pytest.approx(best_balanced(belongs, strange))
    assert threshold == pytest.approx(widest_best(belongs, strange), abs=1e-4)
    gap = min(abs(threshold - d) for d in (*belongs, *strange))
    assert gap > 1e-4  # between examples, so that rounding can't matter


def test_the_threshold_lies_in_the_middle_between_what_belongs_and_what_does_not() -> None:
    model, classes = on_the_ruler([0.0, 1.0, 3.0], [20.0, 22.5, 25.2])
    belongs, strange = distances_by_loops(model, classes)
    assert belongs == pytest.approx([2.0, 0.5, 2.5, 3.85, 0.1, 3.95], abs=1e-4)
    assert min(strange) == pytest.approx(20 - 4 / 3)
    assert calibrate(model, classes) == pytest.approx((3.95 + 20 - 4 / 3) / 2)


def test_the_threshold_sorts_best_wherever_the_examples_lie() -> None:
    rng = random.Random(0)
    tried = 0
    for _ in range(60):
        places = [[float(rng.randrange(12)) for _ in range(rng.randint(2, 3))] for _ in range(rng.randint(2, 3))]
        model, classes = on_the_ruler(*places)
        belongs, strange = distances_by_loops(model, classes)
        threshold = calibrate(model, classes)
        assert threshold is not None
        best = best_balanced(belongs, strange)
        assert balanced(threshold, belongs, strange) == pytest.approx(best), (places, belongs, strange, threshold)
        tried += best < 1
    assert tried > 20  # where no threshold is right for all


@pytest.mark.parametrize("head", ["m2df", "otam"])
def test_with_one_example_a_class_it_is_the_median_of_what_does_not_belong(head: str) -> None:
    model = plain_model(head)
    classes = at_random(model, (1, 1, 1, 1, 1), 0.5)
    belongs, strange = distances_by_loops(model, classes)
    assert belongs == []
    assert calibrate(model, classes) == pytest.approx(statistics.median(strange), abs=1e-4)
    assert calibrate(*on_the_ruler([0.0], [3.0], [4.0], [10.0])) == pytest.approx(2.0)  # of 3, 1, 1 and 6


@pytest.mark.parametrize("head", ["m2df", "each", "otam"])
def test_with_one_class_it_is_the_largest_of_what_belongs(head: str) -> None:
    model = model_of(head)
    classes = at_random(model, (4,), 0.5)
    belongs, strange = distances_by_loops(model, classes)
    assert strange == []
    assert calibrate(model, classes) == pytest.approx(max(belongs), abs=1e-4)
    assert calibrate(*on_the_ruler([0.0, 2.0, 10.0])) == pytest.approx(9.0)


def test_one_example_tells_nothing(make: Make) -> None:
    assert calibrate(*on_the_ruler([5.0])) is None
    classifier = make("otam").fit({"run": noise(0)})
    assert classifier.threshold_ is None
    assert classifier.predict(noise(1)) == "run"
    for refused in (classifier.predict, classifier.explain, classifier.segments, classifier.classify):
        with pytest.raises(UserError, match="one example of one class doesn't tell what is none of these"):
            refused(noise(1), reject=True)


def test_a_threshold_may_be_set(make: Make) -> None:
    support = {"run": [noise(0), noise(1)], "eat": [noise(2), noise(3)]}
    classifier = make("otam", threshold=1e6).fit(support)
    clips = [noise(seed) for seed in range(8, 12)]
    assert classifier.threshold_ == 1e6
    assert NONE_OF_THESE not in classifier.predict(clips, reject=True)
    distances = sorted(p.distance for _, p in classifier.classify(clips))
    classifier.threshold = (distances[1] + distances[2]) / 2
    assert (classifier.predict(clips, reject=True) == NONE_OF_THESE).sum() == 2
    assert make("otam", threshold=2.0).fit({"run": noise(0)}).predict(np.zeros_like(noise(0)), reject=True) is not None
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(UserError, match="threshold is"):
            make("otam", threshold=bad)
        classifier.threshold = bad
        with pytest.raises(UserError, match="threshold is"):
            classifier.predict(clips, reject=True)


# Examples that are nearly the same


def cuts(video: np.ndarray[Any, Any], kind: str, seed: int) -> list[np.ndarray[Any, Any]]:
    """Three examples that are made of one video."""
    n, rng = len(video), np.random.default_rng(seed)
    if kind == "copies":
        return [video, video.copy(), video.copy()]
    if kind == "noise":
        noisy = (video.astype(int) + rng.integers(-6, 7, video.shape) for _ in range(3))
        return [frames.clip(0, 255).astype(np.uint8) for frames in noisy]
    if kind == "two of three":
        return [video, video[n // 10 :], 255 - video]
    return [video[: 8 * n // 10], video[n // 10 : 9 * n // 10], video[2 * n // 10 :]]


@pytest.mark.parametrize("kind", ["overlapping", "copies", "noise", "two of three"])
@pytest.mark.parametrize("head", ["otam", "m2df"])
def test_examples_of_one_video_are_told(head: str, kind: str, make: Make, scenes: dict[str, list[str]]) -> None:
    labels = list(scenes)[:3]
    video = {label: read_frames(scenes[label][0], range)[0].permute(0, 2, 3, 1).numpy() for label in labels}
    support: dict[str, Any] = {label: cuts(video[label], kind, k) for k, label in enumerate(labels)}
    classifier = make(head).fit(support)
    with pytest.warns(UserWarning, match="nearly the same, as if cut from one video") as recorded:
        threshold = classifier.threshold_
    (told,) = recorded
    assert all(repr(label) in str(told.message) for label in labels)
    assert "give examples of different videos, or set the threshold" in str(told.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert classifier.threshold_ == threshold  # said once
        make(head, threshold=3.0).fit(support).predict(video[labels[0]], reject=True)
        make(head).fit({label: scenes[label][0] for label in labels}).predict(video[labels[0]], reject=True)
    one = make(head).fit({labels[0]: support[labels[0]]})
    if kind in ("copies", "noise"):  # there is no other class to compare with
        with pytest.warns(UserWarning, match="nearly the same"):
            assert one.threshold_ is not None


def test_the_class_of_such_examples_is_told_from_others() -> None:
    model = plain_model("otam")
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn((7, FRAMES, DIM), generator=generator)
    alike = draw[:1] + 0.01 * torch.randn((3, FRAMES, DIM), generator=generator)
    sound = [make_class(model, "a", draw[1:4]), make_class(model, "b", draw[4:])]
    assert near_identical(sound) == []
    assert near_identical([*sound, make_class(model, "c", alike)]) == ["c"]
    assert near_identical([*sound, make_class(model, "one", alike[:1])]) == []
    assert near_identical([make_class(model, "c", alike)]) == ["c"]
    assert near_identical(sound[:1]) == []


# What is rejected


def test_a_clip_beyond_the_threshold_is_none_of_these() -> None:
    classifier = FewShotClassifier(make_model("otam"))
    classifier.fit({"run": [noise(k) for k in range(3)], "eat": [noise(k) for k in range(3, 6)]})
    threshold = classifier.threshold_
    assert threshold is not None
    clips = [*(noise(seed) for seed in range(8)), *(np.full_like(noise(0), value) for value in (0, 90, 180, 255))]
    plain, rejecting = classifier.predict(clips), classifier.predict(clips, reject=True)
    said = dict(classifier.classify(clips, reject=True))
    for place, clip in enumerate(clips):
        why = classifier.explain(clip, reject=True)
        assert why.threshold == threshold
        far = why.distance > threshold
        assert why.rejected == far
        assert rejecting[place] == why.label == said[place].label == (NONE_OF_THESE if far else plain[place])
        assert classifier.predict(clip, reject=True) == rejecting[place]
        # How the classes compare is told all the same.
        assert sum(said[place].probabilities.values()) == pytest.approx(1)
        assert (said[place].probability != said[place].probability) == far
    assert 0 < sum(rejecting == NONE_OF_THESE) < len(clips)
    assert set(plain) <= {"run", "eat"}


def test_what_was_said_of_the_threshold_is_forgotten_with_the_classes() -> None:
    classifier = FewShotClassifier(make_model("otam"))
    support = {"run": [noise(0), noise(1)], "eat": [noise(2), noise(3)], "jump": [noise(4), noise(5)]}
    two = {k: support[k] for k in ("run", "eat")}
    more = {"eat": [*support["eat"], noise(6)], "jump": support["jump"]}
    changes: list[tuple[Callable[[], FewShotClassifier], dict[str, Any]]] = [
        (lambda: classifier.fit(two), two),
        (lambda: classifier.add("jump", support["jump"]), support),
        (lambda: classifier.add("eat", noise(6)), {"run": support["run"], **more}),
        (lambda: classifier.remove("run"), more),
    ]
    found = []
    for change, classes in changes:
        change()
        found.append(classifier.threshold_)
        assert found[-1] == pytest.approx(FewShotClassifier(make_model("otam")).fit(classes).threshold_, abs=1e-5)
    assert len(set(found)) > 1


@pytest.mark.parametrize("head", ["m2df", "otam"])
def test_clips_of_another_look_are_rejected_and_known_ones_are_not(head: str, scenes: dict[str, list[str]]) -> None:
    labels = list(scenes)
    known, other = labels[6:], labels[:6]
    classifier = FewShotClassifier(make_model(head)).fit({label: scenes[label][:3] for label in known})
    queries = [path for label in known for path in scenes[label][3:]]
    truth = [label for label in known for _ in scenes[label][3:]]
    found = classifier.predict(queries, reject=True)
    assert len(queries) == 12
    assert (found == truth).sum() == 12
    strangers = [path for label in other for path in scenes[label]]
    assert len(strangers) == 30
    assert (classifier.predict(strangers, reject=True) == NONE_OF_THESE).sum() >= 24  # 25 and 26 where this was written


def test_broken_clips_are_not_none_of_these(make: Make) -> None:
    classifier = make("otam").fit({"run": [noise(0), noise(1)], "eat": [noise(2), noise(3)]})
    with pytest.warns(UserWarning, match="1 of 2 clips"):
        assert classifier.predict([noise(0), "none.mp4"], reject=True)[1] is None
