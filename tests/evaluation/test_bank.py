from typing import Any, cast

import pytest
import torch
from torch import Tensor

from clip_m2df.episode import IndexedEpisode
from clip_m2df.evaluation import bank as module
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.nn.baselines import build_head
from clip_m2df.nn.head import Embedded, Head, HeadOutput

VIDEOS_A_CLASS, N_CLASSES, T, DIM = 9, 7, 4, 16


def videos(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of the videos, 9 of each class, and the prompt table."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(N_CLASSES, DIM, generator=generator)
    # Alike enough for PPS to waver.
    noise = torch.randn(N_CLASSES, VIDEOS_A_CLASS, T, DIM, generator=generator)
    features = prompts[:, None, None] + 2.5 * noise
    return features.flatten(0, 1), prompts


def episodes(n: int, n_way: int = 3, n_shot: int = 1, n_query: int = 2, seed: int = 0) -> IndexedEpisode:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.stack([torch.randperm(N_CLASSES, generator=generator)[:n_way] for _ in range(n)])
    drawn = torch.stack([torch.randperm(VIDEOS_A_CLASS, generator=generator) for _ in range(n * n_way)])
    places = drawn.view(n, n_way, -1) + VIDEOS_A_CLASS * classes.unsqueeze(-1)
    return IndexedEpisode(
        numbers=torch.arange(n),
        support=places[..., :n_shot],
        query=places[..., n_shot : n_shot + n_query].flatten(1),
        query_labels=torch.arange(n_way).repeat_interleave(n_query).expand(n, -1),
        class_indices=classes,
        class_names=[f"class {c}" for c in range(N_CLASSES)],
        draws=torch.rand(n, n_way * n_query, generator=generator),
        replaced=torch.zeros(n, dtype=torch.long),
    )


SMALL = {"num_heads": 4, "hidden_dim": 24}
SIZES: dict[str, dict[str, Any]] = {"m2df": SMALL, "clip_fsar": SMALL, "trx": {"width": 24}, "ts_fsar": {"width": 6}}


def make_head(head: str = "m2df", **options: Any) -> Head:
    torch.manual_seed(0)
    return build_head(head, {"dim": DIM} | SIZES.get(head, {}) | options).eval()


def direct(head: Any, features: Tensor, prompts: Tensor, played: IndexedEpisode, numbers: Tensor) -> Any:
    """Episodes through the head as a whole."""
    return head(
        features[played["support"][numbers]],
        features[played["query"][numbers]],
        prompts[played["class_indices"][numbers]],
        played["draws"][numbers],
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "local": {"views": ["local"]},
    "global": {"views": ["global"]},
    "weights": {"view_weights": [0.3, 0.7]},
    "visual": {"reliability": ["visual"]},
    "both conditions": {"reliability": ["text", "visual"], "direction": "mutual"},
    "no condition": {"reliability": [], "direction": "local_to_global"},
    "sample": {"selection": "sample"},
    "expectation": {"selection": "expectation"},
    "each": {"selection": "each"},
    "without PPS": {"pps": False},
    "depth 2": {"depth": 2},
    "one way": {"single_direction": True},
    "temperature": {"temperature": 5.0, "selection": "sample", "top_k": 2, "smoothing": 0.1},
    "nearest prototype": {"head": "nearest_prototype"},
    "OTAM": {"head": "otam"},
    "zero-shot": {"head": "zero_shot"},
    "Bi-MHM": {"head": "bi_mhm"},
    "CLIP-FSAR": {"head": "clip_fsar", "depth": 2},
    "linear probe": {"head": "linear_probe"},
    "Tip-Adapter": {"head": "tip_adapter"},
    "TRX": {"head": "trx", "tuples": [2, 3]},
    "TS-FSAR": {"head": "ts_fsar", "frames": T},
}


@pytest.mark.parametrize("n_shot", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_each_episode_is_scored_as_by_the_head_itself(name: str, n_shot: int) -> None:
    head = make_head(**OPTIONS[name])
    features, prompts = videos()
    played = episodes(200, n_shot=n_shot)
    bank = EpisodeBank(head, features, prompts, played)
    for numbers in played["numbers"].split(64):
        output, expected = bank.play(numbers), direct(head, features, prompts, played, numbers)
        assert isinstance(expected, HeadOutput)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
        assert output.logits.argmax(-1).equal(expected.logits.argmax(-1))
        assert output.prompt_indices.equal(expected.prompt_indices)
        torch.testing.assert_close(output.prompt_probabilities, expected.prompt_probabilities)
        assert output.views.keys() == expected.views.keys()
        for view, compared in expected.views.items():
            torch.testing.assert_close(output.views[view].distances, compared.distances, atol=1e-4, rtol=0)
            torch.testing.assert_close(output.views[view].text_similarities, compared.text_similarities)
        torch.testing.assert_close(output.distillation.loss, expected.distillation.loss, atol=1e-4, rtol=1e-4)
        assert output.distillation.local_to_global.equal(expected.distillation.local_to_global)
        assert output.distillation.global_to_local.equal(expected.distillation.global_to_local)
    if name in ("sample", "temperature", "expectation"):  # PPS did have a choice
        assert bank.probabilities.amax(-1).min() < 0.9


def count_embedded(head: Head, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many videos a head embeds, call by call."""
    calls: list[int] = []
    embed = head.embed

    def noted(videos: Tensor, prompt: Tensor | None) -> Embedded:
        calls.append(videos[..., 0, 0].numel())
        return embed(videos, prompt)

    monkeypatch.setattr(head, "embed", noted)
    return calls


def support_pairs(played: IndexedEpisode) -> set[tuple[int, int]]:
    """Each video as support, with its class."""
    rows = zip(played["support"].tolist(), played["class_indices"].tolist(), strict=True)
    return {(video, c) for row, classes in rows for shots, c in zip(row, classes, strict=True) for video in shots}


@pytest.mark.parametrize("name", ["as published", "sample", "expectation", "each", "without PPS", "OTAM", "CLIP-FSAR"])
@torch.no_grad()
def test_each_pair_of_a_video_and_a_prompt_is_embedded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(**OPTIONS[name])
    features, prompts = videos()
    played = episodes(300)
    calls = count_embedded(head, monkeypatch)
    bank = EpisodeBank(head, features, prompts, played)
    indices = torch.cat([bank.play(numbers).prompt_indices for numbers in played["numbers"].split(50)])
    query = played["query"].flatten().tolist()
    support = support_pairs(played)
    of_episodes = 0
    if head.query_prompt == "class":
        chosen = played["class_indices"].gather(1, indices).flatten().tolist()
        pairs = len(support | set(zip(query, chosen, strict=True)))
    elif head.query_prompt == "each":
        rows = zip(played["query"].tolist(), played["class_indices"].tolist(), strict=True)
        pairs = len(support | {(video, c) for videos, classes in rows for video in videos for c in classes})
    elif head.query_prompt == "none":
        pairs = len(support) + len(set(query))
    else:  # a mixture is an episode's own
        pairs, of_episodes = len(support), len(query)
    assert pairs >= len(features)
    assert len(bank.pairs) == pairs
    # The first few are embedded twice: once to see how much room all take.
    assert sum(calls) == min(module.PAIRS, pairs) + pairs + of_episodes


@torch.no_grad()
def test_bits_do_not_depend_on_who_plays_what() -> None:
    head = make_head(selection="sample")
    features, prompts = videos()
    played = episodes(256)
    batches = played["numbers"].split(32)
    alone = EpisodeBank(head, features, prompts, played)
    whole = [alone.play(numbers).logits for numbers in batches]
    for ranks in (2, 3):
        for rank in range(ranks):
            bank = EpisodeBank(head, features, prompts, played)
            for number in range(rank, len(batches), ranks):
                assert bank.play(batches[number]).logits.equal(whole[number])


@pytest.mark.parametrize("selection", ["argmax", "each"])
@torch.no_grad()
def test_where_memory_is_short_each_batch_embeds_its_own(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(selection=selection)
    calls = count_embedded(head, monkeypatch)
    features, prompts = videos()
    played = episodes(64)
    ample, short = (EpisodeBank(head, features, prompts, played, memory=memory) for memory in (1e9, 1e4))
    embedded = []
    for bank in (ample, short):
        logits = torch.cat([bank.play(numbers).logits for numbers in played["numbers"].split(16)])
        embedded.append(sum(calls))
        torch.testing.assert_close(logits, ample.play(played["numbers"]).logits, atol=1e-5, rtol=0)
        calls.clear()
    assert embedded[1] > 1.5 * embedded[0]
    expected = ample.play(played["numbers"]).logits
    monkeypatch.setattr(module, "PAIRS", 5)
    few = EpisodeBank(head, features, prompts, played)
    torch.testing.assert_close(few.play(played["numbers"]).logits, expected)


def with_unknown(played: IndexedEpisode, n_unknown: int = 3, seed: int = 1) -> IndexedEpisode:
    """The episodes with queries of the classes that each does not have."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.stack(
        [
            torch.tensor([c for c in range(N_CLASSES) if c not in classes])
            for classes in played["class_indices"].tolist()
        ]
    )
    n = len(others)
    drawn = torch.rand(n, others.shape[1] * VIDEOS_A_CLASS, generator=generator).argsort(-1)[:, :n_unknown]
    classes = others.gather(1, drawn // VIDEOS_A_CLASS)
    unknown = VIDEOS_A_CLASS * classes + drawn % VIDEOS_A_CLASS
    draws = torch.rand(n, n_unknown, generator=generator)
    extra: Any = {"unknown": unknown, "unknown_classes": classes, "unknown_draws": draws}
    merged: Any = played | extra
    return cast(IndexedEpisode, merged)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_unknown_queries_are_scored_as_by_the_head_itself_and_change_nothing(name: str) -> None:
    head = make_head(**OPTIONS[name])
    features, prompts = videos()
    plain = episodes(40, n_shot=2)
    played = with_unknown(plain)
    closed, bank = EpisodeBank(head, features, prompts, plain), EpisodeBank(head, features, prompts, played)
    assert closed.of_unknown is None
    assert bank.of_unknown is not None
    of_unknown: Any = played | {"query": played["unknown"], "draws": played["unknown_draws"]}
    for numbers in played["numbers"].split(20):
        output = bank.of_unknown.play(numbers)
        expected = direct(head, features, prompts, of_unknown, numbers)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
        assert output.prompt_indices.equal(expected.prompt_indices)
        assert bank.play(numbers).logits.equal(closed.play(numbers).logits)
