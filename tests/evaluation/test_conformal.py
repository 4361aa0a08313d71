import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.evaluation.conformal import (
    N_KNOWN,
    STEPS,
    Calibration,
    Player,
    calibrate,
    class_threshold,
    deal_classes,
    make_episodes,
)
from clip_m2df.evaluation.open_set import SCORES
from clip_m2df.nn.baselines import build_head
from clip_m2df.nn.class_text import fuse_text
from tests.evaluation.test_bank import N_CLASSES, VIDEOS_A_CLASS, episodes, make_head, videos

OF_CLASSES = [list(range(c * VIDEOS_A_CLASS, (c + 1) * VIDEOS_A_CLASS)) for c in range(N_CLASSES)]


def plain_threshold(scores: Sequence[float], classes: Sequence[int], error: Fraction) -> float:
    """The threshold in fractions, one score after the other."""
    k = len(set(classes))
    for candidate in sorted(scores):
        shares = [
            Fraction(sum(s <= candidate for s, c in zip(scores, classes, strict=True) if c == own), classes.count(own))
            for own in set(classes)
        ]
        if sum(shares) / (k + 1) >= 1 - error:
            return candidate
    return math.inf


def test_thresholds_are_those_of_a_slow_loop_with_ties_and_classes_of_different_sizes() -> None:
    rng = np.random.default_rng(0)
    steps = [Fraction(step, STEPS) for step in range(1, STEPS)]
    for _ in range(20):
        k = int(rng.integers(1, 30))
        classes = np.concatenate((np.arange(k), rng.integers(0, k, int(rng.integers(0, 80)))))
        scores = rng.integers(0, 12, len(classes)) / 4
        found = class_threshold(torch.from_numpy(scores), torch.from_numpy(classes), [float(s) for s in steps])
        assert found.tolist() == [plain_threshold(scores.tolist(), classes.tolist(), step) for step in steps]


@pytest.mark.parametrize(
    ("k", "error", "enough"), [(9, 0.1, True), (8, 0.1, False), (19, 0.05, True), (18, 0.05, False)]
)
def test_with_too_few_classes_for_an_error_rate_the_threshold_is_infinite(k: int, error: float, enough: bool) -> None:
    scores = torch.arange(float(3 * k))
    found = float(class_threshold(scores, torch.arange(k).repeat_interleave(3), [error]))
    assert found == (3 * k - 1 if enough else math.inf)


def test_the_promise_holds_for_clips_of_new_classes_where_clips_as_the_unit_break_it() -> None:
    """Classes of which each has a level of its own, and clips that vary little around it."""
    rng = np.random.default_rng(0)
    error, k, clips = 0.1, 12, 40
    inside = {"classes": 0.0, "clips": 0.0}
    for _ in range(2000):
        levels = rng.exponential(size=k + 1)
        scores = torch.from_numpy(np.repeat(levels, clips) + 0.05 * rng.standard_normal((k + 1) * clips))
        known, new = scores[: k * clips], scores[k * clips :]
        of_class = float(class_threshold(known, torch.arange(k).repeat_interleave(clips), [error]))
        of_clip = float(class_threshold(known, torch.arange(k * clips), [error]))
        inside["classes"] += float((new <= of_class).double().mean()) / 2000
        inside["clips"] += float((new <= of_clip).double().mean()) / 2000
    assert inside["classes"] >= 1 - error
    assert inside["clips"] < 1 - error - 0.02


