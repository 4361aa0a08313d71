"""TRX: a case by hand, slow loops, the published code's numbers, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_m2df import UserError
from clip_m2df.nn.trx import TRXHead, positions
from tests.conftest import read_golden
from tests.nn import references


def make_head(dim: int = 6, **options: Any) -> TRXHead:
    torch.manual_seed(0)
    return TRXHead(dim=dim, width=5, **options).eval()


def videos(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed))


def with_positions(video: Tensor) -> list[list[float]]:
    """Each frame with its position added, number by number."""
    dim = video.shape[-1]
    placed = []
    for n, frame in enumerate(video.tolist()):
        angles = [n / 10000 ** ((k - k % 2) / dim) for k in range(dim)]
        waves = [math.cos(a) if k % 2 else math.sin(a) for k, a in enumerate(angles)]
        placed.append([x + 0.1 * wave for x, wave in zip(frame, waves, strict=True)])
    return placed


def tuples_of(video: Tensor, size: int) -> list[list[float]]:
    """The frames of each tuple behind one another, the first frame slowest."""
    frames, found = with_positions(video), []

    def extend(start: int, chosen: list[list[float]]) -> None:
        if len(chosen) == size:
            found.append([x for frame in chosen for x in frame])
            return
        for k in range(start, len(frames)):
            extend(k + 1, [*chosen, frames[k]])

    extend(0, [])
    return found


@torch.no_grad()
def slow_distance(encoder: Any, size: int, query: Tensor, shots: list[Tensor]) -> float:
    """Of one query from one class, a pair of tuples at a time."""

    def linear(layer: nn.Linear, x: list[float]) -> list[float]:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    def key(x: list[float]) -> list[float]:
        y = linear(encoder.keys[0], x)
        mean = sum(y) / len(y)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in y) / len(y) + 1e-5)
        norm = encoder.keys[1]
        rows = zip(y, norm.weight.tolist(), norm.bias.tolist(), strict=True)
        return [(v - mean) / deviation * w + b for v, w, b in rows]

    others = [other for shot in shots for other in tuples_of(shot, size)]
    keys, values = [key(other) for other in others], [linear(encoder.values, other) for other in others]
    total, own = 0.0, tuples_of(query, size)
    for pair in own:
        mine = key(pair)
        weights = references.softmax([sum(a * b for a, b in zip(mine, k, strict=True)) / math.sqrt(5) for k in keys])
        for i, value in enumerate(linear(encoder.values, pair)):
            found = sum(w * v[i] for w, v in zip(weights, values, strict=True))
            total += (value - found) ** 2
    return total / len(own)


@pytest.mark.parametrize("tuples", [[2], [3], [2, 3], [1, 4]])
def test_it_equals_the_loop(tuples: list[int]) -> None:
    head = make_head(tuples=tuples)
    support, query = videos(3, 2, 4), videos(4, 4, seed=1)
    expected = torch.zeros(4, 3)
    for q in range(4):
        for c in range(3):
            parts = [
                slow_distance(encoder, size, query[q], list(support[c]))
                for size, encoder in zip(tuples, head.encoders, strict=True)
            ]
            expected[q, c] = -sum(parts) / len(parts)
    torch.testing.assert_close(head(support, query, torch.zeros(3, 6)).logits, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.1


def test_classes_with_other_numbers_of_shots_equal_the_loop() -> None:
    head, shots = make_head(tuples=[2, 3]), [videos(n, 4, seed=n) for n in (1, 3, 2)]
    query = videos(4, 4, seed=9)
    logits = references.logits_of_classes(head, shots, query, torch.zeros(3, 6))
    for q in range(4):
        for c, own in enumerate(shots):
            parts = [
                slow_distance(encoder, size, query[q], list(own))
                for size, encoder in zip((2, 3), head.encoders, strict=True)
            ]
            assert logits[q, c].item() == pytest.approx(-sum(parts) / 2, rel=1e-4)


def test_one_pair_by_hand() -> None:
    # Two frames make one pair, whose values here are its features. With one shot the attention has nothing to choose:
    # the squared distance of the frames, whose positions are the same. The order of frames counts.
    head = TRXHead(dim=2, width=4).eval()
    encoder: Any = head.encoders[0]
    with torch.no_grad():
        encoder.values.weight.copy_(torch.eye(4))
        encoder.values.bias.zero_()
    support = torch.tensor([[[[1.0, 0], [0, 1]]], [[[0, 1], [1, 0]]]])
    query = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [2, 1]]])
    logits = head(support, query, torch.zeros(2, 2)).logits
    torch.testing.assert_close(logits, torch.tensor([[0.0, -4.0], [-4.0, -4.0]]))
    # Keys that are all the same give two shots the same weight: their mean is compared.
    nn.init.zeros_(encoder.keys[0].weight)
    both = support.transpose(0, 1)
    torch.testing.assert_close(head(both, query, torch.zeros(1, 2)).logits, torch.tensor([[-1.0], [-3.0]]))


def test_it_equals_the_published_code() -> None:
    golden, state = read_golden("trx")
    names = {"keys.0": "k_linear", "keys.1": "norm_k", "values": "v_linear"}
    logits = []
    for tuples in ([2], [3], [2, 3]):
        head = TRXHead(dim=10, width=12, tuples=tuples).eval()
        weights = {
            f"encoders.{i}.{ours}.{part}": state[f"{size}.{theirs}.{part}"]
            for i, size in enumerate(tuples)
            for ours, theirs in names.items()
            for part in ("weight", "bias")
        }
        head.load_state_dict({"scale": head.scale, **weights})
        logits.append(head(golden["support"], golden["query"], torch.zeros(4, 10)).logits)
    pairs, triples = golden["pairs"], golden["triples"]
    for found, expected in zip(logits, (pairs, triples, (pairs + triples) / 2), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_positions_of_an_odd_width() -> None:
    expected = torch.tensor(with_positions(torch.zeros(7, 5)))
    torch.testing.assert_close(positions(7, 5, device=torch.device("cpu")), expected)


def test_too_few_frames_and_tuples_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"tuples of 3 frames.* 2: .*data\.frames.*head_options\.tuples"):
        make_head(tuples=[2, 3])(videos(3, 1, 2), videos(1, 2), torch.zeros(3, 6))
    for wrong in ([], [2, 2], [0], [True], [2.0], "2", 2, [None]):
        with pytest.raises(UserError, match="tuples is"):
            make_head(tuples=wrong)


def test_tuples_that_would_fill_the_memory_are_refused() -> None:
    head = TRXHead(dim=4, tuples=[10], width=2)
    with pytest.raises(UserError, match=r"videos of 60 have \d{11}, more than 10000: take fewer frames \(data\.frames"):
        head.embed(torch.zeros(1, 60, 4), None)
