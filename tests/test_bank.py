"""Evaluation from a bank, through the Trainer: the numbers of the direct path, for one pass over the videos."""

import itertools
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from clip_m2df import CLIPM2DF, EpisodeDataModule, UserError
from clip_m2df.episode import named_videos
from tests.data import clips

SMALL: dict[str, Any] = {"n_way": 3, "n_query": 2, "frames": 2, "resize": 32, "size": 32, "num_workers": 0}
HEAD = {"hidden_dim": 32, "heads": 4}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with 6 videos in each of 5 classes, all of them val and test in turn."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["path,label,split"]
    for split, c, v in itertools.product(("train", "val", "test"), range(5), range(6)):
        name = f"{split}{c}_{v}.mp4"
        clips.render(folder / name, n_frames=4 + 3 * c + v, size=(48, 32))
        lines.append(f"{name},{split} {c},{split}")
    (folder / "m.csv").write_text("\n".join(lines))
    return folder / "m.csv"


def data(manifest: Path, **options: Any) -> EpisodeDataModule:
    return EpisodeDataModule(str(manifest), **(SMALL | options))


def make(tiny_clip_dir: Path, **options: Any) -> CLIPM2DF:
    torch.manual_seed(0)
    return CLIPM2DF(backbone=str(tiny_clip_dir), head_options=HEAD, **options)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**(quiet | {"accelerator": "cpu", "default_root_dir": folder, "devices": 1} | options))


def encoded(model: CLIPM2DF) -> list[int]:
    """Notes how many frames go through the tower, call by call."""
    calls: list[int] = []
    model.model.backbone.visual.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"class_weight": 1.0, "text_fusion": 0.4, "selection": "expectation"}, {"selection": "sample"}]
)
def test_the_numbers_are_those_of_the_direct_path(
    many: Path, tiny_clip_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = make(tiny_clip_dir, **options)
    calls = encoded(model)
    results = {}
    for evaluation in ("direct", "bank"):
        calls.clear()
        (results[evaluation],) = trainer(tmp_path).test(
            model, data(many, test_episodes=150, evaluation=evaluation, n_shot=2), verbose=False
        )
        # Two frames of each of the 30 videos, or of the nine in each of 150 episodes.
        assert sum(calls) == 2 * (30 if evaluation == "bank" else 150 * 9)
    assert results["bank"].keys() == results["direct"].keys()
    for name, value in results["direct"].items():
        exact = not name.startswith("test/loss")
        assert results["bank"][name] == (value if exact else pytest.approx(value, abs=1e-4)), name
    assert 0.2 < results["bank"]["test/accuracy"] < 1


@pytest.mark.parametrize("devices", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(many: Path, tiny_clip_dir: Path, tmp_path: Path, devices: int) -> None:
    options = {"test_episodes": 131, "n_query_eval": 2}
    (alone,) = trainer(tmp_path).test(make(tiny_clip_dir, class_weight=1.0), data(many, **options), verbose=False)
    together = trainer(tmp_path, devices=devices, strategy="ddp_fork", use_distributed_sampler=False)
    model = make(tiny_clip_dir, class_weight=1.0)
    (shared,) = together.test(model, data(many, **options), verbose=False)
    assert shared == alone


class Watch(lightning.Callback):
    """Notes how many frames were encoded, and how many episodes counted, at each validation's end."""

    def __init__(self, calls: list[int]) -> None:
        self.calls = calls
        self.seen: list[tuple[int, int]] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append((sum(self.calls), int(pl_module.metrics["val_metrics"]["accuracy"].episodes)))
        self.calls.clear()


def test_sanity_checks_and_limits_encode_what_they_play(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model = make(tiny_clip_dir)
    watch = Watch(encoded(model))
    # 200 episodes are played in batches of three; the sanity check plays two of each.
    source = data(many, val_episodes=200, episodes_per_step=1)
    options: dict[str, Any] = {"limit_val_batches": 2, "num_sanity_val_steps": 1, "callbacks": [watch]}
    trainer(tmp_path, max_steps=1, **options).fit(model, source)
    source.setup("validate")
    batches: Any = source.val_dataloader()
    episodes = batches.dataset.episodes
    sanity, validation = named_videos(episodes, [0, 1]), named_videos(episodes, range(6))
    assert len(sanity) < len(validation) < 30
    training = 9
    assert watch.seen == [(2 * len(sanity), 2), (2 * (len(validation) + training), 6)]


def test_a_frozen_tower_encodes_its_validation_once(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    for frozen in (True, False):
        model = make(tiny_clip_dir, freeze_backbone=frozen)
        calls = encoded(model)
        options = {"val_episodes": 100, "validate_every": 1, "episodes_per_step": 1}
        trainer(tmp_path, max_steps=3, num_sanity_val_steps=0).fit(model, data(many, **options))
        training = 3 * 9 * 2  # of each step's nine clips
        assert sum(calls) - training == 2 * 30 * (1 if frozen else 3)


def test_other_weights_are_encoded_anew(many: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    model, source = make(tiny_clip_dir, freeze_backbone=True), data(many, test_episodes=20)
    run = trainer(tmp_path)
    (first,) = run.test(model, source, verbose=False)
    weights = {name: torch.randn_like(w) if "visual" in name else w for name, w in model.state_dict().items()}
    model.load_state_dict(weights)
    (second,) = run.test(model, source, verbose=False)
    assert first["test/loss/total"] != second["test/loss/total"]


def test_unusable_videos_end_it_or_are_replaced_as_by_the_direct_path(
    many: Path, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    for video in many.parent.glob("*.mp4"):
        (tmp_path / video.name).write_bytes(b"" if video.name in ("test0_0.mp4", "test3_5.mp4") else video.read_bytes())
    (tmp_path / "m.csv").write_text(many.read_text())
    model = make(tiny_clip_dir)
    with pytest.raises(UserError, match=r"2 of the 30 videos of the test split are unusable.*test0_0\.mp4.*test3_5"):
        trainer(tmp_path).test(model, data(tmp_path / "m.csv", test_episodes=50), verbose=False)
    results = []
    for evaluation in ("direct", "bank"):
        source = data(tmp_path / "m.csv", test_episodes=50, evaluation=evaluation, max_unusable=0.1)
        with pytest.warns(UserWarning, match="takes its place"):
            results += trainer(tmp_path).test(model, source, verbose=False)
    assert results[0]["test/replaced_videos"] == results[1]["test/replaced_videos"] > 10
    assert results[0]["test/accuracy"] == results[1]["test/accuracy"]
