import itertools
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from clip_m2df.data.datamodule import EpisodeDataModule
from clip_m2df.errors import UserError

SMALL: dict[str, Any] = {"n_way": 3, "n_query": 2, "frames": 2, "resize": 16, "size": 16, "num_workers": 0}


def make(manifest: Path, **options: Any) -> EpisodeDataModule:
    return EpisodeDataModule(str(manifest), **(SMALL | options))


def test_loaders_give_the_episodes_of_their_split(manifest: Path) -> None:
    data = make(manifest, val_episodes=5, test_episodes=3, batch_size=2, episodes_per_step=4)
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    val: list[Any] = list(data.val_dataloader())
    assert [len(batch["query"]) for batch in val] == [2, 2, 1]
    assert val[0]["class_names"] == [f"val class {c}" for c in range(3)]
    assert val[0]["query"].shape[1] == 3  # one query a class at evaluation
    test = list(data.test_dataloader())
    assert test[0]["class_names"] == [f"the text of {c}" for c in range(3)]
    train = list(itertools.islice(data.train_dataloader(), 4))
    assert train[0]["query"].shape[1] == 6
    again: list[Any] = list(data.val_dataloader())
    assert torch.equal(val[1]["query"], again[1]["query"])


def test_training_and_evaluation_have_seeds_of_their_own(manifest: Path) -> None:
    drawn = {}
    for seed, eval_seed in ((0, 0), (1, 0), (0, 1)):
        data = make(manifest, seed=seed, eval_seed=eval_seed)
        data.setup("fit")
        loaders: tuple[Any, ...] = (data.train_dataloader(), data.val_dataloader())
        drawn[seed, eval_seed] = [next(iter(loader))["draws"] for loader in loaders]
    assert not torch.equal(drawn[0, 0][0], drawn[1, 0][0])
    assert torch.equal(drawn[0, 0][1], drawn[1, 0][1])
    assert torch.equal(drawn[0, 0][0], drawn[0, 1][0])
    assert not torch.equal(drawn[0, 0][1], drawn[0, 1][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 1}, "n_way is 1: there is nothing to tell apart; give at least 2"),
        ({"n_shot": 0}, "n_shot is 0; it must be at least 1"),
        ({"n_query_eval": 0}, "n_query_eval is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"seed": -1}, "seed is -1; it must not be negative"),
        ({"resize": 15}, "resize 15 is smaller than size 16"),
        (
            {"batch_size": 3},
            r"episodes_per_step 16 does not divide into batches of 3 on 1 device\(s\); give a multiple of 3",
        ),
        ({"batch_size": 32}, "episodes_per_step 16 does not divide into batches of 32"),
    ],
)
def test_options_out_of_range_are_refused_by_name(manifest: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(manifest, **options)


def test_episodes_of_a_step_divide_over_devices_or_are_refused(manifest: Path) -> None:
    data = make(manifest, batch_size=2)
    assert [data.accumulation(world_size) for world_size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"batches of 2 on 3 device\(s\); give a multiple of 6"):
        data.accumulation(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 4}, r"val split has 3 classes, too few for n_way 4"),
        ({"n_shot": 3}, r"n_shot 3"),
    ],
)
def test_a_manifest_that_cannot_supply_episodes_is_refused_at_start_up(
    manifest: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(manifest, **options).setup("fit")


class Nothing(lightning.LightningModule):
    """Counts batches; learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["draws"])
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: EpisodeDataModule, folder: Path, ckpt_path: str | None = None, **options: Any) -> Nothing:
    model = Nothing()
    trainer = lightning.Trainer(
        **({"max_steps": 4} | options),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is None and trainer.max_steps == 2:
        trainer.save_checkpoint(folder / "two.ckpt")
    return model


def test_runs_are_counted_in_whole_steps(manifest: Path, tmp_path: Path) -> None:
    data = make(manifest, batch_size=2, episodes_per_step=6, validate_every=2, val_episodes=1)
    model = fit(data, tmp_path)
    assert len(model.seen) == 4 * 3
    assert model.validated == [2, 4]
    # Endless: no number comes twice.
    assert len(torch.cat(model.seen).unique(dim=0)) == 24


def test_a_resumed_run_goes_on_with_the_episodes_that_it_would_have_had(manifest: Path, tmp_path: Path) -> None:
    def data() -> EpisodeDataModule:
        return make(manifest, batch_size=2, episodes_per_step=4, validate_every=1, val_episodes=1)

    whole = fit(data(), tmp_path)
    fit(data(), tmp_path, max_steps=2)
    resumed = fit(data(), tmp_path, str(tmp_path / "two.ckpt"))
    assert torch.equal(torch.cat(resumed.seen), torch.cat(whole.seen)[8:])


def test_a_trainer_that_would_cut_steps_is_refused(manifest: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_steps": -1, "max_epochs": 1}, r"give with trainer\.max_steps"),
        (
            {"accumulate_grad_batches": 3},
            r"trainer\.accumulate_grad_batches is 3, but follows from data\.episodes_per_step, 4",
        ),
        ({"val_check_interval": 3}, r"trainer\.val_check_interval is 3, in batches; say with data\.validate_every"),
        ({"limit_train_batches": 3}, r"trainer\.limit_train_batches 3 cuts an optimiser step of 2 batches"),
    )
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            fit(make(manifest, batch_size=2, episodes_per_step=4), tmp_path, **options)


def test_epochs_cut_by_a_limit_deal_fresh_episodes(manifest: Path, tmp_path: Path) -> None:
    model = fit(make(manifest, batch_size=2, episodes_per_step=4, val_episodes=1), tmp_path, limit_train_batches=4)
    assert len(model.seen) == 8
    assert len(torch.cat(model.seen).unique(dim=0)) == 16


def test_without_validation_the_val_split_may_be_missing(manifest: Path, tmp_path: Path) -> None:
    rows = [line for line in manifest.read_text().splitlines() if ",val," not in line]
    shorter = manifest.parent / "no_val.csv"
    shorter.write_text("\n".join(rows))
    data = make(shorter, batch_size=2, episodes_per_step=4)
    assert len(fit(data, tmp_path, limit_val_batches=0).seen) == 8
    with pytest.raises(UserError, match="val"):
        fit(make(shorter), tmp_path)


def test_a_short_run_is_validated_at_its_end(manifest: Path, tmp_path: Path) -> None:
    assert fit(make(manifest, batch_size=2, episodes_per_step=4, val_episodes=1), tmp_path).validated == [4]


@pytest.mark.parametrize("changed", [{"batch_size": 4}, {"episodes_per_step": 8}])
def test_a_run_that_would_count_otherwise_does_not_go_on(
    manifest: Path, tmp_path: Path, changed: dict[str, int]
) -> None:
    counts = {"batch_size": 2, "episodes_per_step": 4, "val_episodes": 1}
    fit(make(manifest, **counts), tmp_path, max_steps=2)
    with pytest.raises(
        UserError, match=r"set data\.episodes_per_step to 4, and data\.batch_size times the devices to 2"
    ):
        fit(make(manifest, **(counts | changed)), tmp_path, str(tmp_path / "two.ckpt"))


def test_each_device_needs_an_episode(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpisodeDataModule, "world_size", 4)
    with pytest.raises(UserError, match="val_episodes is 3 on 4 devices; give at least one a device"):
        make(manifest, val_episodes=3).setup("validate")
