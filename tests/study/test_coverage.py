"""How often sets hold the truth, over draws of classes."""

import numpy as np
import pytest
import torch

from clip_m2df.evaluation.conformal import Player
from clip_m2df.nn.baselines import build_head
from study.coverage import ERRORS, N_WAY, played, summary

A_CLASS, FRAMES, DIM = 10, 4, 16


def made(n_classes: int, noise: float) -> tuple[Player, list[list[int]]]:
    """Clips around the mean of their class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n_classes, 1, 1, DIM, generator=generator)
    features = centres + noise * torch.randn(n_classes, A_CLASS, FRAMES, DIM, generator=generator)
    videos = [list(range(c * A_CLASS, (c + 1) * A_CLASS)) for c in range(n_classes)]
    head = build_head("nearest_prototype", {"dim": DIM}).eval()
    return Player(head, features.flatten(0, 1), torch.randn(n_classes, DIM, generator=generator), videos), videos


@pytest.mark.parametrize("n_classes", [20, 24, 33])
@torch.no_grad()
def test_sets_hold_the_truth_as_often_as_promised_and_are_not_all_full(n_classes: int) -> None:
    """With one class left for the test, with four, and with ten."""
    player, videos = made(n_classes, noise=2.5)
    draws = played(player, videos, n_shot=1, draws=80, rng=np.random.default_rng(0))
    for error in ERRORS:
        found = summary([draw[error] for draw in draws])
        assert found["coverage"] + found["interval"] >= 1 - error
        assert found["unknown_coverage"] + found["unknown_interval"] >= 1 - error
        assert found["false_rejection"] <= error
        assert 0 < found["set_size"] <= N_WAY + 1
        assert found["full_share"] < 1
    sizes = [summary([draw[error] for draw in draws])["set_size"] for error in ERRORS]
    assert sizes == sorted(sizes, reverse=True)


@torch.no_grad()
def test_clips_that_are_their_class_have_sets_of_that_class() -> None:
    player, videos = made(24, noise=0.01)
    draws = played(player, videos, n_shot=3, draws=5, rng=np.random.default_rng(0))
    found = summary([draw[0.05] for draw in draws])
    assert found["coverage"] > 0.9
    assert found["set_size"] < 1.5
    assert found["full_share"] == 0


def test_intervals_are_over_draws() -> None:
    values = [0.0, 0.5, 1.0, 1.0]
    shares = {"coverage", "unknown_coverage", "set_size", "full_share", "empty_share", "false_rejection"}
    found = summary([dict.fromkeys(shares, value) for value in values])
    assert found["coverage"] == 0.625
    assert found["interval"] == pytest.approx(1.96 * np.std(values) / 2, abs=1e-5)
    intervals = {"interval", "unknown_interval", "false_rejection_interval"}
    assert found.keys() == shares | intervals
