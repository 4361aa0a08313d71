"""Sets of labels that hold the truth with a promised rate."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_m2df import CLIPM2DF, FewShotClassifier, UserError
from clip_m2df.evaluation.conformal import STEPS, class_threshold, least_error, nonconformity
from clip_m2df.evaluation.open_set import SCORES
from tests.classifier.conftest import make_model, noise

DIM, FRAMES, NONE = 16, 4, "none of these"


def clips_of(seed: int, n: int, noise: float = 1.0) -> list[Tensor]:
    """Features of clips of one class; the class is told by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(DIM, generator=generator) + noise * torch.randn(n, FRAMES, DIM, generator=generator))


def classes(first: int, count: int, n: int, noise: float = 1.0) -> dict[str, list[Tensor]]:
    return {f"class {seed}": clips_of(seed, n, noise) for seed in range(first, first + count)}


def make(head: str = "otam", **options: Any) -> FewShotClassifier:
    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {"head_options": {"hidden_dim": 32, "num_heads": 4, "pps": False, "reliability": []}} if head == "m2df" else {}
    )
    return FewShotClassifier(CLIPM2DF("features", {"dim": DIM}, head=head, **sizes, **options))


def fitted(n_way: int = 3, n_shot: int = 2, **options: Any) -> FewShotClassifier:
    return make(**options).fit(classes(0, n_way, n_shot))


def calibrated(n_way: int = 3, n_shot: int = 2, further: int = 9, **options: Any) -> FewShotClassifier:
    return fitted(n_way, n_shot, **options).calibrate(classes(100, further, n_shot + 6))


QUERIES = [clip for seed in (0, 1, 2, 50, 51) for clip in clips_of(seed, 12)[-6:]]


@pytest.mark.parametrize("head", ["otam", "m2df"])
@pytest.mark.parametrize("error", [0.1, 0.3])
def test_a_set_has_what_is_within_the_thresholds_of_the_calibration(head: str, error: float) -> None:
    classifier = calibrated(head=head)
    calibration = classifier.calibration
    assert calibration is not None
    assert calibration.settings.tolist() == [[3, 2, 9]]
    thresholds = calibration.at(3, 2, error)
    found = classifier.predict_sets(QUERIES, error=error)
    probabilities = torch.from_numpy(classifier.predict_proba(QUERIES))
    distances = torch.tensor([p.distance for _, p in sorted(classifier.classify(QUERIES))])
    assert len({*map(len, found)}) > 1
    for labels, row, distance in zip(found, probabilities, distances, strict=True):
        names = [str(classifier.classes_[c]) for c in row.argsort(descending=True)]
        misfits = dict(zip(classifier.classes_.tolist(), (-row.log()).tolist(), strict=True))
        expected = [name for name in names if misfits[name] <= thresholds.known + 1e-4]
        assert [label for label in labels if label != NONE] == expected
        if calibration.score == "distance":
            least = classifier.model.model.head.least_distance(FRAMES)
            assert (NONE in labels) == (-float(distance) - least <= thresholds.unknown)
    assert classifier.predict_sets(QUERIES[0], error=error) == found[0]
    assert [p.labels for _, p in sorted(classifier.classify(QUERIES, error=error))] == found
    assert all(p.labels is None for _, p in classifier.classify(QUERIES))


def test_sets_hold_the_truth_of_known_and_of_unknown_clips_and_say_something() -> None:
    """Over draws of classes, each with a classifier of its own."""
    held: dict[str, list[float]] = {"known": [], "unknown": [], "size": [], "rejected": []}
    for draw in range(60):
        first = 1000 * draw
        classifier = make().fit(classes(first, 3, 1, noise=2.0))
        classifier.calibrate(classes(first + 100, 9, 5, noise=2.0))
        known = [(f"class {c}", clip) for c in range(first, first + 3) for clip in clips_of(c, 9, 2.0)[-4:]]
        strangers = [clip for c in range(first + 50, first + 53) for clip in clips_of(c, 4, 2.0)]
        sets = classifier.predict_sets([clip for _, clip in known], error=0.2)
        held["known"] += [float(label in s) for (label, _), s in zip(known, sets, strict=True)]
        held["rejected"] += [float(s == (NONE,)) for s in sets]
        held["size"] += [float(len(s)) for s in sets]
        held["unknown"] += [float(NONE in s) for s in classifier.predict_sets(strangers, error=0.2)]
    means = {name: sum(values) / len(values) for name, values in held.items()}
    assert means["known"] >= 0.78
    assert means["unknown"] >= 0.78
    assert means["rejected"] <= 0.2
    assert means["size"] < 2.5  # of 4 labels


