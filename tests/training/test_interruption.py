"""Runs that are ended, killed or can't write: what was saved is there, and what goes on ends as if left alone."""

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from benchmarks import soak
from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.cli import main
from clip_m2df.errors import Stopped, UserError
from clip_m2df.files import locked_folder
from clip_m2df.training.checkpoints import BEST, FOLDER, LAST, PREVIOUS, RunCheckpointIO, read_checkpoint, read_last
from tests.conftest import fails, options, quiet_trainer

Run = Callable[..., list[str]]
GoesOn = Callable[..., None]

# Six optimiser steps of two batches each, validated after every second.
RUN = (
    "--data.batch_size=1",
    "--data.episodes_per_step=2",
    "--data.validate_every=2",
    "--trainer.max_steps=6",
    "--trainer.num_sanity_val_steps=0",
    "--dashboard.figures=false",
)


class Kill(lightning.Callback):
    """Sends this process a signal, in training or in validation.

    Args:
        number: the signal.
        batch: before which batch of the training, or of the validation that follows ``after``.
        after: the optimiser step whose validation it is.
        times: how often.
        rank: whose process it is.
        group: send it to all processes of the group.
    """

    def __init__(
        self, number: int, batch: int, after: int | None = None, times: int = 1, rank: int = 0, group: bool = False
    ) -> None:
        self.number, self.batch, self.after, self.times, self.rank = number, batch, after, times, rank
        self.group = group

    def kill(self) -> None:
        for _ in range(self.times):
            if self.group:
                # By another process, as batch systems do.
                subprocess.run(["kill", f"-{self.number}", "--", f"-{os.getpgid(0)}"], check=False)
            else:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.after is None and batch_idx == self.batch and trainer.global_rank == self.rank:
            self.kill()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_step == self.after and batch_idx == self.batch:
            self.kill()


