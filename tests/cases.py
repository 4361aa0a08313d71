"""Inputs that once fell short, from a folder of cases, each against its right value: ``python -m tests.cases FOLDER``.

A function a case, named by the number that its folder begins with; it fails where neither the right value nor the
refusal comes that the folder's README names.
"""

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_m2df import CLIPM2DF, FewShotClassifier
from clip_m2df.cli import main
from clip_m2df.clip.backbone import TINY_CLIP, CLIPBackbone
from clip_m2df.clip.formats import openai_name
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.errors import UserError
from clip_m2df.files import write_table
from clip_m2df.video.reader import read_frames
from tests import clips

# What a case is checked by: its folder, that of all, and an empty one to write to.
Check = Callable[[Path, Path, Path], None]
CALLBACKS = "--trainer.callbacks+=lightning.pytorch.callbacks."


# What the checks share


def command(*arguments: object) -> tuple[int, str]:
    """Run a command: its status, and all that it says."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as caught,  # which pytest would keep to itself
    ):
        warnings.simplefilter("always")
        try:
            status: Any = main(list(map(str, arguments)))
        except SystemExit as ended:
            status = ended.code
    return status, said.getvalue() + "".join(f"\n{warning.message}" for warning in caught)


def refused(*words: str, by: Callable[[], object]) -> None:
    """Check that something is refused, or at least said, in some of the words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            by()
            said = " ".join(str(warning.message) for warning in caught)
        except UserError as error:
            said = str(error)
    assert any(word in said for word in words), f"none of {words} in {said!r}"


def make_data(folder: Path) -> Path:
    """The manifest of six classes to train on, three to validate and three to test, of seven clips each."""
    rows: list[list[str]] = [["path", "label", "split"]]
    for split, names in {"train": "abcdef", "val": "ghi", "test": "jkl"}.items():
        for c, name in enumerate(names):
            for v in range(7):
                file = clips.render(folder / f"{split}_{c}_{v}.mp4", n_frames=8 + c + v % 3, size=(64, 48))
                rows.append([file.name, f"class {name}", split])
    write_table(folder / "m.csv", "manifest", rows)
    return folder / "m.csv"


def fit(cases: Path, run: Path, *more: object, subcommand: str = "fit") -> tuple[int, str]:
    """Run the tiny training of the folder of all cases."""
    manifest = run.parent / "data" / "m.csv"
    if not manifest.exists():
        manifest.parent.mkdir(parents=True)
        make_data(manifest.parent)
    config = yaml.safe_load((cases / "00-common" / "base.yaml").read_text(encoding="utf-8"))
    config["data"]["manifest"] = str(manifest)
    file = run.parent / "base.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return command(subcommand, "--config", file, "--trainer.default_root_dir", run, *more)


def refused_callback(cases: Path, scratch: Path, name: str, *options: str) -> None:
    """Check that a training with a callback is refused by its name, at once."""
    status, said = fit(cases, scratch / "run", CALLBACKS + name, *options)
    assert status == 2, f"status {status}: {said[-300:]}"
    assert name in said, said[-300:]
    assert "Traceback" not in said


def ffmpeg_frames(path: Path) -> NDArray[np.uint8]:
    """All frames of a video as FFmpeg's own program shows them: (frames, height, width, 3)."""
    from imageio_ffmpeg import get_ffmpeg_exe

    done = subprocess.run(
        [
            get_ffmpeg_exe(),
            "-hide_banner",
            "-i",
            path,
            "-fps_mode",
            "passthrough",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-",
        ],
        capture_output=True,
        check=False,
    )
    sizes = re.findall(r"Video: rawvideo.*? ([1-9]\d*)x(\d+)[, ]", done.stderr.decode(errors="replace"))
    width, height = map(int, sizes[-1])
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def corners(frame: NDArray[np.uint8]) -> NDArray[np.int_]:
    """The colours in the middle of the four quarters of a picture (height, width, 3)."""
    height, width = frame.shape[:2]
    return np.array([frame[int(height * y), int(width * x)] for y in (0.25, 0.75) for x in (0.25, 0.75)], int)


