import csv
import importlib
import math
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import save_file

import clip_m2df
from clip_m2df import __version__
from clip_m2df.cli import COMMANDS, command_parser, main
from clip_m2df.commands.configs import find_config, resolve_configs, shipped_configs
from clip_m2df.commands.trainer import run
from clip_m2df.datasets.feature_tables import write_feature_table
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.errors import UserError
from clip_m2df.training.callbacks import RunProgressBar
from clip_m2df.training.checkpoints import read_checkpoint
from clip_m2df.training.module import CLIPM2DF
from tests.conftest import fails, options, quiet_trainer, read_golden, save_tokenizer
from tests.episodes.test_datamodule import broken_copy
from tests.training.wandb_file import end_wandb


@pytest.fixture
def own(manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> list[str]:
    """The options of a run in the test's folder."""
    return options(manifest, tiny_clip_dir, tmp_path)


@pytest.fixture
def best(manifest: Path, tiny_clip_dir: Path, fitted: Path) -> list[str]:
    """The options with which the best checkpoint of the finished run is measured."""
    return options(manifest, tiny_clip_dir, fitted, "--ckpt_path=best")


def test_fit_keeps_best_last_config_and_metrics_in_a_stable_folder(fitted: Path) -> None:
    assert {path.name for path in (fitted / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert "n_way: 3" in (fitted / "config.yaml").read_text()
    (metrics,) = fitted.rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0]
    assert {"val/accuracy", "val/interval", "val/loss/match", "val/view_agreement"} <= set(header.split(","))
    last = torch.load(fitted / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2


def test_a_checkpoint_of_the_command_line_loads_in_python(fitted: Path) -> None:
    model = CLIPM2DF.load_from_checkpoint(fitted / "checkpoints" / "best.ckpt")
    assert model.encode_prompts(["something new"]).shape == (1, 32)


def test_validate_and_test_print_the_accuracy(
    best: list[str], fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, prefix in (("validate", "val"), ("test", "test")):
        assert main([command, *best]) == 0
        said = capsys.readouterr().out
        accuracy = re.search(rf"{prefix}/accuracy *┃ *([\d.]+) ± ([\d.]+) %", said)
        assert accuracy
        with (fitted / f"{prefix}_metrics.csv").open() as file:
            numbers = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
        assert f"{100 * numbers[f'{prefix}/accuracy']:.1f}" == accuracy[1]
        assert f"{100 * numbers[f'{prefix}/interval']:.1f}" == accuracy[2]
        assert f"{prefix}/local_accuracy" in said
        assert not re.search(r"\d\.\d{9}", said)
    assert "hardest classes" in said
    assert (fitted / "val_classes.csv").read_text().count("val class") == 3
    classes = (fitted / "test_classes.csv").read_text().splitlines()
    assert classes[0] == "class,queries,correct,accuracy"
    assert [line.split(",")[0] for line in classes[1:]] == ["test class 0", "test class 1", "test class 2"]
    assert sum(int(line.split(",")[1]) for line in classes[1:]) == 6 * 3
    (matrix,) = fitted.glob("test_confusion.csv")
    counts = [[int(cell) for cell in line.split(",")[1:]] for line in matrix.read_text().splitlines()[1:]]
    assert [sum(row) for row in counts] == [int(line.split(",")[1]) for line in classes[1:]]


def test_a_checkpoint_is_tested_without_its_backbones_files(own: list[str], fitted: Path) -> None:
    args = [a for a in own if "--model" not in a and "--config" not in a]
    path = fitted / "checkpoints" / "best.ckpt"
    assert main(["test", *args, f"--ckpt_path={path}"]) == 0


def test_what_changes_at_evaluation_wins_over_the_checkpoint(best: list[str], fitted: Path) -> None:
    more = ["--model.selection=sample", "--model.text_fusion=0.5", "--data.n_way=2"]
    ended = run(resolve_configs(["test", *best, *more]))
    assert ended.model.model.head.selection == "sample"
    assert ended.model.text_fusion == 0.5
    assert ended.datamodule.eval_shape.n_way == 2
    weights = torch.load(fitted / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in ended.model.state_dict().items())


def test_a_model_option_that_contradicts_the_checkpoint_is_refused(
    best: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["test", *best]
    said = fails([*args, "--model.template=this is {}"], capsys)
    assert "model.template is 'this is {}', but 'a photo of {}' in" in said
    assert "leave it out" in said
    assert "model.head_options.depth is 2, but 1 in" in fails([*args, "--model.head_options.depth=2"], capsys)
    assert "--model.selection" in fails([*args, "--model.head_options.selection=sample"], capsys)
    assert "model.backbone is 'tiny'" in fails([*args, "--model.backbone=tiny"], capsys)
    # The same value is no contradiction, nor is a default that the checkpoint doesn't name.
    assert main([*args, "--model.template=a photo of {}", "--model.head_options={num_heads: 4, depth: 1}"]) == 0


@pytest.mark.slow
def test_backbone_options_make_the_tower_and_a_checkpoint_keeps_it(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, folder = tmp_path / "clip.safetensors", tmp_path / "tokenizer"
    save_file(read_golden("clip_vit")[1], weights)
    assert save_tokenizer(folder, string.ascii_lowercase + string.digits, [f"word{i}" for i in range(45)]) == 120
    said = "--model.backbone_options."
    mine = [f"{said}activation=gelu", f"{said}head_width=32", f"{said}mean=[0, 0, 0.485]", f"{said}tokenizer={folder}"]
    args = options(manifest, weights, tmp_path / "run", "--model.template={}")  # it reads 16 tokens
    assert "are not known to be OpenAI's" in fails(["fit", *args], capsys)
    assert main(["fit", *args, *mine]) == 0
    config = tmp_path / "run" / "config.yaml"
    assert "head_width: 32" in config.read_text()
    weights.unlink()
    best = [f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'best.ckpt'}", "--trainer.logger=false"]
    tower = run(["test", f"--config={config}", *best]).model.model.backbone
    assert (tower.visual_config["hidden_act"], tower.visual_config["num_attention_heads"]) == ("gelu", 2)
    assert tower.mean.flatten().tolist() == pytest.approx([0, 0, 0.485])
    # What contradicts the checkpoint is refused, as for any other option; what doesn't is free.
    test = ["test", *args, *best]
    assert main([*test, *mine]) == 0
    assert main([*test, f"{said}std=[0.26862954, 0.26130258, 0.27577711]"]) == 0
    told = fails([*test, f"{said}activation=quick_gelu"], capsys)
    assert "model.backbone_options.activation is 'quick_gelu', but 'gelu' in" in told
    assert "model.backbone_options.mean is [0.0, 0.0, 0.5], but [0.0" in fails(
        [*test, f"{said}mean=[0, 0, 0.5]"], capsys
    )
    assert "backbone_options has no 'head'; there are activation" in fails([*test, f"{said}head=32"], capsys)


@pytest.mark.slow
def test_fit_goes_on_from_last_and_refuses_to_write_over_a_run(
    manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def last(name: str) -> dict[str, torch.Tensor]:
        checkpoint = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 3
        weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
        return weights

    args = ["fit", *options(manifest, tiny_clip_dir, tmp_path / "run")]
    assert main(args) == 0
    assert "holds a run already: go on with it by --ckpt_path last" in fails(args, capsys)
    # A checkpoint from elsewhere is no licence either.
    elsewhere = tmp_path / "elsewhere.ckpt"
    elsewhere.write_bytes((tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes())
    assert "holds a run already" in fails([*args, f"--ckpt_path={elsewhere}"], capsys)
    said = fails([*args, "--ckpt_path=last"], capsys)
    assert "has made 2 optimiser steps already; to go on, give more than that with trainer.max_steps" in said
    on = [*args, "--ckpt_path=last", "--trainer.max_steps=3"]
    assert main(on) == 0
    uninterrupted = ["fit", *options(manifest, tiny_clip_dir, tmp_path / "whole", "--trainer.max_steps=3")]
    assert main(uninterrupted) == 0
    for name, value in last("whole").items():
        assert torch.equal(value, last("run")[name]), name


def test_the_last_step_is_kept_without_any_validation_and_a_profiler_tells_where_the_time_went(
    own: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert main(["fit", *own, "--trainer.limit_val_batches=0", "--trainer.profiler=simple"]) == 0
    for part in ("train_dataloader_next", "run_training_batch"):
        assert part in caplog.text
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_bad_checkpoints(own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["test", *own]
    assert "last.ckpt: fit has saved nothing there yet" in fails([*args, "--ckpt_path=last"], capsys)
    assert "best.ckpt: no such file" in fails([*args, "--ckpt_path=best"], capsys)
    said = fails(args, capsys)
    assert "test measures a checkpoint: give --ckpt_path best" in said
    assert "neither head nor tower (--model.freeze_backbone true)" in said
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1.0}}, other)
    assert "other.ckpt is damaged or of another model" in fails([*args, f"--ckpt_path={other}"], capsys)


def test_a_head_with_nothing_to_train_is_measured_without_a_checkpoint(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The demo config's options of the head are those of m2df.
    otam = ["--model.head_options={}", "--model.head=otam", "--model.head_options.smoothing=0.2"]
    args = [*own, *otam, "--model.freeze_backbone=true"]
    for command, said in (("test", "test/accuracy"), ("validate", "val/accuracy")):
        assert main([command, *args]) == 0
        assert said in capsys.readouterr().out
    assert (tmp_path / "test_classes.csv").exists()
    said = fails(["fit", *args], capsys)
    assert "nothing to train" in said
    assert "clip-m2df test without --ckpt_path" in said
    assert "test measures a checkpoint" in fails(["test", *own, "--model.head=clip_fsar"], capsys)
    for head in ("linear_probe", "tip_adapter"):
        assert main(["test", *args, f"--model.head={head}", "--model.head_options={}"]) == 0
        assert "test/accuracy" in capsys.readouterr().out
    # Behind a tower that learns it is trained like any other.
    assert main(["fit", *args, "--model.freeze_backbone=false"]) == 0


def test_frames_that_a_head_cannot_take_are_refused_before_videos_are_read(
    own: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    of_head = ["--model.head_options={}", "--model.head=ts_fsar"]
    assert "ts_fsar weighs 8 frames, and videos have 2" in fails(["fit", *own, *of_head], capsys)
    of_head = ["--model.head_options={tuples: [3]}", "--model.head=trx"]
    assert "trx compares tuples of 3 frames, and videos have 2" in fails(["fit", *own, *of_head], capsys)


def test_misspelt_keys_are_named(own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", *own]
    assert "--model.lrr" in fails([*args, "--model.lrr=1"], capsys)
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("data:\n  n_ways: 5\n")
    assert "n_ways" in fails([*args, f"--config={misspelt}"], capsys)
    assert 'key "data.n_way"' in fails([*args, "--data.n_way=five"], capsys)
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [")
    assert "broken.yaml" in fails(["fit", "--config", str(broken)], capsys)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.lrr=1"], "there is no option --model.lrr; did you mean --model.lr?"),
        (["--model.lrr", "1"], "there is no option --model.lrr; did you mean --model.lr?"),
        (["--model.l=1"], "there is no option --model.l; did you mean --model.lr?"),
        (["--max_steps=3"], "there is no option --max_steps; did you mean --trainer.max_steps?"),
        (["--trainer.mx_steps=3"], "did you mean --trainer.max_steps?"),
        (["--ckpt_pth", "last"], "there is no option --ckpt_pth; did you mean --ckpt_path?"),
        (["last"], "'last' belongs to no option"),
        (
            ["--data.decoder=pyva"],
            "data.decoder is 'pyva'; it must be one of auto, decord, pyav, torchcodec; did you mean pyav?",
        ),
        (["--model.selection=argmx"], "did you mean argmax?"),
        (["--model.head=m2fd"], "did you mean m2df?"),
        (["--trainer.precision=bf16-mixd"], "did you mean bf16-mixed?"),
        (["--trainer.logger=CSVLoger"], "trainer.logger is 'CSVLoger', which it can't be; did you mean CSVLogger?"),
        (["--model.head_options.depht=2"], "did you mean 'depth'?"),
        (["data: {n_ways: 5}"], "there is no option data.n_ways; did you mean data.n_way?"),
        (["modl: {lr: 1}"], "there is no option modl.lr; did you mean model.lr?"),
        (["seed_everythin: 1"], "there is no option seed_everythin; did you mean seed_everything?"),
        (["fit: {data: {n_way: 5}}"], "there is no option fit.data.n_way; write it without fit:"),
        (["trainer: {precision: 17}"], "trainer.precision is '17'; it must be one of 64, 32, 16"),
    ],
)
def test_what_was_meant_is_suggested(
    more: list[str], said: str, own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ": " in more[0]:
        (tmp_path / "own.yaml").write_text(more[0])
        more = [f"--config={tmp_path / 'own.yaml'}"]
    found = fails(["fit", *own, *more], capsys)
    assert said in found
    assert "fit." not in found or "fit." in said


@pytest.mark.parametrize("command", ["fit", "validate", "test", "episodes"])
def test_a_command_alone_says_where_configs_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails([command], capsys)
    assert "give --config NAME (clip-m2df configs lists them) or --data.manifest" in said
    assert ("and --output" in said) == (command == "episodes")
    assert f"clip-m2df {command} --help" in said


def test_fit_ends_with_what_to_type_next(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *own, f"--trainer.default_root_dir={tmp_path / 'my run'}"]) == 0
    *_, best, command = capsys.readouterr().out.strip().splitlines()
    score = read_checkpoint(tmp_path / "my run" / "checkpoints" / "last.ckpt")["callbacks"]
    (value,) = (state["best_model_score"] for state in score.values() if "best_model_score" in state)
    assert f"{tmp_path}/my run/checkpoints/best.ckpt, with val/accuracy {100 * float(value):.1f} %; next:" in best
    program, *args = shlex.split(command)
    assert program == "clip-m2df"
    assert main(args) == 0
    assert main(["fit", *own, f"--trainer.default_root_dir={tmp_path / 'b'}", "--trainer.limit_val_batches=0"]) == 0
    *_, command = capsys.readouterr().out.strip().splitlines()
    assert main(shlex.split(command)[1:]) == 0


def metrics(folder: Path) -> list[tuple[int, bool, float]]:
    """The rows of a run's only metrics: the step, whether it is a training's, and the loss."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), bool(row["train/loss/total"]), float(row["train/loss/total"] or row["val/loss/total"]))
        for row in rows
    ]


@pytest.mark.slow
def test_a_run_that_goes_on_has_one_log(own: list[str], manifest: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    steps = ["--trainer.log_every_n_steps=1", "--trainer.max_steps"]
    alone = options(manifest, tiny_clip_dir, tmp_path / "alone", *steps[:1], "--trainer.max_steps=4")
    assert main(["fit", *alone]) == 0
    assert main(["fit", *own, *steps, "2"]) == 0
    assert main(["test", *own, "--ckpt_path=best"]) == 0
    assert main(["validate", *own, "--ckpt_path=best"]) == 0
    assert main(["fit", *own, *steps, "3", "--ckpt_path=last"]) == 0
    (path,) = tmp_path.joinpath("lightning_logs").rglob("metrics.csv")
    # A row of a step that comes anew, and one that was cut short by a crash.
    header = path.read_text().splitlines()[0].split(",")
    with path.open("a") as file:
        file.write(",".join("7" if name == "step" else "0.5" for name in header) + "\n0,")
    assert main(["fit", *own, *steps, "4", "--ckpt_path=last"]) == 0
    assert [entry.name for entry in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    assert metrics(tmp_path / "lightning_logs") == metrics(tmp_path / "alone")
    # From an earlier checkpoint the steps after it come anew, and the validation after it once.
    shutil.copy(tmp_path / "checkpoints" / "previous.ckpt", tmp_path / "checkpoints" / "early.ckpt")
    assert main(["fit", *own, *steps, "4", f"--ckpt_path={tmp_path / 'checkpoints' / 'early.ckpt'}"]) == 0
    assert metrics(tmp_path / "lightning_logs") == metrics(tmp_path / "alone")


@pytest.mark.slow
def test_a_configured_logger_goes_on_too(own: list[str], tmp_path: Path) -> None:
    (tmp_path / "tb.yaml").write_text(
        "trainer: {logger: [{class_path: TensorBoardLogger, init_args: {save_dir: LOGS}},"
        " {class_path: CSVLogger, init_args: {save_dir: LOGS, name: csv}}]}".replace("LOGS", str(tmp_path / "logs"))
    )
    more = [f"--config={tmp_path / 'tb.yaml'}", "--trainer.log_every_n_steps=1"]
    assert main(["fit", own[0], *more, *own[1:]]) == 0
    assert main(["test", own[0], *more, *own[1:], "--ckpt_path=best"]) == 0
    assert main(["fit", own[0], *more, *own[1:], "--ckpt_path=last", "--trainer.max_steps=3"]) == 0
    for name in ("lightning_logs", "csv"):
        assert [entry.name for entry in (tmp_path / "logs" / name).iterdir()] == ["version_0"]
    assert [row[0] for row in metrics(tmp_path / "logs") if row[1]] == [0, 1, 2]


def test_a_run_that_is_refused_at_its_start_leaves_the_config_of_the_one_before(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *own]) == 0
    before = (tmp_path / "config.yaml").read_bytes()
    for more in (["--data.seed=5"], ["--data.episodes_per_step=2"], []):
        fails(["fit", *own, "--ckpt_path=last", "--trainer.log_every_n_steps=9", *more], capsys)
        assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*workers?.*")
def test_nothing_is_said_of_few_workers(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "clip_m2df", "fit", *own], capture_output=True, text=True, check=True)
    assert "worker" not in done.stdout + done.stderr


def test_more_workers_than_cores_are_said_to_be_of_no_use(own: list[str]) -> None:
    with pytest.warns(UserWarning, match="data.num_workers is 10000, but there are .* cores"):
        assert main(["fit", *own, "--data.num_workers=10000", "--data.n_way=5"]) == 2


def test_errors_of_the_data_come_as_one_line(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", *own]
    assert "n_way is 1" in fails([*args, "--data.n_way=1"], capsys)
    assert "too few" in fails([*args, "--data.n_way=5"], capsys)
    assert "image_size is 25, no multiple of the 8 pixels" in fails([*args, "--data.size=25"], capsys)


def test_a_checkpoint_keeps_the_size_of_its_frames(
    best: list[str], tiny_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(["test", *best, "--data.size=24"], capsys)
    assert "data.size is 24, but the tower takes frames of 32 pixels, which a checkpoint keeps" in said
    said = fails(["test", *best, "--model.backbone_options.image_size=24"], capsys)
    assert "model.backbone_options.image_size is 24, but 32 in" in said
    said = fails(["test", *best, "--model.backbone_options.dtype=float16"], capsys)
    assert "model.backbone_options.dtype is 'float16', but 'float32' in" in said
    assert "resize 30 is smaller than the tower's size 32" in fails(
        ["test", *best, "--data.size=null", "--data.resize=30"], capsys
    )


def test_a_broken_video_ends_a_run_with_its_name(
    own: list[str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = broken_copy(manifest, tmp_path, "val0_0.mp4")
    said = fails(["fit", *own, f"--data.manifest={broken}", "--data.val_episodes=20"], capsys)
    assert "val0_0.mp4" in said
    assert "it is empty" in said


def test_a_folder_that_cannot_be_written_ends_in_one_line(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    args = ["fit", *own, f"--trainer.default_root_dir={tmp_path / 'file' / 'run'}"]
    assert "file/run" in fails(args, capsys)
    for switched in ([*args, "--traceback"], ["--traceback", *args]):
        with pytest.raises(UserError, match="file/run"):
            main(switched)


def test_configs_are_found_here_first_and_among_the_shipped_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("demo_5way1shot.yaml") == shipped_configs()["demo_5way1shot.yaml"]
    (tmp_path / "demo_5way1shot.yaml").write_text("")
    assert find_config("demo_5way1shot.yaml") == Path("demo_5way1shot.yaml")
    assert "config demo_5way1shop.yaml: no such file here" in fails(["fit", "--config", "demo_5way1shop.yaml"], capsys)
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "demo_5way1shot.yaml" in [line.split()[0] for line in listed]
    assert len({line.index(line.split(None, 1)[1]) for line in listed}) == 1  # what they are stands in one column


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ("data: {n_way: 3}\nmodel: {}\ndata:\n  n_shot: 1\n", "data stands in it twice, in lines 1 and 3"),
        ("data:\n  n_way: 3\n  n_shot: 1\n  'n_way': 2\n", "n_way stands in it twice, in lines 2 and 4"),
    ],
)
def test_an_option_that_a_config_has_twice_is_named(
    text: str, twice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert f"config {tmp_path / 'c.yaml'} can't be read: {twice}" in fails(
        ["fit", f"--config={tmp_path}/c.yaml"], capsys
    )


def test_a_message_repeats_no_value_of_any_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{n_way: {'x' * 100_000}}}\n")
    said = fails(["fit", f"--config={tmp_path / 'c.yaml'}"], capsys)
    assert '"data.n_way": Expected' in said
    assert len(said) < 2000


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--help"],
        ["--version"],
        ["configs"],
        ["fit", "--profile"],
        *([command, "--help"] for command in ("demo", "configs", "prepare", "check", "cache", "predict")),
    ],
    ids=" ".join,
)
def test_help_comes_without_torch_or_lightning(args: list[str]) -> None:
    # What takes long to import, and at the top level even what reads signatures.
    heavy = {"torch", "lightning", "transformers", "av", "numpy", "jsonargparse"}
    heavy |= {"docstring_parser", "yaml", "rich"} if args[:1] in ([], ["--help"], ["--version"]) else set()
    script = (
        "import sys\nfrom clip_m2df.cli import main\n"
        f"try:\n    status = main({args!r})\nexcept SystemExit as end:\n    status = end.code\n"
        f"heavy = {heavy!r} & set(sys.modules)\nassert not heavy, heavy\nsys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "--profile" in args else 0), done.stderr
    assert (__version__ if args == ["--version"] else "fit") in done.stdout or args[0] in COMMANDS


@pytest.mark.parametrize("args", [["configs"], ["--help"], ["predict", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_any_more_ends_quietly(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "clip_m2df", *args]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    # argparse passes over it where each line is written at once.
    assert done.returncode in ((141,) if args == ["configs"] else (0, 141))
    assert not done.stderr


def test_the_package_has_the_names_that_it_lists() -> None:
    assert all(hasattr(clip_m2df, name) for name in clip_m2df.__all__)
    assert set(clip_m2df.__all__) == set(dir(clip_m2df))
    with pytest.raises(AttributeError, match="nothing"):
        _ = clip_m2df.nothing


def parse(command: str, *args: str) -> dict[str, Any]:
    """What a command's function is called with."""
    home, name = COMMANDS[command][0].split(".")
    function = getattr(importlib.import_module(f"clip_m2df.commands.{home}"), name)
    return vars(command_parser(command, function).parse_args(args))


def test_commands_take_what_people_type() -> None:
    root: dict[str, Any] = {"root": Path("V"), "output": Path("m.csv")}
    prepared = {"dataset": "hmdb51", "lists": None, "annotations": [Path("a"), Path("b")], "report": Path("r.csv")}
    prepared |= {"group": None}
    typed = ["--root", "V", "--annotations", "a", "b", "--output=m.csv", "--report", "r.csv"]
    assert parse("prepare", "hmdb51", *typed) == parse("prepare", *typed, "hmdb51") == root | prepared
    bare = parse("prepare", "folder", "--root=V", "--output=m.csv", "--lists=l")
    assert bare == root | {"dataset": "folder", "lists": Path("l"), "annotations": (), "report": None, "group": None}
    assert parse("prepare", "folder", "--root=V", "--output=m.csv", r"--group=(.*)_\d+")["group"] == r"(.*)_\d+"
    cached = parse("cache", "--manifest=m.csv", "--output=c", "--timeout=5")
    own: dict[str, Any] = {
        "manifest": Path("m.csv"),
        "root": None,
        "output": Path("c"),
        "short_side": 256,
        "frames": 24,
        "resize_mode": "short_side",
    }
    assert cached == own | {"workers": cached["workers"], "timeout": 5.0}
    found = parse("predict", "--backbone=tiny", "--videos", "a", "b", "--output=t.csv", "--reject", "--fps=9")
    assert found["videos"] == ["a", "b"]
    assert (found["reject"], found["segments"], found["fps"], found["window"]) == (True, False, 9.0, None)


@pytest.mark.parametrize(
    ("args", "at_fault"),
    [
        (["prepare"], "required: dataset, --root, --output"),
        (["prepare", "hmdb", "--root=V", "--output=m.csv"], "'hmdb' (choose from 'kinetics100', 'ssv2'"),
        (["check"], "required: --manifest"),
        (["cache", "--manifest=m.csv"], "required: --output"),
        (["predict", "--backbone=tiny", "--output=t.csv"], "required: --videos"),
        (["predict", "--backbone=tiny", "--videos=a", "--output=t.csv", "--fps=x"], "--fps: invalid float value: 'x'"),
        (["demo", "--epochs=3"], "unrecognized arguments: --epochs=3"),
        (["fitt"], "invalid choice: 'fitt'"),
    ],
)
def test_wrong_usage_is_named(args: list[str], at_fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(args, capsys)
    assert at_fault in said
    assert said.startswith(f"usage: clip-m2df {args[0]} [-h]") == (args[0] in COMMANDS)


def test_a_parser_is_made_from_a_documented_signature(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(
        what: Literal["a", "b"],
        *extra: str,
        size: int,
        share: float | None = None,
        names: Sequence[str] = (),
        half: bool = False,
        times: int = 3,
    ) -> None:
        """Measure something.

        More of it.

        Args:
            what: The ``thing``
                itself.
            *extra: Not typed.
            size: In pixels.
            share: In %.
            names: Any.
            half: One half only.
            times: How often.
        """

    parser = command_parser("measure", measure)
    given = vars(parser.parse_args(["b", "--size=2", "--names", "x", "y", "--half"]))
    assert given == {"what": "b", "size": 2, "share": None, "names": ["x", "y"], "half": True, "times": 3}
    said = " ".join(parser.format_help().split())
    for words in ("Measure something.", "{a,b} The thing itself.", "--share SHARE In %.", "How often. (default: 3)"):
        assert words in said
    assert "More of it" not in said
    assert said.count("default") == 1


@pytest.mark.parametrize(
    ("name", "config", "instead"),
    [
        ("profile", "profile: true", "--trainer.profiler simple"),
        ("data.train_views", "data: {train_views: 2}", "--data.train_augmentations"),
    ],
)
def test_options_of_earlier_versions_name_what_to_write(
    name: str, config: str, instead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(config)
    said = fails(["test", "--config=demo_5way1shot.yaml", f"--config={tmp_path / 'own.yaml'}"], capsys)
    assert f"config {tmp_path / 'own.yaml'}: " in said
    assert instead in said
    for typed in ([f"--{name}=1"], [f"--{name}", "1"]):
        said = fails(["fit", *typed], capsys)
        assert f"no option {name} " in said
        assert instead in said


def test_a_config_that_a_run_of_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = "# lightning.pytorch==2.6.6\nprofile: true\ndata: {train_views: 2, n_way: 3}\n"
    path.write_text(text + "model: {head: m2df, head_options: {heads: 4}}\ntrainer: {default_root_dir: über}\n")
    for typed in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        (resolved,) = resolve_configs(typed)
        assert yaml.safe_load(resolved.removeprefix("--config=")) == {
            "data": {"train_augmentations": 2, "n_way": 3},
            "model": {"head": "m2df", "head_options": {"num_heads": 4}},
            "trainer": {"default_root_dir": "über"},
        }
    # Heads of others may have any options; and what is of today is left as it is.
    path.write_text("# lightning.pytorch==2.6.6\nmodel: {head: own.Head, head_options: {heads: 4}}\n")
    assert resolve_configs([f"--config={path}"]) == [f"--config={path}"]
    demo = find_config("demo_5way1shot.yaml")
    args = resolve_configs(["fit", "--config", demo.name, "--data.n_way=3"])
    assert args == ["fit", f"--config={demo}", "--data.n_way=3"]


@pytest.mark.slow
def test_the_saved_config_is_a_config(fitted: Path, tmp_path: Path) -> None:
    args = [f"--config={fitted / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"]
    assert main(["fit", *args]) == 0
    assert main(["fit", *args, "--ckpt_path=last", "--trainer.max_steps=2"]) == 0
    # What it went on from is the run's own matter, not that of whoever starts from its configuration.
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["ckpt_path"] is None
    again = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert again["head_options"] == {"hidden_dim": 32, "num_heads": 4}


def test_a_wheel_brings_the_configs_and_the_tiny_clip(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import clip_m2df.clip.backbone as b, clip_m2df.commands.configs as c\n"
        f"assert c.__file__.startswith({str(tmp_path)!r})\n"
        "assert c.find_config('demo_5way1shot.yaml').is_file()\n"
        "assert (b.TINY_CLIP / 'model.safetensors').is_file()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


def test_a_checkpoint_of_a_users_script_is_tested_by_the_command_line(
    own: list[str], manifest: Path, tiny_clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CLIPM2DF(backbone=str(tiny_clip_dir), head_options={"hidden_dim": 32, "num_heads": 4})
    episodes: dict[str, Any] = {"n_way": 3, "n_query": 2, "episodes_per_step": 2, "val_episodes": 2, "num_workers": 0}
    data = EpisodeDataModule(str(manifest), frames=2, resize=32, size=32, **episodes)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    args = [a for a in own if "--config" not in a]
    assert main(["test", *args, f"--ckpt_path={tmp_path / 'mine.ckpt'}"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_and_biases_logs_offline_without_an_account(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline_wandb: None
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--config=recipes/wandb_offline.yaml", *own[1:], "--trainer.log_every_n_steps=1"]
    assert main(["fit", own[0], *more]) == 0
    end_wandb()
    (log,) = tmp_path.glob("runs/wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"val/accuracy" in content
    assert b"train/loss/match" in content


def test_the_progress_bar_ends_where_the_run_does() -> None:
    bar = RunProgressBar()
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=4, accumulate_grad_batches=3)
    bar.setup(trainer, CLIPM2DF, "fit")  # type: ignore[arg-type]
    trainer.max_steps, trainer.num_training_batches = 10, math.inf
    assert bar.total_train_batches == 10  # optimiser steps
    trainer.max_steps, trainer.num_training_batches = -1, 7
    assert bar.total_train_batches == 3
    trainer.max_steps, trainer.num_training_batches = -1, math.inf
    assert bar.total_train_batches == math.inf


def other_manifest(manifest: Path, folder: Path) -> Path:
    """A manifest elsewhere whose test split is the val split of the tests' own videos."""
    for video in manifest.parent.glob("val*.mp4"):
        shutil.copy(video, folder)
    rows = [line.replace(",val,", ",test,") for line in manifest.read_text().splitlines() if ",val," in line]
    other = folder / "other.csv"
    other.write_text("\n".join(["path,label,split,text", *rows]) + "\n")
    return other


def numbers_of(folder: Path, name: str) -> dict[str, str]:
    with (folder / f"{name}_metrics.csv").open() as file:
        return {row["metric"].removeprefix(f"{name}/"): row["value"] for row in csv.DictReader(file)}


def test_several_manifests_have_the_numbers_of_each_alone_in_one_table(
    manifest: Path, tiny_clip_dir: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    other = other_manifest(manifest, folder)
    checkpoint = f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}"
    expected = []
    for number, source in enumerate((manifest, other)):
        assert main(["test", *options(source, tiny_clip_dir, tmp_path / str(number), checkpoint)]) == 0
        expected.append(numbers_of(tmp_path / str(number), "test"))
    assert expected[0] != expected[1]

    args = options(manifest, tiny_clip_dir, tmp_path / "both", checkpoint, f"--also={other}", f"--also={manifest}")
    capsys.readouterr()
    done = run(resolve_configs(["test", *args]))
    said = "".join(capsys.readouterr().out.split())
    found = [numbers_of(tmp_path / "both", name) for name in ("test", "test_2", "test_3")]
    assert found == [expected[0], expected[1], expected[0]]
    with (tmp_path / "both" / "test_manifests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["manifest"] for row in rows] == [str(manifest), str(other), str(manifest)]
    for row, numbers in zip(rows, found, strict=True):
        assert (row["classes"], row["episodes"]) == ("3", "6")
        assert {name: row[name] for name in numbers} == numbers
        accuracy, interval = (100 * float(numbers[name]) for name in ("accuracy", "interval"))
        assert f"│3│6│{accuracy:.1f}±{interval:.1f}%│" in said
    # What is logged of the last has a name of its own.
    assert float(done.trainer.callback_metrics["test_3/accuracy"]) == pytest.approx(float(found[2]["accuracy"]))


def test_a_further_manifest_is_checked_before_the_first_is_tested(
    best: list[str], manifest: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["test", *best, f"--trainer.default_root_dir={tmp_path}"]
    args[args.index("--ckpt_path=best")] = f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}"
    assert "none.csv" in fails([*args, f"--also={tmp_path / 'none.csv'}"], capsys)
    few = tmp_path / "few.csv"
    few.write_text("path,label,split\n" + f"{manifest.parent / 'test0_0.mp4'},run,test\n")
    assert "few.csv" in fails([*args, f"--also={few}", f"--data.root={manifest.parent}"], capsys)
    for option, value in (("report", "page.html"), ("data.episodes_file", "episodes.jsonl")):
        said = fails([*args, f"--also={manifest}", f"--{option}={tmp_path / value}"], capsys)
        assert f"{option} is of one manifest" in said
    # So is what only the model can tell: the features of another tower.
    rows = [{"path": f"{c}_{i}.mp4", "label": f"class {c}", "split": "test"} for c in range(3) for i in range(5)]
    for width, frames, why in ((7, 2, "have 7 numbers a frame"), (32, 3, "are of 3 frames")):
        features = tmp_path / f"{width}.safetensors"
        write_feature_table(features, rows, torch.rand(15, frames, width))
        said = fails([*args, f"--also={features}"], capsys)
        assert f"--also {features}: the features in {features} {why}" in said
    assert not list(tmp_path.glob("test_*"))
