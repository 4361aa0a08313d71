from pathlib import Path

import pytest

from clip_m2df import CLIPM2DF
from clip_m2df.cli import main
from clip_m2df.commands.demo import run_demo
from clip_m2df.motion_shapes import rendering


@pytest.mark.slow
def test_the_demo_goes_from_rendering_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIP_M2DF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(rendering.VIDEOS_PER_CLASS, "demo", {"train": 6, "val": 2, "test": 2})
    output = tmp_path / "demo"
    # So small a learning rate leaves the weights as they were: before and after training are then the same.
    small = ["--trainer.max_steps=1", "--model.lr=1e-12", "--data.episodes_per_step=4", "--data.val_episodes=4"]
    small += ["--data.num_workers=0"]
    options = [*small, "--data.validate_every=1", "--trainer.enable_progress_bar=false"]
    run_demo(*options, output=output, episodes=20)
    said = capsys.readouterr().out
    for row in ("OTAM on the tower's features", "CLIP-M²DF before training", "CLIP-M²DF after training"):
        assert row in said
    before, after = (said.split(f"{when} training")[1].splitlines()[0] for when in ("before", "after"))
    assert before.split() == after.split()
    # The same episodes as the test command's: the table's last row is its accuracy.
    test = [f"--trainer.default_root_dir={output}", "--ckpt_path=best", "--data.test_episodes=20", *small[1:]]
    assert main(["test", "--config=demo_5way1shot.yaml", *test, "--trainer.enable_progress_bar=false"]) == 0
    tested = capsys.readouterr().out
    _, accuracy, _ = tested.split("test/accuracy")[1].split("┃", 2)
    assert accuracy.strip().removesuffix(" %") in said.split("after training")[1].splitlines()[0]
    # An earlier demo is replaced; anything else is not.
    (output / ".demo").unlink()
    assert main(["demo", f"--output={output}"]) == 2
    assert "is there already, and no earlier demo" in capsys.readouterr().err
    assert CLIPM2DF.load_from_checkpoint(output / "checkpoints" / "best.ckpt").hparams["backbone"] == "tiny"


def test_the_demo_wants_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--episodes=1"]) == 2
    assert "episodes is 1; it must be at least 2" in capsys.readouterr().err