def assert_like_ffmpeg(path: Path) -> None:
    ours, theirs = read_frames(str(path), range), ffmpeg_frames(path)
    clip = ours[0].permute(0, 2, 3, 1).numpy()
    assert clip.shape == theirs.shape, f"{path.name}: {clip.shape}, FFmpeg {theirs.shape}"
    for n in (0, len(clip) // 2, len(clip) - 1):
        off = np.abs(corners(clip[n]) - corners(theirs[n])).max()
        assert off <= 12, f"{path.name}: frame {n} differs by {off}"


# The cases


def mirrored(case: Path, cases: Path, scratch: Path) -> None:
    for video in sorted(case.glob("*.mp4")):
        assert_like_ffmpeg(video)
    for orientation in range(1, 9):
        folder = case / f"exif{orientation}"
        ours = read_frames(str(folder), range)[0][0].permute(1, 2, 0).numpy()
        with Image.open(folder / "1.jpg") as image:
            shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert ours.shape == shown.shape, f"orientation {orientation}"
        assert np.abs(corners(ours) - corners(shown)).max() <= 12, f"orientation {orientation}"


def not_finite(case: Path, cases: Path, scratch: Path) -> None:
    status, said = fit(cases, scratch / "f16", "--model.lr", "1e-3", "--trainer.precision", "16-true")
    assert status == 2, f"a training whose weights are NaN: status {status}: {said[-200:]}"
    assert "finite" in said.lower()
    status, said = fit(cases, scratch / "run", "--trainer.max_steps", "2")
    assert status == 0, said[-300:]
    best = scratch / "run" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    for weight in checkpoint["state_dict"].values():
        if weight.is_floating_point():
            weight.fill_(torch.nan)
    torch.save(checkpoint, best)
    status, said = fit(cases, scratch / "run", "--ckpt_path", "best", subcommand="test")
    assert status == 2, f"test: status {status}"
    assert "finite" in said.lower(), said[-300:]
    support = scratch / "support"
    for label, name in (("a", "train_0_0.mp4"), ("b", "train_1_0.mp4")):
        (support / label).mkdir(parents=True)
        shutil.copy(scratch / "data" / name, support / label)
    own = ["--support", support, "--videos", support, "--output", scratch / "p.csv", "--workers", 0]
    status, said = command("predict", "--ckpt_path", best, *own)
    assert status == 2, f"predict: status {status}"
    assert "finite" in said.lower(), said[-300:]


def openclip_towers(case: Path, cases: Path, scratch: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    images = torch.randn(2, 3, 32, 32)
    for width, heads, act in ((128, 2, "gelu"), (320, 4, "gelu"), (832, 8, "gelu")):
        torch.manual_seed(0)
        size: Any = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "image_size": 32}
        config = CLIPVisionConfig(**size, num_attention_heads=heads, patch_size=8, projection_dim=64, hidden_act=act)
        model: torch.nn.Module = CLIPVisionModelWithProjection(config)
        model.eval()
        state = in_openai_layout(model)
        refused("open_clip_config.json", by=partial(CLIPBackbone.from_openai, state))
        folder = scratch / f"{width}"
        folder.mkdir()
        save_file(state, folder / "open_clip_model.safetensors")
        vision = {"image_size": 32, "layers": 2, "width": width, "patch_size": 8, "head_width": width // heads}
        text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
        told = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(told), encoding="utf-8")
        backbone = CLIPBackbone.load(str(folder / "open_clip_model.safetensors")).eval()
        with torch.no_grad():
            torch.testing.assert_close(backbone.encode_frames(images), model(images).image_embeds, atol=1e-4, rtol=1e-4)


def in_openai_layout(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a tower of transformers', by OpenAI's names."""
    stacked: dict[str, list[Tensor]] = {}
    state = model.state_dict()
    for key in sorted(state, key=lambda key: next((i for i, n in enumerate("qkv") if f".{n}_proj" in key), 0)):
        name = openai_name(key)
        stacked.setdefault(name, []).append(state[key].T if name == "visual.proj" else state[key])
    return {name: torch.cat(parts).contiguous() for name, parts in stacked.items()}


def stray_weights(case: Path, cases: Path, scratch: Path) -> None:
    weights = load_file(TINY_CLIP / "model.safetensors")
    plain = CLIPBackbone.load("tiny").state_dict()

    def copied(name: str) -> Path:
        return Path(shutil.copytree(TINY_CLIP, scratch / name))

    def same(folder: Path) -> bool:
        state = CLIPBackbone.load(str(folder)).state_dict()
        return all(torch.equal(weight, plain[key]) for key, weight in state.items())

    zeros = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for name in ("model_epoch1", "model_ema", "model.old"):
        save_file(zeros, copied(name) / f"{name}.safetensors")
        assert same(scratch / name), name

    query = next(key for key in weights if "vision_model" in key and "q_proj.weight" in key)
    lora = {query.replace("weight", f"lora_{part}.weight"): torch.ones(2, 2) for part in "AB"}
    trained = copied("lora")
    save_file(weights | lora, trained / "model.safetensors")
    refused("lora", by=lambda: CLIPBackbone.load(str(trained)))
    zero = copied("std")
    (zero / "preprocessor_config.json").write_text('{"image_std": [0, 0, 0]}', encoding="utf-8")
    refused("std", by=lambda: CLIPBackbone.load(str(zero)))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    mean, std = [123.675, 116.28, 103.53], [58.4, 57.1, 57.4]
    for name, values, shift, scale in (
        ("do_normalize", {"do_normalize": False}, [0.0] * 3, [255.0] * 3),
        ("do_rescale", {"do_rescale": False, "image_mean": mean, "image_std": std}, mean, std),
    ):
        folder = copied(name)
        (folder / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
        found = CLIPBackbone.load(str(folder)).normalise(pixels)
        expected = (pixels - torch.tensor(shift).view(3, 1, 1)) / torch.tensor(scale).view(3, 1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    halves = [dict(list(weights.items())[half::2]) for half in (0, 1)]
    shards = copied("shards")
    (shards / "model.safetensors").unlink()
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, part in zip(files, halves, strict=True):
        save_file(part, shards / file)
    index = {"weight_map": {key: file for file, part in zip(files, halves, strict=True) for key in part}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file(zeros, shards / "model_ema.safetensors")
    assert same(shards)
    (shards / files[1]).unlink()
    refused(files[1], by=lambda: CLIPBackbone.load(str(shards)))


def spellings(case: Path, cases: Path, scratch: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        clips.render(scratch / name, n_frames=9 + (name == "b.mp4"), size=(64, 48))
    for one, other in (
        ("HandstandPushups", "HandStandPushups"),
        ("open door", "open_door"),
        ("caf\u00e9", "cafe\u0301"),
        ("run\u200b", "run"),
        ("open\u00a0door", "open door"),
    ):
        write_table(scratch / "m.csv", "manifest", [["path", "label", "split"], ["a.mp4", one, "train"]])
        rows = [["path", "label", "split"], ["a.mp4", one, "train"], ["b.mp4", other, "test"]]
        write_table(scratch / "m.csv", "manifest", rows)
        refused("split", by=lambda: Manifest.read(scratch / "m.csv"))
    for link in (os.symlink, os.link):
        (scratch / "link.mp4").unlink(missing_ok=True)
        link(scratch / "a.mp4", scratch / "link.mp4")
        rows = [["path", "label", "split"], ["a.mp4", "x", "train"], ["link.mp4", "y", "test"]]
        write_table(scratch / "m.csv", "manifest", rows)
        out = scratch / f"{link.__name__}.csv"
        _, said = command("check", "--manifest", scratch / "m.csv", "--output", out, "--workers", 1)
        assert "link.mp4" in said or "a.mp4" in out.read_text(encoding="utf-8").replace("a.mp4,x", "", 1), said


def averages(case: Path, cases: Path, scratch: Path) -> None:
    ema = [CALLBACKS + "EMAWeightAveraging", "--trainer.callbacks.decay", "0.9", "--model.lr", "1e-3"]
    status, said = fit(cases, scratch / "whole", "--trainer.max_steps", "8", *ema)
    if status == 2:
        assert "EMAWeightAveraging" in said, said[-300:]
        return
    assert fit(cases, scratch / "two", "--trainer.max_steps", "4", *ema)[0] == 0
    assert fit(cases, scratch / "two", "--trainer.max_steps", "8", "--ckpt_path", "last", *ema)[0] == 0
    whole, two = (
        torch.load(scratch / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "two")
    )
    for key, weight in whole.items():
        torch.testing.assert_close(two[key], weight, msg=f"{key} differs after going on from last.ckpt")


def rate_finder(case: Path, cases: Path, scratch: Path) -> None:
    found = [CALLBACKS + "LearningRateFinder", "--trainer.callbacks.num_training_steps", "20"]
    watched = [CALLBACKS + "LearningRateMonitor", "--model.lr", "1e-3"]
    status, said = fit(cases, scratch / "run", *found, "--trainer.callbacks.max_lr", "0.1", *watched)
    if status == 2:
        assert "LearningRateFinder" in said, said[-300:]
        return
    (metrics,) = (scratch / "run").rglob("metrics.csv")
    with metrics.open(encoding="utf-8", newline="") as file:
        rates = [float(row["lr-Adam/head"]) for row in csv.DictReader(file) if row.get("lr-Adam/head")]
    last = torch.load(scratch / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert max(rates) == max(rates[1:]) == last["hyper_parameters"]["lr"], rates


def accumulation(case: Path, cases: Path, scratch: Path) -> None:
    options = ["--data.batch_size", "4", "--trainer.callbacks.scheduling", "{0: 2}"]
    refused_callback(cases, scratch, "GradientAccumulationScheduler", options[2], options[3], *options[:2])


def preview(case: Path, cases: Path, scratch: Path) -> None:
    for video in sorted([*case.glob("*.mp4"), *case.glob("*.mkv")]):
        assert_like_ffmpeg(video)


def pickled(case: Path, cases: Path, scratch: Path) -> None:
    for head in ("clip_fsar", "otam", "m2df"):
        model = CLIPM2DF(backbone="tiny", head=head)
        again = pickle.loads(pickle.dumps(model))
        assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())
        copy.deepcopy(model)
    spawned = ["--trainer.max_steps", "2", "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"]
    status, said = fit(cases, scratch / "run", *spawned)
    assert status == 0, said[-300:]


def same_texts(case: Path, cases: Path, scratch: Path) -> None:
    videos = [clips.render(scratch / f"{n}.mp4", n_frames=9 + n, size=(64, 48)) for n in (0, 1)]
    classifier = FewShotClassifier(CLIPM2DF(backbone="tiny", head="zero_shot", freeze_backbone=True))
    long = "a person who " + "very slowly and carefully " * 20
    for texts in (
        {"open": f"{long}opens the door", "close": f"{long}closes the door"},
        {"open": "moving", "close": "moving"},
    ):
        support: Any = {"open": videos[:1], "close": videos[1:]}
        refused("open", by=partial(classifier.fit, support, texts=texts))


def left_out(case: Path, cases: Path, scratch: Path) -> None:
    own = ["--backbone", "tiny", "--support", case / "sup", "--videos", case / "vids", "--workers", 0]
    status, said = command("predict", *own, "--output", scratch / "p.csv")
    assert status in (0, 1), said[-300:]
    said += (scratch / "p.csv").read_text(encoding="utf-8")
    for file in (case / "vids").iterdir():
        assert file.name in said, f"no word about {file.name}"


def frame_names(case: Path, cases: Path, scratch: Path) -> None:
    for folder, frames, named in (("decimal", [0, 20, 40, 60, 80], "t_1."), ("mixed", 3, "mask")):
        painted: list[int] = []
        said = ""
        try:
            painted = read_frames(str(case / folder), range)[0][:, 0, 0, 0].tolist()
        except UserError as error:
            said = str(error)
        assert named in said or frames in (painted, len(painted)), f"{folder}: {painted} {said}"


def swa(case: Path, cases: Path, scratch: Path) -> None:
    options = ["--trainer.callbacks.swa_lrs", "1e-2", "--trainer.callbacks.swa_epoch_start", "1"]
    refused_callback(cases, scratch, "StochasticWeightAveraging", *options)


def split_lists(case: Path, cases: Path, scratch: Path) -> None:
    for args, rows in (
        (["folder", "--root", case / "tree", "--lists", case / "mm"], {("wave", "test"), ("drink (1)", "train")}),
        (["kinetics100", "--root", case / "kt", "--lists", case / "k"], {("wave", "test"), ("open door", "train")}),
    ):
        output = scratch / f"{args[0]}.csv"
        status, said = command("prepare", *args, "--output", output)
        assert status in (0, 1), said[-300:]
        with output.open(encoding="utf-8", newline="") as file:
            found = {(row["label"], row["split"]) for row in csv.DictReader(file)}
        assert len({split for _, split in found}) == 2, found
        if args[0] == "kinetics100":  # the names of MMAction2's classes are in its list of them, if anywhere
            assert rows <= found, found


def callbacks(case: Path, cases: Path, scratch: Path) -> None:
    status, said = fit(
        cases,
        scratch / "es",
        "--trainer.max_steps",
        "4",
        CALLBACKS + "EarlyStopping",
        "--trainer.callbacks.monitor",
        "val/acc",
    )
    assert (status, "val/acc" in said) == (2, True), said[-300:]
    refused_callback(cases, scratch, "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 1}")
    finder = ["--trainer.callbacks.max_trials", "2", "--trainer.callbacks.steps_per_trial", "1"]
    refused_callback(cases, scratch, "BatchSizeFinder", *finder)


def odd_videos(case: Path, cases: Path, scratch: Path) -> None:
    for video in sorted(case.iterdir()):
        if video.suffix not in (".py", "") and video.name not in ("reschange.ts", "hdr10.mp4"):
            assert_like_ffmpeg(video)
    # Of one size, where FFmpeg's program scales; and of 8 bits by another way of rounding.
    assert len(read_frames(str(case / "reschange.ts"), range)[0]) == 24
    assert len(read_frames(str(case / "hdr10.mp4"), range)[0]) == 24


CHECKS: dict[str, Check] = {
    "01": mirrored,
    "02": not_finite,
    "03": openclip_towers,
    "04": stray_weights,
    "05": spellings,
    "06": averages,
    "07": rate_finder,
    "08": accumulation,
    "09": preview,
    "10": pickled,
    "11": same_texts,
    "12": left_out,
    "13": frame_names,
    "14": swa,
    "16": split_lists,
    "17": callbacks,
    "19": odd_videos,
}


def run_case(number: str, cases: Path) -> None:
    """Check a case.

    Args:
        number: What its folder begins with.
        cases: The folder of all.
    """
    (case,) = cases.glob(f"{number}-*")
    with tempfile.TemporaryDirectory() as scratch:
        CHECKS[number](case, cases, Path(scratch))


def run_all(arguments: Sequence[str]) -> int:
    """Check all cases of a folder, or those whose numbers follow it, and say of each whether it is right."""
    cases, wanted = Path(arguments[0]), arguments[1:] or list(CHECKS)
    # A case without a check is none that is right.
    wrong = sorted({path.name[:2] for path in cases.glob("[0-9][0-9]-*")} - {"00", *CHECKS})
    for number in wrong:
        print(f"{number} has no check")
    for number in wanted:
        try:
            run_case(number, cases)
            print(f"{number} right", flush=True)
        except Exception as error:  # whatever else the case leads to is wrong too
            wrong.append(number)
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"{number} WRONG, {where.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
