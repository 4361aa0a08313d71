"""A head of a user's own, whose prototypes depend on the query, wherever heads are played."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_m2df import CLIPM2DF, FewShotClassifier
from clip_m2df.commands.trainer import CLI, run
from clip_m2df.export import FORMATS, export_model
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.prompts import SelectedPrompts
from tests.classifier.conftest import noise
from tests.conftest import options
from tests.test_export import HEAD_INPUTS, opened

PATH = f"{__name__}.SmallTRX"
WIDTH = 8


class SmallTRX(Head):
    """Pairs of frames of a query attend to those of all shots of a class (after Perrett et al., TRX, CVPR 2021).

    Args:
        dim: width of the features.
        width: of keys and values.
    """

    def __init__(self, *, dim: int, width: int = WIDTH) -> None:
        super().__init__(dim=dim)
        self.keys = nn.Sequential(nn.Linear(2 * dim, width), nn.LayerNorm(width))
        self.values = nn.Linear(2 * dim, width, bias=False)

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        first, second = torch.triu_indices(videos.shape[-2], videos.shape[-2], 1, device=videos.device)
        pairs = torch.cat((videos[..., first, :], videos[..., second, :]), -1)
        return Embedded(keys=self.keys(pairs), values=self.values(pairs))

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        pairs = embedded.map(lambda tensor: tensor.flatten(-3, -2))  # of all shots
        real = torch.ones(pairs["keys"].shape[:-1], dtype=torch.bool, device=prompts.device)
        return Embedded(pairs, real=real)

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        keys, values = (query[name].unsqueeze(-3) for name in ("keys", "values"))
        scores = keys @ prototypes["keys"].unsqueeze(-4).transpose(-1, -2) / math.sqrt(keys.shape[-1])
        scores = scores.masked_fill(~prototypes["real"].unsqueeze(-2).unsqueeze(-4), -torch.inf)
        own = scores.softmax(-1) @ prototypes["values"].unsqueeze(-4)  # a prototype for each pair of the query
        return HeadOutput.of(-(values - own).square().mean((-1, -2)), selected)


def slow_logits(head: SmallTRX, support: Sequence[Tensor], query: Tensor) -> Tensor:
    """A query, a class and a pair of frames at a time, each class with its own number of shots."""

    def pairs(video: Tensor) -> list[Tensor]:
        return [torch.cat((video[i], video[j])) for i in range(len(video)) for j in range(i + 1, len(video))]

    logits = torch.zeros(len(query), len(support))
    for q, video in enumerate(query):
        for c, shots in enumerate(support):
            distances = []
            for pair in pairs(video):
                others = [other for shot in shots for other in pairs(shot)]
                key = head.keys(pair)
                scores = torch.stack([key @ head.keys(other) / math.sqrt(WIDTH) for other in others])
                own = sum(w * head.values(other) for w, other in zip(scores.softmax(0), others, strict=True))
                distances.append((head.values(pair) - own).square().mean())
            logits[q, c] = -torch.stack(distances).mean()
    return logits


@pytest.fixture
def model() -> CLIPM2DF:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPM2DF("tiny", head=PATH).eval()


def own_head(model: CLIPM2DF) -> SmallTRX:
    head = model.model.head
    assert isinstance(head, SmallTRX)
    return head


# On the command line


@pytest.fixture(scope="module")
def own(manifest: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run with the head."""
    head = [f"--model.head={PATH}", f'--model.head_options={{"width": {WIDTH}}}', "--model.lr=1e-2"]
    more = ["--data.frames=3", "--data.test_episodes=30", "--trainer.max_steps=4"]
    return options(manifest, tiny_clip_dir, tmp_path_factory.mktemp("own_head"), *head, *more)[1:]


@pytest.fixture(scope="module")
def fitted(own: list[str]) -> CLI:
    return run(["fit", *own])


def test_it_is_trained(fitted: CLI) -> None:
    (optimizer,) = fitted.trainer.optimizers
    for name, weight in own_head(fitted.model).named_parameters():
        if name != "scale":  # which the class-text loss alone trains
            assert optimizer.state[weight]["step"] == 4
            assert optimizer.state[weight]["exp_avg_sq"].amax() > 0, name