@pytest.mark.parametrize(
    ("n_way", "n_shot", "n_query"), [(2, 1, 2), (5, 3, 4), (N_CLASSES - 1, 1, 4), (N_CLASSES, 5, 1)]
)
def test_every_class_comes_about_as_often_and_no_query_is_in_its_support(n_way: int, n_shot: int, n_query: int) -> None:
    rng = np.random.default_rng(0)
    of_episodes = deal_classes(range(N_CLASSES), n_way, n_query=n_query, n_known=20, rng=rng)
    dealt = make_episodes(OF_CLASSES, of_episodes, n_shot, n_query, rng)
    rows, known = dealt.episodes, dealt.known
    assert rows["support"].shape[1:] == (n_way, n_shot)
    assert rows["query"].shape[1] == n_query * (n_way + min(n_way, N_CLASSES - n_way))
    assert (rows["support"] // VIDEOS_A_CLASS == rows["class_indices"].unsqueeze(-1)).all()
    assert (rows["query"] // VIDEOS_A_CLASS == dealt.classes).all()
    own = rows["class_indices"].gather(1, rows["query_labels"].clamp(min=0))
    assert (own == dealt.classes)[known].all()
    for support, query, classes, row, of in zip(
        rows["support"], rows["query"], rows["class_indices"], known, dealt.classes, strict=True
    ):
        drawn = support.flatten().tolist() + query.tolist()
        assert len(drawn) == len(set(drawn))
        assert not set(of[~row].tolist()) & set(classes.tolist())
    for of_kind, most in ((known, n_query), (~known, 2 * n_query)):
        counts = dealt.classes[of_kind].bincount(minlength=N_CLASSES)
        assert counts.max() - counts.min() <= most
    counts = dealt.classes[known].bincount(minlength=N_CLASSES)
    assert counts.min() >= 20
    assert counts.max() < 20 + 2 * n_query  # and no more than it takes
    # So each class counts for the threshold of "none of these" too, however few are outside an episode.
    assert len(dealt.classes[~known].unique()) == (N_CLASSES if n_way < N_CLASSES else 0)


@pytest.mark.parametrize("name", ["m2df", "otam", "clip_fsar"])
def test_a_bank_plays_episodes_of_any_shape_as_one_that_was_made_for_them(name: str) -> None:
    features, prompts = videos()
    head = make_head(name)
    player = Player(head, features, prompts, OF_CLASSES)
    for n_way, n_shot in ((3, 1), (5, 2), (2, 4)):
        played = episodes(6, n_way, n_shot)
        with torch.no_grad():
            expected = EpisodeBank(head, features, prompts, played).play(played["numbers"]).logits
            found = player.play(played)[0]
        torch.testing.assert_close(found, expected)


def slow_calibration(head: Any, features: Tensor, prompts: Tensor, n_way: int, n_shot: int, share: float) -> Any:
    """The scores of all queries, each episode by itself through the head."""
    rng = np.random.default_rng([n_way, n_shot])
    n_query = min(4, VIDEOS_A_CLASS - n_shot)
    of_episodes = deal_classes(range(N_CLASSES), n_way, n_query=n_query, n_known=N_KNOWN, rng=rng)
    dealt = make_episodes(OF_CLASSES, of_episodes, n_shot, n_query, rng)
    known: list[tuple[float, int]] = []
    unknown: list[tuple[Tensor, int]] = []
    for i in range(len(dealt.classes)):
        rows = {key: value[i] for key, value in dealt.episodes.items() if isinstance(value, Tensor)}
        own, query = prompts[rows["class_indices"]], features[rows["query"]]
        logits = head(features[rows["support"]], query, own).logits
        shares = fuse_text(head, share, logits, query, own).double().softmax(-1)
        for j, label in enumerate(rows["query_labels"].tolist()):
            of = int(dealt.classes[i, j])
            if label < 0:
                unknown.append((logits[j], of))
            else:
                known.append((1 - float(shares[j, label]), of))
    return known, unknown


@pytest.mark.parametrize(("name", "share"), [("m2df", 0.0), ("otam", 0.5)])
@torch.no_grad()
def test_thresholds_are_those_of_each_episode_by_itself(name: str, share: float) -> None:
    features, prompts = videos()
    head = make_head(name)
    found = calibrate(head, features, prompts, OF_CLASSES, n_shots=[2], n_ways=[3], text_fusion=share)
    assert found is not None
    known, unknown = slow_calibration(head, features, prompts, 3, 2, share)
    for error in (Fraction(1, 5), Fraction(2, 5)):
        thresholds = found.at(3, 2, float(error))
        misfits, classes = zip(*known, strict=True)
        # The threshold of 1 - p, which is kept as -log p.
        assert 1 - math.exp(-thresholds.known) == pytest.approx(plain_threshold(misfits, classes, error), abs=1e-5)
        scores = [float(SCORES[found.score](logits.double())) for logits, _ in unknown]
        expected = plain_threshold(scores, [of for _, of in unknown], error)
        assert thresholds.unknown == pytest.approx(expected, abs=1e-4)


def small_calibration(head_name: str = "otam", **options: Any) -> Calibration:
    features, prompts = videos()
    head = build_head(head_name, {"dim": features.shape[-1]})
    found = calibrate(head, features, prompts, OF_CLASSES, **{"n_shots": [1, 3, 9], **options})
    assert found is not None
    return found


def test_what_there_is_of_a_calibration_is_said() -> None:
    found = small_calibration()
    assert found.n_shots == [1, 3]  # of 9 videos a class none is left beside 9 examples
    assert str(found) == f"2 to {N_CLASSES} classes with 1, 3 examples"
    assert found.n_classes(4, 3) == N_CLASSES
    assert found.n_classes(4, 2) == 0
    with pytest.raises(UserError, match=r"not of 4 classes with 2 examples, but of 2 to 7 classes with 1, 3 examples"):
        found.at(4, 2, 0.2)
    # 1/8 of the weight is that of the class to come.
    assert math.isinf(found.at(4, 3, 0.12).known)
    assert math.isfinite(found.at(4, 3, 0.13).known)
    # With all classes in each episode there is no unknown clip.
    assert math.isinf(found.at(N_CLASSES, 1, 0.5).unknown)
    assert math.isfinite(found.at(N_CLASSES, 1, 0.5).known)
    assert math.isinf(found.at(4, 3, 0.001).known)


def test_other_settings_beside_it_change_nothing_of_a_calibration() -> None:
    both, alone = small_calibration(n_ways=[3, 4]), small_calibration(n_ways=[4], n_shots=[3])
    assert both.at(4, 3, 0.2).known == alone.at(4, 3, 0.2).known


def test_a_calibration_chooses_its_score_by_all_its_settings() -> None:
    name = "nearest_prototype"  # for which another score than the first is best
    together = small_calibration(name, n_ways=[3, 4], n_shots=[1, 3])
    alone = [small_calibration(name, n_ways=[n_way], n_shots=[n_shot]) for n_shot in (1, 3) for n_way in (3, 4)]
    for score, mean in together.aurocs.items():
        assert mean == pytest.approx(sum(one.aurocs[score] for one in alone) / 4, abs=1e-12)
    assert together.score == max(together.aurocs, key=lambda score: together.aurocs[score]) == "energy"


def test_an_error_rate_that_floats_put_below_its_step_is_of_the_step() -> None:
    found = small_calibration(n_ways=[4])
    assert 0.29 * STEPS < 58
    assert found.at(4, 3, 0.29) == tuple(found.thresholds[1, :, 57].tolist())
    assert found.thresholds[1, :, 57].ne(found.thresholds[1, :, 56]).any()


def test_classes_with_too_few_videos_are_left_out_of_a_calibration() -> None:
    features, prompts = videos()
    head = build_head("otam", {"dim": features.shape[-1]})
    fewer = [row[:2] if c == 3 else row for c, row in enumerate(OF_CLASSES)]
    found = calibrate(head, features, prompts, fewer, n_shots=[1, 3])
    assert found is not None
    assert (found.n_classes(4, 1), found.n_classes(4, 3)) == (N_CLASSES, N_CLASSES - 1)
    assert calibrate(head, features, prompts, [row[:1] for row in OF_CLASSES], n_shots=[1]) is None
    assert calibrate(head, features, prompts, [OF_CLASSES[0], OF_CLASSES[1][:1]], n_shots=[1]) is None


def test_a_calibration_comes_back_from_its_state_and_a_damaged_one_is_refused() -> None:
    found = small_calibration()
    state = found.state()
    again = Calibration.from_state(state)
    assert again.at(3, 1, 0.3) == found.at(3, 1, 0.3)
    nan = torch.full_like(found.thresholds, math.nan)
    for name, value in (
        ("score", "distances"),
        ("score", None),
        ("score", ["distance"]),
        ("aurocs", {"distance": 2.0}),
        ("aurocs", {"distance": 0.5}),
        ("aurocs", dict.fromkeys(SCORES, 2.0)),
        ("aurocs", dict.fromkeys(SCORES, "0.5")),
        ("aurocs", dict.fromkeys(SCORES, torch.tensor([0.5]))),
        ("settings", found.settings.to_sparse()),
        ("settings", found.settings.tolist()),
        ("thresholds", found.thresholds.to_sparse()),
        ("thresholds", found.thresholds.to("meta")),
        ("goes_by", {"selection": torch.ones(3)}),
        ("settings", found.settings.float()),
        ("settings", found.settings[:, :2]),
        ("settings", found.settings * 0),
        ("settings", found.settings[:1].repeat(len(found.settings), 1)),
        ("thresholds", nan),
        ("thresholds", found.thresholds.flip(-1)),
        ("thresholds", found.thresholds[:1]),
        ("thresholds", "none"),
        ("goes_by", 3),
    ):
        with pytest.raises(UserError, match=r"the calibration is damaged: it has .*; calibrate again") as refused:
            Calibration.from_state(state | {name: value})
        assert len(str(refused.value)) < 200
    others: list[Any] = [None, [], {}, {**state, "more": 1}]
    for other in others:
        with pytest.raises(UserError, match="the calibration is damaged"):
            Calibration.from_state(other)