class KillTest(lightning.Callback):
    """Sends this process SIGTERM in a test."""

    def on_test_batch_start(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class StopInMidStep(lightning.Callback):
    """Wants the run to stop after the first batch of the third step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx == 4


class Steps(lightning.Callback):
    """Notes the optimiser steps that were validated."""

    validated: list[int] = []  # noqa: RUF012 - for the test to see

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(trainer.global_step)


def callback(kind: type[lightning.Callback], **arguments: Any) -> list[str]:
    name = f"--trainer.callbacks+={__name__}.{kind.__name__}"
    return [name, *(f"--trainer.callbacks.{key}={value}" for key, value in arguments.items())]


def kill(batch: int, number: int = signal.SIGTERM, **more: Any) -> list[str]:
    return callback(Kill, number=int(number), batch=batch, **more)


@pytest.fixture(scope="module")
def alone(manifest: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["fit", *options(manifest, tiny_clip_dir, folder, *RUN)]) == 0
    return folder


@pytest.fixture
def run(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> Run:
    def command(*more: str, folder: Path = tmp_path) -> list[str]:
        return ["fit", *options(manifest, tiny_clip_dir, folder, *RUN, *more)]

    return command


@pytest.fixture
def goes_on(run: Run, alone: Path, tmp_path: Path) -> GoesOn:
    """Goes on from the last checkpoint, and ends as the run that nobody disturbed."""

    def command(*more: str) -> None:
        assert main(run("--ckpt_path=last", *more)) == 0
        assert soak.differences(alone, tmp_path) == []

    return command


def step_of(folder: Path, name: str = LAST) -> int:
    return int(read_checkpoint(folder / FOLDER / name)["global_step"])


def best_so_far(folder: Path) -> tuple[str, float]:
    states = read_checkpoint(folder / FOLDER / LAST)["callbacks"]
    (state,) = (state for name, state in states.items() if name.startswith("RunCheckpoint"))
    return state["best_model_path"], float(state["best_model_score"])


@pytest.mark.parametrize(
    ("number", "batch"), [(signal.SIGTERM, 4), (signal.SIGTERM, 5), (signal.SIGINT, 4), (signal.SIGUSR1, 5)]
)
def test_a_signal_saves_at_the_next_optimiser_step(
    run: Run,
    goes_on: GoesOn,
    tmp_path: Path,
    number: signal.Signals,
    batch: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    assert main(run(*kill(batch, number))) == 128 + number
    assert signal.getsignal(number) == before
    said = capsys.readouterr().err
    assert f"stopped by {number.name}; optimiser step 3 is saved, --ckpt_path last goes on" in said
    assert step_of(tmp_path) == 3
    goes_on()


def test_under_slurm_a_run_saves_in_the_same_way(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": 1, "JOB_NAME": "job", "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", "")  # where no scontrol is
    assert main(run(*kill(4, signal.SIGUSR1))) == 128 + signal.SIGUSR1
    assert step_of(tmp_path) == 3
    assert not list(tmp_path.rglob("hpc_ckpt*"))


# In the fourth step, whose validation follows; in that validation; twice in the third step, which is not saved: the
# last that is was saved before the validation of the second. In the last step, and in its validation.
@pytest.mark.parametrize(
    ("at", "saved", "validated"),
    [
        ({"batch": 7}, 4, [2, 4, 6]),
        ({"batch": 1, "after": 4}, 4, [2, 4, 6]),
        ({"batch": 4, "times": 2}, 2, [2, 2, 4, 6]),
        ({"batch": 11}, 6, [2, 4, 6]),
        ({"batch": 1, "after": 6}, 6, [2, 4, 6]),
    ],
)
def test_a_validation_that_was_cut_short_is_made_up_for(
    run: Run,
    goes_on: GoesOn,
    tmp_path: Path,
    at: dict[str, int],
    saved: int,
    validated: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Steps.validated = []
    status = main(run(*callback(Steps), *kill(**at)))
    assert status == 128 + signal.SIGTERM
    assert step_of(tmp_path) == saved
    goes_on(*callback(Steps))
    assert Steps.validated == validated
    assert "has made 6 optimiser steps already" in fails(run("--ckpt_path=last"), capsys)


@pytest.mark.parametrize("at", [{"batch": 0, "after": 0}, {"batch": 0, "times": 2}])
def test_before_anything_is_saved_a_signal_ends_a_run_at_once(
    run: Run, tmp_path: Path, at: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(run("--trainer.num_sanity_val_steps=1", *kill(**at)))
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; nothing has been saved" in capsys.readouterr().err
    # Whatever is on its way to handle errors must not take it for one.
    assert not issubclass(Stopped, Exception)


def test_a_test_ends_with_the_status_of_its_signal(run: Run, alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["test", *run(folder=alone)[1:], "--ckpt_path=best", "--data.test_episodes=100"]
    assert main([*args, f"--trainer.callbacks+={__name__}.KillTest"]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_who_wants_a_run_to_stop_gets_a_whole_step(run: Run, alone: Path, tmp_path: Path) -> None:
    assert main(run(f"--trainer.callbacks+={__name__}.StopInMidStep")) == 0
    assert step_of(tmp_path) == 3
    assert main(run("--ckpt_path=last")) == 0
    weights, expected = (read_checkpoint(folder / FOLDER / LAST)["state_dict"] for folder in (tmp_path, alone))
    assert all(weights[name].equal(value) for name, value in expected.items())


def test_without_validations_the_last_is_saved_as_often(run: Run, tmp_path: Path) -> None:
    assert main(run("--trainer.limit_val_batches=0", *kill(10, times=2))) == 128 + signal.SIGTERM
    assert (step_of(tmp_path), step_of(tmp_path, PREVIOUS)) == (4, 2)


def test_a_run_that_starts_from_another_has_a_best_of_its_own(run: Run, alone: Path, tmp_path: Path) -> None:
    args = run(f"--ckpt_path={alone / FOLDER / LAST}", "--trainer.max_steps=8")
    assert main(args) == 0
    assert step_of(tmp_path, BEST) == 8


def test_the_seeds_of_a_run_stay_what_they_were(run: Run, goes_on: GoesOn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run(*kill(8))) != 0
    said = fails(run("--ckpt_path=last", "--data.seed=1"), capsys)
    assert "the run's episodes are those of seed 0: set data.seed to that" in said
    goes_on("--seed_everything=5")


def others(manifest: Path, folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> Path:
    """A manifest of the same videos, each row changed; paths lead to where the videos are."""
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = [change(row | {"path": str(manifest.parent / row["path"])}) for row in csv.DictReader(file)]
    path = folder / "other.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row for row in rows if row["split"])
    return path


# What changes the episodes or losses of a run, or by what its best is chosen; in which words it is refused.
CHANGES: dict[str, str] = {
    "--data.n_way=2": "data.n_way is 2, but 3",
    "--data.n_shot=2": "data.n_shot is 2, but 1",
    "--data.train_n_shot=2": "data.train_n_shot is 2, but 1",
    "--data.n_query=1": "data.n_query is 1, but 2",
    "--data.n_query_eval=2": "data.n_query_eval is 2, but 1",
    "--data.val_episodes=5": "data.val_episodes is 5, but 4",
    "--data.eval_seed=1": "data.eval_seed is 1, but 0",
    "--data.frames=3": "data.frames is 3, but 2",
    "--data.resize=40": "data.resize is 40, but 32",
    "--data.resize_mode=squash": "data.resize_mode is 'squash', but 'short_side'",
    "--data.sampling=linspace": "data.sampling is 'linspace', but 'segments'",
    "--data.flip=true": "data.flip is True, but False",
    "--data.jitter_queries=true": "data.jitter_queries is True, but False",
    "--data.train_augmentations=2": "data.train_augmentations is 2, but 0",
    "--data.seed=1": "the run's episodes are those of seed 0",
    "--data.episodes_per_step=4": "data.episodes_per_step to 2",
    "--model.selection=expectation": "model.selection is 'expectation', but 'argmax'",
    "--model.text_fusion=0.5": "model.text_fusion is 0.5, but 0.0",
    "--model.lr=0.5": "model.lr is 0.5, but",
    "--model.match_weight=2": "model.match_weight is 2.0, but 1.0",
    "--model.head_options.temperature=3": "model.head_options.temperature is 3, but",
    "--trainer.gradient_clip_val=1": "trainer.gradient_clip_val is 1, but None",
    "--checkpoint.monitor=val/loss/total": "checkpoint.monitor is 'val/loss/total', but 'val/accuracy'",
    "--checkpoint.mode=min": "checkpoint.mode is 'min', but 'max'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_episodes_or_losses_is_refused_when_a_run_goes_on(
    run: Run, alone: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.freeze_backbone=true"] if "augmentations" in change else []
    said = fails(run("--ckpt_path=last", "--trainer.max_steps=8", change, *more, folder=alone), capsys)
    assert CHANGES[change] in said
    assert step_of(alone) == 6


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (lambda row: row | {"text": "another" if row["label"] == "train class 1" else ""}, "the train split"),
        (lambda row: row | {"text": "another" if row["label"] == "val class 1" else ""}, "the val split"),
        (lambda row: row | {"split": "" if row["path"].endswith("train1_3.mp4") else row["split"]}, "15 videos of 4"),
        (lambda row: row | {"label": "zoo" if row["label"] == "train class 1" else row["label"]}, "the train split"),
    ],
)
def test_other_videos_classes_or_texts_are_refused_when_a_run_goes_on(
    run: Run, alone: Path, manifest: Path, tmp_path: Path, row: Any, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--data.manifest={others(manifest, tmp_path, row)}", f"--data.root={manifest.parent}"]
    said = fails(run("--ckpt_path=last", "--trainer.max_steps=8", *given, folder=alone), capsys)
    assert named in said
    assert "split of data.manifest is" in said


def test_class_texts_and_a_cache_are_refused_when_a_run_goes_on(
    run: Run, alone: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.csv").write_text("label,text\ntrain class 1,another\n")
    said = fails(run("--ckpt_path=last", f"--data.class_texts={tmp_path / 'texts.csv'}", folder=alone), capsys)
    assert "the train split of data.manifest is" in said
    cache = tmp_path / "cache"
    assert main(["cache", f"--manifest={manifest}", f"--output={cache}", "--short_side=32", "--frames=6"]) == 0
    said = fails(run("--ckpt_path=last", f"--data.cache={cache}", folder=alone), capsys)
    assert "data.cache is 'one of short_side 32, frames 6" in said


def test_what_changes_no_episode_is_free_when_a_run_goes_on(
    run: Run, goes_on: GoesOn, manifest: Path, tmp_path: Path
) -> None:
    """Workers, the place of the manifest and of its videos, tests, and how it is computed and logged."""
    assert main(run("--trainer.max_steps=3")) == 0
    moved = tmp_path / "moved"
    shutil.copytree(manifest.parent, moved)
    goes_on(
        f"--data.manifest={moved / manifest.name}",
        "--data.num_workers=1",
        "--data.test_episodes=3",
        "--data.evaluation=direct",
        "--data.stuck_after=99",
        "--model.gradient_checkpointing=true",
        "--model.bank_memory=1",
        "--trainer.logger=false",
        "--trainer.log_every_n_steps=1",
    )


def test_a_manifest_may_lie_elsewhere_than_its_videos_when_a_run_goes_on(
    run: Run, goes_on: GoesOn, manifest: Path, tmp_path: Path
) -> None:
    assert main(run("--trainer.max_steps=3")) == 0
    (tmp_path / "lists").mkdir()
    path = others(manifest, tmp_path / "lists", lambda row: row)
    goes_on(f"--data.manifest={path}", f"--data.root={manifest.parent}")


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_had_them_from_the_start(
    run: Run, goes_on: GoesOn, tmp_path: Path
) -> None:
    for steps in (2, 3, 4):
        assert main(run(f"--trainer.max_steps={steps}", *(["--ckpt_path=last"] if steps > 2 else []))) == 0
        assert step_of(tmp_path) == steps
    goes_on()


def test_a_checkpoint_from_within_a_step_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fail(lightning.Callback):
        """Fails in the second batch of the third step."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                raise UserError("failed on purpose")

    globals()["Fail"] = Fail
    saving = ["--trainer.callbacks+=lightning.pytorch.callbacks.OnExceptionCheckpoint"]
    saving += [f"--trainer.callbacks.dirpath={tmp_path / 'failed'}"]
    assert "on purpose" in fails(run(*saving, f"--trainer.callbacks+={__name__}.Fail"), capsys)
    said = fails(run(f"--ckpt_path={tmp_path / 'failed' / 'on_exception.ckpt'}", folder=tmp_path / "new"), capsys)
    assert "was saved in the middle of an optimiser step" in said
    assert "--ckpt_path last" in said


def test_a_checkpoint_of_an_earlier_version_that_says_less_goes_on(run: Run, goes_on: GoesOn, tmp_path: Path) -> None:
    assert main(run("--trainer.max_steps=4")) == 0
    path = tmp_path / FOLDER / LAST
    checkpoint = read_checkpoint(path)
    del checkpoint["goes_by"]
    for fact in ("episodes", "whole_step"):
        del checkpoint["EpisodeDataModule"][fact]
    torch.save(checkpoint, path)
    goes_on()


def test_in_python_too_a_run_goes_on_with_its_own_options_alone(alone: Path, manifest: Path, tmp_path: Path) -> None:
    path = alone / FOLDER / LAST
    source = {
        "n_way": 3,
        "n_query": 2,
        "n_query_eval": 1,
        "frames": 2,
        "resize_mode": "short_side",
        "resize": 32,
        "size": 32,
        "val_episodes": 4,
    }
    data = EpisodeDataModule(str(manifest), batch_size=1, episodes_per_step=2, num_workers=0, **source)  # type: ignore[arg-type]
    for changed in ({"lr": 0.5}, {"head_options": {"hidden_dim": 32, "num_heads": 4, "smoothing": 0.9}}):
        model = CLIPM2DF.load_from_checkpoint(path, **changed)
        with pytest.raises(UserError, match=r"model\.(lr is 0\.5|head_options\.smoothing is 0\.9), but"):
            quiet_trainer(tmp_path, max_steps=8).fit(model, data, ckpt_path=path)
    quiet_trainer(tmp_path, max_steps=7, limit_val_batches=0).fit(
        CLIPM2DF.load_from_checkpoint(path), data, ckpt_path=path
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_signals_to_the_run(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "clip_m2df", *run("--data.num_workers=2", *kill(4, number, group="true"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True, timeout=300)
    assert done.returncode == 128 + number, done.stderr
    assert step_of(tmp_path) == 3


def test_a_run_goes_on_where_its_folder_was_moved_to(run: Run, alone: Path, tmp_path: Path) -> None:
    assert main(run(*kill(8), folder=tmp_path / "here")) != 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert main(run("--ckpt_path=last", folder=tmp_path / "there")) == 0
    assert soak.differences(alone, tmp_path / "there") == []
    # The best so far was known there, and is in the new folder.
    moved, whole = (best_so_far(folder) for folder in (tmp_path / "there", alone))
    assert moved == (str(tmp_path / "there" / FOLDER / BEST), whole[1])


@pytest.mark.slow
def test_a_killed_run_ends_as_if_left_alone(manifest: Path, tiny_clip_dir: Path) -> None:
    command = options(manifest, tiny_clip_dir, Path("nowhere"), *RUN, "--checkpoint.every=1", "--trainer.max_steps=20")
    short = [option for option in command if "default_root_dir" not in option and "num_workers" not in option]
    for case in soak.cases(kills=3, run=short):
        assert case["different"] == "nothing"
        assert case["within_bar"]


def test_a_damaged_last_falls_back_to_the_one_before(
    run: Run, goes_on: GoesOn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(*kill(9))) != 0
    folder = tmp_path / FOLDER
    assert (step_of(tmp_path), step_of(tmp_path, PREVIOUS)) == (5, 4)
    whole = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged: going on with .*previous.ckpt, of step 4"):
        assert main(run("--ckpt_path=last", *kill(9))) != 0
    # The damaged one has not taken the place of the good one.
    assert (step_of(tmp_path), step_of(tmp_path, PREVIOUS)) == (5, 4)
    goes_on()
    for name in (LAST, PREVIOUS):
        (folder / name).write_bytes(b"")
    assert "previous.ckpt: damaged; give --ckpt_path best, or start anew" in fails(run("--ckpt_path=last"), capsys)
    # Nor is a damaged run written over.
    assert "holds a run already" in fails(run(), capsys)


def test_any_damage_to_a_checkpoint_is_noticed(alone: Path, tmp_path: Path) -> None:
    whole = (alone / FOLDER / LAST).read_bytes()
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / PREVIOUS).write_bytes(whole)
    generator = torch.Generator().manual_seed(0)
    expected = read_checkpoint(alone / FOLDER / LAST)
    for _ in range(20):
        damaged = bytearray(whole)
        place = int(torch.randint(len(whole), (), generator=generator))
        damaged[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        (tmp_path / FOLDER / LAST).write_bytes(damaged)
        try:
            with pytest.warns(UserWarning, match="is damaged"):
                assert read_last(tmp_path)[0].name == PREVIOUS
        except pytest.fail.Exception:  # padding between the parts
            assert soak.compare(read_checkpoint(tmp_path / FOLDER / LAST), expected) == []


def test_last_may_be_missing_between_two_renamings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fit has saved nothing there yet"):
        read_last(tmp_path)
    plain = RunCheckpointIO()
    for step in (1, 2):
        plain.save_checkpoint({"global_step": step}, tmp_path / FOLDER / LAST)
    assert [step_of(tmp_path, name) for name in (PREVIOUS, LAST)] == [1, 2]
    (tmp_path / FOLDER / LAST).unlink()
    with pytest.warns(UserWarning, match=r"there is no .*last.ckpt: going on with .*previous.ckpt, of step 1"):
        assert read_last(tmp_path)[0] == tmp_path / FOLDER / PREVIOUS


class Full(lightning.Callback):
    """The disk is full from the fifth step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def any_size() -> Iterator[None]:
    """Lets files have any size again afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_run_with_a_line(
    run: Run, goes_on: GoesOn, tmp_path: Path, capsys: pytest.CaptureFixture[str], any_size: None
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert main(run("--trainer.max_steps=3")) == 0
    said = fails(run("--ckpt_path=last", "--checkpoint.every=5", f"--trainer.callbacks+={__name__}.Full"), capsys)
    assert "last.ckpt: File too large; make room; what was there before still is, and --ckpt_path last goes on" in said
    assert step_of(tmp_path) == 4
    assert not list(tmp_path.rglob("*.part"))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    goes_on()


def test_where_nothing_was_saved_a_full_disk_does_not_say_go_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], any_size: None
) -> None:
    said = fails(
        run("--data.validate_every=5", "--trainer.max_steps=5", f"--trainer.callbacks+={__name__}.Full"), capsys
    )
    assert "last.ckpt: File too large; make room; nothing of it is kept" in said
    assert "--ckpt_path last" not in said
    assert not list((tmp_path / FOLDER).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 100, 1024])
def test_on_a_full_disk_no_good_file_is_cut(run: Run, tmp_path: Path, size: int) -> None:
    more = ["--trainer.log_every_n_steps=1", "--dashboard.figures=true"]
    assert main(run("--trainer.max_steps=3", *more)) == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "clip_m2df", *run("--ckpt_path=last", *more)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f" {tmp_path}/" in done.stderr
    assert "File too large; make room; what was there before still is" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_one_fit_has_a_run_folder(run: Run, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with locked_folder(tmp_path, "run folder"):  # as another process does
        for more in ([], ["--ckpt_path=last", "--trainer.max_steps=8"], ["--data.seed=7"]):
            said = fails(run(*more), capsys)
            assert f"another process writes the run folder {tmp_path}: wait for its end, or name another" in said
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == files
        # Others write files of their own.
        for command in ("test", "validate"):
            assert main([command, *run()[1:], "--ckpt_path=best"]) == 0
        assert all((tmp_path / path.relative_to(tmp_path)).read_bytes() == content for path, content in files.items())
    assert main(run("--ckpt_path=last", "--trainer.max_steps=8")) == 0
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--trainer.strategy=ddp_fork"]])
def test_a_second_fit_is_refused_until_the_first_is_gone(run: Run, tmp_path: Path, how: list[str]) -> None:
    several = ["--trainer.devices=2", *how, "--data.num_workers=2", "--trainer.max_steps=100000"]
    command = [sys.executable, "-m", "clip_m2df"]
    first = subprocess.Popen([*command, *run(*several)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "config.yaml").exists():  # it trains, and has workers
            assert first.poll() is None
        second = subprocess.run([*command, *run()], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "another process writes the run folder" in second.stderr
        workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        assert workers
    finally:
        first.kill()
        first.wait()
    # Processes that it forked may live for a while yet: the lock was not theirs.
    with locked_folder(tmp_path, "run folder"):
        pass


def test_every_is_a_number_of_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "checkpoint.every is 0; it must be at least 1" in fails(run("--checkpoint.every=0"), capsys)