def test_a_bank_gives_the_numbers_of_the_direct_path(fitted: CLI, own: list[str]) -> None:
    results = []
    for evaluation, n_shot in (("direct", 1), ("bank", 1), ("direct", 2), ("bank", 2)):
        more = [f"--data.evaluation={evaluation}", f"--data.n_shot={n_shot}", "--ckpt_path=last"]
        tested = run(["test", *own, *more])
        results.append({name: float(value) for name, value in tested.trainer.callback_metrics.items()})
    for direct, bank in (results[:2], results[2:]):
        assert bank == pytest.approx(direct, abs=1e-5)
        assert direct["test/accuracy"] == bank["test/accuracy"]
        assert {"test/interval", "test/loss/match", "test/pps_accuracy"} < direct.keys()
        assert "test/local_accuracy" not in direct
    assert results[0] != pytest.approx(results[2], abs=1e-5)


# In Python


@torch.no_grad()
def expected_logits(classifier: FewShotClassifier, shots: dict[str, list[Any]], clips: list[Any]) -> Tensor:
    """By the slow loop, from what the tower makes of the examples and of the clips."""

    def encoded(clips: list[Any]) -> Tensor:
        return torch.stack([classifier.encoder.encode_one(clip).features for clip in clips])

    return slow_logits(own_head(classifier.model), [encoded(own) for own in shots.values()], encoded(clips))


def test_classes_of_any_numbers_of_examples(model: CLIPM2DF) -> None:
    shots = {"run": [noise(0)], "eat": [noise(1), noise(2)], "jump": [noise(3), noise(4), noise(5)]}
    clips = [noise(seed) for seed in range(6, 10)]
    classifier = FewShotClassifier(model).fit(shots)
    logits = expected_logits(classifier, shots, clips)
    assert classifier.predict_proba(clips) == pytest.approx(logits.softmax(-1).numpy(), abs=1e-5)
    assert list(classifier.predict(clips)) == [list(shots)[c] for c in logits.argmax(-1)]
    assert logits.std(-1).min() > 1e-4  # or the comparison would say nothing

    classifier.add("run", noise(20)).remove("jump")
    shots = {"run": [noise(0), noise(20)], "eat": shots["eat"]}
    logits = expected_logits(classifier, shots, clips)
    assert classifier.predict_proba(clips) == pytest.approx(logits.softmax(-1).numpy(), abs=1e-5)


def test_a_prediction_is_explained(model: CLIPM2DF) -> None:
    shots = {"run": [noise(0)], "eat": [noise(1), noise(2)], "jump": [noise(3), noise(4), noise(5)]}
    classifier = FewShotClassifier(model).fit(shots)
    found = classifier.explain(noise(6), reject=True)
    (logits,) = expected_logits(classifier, shots, [noise(6)])
    assert found.distance == pytest.approx(-logits.max().item(), abs=1e-5)
    assert list(found.probabilities.values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
    assert found.compared == [list(shots)[c] for c in logits.topk(2).indices]
    assert (found.views, found.alignments, found.prompt, found.teacher) == ({}, {}, None, None)
    assert found.figure().width > 300


def test_a_saved_classifier_is_loaded_by_whoever_asks_for_the_head(model: CLIPM2DF, tmp_path: Path) -> None:
    classifier = FewShotClassifier(model).fit({"run": [noise(0)], "eat": [noise(1), noise(2)]})
    classifier.save(tmp_path / "saved")
    loaded = FewShotClassifier.load(tmp_path / "saved", head=PATH)
    assert loaded.predict_proba(noise(3)) == pytest.approx(classifier.predict_proba(noise(3)))


@pytest.mark.slow
def test_it_is_exported(model: CLIPM2DF, tmp_path: Path) -> None:
    export_model(model, tmp_path / "e", n_way=3, n_shot=2, n_queries=2, frames=4, batch=1)
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 2, 4, 64), (2, 4, 64), (3, 64))
    episode = {n: torch.randn(s, generator=generator) for n, s in zip(HEAD_INPUTS, sizes, strict=True)}
    with torch.no_grad():
        expected = slow_logits(own_head(model), list(episode["support"]), episode["query"])
    for suffix in FORMATS:
        found = opened(tmp_path / f"e/head.{suffix}", *HEAD_INPUTS)(**episode)["logits"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
