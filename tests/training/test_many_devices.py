"""Several processes: other episodes each in training, the same results as one process has."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from benchmarks import soak
from clip_m2df.episode import episode_draws
from tests.conftest import options, quiet_trainer
from tests.training.test_evaluation_from_bank import data
from tests.training.test_interruption import Kill, callback, step_of
from tests.training.test_module import make


class Note(lightning.Callback):
    """Writes down a rank's episodes, and the gradients of the first optimiser step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.draws: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.draws.append(batch["draws"])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save((torch.cat(self.draws), self.gradients), self.folder / f"{trainer.world_size}_{trainer.global_rank}")


def train(manifest: Path, tiny_clip_dir: Path, folder: Path, devices: int, precision: str, **options: Any) -> list[Any]:
    """Two steps of 8 episodes in batches of two, on all weights by default; what each rank noted."""
    model, source = make(tiny_clip_dir, class_weight=1.0, **options), data(manifest, batch_size=2, episodes_per_step=8)
    run: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "precision": precision, "callbacks": [Note(folder)]}
    if devices > 1:
        run["strategy"] = "ddp_fork"
    quiet_trainer(folder, devices=devices, enable_checkpointing=False, **run).fit(model, source)
    return [torch.load(folder / f"{devices}_{rank}") for rank in range(devices)]


@pytest.mark.parametrize(("precision", "rtol", "atol"), [("64-true", 1e-9, 1e-13), ("32-true", 1e-4, 1e-6)])
def test_two_processes_train_as_one_on_other_episodes_each(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, precision: str, rtol: float, atol: float
) -> None:
    ((all_draws, expected),) = train(manifest, tiny_clip_dir, tmp_path, 1, precision)
    ranks = train(manifest, tiny_clip_dir, tmp_path, 2, precision)
    # An episode is known by its draws.
    numbers = {tuple(episode_draws(0, "train", i, 6).tolist()): i for i in range(16)}
    seen = [[numbers[tuple(row)] for row in draws.float().tolist()] for draws in (all_draws, *(d for d, _ in ranks))]
    assert seen[0] == list(range(16))
    assert sorted(seen[1] + seen[2]) == list(range(16))
    # Each step has the episodes that it has on one device.
    assert sorted(seen[1][:4] + seen[2][:4]) == list(range(8))
    assert any(name.startswith("model.backbone") for name in expected)
    for _, gradients in ranks:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradients[name], gradient, rtol=rtol, atol=atol, msg=name)


# Each rank has training videos that it cannot read.
SCRIPT = """
import os
import sys
from clip_m2df.cli import main
from clip_m2df.video.reader import VideoError
from clip_m2df.video.transforms import ClipReader

whole = ClipReader.read

def read(self, path, uniforms=None):
    name = os.path.basename(path)
    if uniforms is not None and name in {broken}[int(os.environ.get("LOCAL_RANK", 0))]:
        raise VideoError(f"cannot read the video {{path}}: it is empty")
    return whole(self, path, uniforms)

ClipReader.read = read
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run_two(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs ``fit`` in two processes, each with broken videos of its own, to a status: what is said."""

    def command(status: int, broken: list[list[str]], *more: str) -> str:
        (tmp_path / "script.py").write_text(SCRIPT.format(broken=broken))
        own = ["--data.batch_size=1", "--trainer.max_steps=40", "--trainer.devices=2", "--trainer.strategy=ddp", *more]
        args = ["fit", *options(manifest, tiny_clip_dir, tmp_path / "run", *own)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), *args],
            env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return command


# Of the three of sixteen no rank alone finds all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "share"),
    [
        ([["train0_0.mp4"], []], 0.05),
        ([[], ["train0_0.mp4"]], 0.05),
        ([["train0_0.mp4", "train1_1.mp4"], ["train2_2.mp4"]], 0.15),
    ],
)
def test_videos_that_a_rank_cannot_read_are_counted_over_all_and_end_the_run_in_plain_words(
    run_two: Callable[..., str], broken: list[list[str]], share: float
) -> None:
    limits = [f"--data.max_unusable={share}", "--data.episodes_per_step=2", "--trainer.limit_val_batches=0"]
    said = run_two(2, broken, *limits)
    n = sum(map(len, broken))
    assert f"{n} of the 16 videos of the train split are unusable, more than the share {share}" in said
    assert all(broken) or "another process of this run has ended; what it said says why" in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(
    run_two: Callable[..., str], tmp_path: Path, rank: int
) -> None:
    kill = callback(Kill, number=int(signal.SIGTERM), batch=2, rank=rank)
    said = run_two(128 + signal.SIGTERM, [[], []], "--data.episodes_per_step=4", *kill)
    assert said.count("stopped by SIGTERM; optimiser step 2 is saved") == 1
    assert step_of(tmp_path / "run") == 2


@pytest.mark.slow
def test_spawned_processes_train_as_others_do(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    def fit(strategy: str, *more: str, status: int = 0) -> str:
        own = ["--data.batch_size=1", "--trainer.devices=2", f"--trainer.strategy={strategy}", *more]
        command = [
            sys.executable,
            "-m",
            "clip_m2df",
            "fit",
            *options(manifest, tiny_clip_dir, tmp_path / strategy, *own),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == status, done.stderr
        return done.stderr

    for strategy in ("ddp", "ddp_spawn"):
        fit(strategy)
        fit(strategy, "--ckpt_path=last", "--trainer.max_steps=3")
    assert soak.differences(tmp_path / "ddp", tmp_path / "ddp_spawn") == []
    said = fit("ddp_spawn", "--ckpt_path=last", "--trainer.max_steps=4", "--data.n_shot=2", status=2)
    assert "error: data.n_shot is 2, but 1" in said
    assert "Traceback" not in said
