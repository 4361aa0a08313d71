"""The dashboard: everything that a training shows, read back from where it was logged."""

import contextlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from clip_m2df import Manifest, UserError, __version__
from clip_m2df.cli import main
from clip_m2df.commands.configs import find_config, shipped_configs
from clip_m2df.evaluation.metrics import Evaluated
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.prompts import SelectedPrompts
from clip_m2df.training.checkpoints import read_checkpoint
from clip_m2df.training.dashboard import Dashboard, EvidenceCollector
from tests.commands.test_configs import Parsed
from tests.conftest import options
from tests.conftest import quiet_trainer as trainer
from tests.training.test_module import UsersData, make, make_episodes
from tests.training.wandb_file import OfflineRun, end_wandb

PICTURES = {"confusion_matrix", "class_accuracy", "alignment", "prompt_scores", "reliability"}
WITHOUT_VIEWS = {"confusion_matrix", "class_accuracy"}
EPISODES = {f"hardest_episode_{rank}" for rank in range(1, 5)}
WANDB = "--config=recipes/wandb_offline.yaml"


@pytest.fixture(autouse=True)
def _offline(offline_wandb: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, without an account."""
    monkeypatch.chdir(tmp_path)


def fit(manifest: Path, tiny_clip_dir: Path, *more: str) -> int:
    base, *rest = options(manifest, tiny_clip_dir, Path("run"), "--trainer.log_every_n_steps=1")
    configs = [option for option in more if option.startswith("--config")]
    return main(["fit", base, *configs, *rest, *(option for option in more if option not in configs)])


def offline_runs() -> list[OfflineRun]:
    """All runs of this folder, written to their ends."""
    end_wandb()
    return [OfflineRun(folder) for folder in sorted(Path("runs/wandb").glob("offline-run-*"))]


def check_picture(path: Path, kind: str = "PNG") -> None:
    with Image.open(path) as picture:
        assert picture.format == kind
        assert np.asarray(picture).std() > 1  # decoded, and no blank page


def test_everything_is_in_an_offline_run(manifest: Path, tiny_clip_dir: Path) -> None:
    assert fit(manifest, tiny_clip_dir, WANDB, "--dashboard.upload_best=true") == 0
    assert wandb.run is None
    (found,) = offline_runs()
    assert found.finished

    # What was run
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    for group in ("model", "data", "trainer", "checkpoint", "dashboard"):
        assert found.config[group] == saved[group], group
    assert found.config["seed_everything"] == 0
    assert found.config["version"] == __version__
    assert found.config["manifest_digest"] == Manifest.read(manifest).digest
    assert found.config["git_revision"] is None  # no checkout here

    # Numbers, by the names of the progress bar
    for name in ("train/accuracy", "train/interval", "train/loss/total", "train/loss/match", "train/loss/distill"):
        assert len(found.logged(name)) == 2, name
    for name in ("accuracy", "interval", "loss/total", "pps_accuracy", "local_to_global", "global_to_local"):
        assert len(found.logged(f"val/{name}")) == 2, name

    # Pictures of both validations
    for name in PICTURES | EPISODES:
        files = found.files(f"val/{name}")
        assert len(files) == 2, name
        check_picture(files[-1], "JPEG" if name in EPISODES else "PNG")
    for kind in ("visual", "text"):
        for view in ("local", "global"):
            assert sum(found.logged(f"val/{kind}_confidence/{view}")[-1]["values"]) == 4 * 3
    steps = [row["trainer/global_step"] for row in found.history if "val/alignment" in row]
    assert steps == [1, 2]

    # Tables
    columns, rows = found.table("val/class_accuracies")
    assert columns == ["class", "accuracy", "queries"]
    assert [name for name, *_ in rows] == ["val class 0", "val class 1", "val class 2"]
    total = sum(share * queries for _, share, queries in rows) / sum(queries for *_, queries in rows)
    assert total == pytest.approx(found.logged("val/accuracy")[-1])
    columns, rows = found.table("val/hardest_episodes")
    assert columns[:5] == ["rank", "episode", "cross-entropy", "class", "predicted"]
    assert [row[0] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert {row[1] for row in rows} == {0, 1, 2, 3}
    losses = [sum(row[2] for row in rows[i : i + 3]) / 3 for i in range(0, 12, 3)]
    assert losses == sorted(losses, reverse=True)
    # The four are all episodes, so their mean is the loss: a sum over the 3 queries.
    assert 3 * sum(losses) / 4 == pytest.approx(found.logged("val/loss/match")[-1], rel=1e-4)
    for row in rows:
        assert {*row[3:5]} <= {"val class 0", "val class 1", "val class 2"}
        for path in row[5:]:
            with Image.open(path) as strip:
                assert strip.size == (2 * 48, 48)

    (artifact,) = (artifact for artifact in found.artifacts if artifact.name.startswith("best-"))
    assert json.loads(artifact.metadata) == {"step": read_checkpoint("run/checkpoints/best.ckpt")["global_step"]}
    best = found.artifact_files("best-")
    assert best["best.ckpt"].read_bytes() == Path("run/checkpoints/best.ckpt").read_bytes()


@pytest.mark.slow
def test_a_training_that_goes_on_is_the_same_run(manifest: Path, tiny_clip_dir: Path) -> None:
    assert fit(manifest, tiny_clip_dir, WANDB, "--trainer.max_steps=1") == 0
    assert fit(manifest, tiny_clip_dir, WANDB, "--trainer.max_steps=2", "--ckpt_path=last") == 0
    # Who starts from its configuration starts a run of their own.
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["logger"]["init_args"]["id"] is None
    first, second = offline_runs()
    assert first.id == second.id == Path("run/wandb_id").read_text().strip()
    assert [run_.logged("trainer/global_step")[-1] for run_ in (first, second)] == [1, 2]
    named = "--trainer.logger.init_args.id=mine"
    assert fit(manifest, tiny_clip_dir, WANDB, named, "--trainer.max_steps=3", "--ckpt_path=last") == 0
    assert offline_runs()[-1].id == "mine"
    # Another run folder, another run.
    assert fit(manifest, tiny_clip_dir, WANDB, "--trainer.default_root_dir=other") == 0
    assert len({run_.id for run_ in offline_runs()}) == 3


class Terminates(lightning.Callback):
    """Sends SIGTERM to its own process, before the fourth step."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


class Fails(lightning.Callback):
    """Ends the training with an exception, before the fourth step."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise UserError("it fails")


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "status", "steps"), [(Terminates, 143, 4), (Fails, 2, 3)])
def test_a_run_that_is_interrupted_keeps_its_log(
    manifest: Path, tiny_clip_dir: Path, ends: type, status: int, steps: int
) -> None:
    # A batch of all four episodes is a step.
    more = ["--trainer.max_steps=9", "--data.validate_every=2", "--data.batch_size=4"]
    assert fit(manifest, tiny_clip_dir, WANDB, *more, f"--trainer.callbacks+={__name__}.{ends.__name__}") == status
    assert wandb.run is None
    (found,) = offline_runs()
    assert found.finished
    assert len(found.logged("train/loss/total")) == steps
    assert len(found.files("val/alignment")) == 1


@pytest.mark.slow
def test_without_wandb_pictures_are_files(manifest: Path, tiny_clip_dir: Path) -> None:
    assert fit(manifest, tiny_clip_dir, "--data.val_episodes=7") == 0
    assert {folder.name for folder in Path("run/figures").iterdir()} == {"step-000001", "step-000002"}
    files = list(Path("run/figures/step-000002").iterdir())
    assert {file.stem for file in files} == PICTURES | EPISODES
    for file in files:
        check_picture(file)
    assert not Path("run/wandb_id").exists()
    (hparams,) = Path("run").rglob("hparams.yaml")
    record = yaml.safe_load(hparams.read_text())
    assert record["data"]["n_way"] == 3
    assert record["version"] == __version__


@pytest.mark.slow
def test_both_evaluations_and_two_devices_show_the_same(manifest: Path, tiny_clip_dir: Path) -> None:
    found = []
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    no_dropout = [f"--model.head_options.{name}dropout=0.0" for name in ("", "context_", "attention_")]
    for i, (evaluation, devices) in enumerate([("bank", []), ("direct", []), ("bank", two), ("direct", two)]):
        more = [f"--data.evaluation={evaluation}", "--data.val_episodes=7", "--trainer.max_steps=1", *no_dropout]
        more += [*devices, "--model.lr=1e-9", f"--trainer.default_root_dir={i}"]
        assert fit(manifest, tiny_clip_dir, *more) == 0
        found.append({file.stem: np.asarray(Image.open(file)).astype(int) for file in Path(f"{i}").rglob("*.png")})
    expected = found[0]
    assert expected.keys() == PICTURES | EPISODES
    for others in found[1:]:
        assert others.keys() == expected.keys()
        for name, picture in expected.items():
            assert others[name].shape == picture.shape, name
            # The bits of features differ with the batches that they are computed in, and so may a last digit.
            assert (np.abs(others[name] - picture) > 8).mean() < 0.01, name


@pytest.mark.slow
def test_tensorboard_gets_the_same_pictures(manifest: Path, tiny_clip_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=board"]
    assert fit(manifest, tiny_clip_dir, *logger, "--trainer.max_steps=1") == 0
    assert fit(manifest, tiny_clip_dir, "--trainer.max_steps=1", "--trainer.default_root_dir=plain") == 0
    (events,) = Path("board").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent), size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {f"val/{name}" for name in PICTURES | EPISODES}
    assert "val/accuracy" in board.Tags()["scalars"]
    for tag in board.Tags()["images"]:
        (event,) = board.Images(tag)
        Path("shown.png").write_bytes(event.encoded_image_string)
        (file,) = Path("plain/figures/step-000001").glob(f"{tag.removeprefix('val/')}.png")
        assert np.array_equal(np.asarray(Image.open("shown.png")), np.asarray(Image.open(file)))
    assert not Path("run/figures").exists()


@pytest.mark.slow
def test_it_can_be_turned_off_and_needs_no_logger(manifest: Path, tiny_clip_dir: Path) -> None:
    assert fit(manifest, tiny_clip_dir, "--dashboard.figures=false") == 0
    assert not Path("run/figures").exists()
    more = ["--trainer.logger=false", "--trainer.default_root_dir=bare", "--dashboard.episodes=1"]
    assert fit(manifest, tiny_clip_dir, *more) == 0
    assert {file.stem for file in Path("bare/figures/step-000002").iterdir()} == PICTURES | {"hardest_episode_1"}
    assert fit(manifest, tiny_clip_dir, "--trainer.fast_dev_run=true", "--trainer.default_root_dir=trial") == 0
    assert not Path("trial/figures").exists()


def test_what_cannot_be_is_refused(manifest: Path, tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(manifest, tiny_clip_dir, "--dashboard.upload_best=true") == 2
    assert "dashboard.upload_best gives the best checkpoint to W&B, but" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"dashboard\.episodes is 0"):
        Dashboard(episodes=0)
    # Of several ranks the first alone has a run; the others have the logger.
    logger = WandbLogger(offline=True)
    other: Any = SimpleNamespace(loggers=[logger], is_global_zero=False, fast_dev_run=False)
    Dashboard(upload_best=True).setup(other, lightning.LightningModule(), "fit")


@pytest.mark.slow
def test_a_training_goes_on_without_pictures_where_they_cannot_be_written(manifest: Path, tiny_clip_dir: Path) -> None:
    Path("run").mkdir()
    Path("run/figures").touch()
    with pytest.warns(UserWarning, match="the pictures of a validation can't be given: .*run/figures"):
        assert fit(manifest, tiny_clip_dir) == 0
    assert Path("run/checkpoints/last.ckpt").exists()


class OtherHead(Head):
    """Scores by the mean of the frames; has one weight, and no views."""

    def embed(self, videos: torch.Tensor, prompt: torch.Tensor | None) -> Embedded:
        return Embedded(mean=videos.mean(-2))

    def prototype(self, embedded: Embedded, prompts: torch.Tensor) -> Embedded:
        return embedded.map(lambda mean: mean.mean(-2))

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        return HeadOutput.of(self.scale * -torch.cdist(query["mean"], prototypes["mean"]), selected)


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        # Its scale is trained by the class-text loss too.
        (["{}", f"--model.head={__name__}.OtherHead", "--model.class_weight=1.0"], WITHOUT_VIEWS),
        # One without anything to train but the tower.
        (["{}", "--model.head=bi_mhm", "--model.freeze_backbone=false"], WITHOUT_VIEWS),
        (["{hidden_dim: 32, num_heads: 4}", "--model.head=clip_fsar"], WITHOUT_VIEWS),
        (["{views: [global]}", "--model.text_fusion=0.5", "--trainer.precision=bf16-mixed"], PICTURES),
    ],
)
def test_what_a_head_has_is_shown(manifest: Path, tiny_clip_dir: Path, more: list[str], shown: set[str]) -> None:
    assert fit(manifest, tiny_clip_dir, f"--model.head_options={more[0]}", *more[1:], "--trainer.max_steps=1") == 0
    assert {file.stem for file in Path("run/figures/step-000001").iterdir()} == shown | EPISODES


def test_a_users_own_data_need_no_manifest(tiny_clip_dir: Path, tmp_path: Path) -> None:
    model, watch = make(tiny_clip_dir), Dashboard(episodes=2)
    logger = CSVLogger(tmp_path / "logs")
    fitting = trainer(tmp_path, max_steps=2, val_check_interval=2, logger=logger, callbacks=[watch])
    fitting.fit(model, UsersData())
    shown = {file.stem for file in (tmp_path / "figures" / "step-000002").iterdir()}
    assert shown == PICTURES | {"hardest_episode_1", "hardest_episode_2"}
    record = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert record["manifest_digest"] is None
    assert record["version"] == __version__


def test_a_test_after_the_training_goes_on_with_its_run(tiny_clip_dir: Path, tmp_path: Path) -> None:
    logger = WandbLogger(project="p", offline=True, save_dir="runs")
    testing = trainer(tmp_path, max_steps=1, val_check_interval=1, logger=logger, callbacks=[Dashboard(figures=False)])
    model = make(tiny_clip_dir)
    testing.fit(model, UsersData())
    testing.test(model, UsersData(), verbose=False)
    first, second = offline_runs()
    assert first.id == second.id
    assert second.logged("test/accuracy")


def test_the_revision_of_a_checkout_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from clip_m2df.training.dashboard import git_revision

    assert git_revision() is None
    monkeypatch.chdir(Path(__file__).parent)
    revision = git_revision()
    assert revision is None or len(revision) == 40  # the tests of a wheel lie in no checkout
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None


def test_the_hardest_are_found_whatever_the_batches_and_ranks(tiny_clip_dir: Path) -> None:
    """Of several ranks, played one after the other, the collectors keep what a single process keeps."""
    model = make(tiny_clip_dir).eval()
    model.evaluated = Evaluated({}, torch.zeros((0, 0), dtype=torch.long), {})
    episodes = [make_episodes(1, seed) for seed in range(6)]
    with torch.no_grad():
        outputs = [model.validation_step(episode, 0) for episode in episodes]
    alone: Any = SimpleNamespace(
        world_size=1, precision_plugin=SimpleNamespace(val_step_context=contextlib.nullcontext)
    )

    def kept(world_size: int) -> list[tuple[float, int]]:
        found = []
        for rank in range(world_size):
            collector = EvidenceCollector(episodes=2)
            for episode, output in list(zip(episodes, outputs, strict=True))[rank::world_size]:
                ranked: Any = SimpleNamespace(world_size=world_size, global_rank=rank)
                collector.add(ranked, episode, output)
            evidence = collector.gather(alone, model)
            assert evidence is not None
            found += [(hard.loss, hard.number) for hard in evidence.hardest]
        return sorted(found, reverse=True)[:2]

    assert kept(1) == kept(2) == kept(3)
    assert len({number for _, number in kept(1)}) == 2


# ------------------------------------------------------------------------------------------------- sweeps

SWEEPS = sorted((find_config("demo_5way1shot.yaml").parent / "sweeps").glob("*.yaml"))


def test_sweeps_are_no_configs() -> None:
    assert len(SWEEPS) == 2
    assert not any("sweeps" in name for name in shipped_configs())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_is_an_option_of_the_command(path: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    from clip_m2df.nn.baselines import build_head

    sweep = yaml.safe_load(path.read_text())
    shell = sweep["command"][3].replace("$WANDB_RUN_ID", "abc").replace('"$@"', "").replace('"', "").split()
    assert shell[:2] == ["exec", "clip-m2df"]
    assert sweep["command"][-1] == "${args}"
    fixed = [word for word in shell[3:] if not word.startswith("--config") and not word.endswith(".yaml")]
    configs = [f"--config={find_config(word)}" for word in shell if word.endswith(".yaml")]
    assert sweep["metric"]["name"] == "val/accuracy"
    for parameter, choice in sweep["parameters"].items():
        for value in choice["values"]:
            # As W&B's agent writes them.
            flags = create_sweep_command_args({"args": {parameter: {"value": value}}})["args"]
            config = Parsed([shell[2], *configs, *fixed, *flags]).config.fit
            found = config
            for key in parameter.split("."):
                found = found[key]
            assert found == value, parameter
            build_head("m2df", {"dim": 64, **config.model.head_options})
            assert config.trainer.logger.init_args.offline is False
            assert config.trainer.default_root_dir.endswith("/abc")
