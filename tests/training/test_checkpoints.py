"""A checkpoint is read once, however it is used; what was saved under former names of options loads."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_m2df import CLIPM2DF, UserError
from clip_m2df.cli import main
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.training.checkpoints import BEST, FOLDER, LAST, RunCheckpointIO, read_checkpoint
from tests.conftest import fails, options

SMALL = {"hidden_dim": 32, "num_heads": 4}
FORMER = {"hidden_dim": 32, "heads": 4}

_opened: list[str] = []


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and str(args[0]).endswith(".ckpt") and args[1] == "r":
        _opened.append(str(args[0]))


sys.addaudithook(_listen)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The checkpoints that are opened for reading, in order."""
    _opened.clear()
    yield _opened
    _opened.clear()


@pytest.fixture(scope="module")
def fitted(manifest: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one optimiser step."""
    folder = tmp_path_factory.mktemp("fitted")
    assert main(["fit", *options(manifest, tiny_clip_dir, folder, "--trainer.max_steps=1")]) == 0
    return folder


@pytest.fixture
def former(fitted: Path, tmp_path: Path) -> Path:
    """A checkpoint as it was saved when the number of attention heads was called ``heads``."""
    checkpoint = read_checkpoint(fitted / FOLDER / LAST)
    checkpoint["hyper_parameters"]["head_options"] = FORMER
    torch.save(checkpoint, tmp_path / "former.ckpt")
    return tmp_path / "former.ckpt"


def test_a_checkpoint_is_verified_and_read_once(
    manifest: Path, tiny_clip_dir: Path, fitted: Path, opened: list[str]
) -> None:
    last = str(fitted / FOLDER / LAST)
    once = [last, last]  # for its checksums, and for what it holds
    # The calibration at the end of fit adds to what the training has written.
    calibrated = [str(fitted / FOLDER / name) for name in (BEST, BEST, LAST, LAST)]
    CLIPM2DF.load_from_checkpoint(last)
    assert opened == once
    for command in ("validate", "test", "fit"):
        opened.clear()
        assert main([command, *options(manifest, tiny_clip_dir, fitted, "--ckpt_path=last")]) == 0
        assert opened == [*once, *(calibrated if command == "fit" else [])]


def test_what_has_been_read_is_handed_over_once(fitted: Path) -> None:
    path = fitted / FOLDER / LAST
    checkpoint = read_checkpoint(path)
    plugin = RunCheckpointIO(path, checkpoint)
    assert plugin.load_checkpoint(str(path)) is checkpoint
    again = plugin.load_checkpoint(path)
    assert again is not checkpoint
    assert again["global_step"] == checkpoint["global_step"]


# Former names


def test_saved_options_have_the_names_of_today(former: Path, tmp_path: Path) -> None:
    model = CLIPM2DF.load_from_checkpoint(former)
    assert model.hparams["head_options"] == SMALL
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["options"]["head_options"] = FORMER
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    loaded = CLIPM2DF.from_pretrained(tmp_path / "model")
    assert loaded.hparams["head_options"] == SMALL
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_command_takes_a_checkpoint_with_former_names_and_refuses_them_typed(
    manifest: Path, tiny_clip_dir: Path, former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["test", *options(manifest, tiny_clip_dir, tmp_path, f"--ckpt_path={former}")]
    assert main(args) == 0
    said = fails([*args, "--model.head_options={hidden_dim: 32, heads: 4}"], capsys)
    assert "head_options.heads is not an option" in said
    assert "num_heads" in said


def test_former_names_given_in_python_are_errors_that_name_those_of_today(tiny_clip_dir: Path) -> None:
    for head in ("m2df", "clip_fsar"):
        with pytest.raises(UserError, match=r"'heads'.*num_heads"):
            CLIPM2DF(backbone=str(tiny_clip_dir), head=head, head_options=FORMER)


class OwnHead(M2DFHead):
    """A head of a user's, whose option ``heads`` means something else."""

    def __init__(self, *, dim: int, heads: int = 1, num_heads: int = 4) -> None:
        super().__init__(dim=dim, hidden_dim=8, num_heads=num_heads)
        self.heads = heads


def test_an_option_of_a_users_head_keeps_its_name(tiny_clip_dir: Path, tmp_path: Path) -> None:
    head = f"{__name__}.OwnHead"
    model = CLIPM2DF(backbone=str(tiny_clip_dir), head=head, head_options={"heads": 3})
    model.save_pretrained(tmp_path)
    loaded = CLIPM2DF.from_pretrained(tmp_path)
    assert isinstance(loaded.model.head, OwnHead)
    assert loaded.model.head.heads == 3
