"""Mixed precision through the Trainer: what an evaluation and a training reach, beside float32."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch

from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.commands.configs import find_config
from clip_m2df.commands.trainer import CLI, run
from tests.conftest import quiet_trainer

SEED = 0


def test_bank_and_direct_path_agree_in_bfloat16(manifest: Path, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = CLIPM2DF(backbone="tiny", head_options={"hidden_dim": 64}, class_weight=1.0)
    options: dict[str, Any] = {"frames": 4, "resize": 40, "size": 40, "num_workers": 0, "test_episodes": 20}

    def evaluate(evaluation: Any, precision: Any) -> dict[str, float]:
        data = EpisodeDataModule(str(manifest), n_way=3, evaluation=evaluation, **options)
        (numbers,) = quiet_trainer(tmp_path, precision=precision).test(model, data, verbose=False)
        return dict(numbers)

    direct, bank = evaluate("direct", "bf16-mixed"), evaluate("bank", "bf16-mixed")
    # What goes through the tower and the encoders together may change a bfloat16's rounding, and so a close decision.
    for name, value in direct.items():
        assert bank[name] == pytest.approx(value, rel=0.01, abs=0.05), name
    assert bank["test/loss/total"] != evaluate("bank", "32-true")["test/loss/total"]


class Run(NamedTuple):
    fit: CLI
    accuracy: float
    interval: float


def train_and_test(folder: Path, precision: str) -> Run:
    """The demo, its test episodes twice as many; features of the training videos are encoded once, to save time."""
    common = [
        f"--config={find_config('demo_5way1shot.yaml')}",
        f"--seed_everything={SEED}",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.precision={precision}",
        "--trainer.devices=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--data.num_workers=0",
        "--data.test_episodes=2000",
    ]
    # The last checkpoint, for the best is chosen on few episodes; nothing is to be validated, then.
    fit = run(["fit", *common, "--data.train_augmentations=4", "--data.validate_every=200", "--data.val_episodes=2"])
    test = run(["test", *common, "--ckpt_path=last"])
    return Run(fit, *accuracy_of(test.trainer))


def accuracy_of(trainer: lightning.Trainer) -> tuple[float, float]:
    metrics = trainer.callback_metrics
    return float(metrics["test/accuracy"]), float(metrics["test/interval"])


@pytest.mark.slow
def test_the_demo_in_bfloat16_reaches_the_accuracy_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seeds are apart by more than the interval of one run's test. But runs of one seed start from the same weights and
    # see the same episodes, draws and dropout, so that the precision is all that differs.
    monkeypatch.setenv("CLIP_M2DF_CACHE", str(tmp_path / "cache"))
    full, mixed = (train_and_test(tmp_path / precision, precision) for precision in ("32-true", "bf16-mixed"))
    lightning.seed_everything(SEED, verbose=False)
    untrained = CLIPM2DF(**full.fit.config["fit"].model.as_dict())
    full.fit.trainer.test(untrained, datamodule=full.fit.datamodule, verbose=False)
    before, interval = accuracy_of(full.fit.trainer)

    assert abs(mixed.accuracy - full.accuracy) <= mixed.interval + full.interval
    assert mixed.accuracy - mixed.interval > before + interval
    # It was trained in the precision that was asked for, and its weights are float32 all the same.
    assert str(mixed.fit.trainer.precision) == "bf16-mixed"
    assert {weight.dtype for weight in mixed.fit.model.parameters()} == {torch.float32}
    assert any(not a.equal(b) for a, b in zip(mixed.fit.model.parameters(), full.fit.model.parameters(), strict=True))