def test_where_classes_are_too_few_for_an_error_rate_sets_are_full_and_that_is_said() -> None:
    classifier = calibrated(further=9)
    every = {*classifier.classes_.tolist(), NONE}
    with pytest.warns(UserWarning, match=r"the 9 classes of the calibration are too few for an error rate of 0\.05"):
        assert all(set(labels) == every for labels in classifier.predict_sets(QUERIES, error=0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert any(set(labels) != every for labels in classifier.predict_sets(QUERIES, error=0.1))
    with pytest.warns(UserWarning, match=r"are too few for an error rate of 0\.053, .* allow 0\.055 or more"):
        (more := calibrated(further=18)).predict_sets(QUERIES, error=0.053)  # 1/19 is 0.0526; steps are of 0.005
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert any(set(labels) != every for labels in more.predict_sets(QUERIES, error=0.055))
    with pytest.warns(UserWarning, match="'none of these' is in every set"):
        without = calibrated(further=3).predict_sets(QUERIES, error=0.4)
    assert all(NONE in labels for labels in without)
    assert any(len(labels) < 4 for labels in without)


def test_the_error_rate_that_is_said_to_be_allowed_is_allowed() -> None:
    """1/11 = 0.0909… of ten classes is rounded up to a step, as error rates are rounded down to one."""
    classifier = calibrated(further=10)
    for error in (0.05, 0.0949):
        with pytest.warns(UserWarning, match=r"10 classes allow 0\.095 or more"):
            classifier.predict_sets(QUERIES, error=error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict_sets(QUERIES, error=0.095)


@pytest.mark.parametrize("n_classes", range(1, 200))
def test_the_least_error_rate_is_the_first_step_with_a_threshold(n_classes: int) -> None:
    scores = torch.arange(n_classes, dtype=torch.float64)
    steps = [step / STEPS for step in range(1, STEPS)]
    thresholds = class_threshold(scores, torch.arange(n_classes), steps)
    assert steps[int(thresholds.isfinite().int().argmax())] == least_error(n_classes)


def test_what_is_at_a_threshold_is_in_the_set() -> None:
    """Where all clips are alike, each fits each class as badly as those of the calibration did."""

    def alike(n: int) -> list[Tensor]:
        return list(torch.ones(n, FRAMES, DIM))

    classifier = make().fit({f"class {c}": alike(1) for c in range(3)})
    classifier.calibrate({f"further {c}": alike(3) for c in range(9)})
    every = {"class 0", "class 1", "class 2", NONE}
    assert [set(labels) for labels in classifier.predict_sets(alike(2), error=0.2)] == [every, every]


def test_sets_go_by_as_many_examples_as_there_is_a_calibration_for() -> None:
    classifier, alone = fitted(n_shot=2), calibrated()
    further = torch.stack([torch.stack(clips) for clips in classes(100, 9, 8).values()])
    videos = [range(8 * c, 8 * c + 8) for c in range(9)]
    classifier.calibration = classifier.model.calibrate(further.flatten(0, 1), torch.zeros(9, DIM), videos, [1, 2], [3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that examples are left out
        found = classifier.predict_sets(QUERIES, error=0.2)
    expected = alone.predict_sets(QUERIES, error=0.2)
    assert [{*labels} - {NONE} for labels in found] == [{*labels} - {NONE} for labels in expected]


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_sets_are_of_the_probabilities_by_which_clips_are_predicted(share: float) -> None:
    """Those fused with the text, if they are, as in the calibration."""
    model = make_model("otam", text_fusion=share)
    classifier = FewShotClassifier(model, frames=4).fit({f"class {c}": [noise(c, 4)] for c in range(3)})
    classifier.calibrate({f"further {c}": [noise(100 + 2 * c, 4), noise(101 + 2 * c, 4)] for c in range(9)})
    assert classifier.calibration is not None
    queries = [noise(seed, 4) for seed in range(50, 58)]
    threshold = classifier.calibration.at(3, 1, 0.3).known
    probabilities = torch.from_numpy(classifier.predict_proba(queries))
    found = [{*labels} - {NONE} for labels in classifier.predict_sets(queries, error=0.3)]
    inside = (-probabilities.log() <= threshold).tolist()
    assert found == [{f"class {c}" for c, within in enumerate(row) if within} for row in inside]
    assert 0 < sum(map(len, found)) < 24


def test_a_set_may_be_empty() -> None:
    """A clip between two classes is likely of neither, and close to both."""
    classifier = calibrated(further=19)
    sets = classifier.predict_sets([clip for seed in range(3) for clip in clips_of(seed, 40, noise=2.5)], error=0.9)
    assert () in sets


@pytest.mark.parametrize("error", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_an_error_rate_out_of_its_range_is_refused(error: float) -> None:
    with pytest.raises(UserError, match="error"):
        calibrated().predict_sets(QUERIES, error=error)


def test_what_a_calibration_needs_is_said_and_nothing_changes_without_it() -> None:
    classifier = fitted()
    with pytest.raises(UserError, match=r"has no calibration.*further classes"):
        classifier.predict_sets(QUERIES)
    before = calibrated(further=9)
    for further, why in (
        (classes(100, 2, 9), "of the 2 further classes 2 have 3 clips or more, too few for 3 classes with 2 examples"),
        (classes(100, 9, 2), "of the 9 further classes 0 have 3 clips or more"),
        (classes(2, 9, 9), "the classifier has 'class 2' itself: calibrate on other classes"),
        ({}, "no classes"),
    ):
        known = before.calibration
        with pytest.raises(UserError, match=why):
            before.calibrate(further)
        assert before.calibration is known
    with pytest.raises(UserError, match="a single class makes no sets"):
        fitted(n_way=1).calibrate(classes(100, 9, 9))
    before.add("class 9", clips_of(9, 2))
    with pytest.raises(UserError, match="is for 3 classes with 2 examples, and not for 4 classes with 2 examples"):
        before.predict_sets(QUERIES)
    before.remove("class 9")
    assert len(before.predict_sets(QUERIES)) == len(QUERIES)
    before.model.text_fusion = 0.5
    with pytest.raises(UserError, match=r"for text_fusion 0\.0, not for 0\.5"):
        before.predict_sets(QUERIES)
    # Nor is one taken that does not say what it goes by.
    assert known is not None
    before.model.text_fusion = 0.0
    before.calibration = dataclasses.replace(known, goes_by={"frames": known.goes_by["frames"]})
    with pytest.raises(UserError, match="is for selection None, not for argmax"):
        before.predict_sets(QUERIES)


def test_with_different_numbers_of_examples_sets_go_by_as_many_as_the_fewest() -> None:
    support = {"class 0": clips_of(0, 3), "class 1": clips_of(1, 2), "class 2": clips_of(2, 4)}
    classifier = make().fit(support).calibrate(classes(100, 9, 9))
    assert classifier.calibration is not None
    assert classifier.calibration.settings.tolist() == [[3, 2, 9]]
    with pytest.warns(UserWarning, match="by the first 2 of the examples of each class"):
        found = classifier.predict_sets(QUERIES, error=0.2)
    same = make().fit({label: row[:2] for label, row in support.items()})
    same.calibration = classifier.calibration
    assert same.predict_sets(QUERIES, error=0.2) == found


def test_a_calibration_is_the_classifiers_own_and_saved_with_it(tmp_path: Path) -> None:
    classifier = calibrated()
    other = FewShotClassifier(classifier.model).fit(classes(0, 3, 2))
    assert classifier.model.calibration is None
    assert other.calibration is None
    classifier.save(tmp_path / "saved")
    assert classifier.model.calibration is None
    loaded = FewShotClassifier.load(tmp_path / "saved")
    assert loaded.predict_sets(QUERIES, error=0.2) == classifier.predict_sets(QUERIES, error=0.2)
    # A classifier without one takes its place, and leaves nothing of it.
    other.save(tmp_path / "saved")
    assert FewShotClassifier.load(tmp_path / "saved").calibration is None
    assert not (tmp_path / "saved" / "calibration.safetensors").exists()


def test_a_damaged_calibration_of_a_folder_is_refused(tmp_path: Path) -> None:
    classifier = calibrated()
    classifier.model.calibration = classifier.calibration
    classifier.model.save_pretrained(tmp_path)
    assert CLIPM2DF.from_pretrained(tmp_path).calibration is not None
    file = tmp_path / "calibration.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"calibration\.safetensors is damaged"):
        CLIPM2DF.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"calibration\.safetensors"):
        CLIPM2DF.from_pretrained(tmp_path)


def test_scores_of_sets_are_those_of_the_open_set_tests() -> None:
    """The threshold of "none of these" is one of the score that told unknown clips best."""
    classifier = calibrated(further=12)
    calibration = classifier.calibration
    assert calibration is not None
    assert calibration.score == max(calibration.aurocs, key=lambda name: calibration.aurocs[name])
    assert calibration.aurocs.keys() == SCORES.keys()
    logits = torch.tensor([[1.0, 3.0]])
    assert nonconformity(logits).exp().reciprocal().allclose(logits.double().softmax(-1))
