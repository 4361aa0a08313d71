import math

import numpy as np
import pytest
import torch

from clip_m2df.evaluation.metrics import EpisodeAccuracy, Mean, Share, Sum


def random_episodes(n: int, n_queries: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, n_queries, generator=torch.Generator().manual_seed(seed)) < 0.7


def test_accuracy_and_interval_are_those_over_episodes() -> None:
    correct = random_episodes(101, 5)
    metric = EpisodeAccuracy()
    for batch in correct.split(8):
        metric.update(batch)
    result = metric.compute()
    accuracies = correct.numpy().mean(1)
    assert result["accuracy"].item() == pytest.approx(accuracies.mean(), abs=1e-15)
    assert result["interval"].item() == pytest.approx(1.96 * np.std(accuracies) / math.sqrt(101), abs=1e-15)


def test_ranks_add_up_to_the_bit_whatever_their_number() -> None:
    correct = random_episodes(1000, 25)
    one = EpisodeAccuracy()
    one.update(correct)
    for world_size in (2, 3, 7):
        ranks = [EpisodeAccuracy() for _ in range(world_size)]
        for rank, metric in enumerate(ranks):
            metric.update(correct[rank::world_size])
        # What torchmetrics does over processes, by each state's own reduction.
        merged = EpisodeAccuracy()
        for name in ("correct", "correct_squared", "episodes"):
            setattr(merged, name, torch.stack([getattr(metric, name) for metric in ranks]).sum(0))
        merged.n_queries = torch.stack([metric.n_queries for metric in ranks]).amax(0)
        merged._update_count = 1
        assert merged.compute() == one.compute()


def test_no_episode_has_no_accuracy_and_equal_ones_no_interval() -> None:
    metric = EpisodeAccuracy()
    with pytest.warns(UserWarning, match="before"):
        assert math.isnan(metric.compute()["accuracy"])
    metric.reset()
    metric.update(torch.tensor([[True, False], [False, True]]))
    assert metric.compute() == {"accuracy": 0.5, "interval": 0.0}


def test_episodes_of_another_size_are_refused() -> None:
    metric = EpisodeAccuracy()
    metric.update(random_episodes(2, 5))
    with pytest.raises(ValueError, match="episodes of 4 queries after episodes of 5"):
        metric.update(random_episodes(2, 4))


def test_share() -> None:
    share = Share()
    share.update(torch.tensor([True, False, False]))
    share.update(torch.tensor([[True]]))
    assert share.compute().item() == 0.5


def test_mean_weighs_batches_by_their_episodes() -> None:
    mean = Mean()
    mean.update(torch.tensor(1.0), 3)
    mean.update(torch.tensor(5.0), 1)
    assert mean.compute().item() == 2


def test_metrics_go_on_after_inference_mode() -> None:
    for metric, update in (
        (EpisodeAccuracy(), (torch.tensor([[True]]),)),
        (Share(), (torch.tensor([True]),)),
        (Mean(), (torch.tensor(1.0), 1)),
    ):
        with torch.inference_mode():
            metric.update(*update)
            metric.reset()
        metric.update(*update)
        metric.compute()


def test_a_mean_is_the_same_to_the_bit_in_whatever_order() -> None:
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 10
    results = []
    for order in (range(500), range(499, -1, -1), torch.randperm(500, generator=torch.Generator().manual_seed(1))):
        mean = Mean()
        for k in order:
            mean.update(values[k], 1)
        results.append(mean.compute())
    assert results[0] == results[1] == results[2]
    torch.testing.assert_close(results[0], values.double().mean(), rtol=1e-8, atol=0)


def test_a_mean_of_what_is_no_number_is_none() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        mean = Mean()
        mean.update(torch.tensor(1.0), 2)
        assert mean.compute() == 1
        mean.update(torch.tensor(bad), 2)
        mean.update(torch.tensor(1.0), 2)
        assert mean.compute().isnan()
        mean.reset()
        mean.update(torch.tensor(3.0), 1)
        assert mean.compute() == 3


def test_a_sum_counts() -> None:
    count = Sum()
    count.update(torch.tensor([1, 2]))
    count.update(torch.tensor(4))
    assert count.compute() == 7
