import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_m2df.cli import main
from clip_m2df.profile import PARTS, WARM_UP, StepProfile, measure_peak
from tests.test_cli import options


def test_a_run_says_where_its_time_went(
    manifest: Path,
    tiny_clip_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profiles: list[StepProfile] = []
    end = StepProfile.on_train_end

    def noted(self: StepProfile, *rest: Any) -> None:
        profiles.append(self)
        end(self, *rest)

    monkeypatch.setattr(StepProfile, "on_train_end", noted)
    started = time.perf_counter()
    args = options(manifest, tiny_clip_dir, tmp_path, "--trainer.max_steps=5", "--profile=true")
    assert main(["fit", *args]) == 0
    took = time.perf_counter() - started
    said = capsys.readouterr().out
    assert all(part in said for part in ("profile of 7 batches", *PARTS, "TFLOP/s of"))
    (profile,) = profiles
    # Two batches of each of five steps, less the warm-up.
    assert profile.batches == 10 - WARM_UP
    total = profile._until - profile._total_since
    assert 0 < sum(profile.seconds.values()) <= total < took
    assert all(profile.seconds[part] > 0 for part in PARTS)
    # 17 tokens through 2 layers of the frozen tower take 2e6 a frame; two episodes of 9 videos of 2 frames share some.
    assert 18 * 2e6 < profile.operations < 3 * 36 * 2e6


def test_without_the_option_nothing_is_measured(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(manifest, tiny_clip_dir, tmp_path)]) == 0
    assert "profile of" not in capsys.readouterr().out


def test_the_peak_is_that_of_a_matrix_product() -> None:
    assert 1e9 < measure_peak(torch.device("cpu"), torch.float32, size=256) < 1e14


def test_compiled_parts_keep_the_names_of_their_weights(tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_m2df import CLIPM2DF

    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    head = {"hidden_dim": 32, "heads": 4}
    model = CLIPM2DF(backbone=str(tiny_clip_dir), head_options=head, compile=True)
    assert compiled == ["_Tower", "M2DFHead"]
    plain = CLIPM2DF(backbone=str(tiny_clip_dir), head_options=head)
    assert model.state_dict().keys() == plain.state_dict().keys()
