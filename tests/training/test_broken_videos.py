"""Runs over videos of which many are broken."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clip_m2df.datasets.manifest import Manifest
from clip_m2df.episodes.plan import EpisodeShape, plan_episode
from clip_m2df.video.reader import VideoError, read_frames
from tests.clips import damage
from tests.conftest import options

N_CLASSES, N_QUERY, STEPS = 10, 4, 24


@pytest.mark.slow
def test_a_run_over_every_damaged_file_ends_and_names_the_unusable_ones(tmp_path: Path, tiny_clip_dir: Path) -> None:
    (tmp_path / "videos").mkdir()
    files = damage(tmp_path / "videos")
    assert len(files) == 300
    lines = [f"videos/{file.path.name},class {i % N_CLASSES},train" for i, file in enumerate(files)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,split", *lines]))
    train = Manifest.read(tmp_path / "m.csv").split("train")
    visited = set()
    for episode in range(2 * STEPS):
        plan = plan_episode(train, EpisodeShape(N_CLASSES, 1, N_QUERY), seed=0, episode=episode)
        visited |= {video.path for rows in (plan.support, plan.query) for row in rows for video in row}
    assert len(visited) == 300
    unusable = set()
    for file in files:
        try:
            read_frames(str(file.path), range)
        except VideoError:
            unusable.add(str(file.path))
    assert 100 < len(unusable) < 200

    own = [f"--data.n_way={N_CLASSES}", f"--data.n_query={N_QUERY}", "--data.batch_size=1", "--data.num_workers=1"]
    own += ["--data.episodes_per_step=2", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1"]
    own += [f"--trainer.max_steps={STEPS}"]
    fit = ["fit", *options(tmp_path / "m.csv", tiny_clip_dir, tmp_path / "run", *own)]
    # In processes of their own, as a person runs them: loaders are forked, and this one may have other threads.
    command = [sys.executable, "-m", "clip_m2df", *fit]
    done = subprocess.run([*command, "--data.max_unusable=1.0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"warning: cannot read the video (.*?): .*takes its place$", done.stderr, re.MULTILINE)
    assert sorted(named) == sorted(unusable)  # each once
    (metrics,) = (tmp_path / "run").rglob("metrics.csv")
    header, *rows = (line.split(",") for line in metrics.read_text().splitlines())
    column = header.index("train/replaced_videos")
    assert sum(float(row[column]) for row in rows if row[column]) > len(unusable)

    refused = ["--data.max_unusable=0.05", f"--trainer.default_root_dir={tmp_path / 'another'}"]
    done = subprocess.run([*command, *refused], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    message = done.stderr[done.stderr.index("clip-m2df: error:") :]
    assert "of the 300 videos of the train split are unusable, more than the share 0.05" in message
    assert len(set(re.findall(r"/videos/[\w.]+", message))) > 15
