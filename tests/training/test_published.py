"""Checkpoints as the published training saves them, from frames to logits: in Python, and by the commands."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_m2df import CLIPM2DF, CLIPBackbone, Episode, FewShotClassifier, UserError
from clip_m2df.cli import main
from clip_m2df.clip.backbone import TINY_CLIP
from clip_m2df.commands.configs import resolve_configs
from clip_m2df.commands.trainer import run
from clip_m2df.evaluation.evidence import Played
from clip_m2df.nn.m2df import M2DFHead
from tests.conftest import GOLDEN, fails, quiet_trainer, save_checkpoint

WAY, SHOT, DIM = 5, 2, 16
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
TOWERS = ("vit", "resnet")


class Published(NamedTuple):
    """What scripts/golden_published.py wrote, and as files."""

    numbers: dict[str, Tensor]
    class_names: list[str]
    file: Path
    clip: Path

    @property
    def episode(self) -> Episode:
        """The episode as a batch of one."""
        frames, labels = self.numbers["frames"], self.numbers["labels"]
        support = frames[: WAY * SHOT][labels[: WAY * SHOT].argsort(stable=True)]
        return Episode(
            support=support.unflatten(0, (WAY, SHOT)).unsqueeze(0),
            query=frames[WAY * SHOT :].unsqueeze(0),
            query_labels=labels[WAY * SHOT :].unsqueeze(0),
            class_indices=torch.arange(WAY).unsqueeze(0),
            class_names=self.class_names,
            draws=self.numbers["draws"].unsqueeze(0),
        )

    @property
    def size(self) -> int:
        """Height and width of the frames."""
        return self.numbers["frames"].shape[-1]


def save_published(state: dict[str, Tensor], file: Path) -> None:
    """Save as the published training does: with its optimiser, of which a step is made, and its schedule."""
    weights = [torch.nn.Parameter(weight) for weight in state.values() if weight.is_floating_point()]
    optimizer = torch.optim.Adam(weights, lr=0.000001)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1600000], gamma=1)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    scheduler.step()
    parts = {"optimizer_state_dict": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({"iteration": 200, "model_state_dict": state, **parts}, file)


def make_published(folder: Path, tower: str) -> Published:
    """The published checkpoint in its default form, and the CLIP that its training began with as a file."""
    with np.load(GOLDEN / f"published_{tower}.npz") as golden:
        names = golden["class_names"].tolist()
        numbers = {key: torch.from_numpy(golden[key]) for key in golden.files if key != "class_names"}
    state, clip = (
        {key.removeprefix(prefix): numbers.pop(key) for key in list(numbers) if key.startswith(prefix)}
        for prefix in ("state/", "clip/")
    )
    save_published({key: w.float() if w.is_floating_point() else w for key, w in state.items()}, folder / "c.pyth")
    torch.save(clip, folder / "clip.pt")
    vision = {"vit": {"width": 64, "layers": 1, "patch_size": 8}, "resnet": {"width": 2, "layers": [1] * 4}}[tower]
    model = {"embed_dim": DIM, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {"heads": 1}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_CLIP / file, folder)
    return Published(numbers, names, folder / "c.pyth", folder / "clip.pt")


@pytest.fixture(scope="module", params=TOWERS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return make_published(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return make_published(tmp_path_factory.mktemp("vit"), "vit")


def write_videos(published: Published, folder: Path) -> list[Path]:
    """The frames as folders of images, ``support/CLASS/0`` and so on, and ``clips/0``; their paths in file order."""
    paths, labels = [], published.numbers["labels"].tolist()
    for index, (frames, label) in enumerate(zip(published.numbers["frames"], labels, strict=True)):
        of_class = folder / "support" / published.class_names[label]
        path = of_class / str(index) if index < WAY * SHOT else folder / "clips" / str(index)
        path.mkdir(parents=True)
        for number, frame in enumerate(frames.movedim(1, -1).numpy()):
            Image.fromarray(frame).save(path / f"{number}.png")
        paths.append(path)
    return paths


def test_the_golden_numbers_tell_right_from_wrong(published: Published) -> None:
    """Else what follows would say little: drawn prompts, the scaling and each query make a difference."""
    numbers = published.numbers
    assert (numbers["logits"] - numbers["sampled_logits"]).abs().max() > 1e-3
    assert numbers["logits"].std(0).min() > 0.5
    model = CLIPM2DF.from_published(published.file, clip=str(published.clip), selection="argmax")
    model.model.backbone.mean.fill_(0.45)
    with torch.no_grad():
        assert (model(published.episode).logits[0] - numbers["logits"]).abs().max() > 0.1


FORMS = ("DataParallel", "plain", "whole", "without optimiser", "half")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_frames_have_the_logits_of_the_published_code(published: Published, form: str, tmp_path: Path) -> None:
    saved = torch.load(published.file, weights_only=True)
    state = saved["model_state_dict"]
    assert any(key.startswith("backbone.module.") for key in state)  # the published default
    file = tmp_path / "checkpoint14000.pt"
    if form != "DataParallel":
        state = {key.replace("backbone.module.", "backbone."): weight for key, weight in state.items()}
    if form == "whole":
        state = {f"module.{key}": weight for key, weight in state.items()}
    if form == "half":
        state = {key: w.half() if w.is_floating_point() else w for key, w in state.items()}
    torch.save(state if form == "without optimiser" else saved | {"model_state_dict": state}, file)
    model = CLIPM2DF.from_published(file, clip=str(published.clip))
    assert not model.training
    torch.testing.assert_close(model(published.episode).logits[0], published.numbers["sampled_logits"], **CLOSE)
    # What is 256 there for a crop of 224.
    resize = {32: 37, 64: 73}[published.size]
    assert model.reading == {"frames": 8, "resize": resize, "resize_mode": "short_side", "sampling": "linspace"}
    # The same by the general way in, and with a CLIP that is loaded already, which stays as it is.
    clip = CLIPBackbone.load(str(published.clip))
    before = {name: weight.clone() for name, weight in clip.state_dict().items()}
    model = CLIPM2DF.load_from_checkpoint(file, clip=clip, selection="argmax")
    torch.testing.assert_close(model(published.episode).logits[0], published.numbers["logits"], **CLOSE)
    assert all(torch.equal(weight, before[name]) for name, weight in clip.state_dict().items())
    assert clip.mean.all()
    tokens = model.model.backbone.tokenize([f"a photo of {name}" for name in published.class_names])
    assert torch.equal(tokens, published.numbers["tokens"])


@torch.no_grad()
def test_it_stays_so_when_it_is_saved_as_ours(published: Published, tmp_path: Path) -> None:
    model = CLIPM2DF.from_published(published.file, clip=str(published.clip))
    save_checkpoint(model, tmp_path / "ours.ckpt")
    model.save_pretrained(tmp_path / "folder")
    again = CLIPM2DF.from_pretrained(tmp_path / "folder")
    again.save_pretrained(tmp_path / "again")
    for loaded in (
        CLIPM2DF.load_from_checkpoint(tmp_path / "ours.ckpt").eval(),
        again,
        CLIPM2DF.from_pretrained(tmp_path / "again"),
    ):
        assert loaded.model.head.selection == "sample"
        assert loaded.reading == model.reading
        frames = published.numbers["frames"][:1]
        assert torch.equal(loaded.model.backbone.normalise(frames), frames / 255)
        torch.testing.assert_close(loaded(published.episode).logits[0], published.numbers["sampled_logits"], **CLOSE)
    # What a person asks for wins.
    asked = CLIPM2DF.from_pretrained(tmp_path / "folder", selection="argmax")
    torch.testing.assert_close(asked(published.episode).logits[0], published.numbers["logits"], **CLOSE)
    asked.save_pretrained(tmp_path / "asked")
    assert CLIPM2DF.from_pretrained(tmp_path / "asked").model.head.selection == "sample"


def test_a_training_from_published_weights_keeps_what_they_need(vit: Published, tmp_path: Path) -> None:
    model = CLIPM2DF.from_published(vit.file, clip=str(vit.clip), lr=1e-4)
    episodes: Any = [vit.episode]
    loader: Any = torch.utils.data.DataLoader(episodes, batch_size=None)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    tuned = CLIPM2DF.load_from_checkpoint(tmp_path / "tuned.ckpt")
    assert (tuned.model.head.selection, tuned.lr) == ("sample", 1e-4)
    assert not tuned.model.backbone.mean.any()


PLAYED: list[Played] = []


class Watch(lightning.Callback):
    """Keeps what is played in a test."""

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        PLAYED.append(outputs)


@pytest.fixture
def test_args(published: Published, tmp_path: Path) -> list[str]:
    """``clip-m2df test`` of the golden episode, but for the checkpoint and the model's options."""
    paths, labels = write_videos(published, tmp_path), published.numbers["labels"].tolist()
    rows = [f"{path},{published.class_names[label]},test" for path, label in zip(paths, labels, strict=True)]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    roles: dict[str, dict[str, list[str]]] = {
        role: {name: [] for name in published.class_names} for role in ("support", "query")
    }
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        roles["support" if index < WAY * SHOT else "query"][published.class_names[label]].append(str(path))
    (tmp_path / "episodes.jsonl").write_text(json.dumps(roles) + "\n")
    return [
        "test",
        f"--data.manifest={tmp_path / 'manifest.csv'}",
        f"--data.episodes_file={tmp_path / 'episodes.jsonl'}",
        f"--data.n_shot={SHOT}",
        "--data.n_query_eval=1",
        f"--data.size={published.size}",
        f"--data.resize={published.size}",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        f"--trainer.callbacks+={__name__}.{Watch.__name__}",
    ]


def play(arguments: list[str]) -> tuple[Played, CLIPM2DF]:
    """Test by the command line: what was played, queries and classes in the order of ``class_names``; the model."""
    PLAYED.clear()
    ended = run(resolve_configs(arguments))
    (played,) = PLAYED
    assert torch.equal(played.episode["query_labels"][0], torch.arange(WAY))
    return played, ended.model


@torch.no_grad()
def test_the_command_line_has_the_logits_of_the_published_code(
    published: Published, test_args: list[str], tmp_path: Path
) -> None:
    args = [*test_args, f"--ckpt_path={published.file}", f"--model.backbone={published.clip}"]
    args += ["--model.backbone_options.mean=[0, 0, 0]", "--model.backbone_options.std=[1, 1, 1]"]  # as it was trained
    by_class = published.episode["query_labels"][0].argsort()
    played, _ = play([*args, "--model.selection=argmax"])
    torch.testing.assert_close(played.output.logits[0], published.numbers["logits"][by_class], **CLOSE)
    # Where nobody asks for another selection, a shipped config neither, prompts are drawn.
    played, drawn = play([args[0], "--config=hmdb51_5way1shot.yaml", *args[1:]])
    assert drawn.model.head.selection == "sample"
    episode = published.episode
    episode = Episode(**{**episode, "query": episode["query"][:, by_class], "draws": played.episode["draws"]})
    model = CLIPM2DF.from_published(published.file, clip=str(published.clip))
    torch.testing.assert_close(played.output.logits, model(episode).logits, **CLOSE)
    # Saved as ours, no backbone is needed.
    save_checkpoint(model, tmp_path / "ours.ckpt")
    again, ours = play([*test_args, f"--ckpt_path={tmp_path / 'ours.ckpt'}"])
    assert ours.model.head.selection == "sample"
    assert torch.equal(again.output.logits, played.output.logits)


def test_predict_takes_the_likeliest_prompt_so_that_predictions_repeat(published: Published, tmp_path: Path) -> None:
    paths, labels = write_videos(published, tmp_path)[WAY * SHOT :], published.numbers["labels"][WAY * SHOT :]
    told = ["--support", str(tmp_path / "support"), "--videos", str(tmp_path / "clips"), "--workers", "0"]
    told += ["--resize", str(published.size), "--device", "cpu", "--output", str(tmp_path / "found.csv")]
    assert main(["predict", "--ckpt_path", str(published.file), "--backbone", str(published.clip), *told]) == 0
    with (tmp_path / "found.csv").open() as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    expected = published.numbers["logits"].softmax(-1)
    assert len(rows) == len(labels) == WAY
    for path, probabilities in zip(paths, expected, strict=True):
        found = torch.tensor([float(rows[path.name][f"p_{name}"]) for name in published.class_names])
        torch.testing.assert_close(found, probabilities, **CLOSE)
    options: dict[str, Any] = {"clip": str(published.clip), "resize": published.size, "device": "cpu"}
    classifier = FewShotClassifier.from_checkpoint(published.file, **options).fit(tmp_path / "support")
    found = torch.from_numpy(classifier.predict_proba([str(path) for path in paths]))
    names = [classifier.classes_.tolist().index(name) for name in published.class_names]
    torch.testing.assert_close(found[:, names].float(), expected, **CLOSE)
    # What is saved of it needs neither file, and nobody's word for how prompts are picked.
    classifier.save(tmp_path / "classifier")
    loaded = FewShotClassifier.load(tmp_path / "classifier", device="cpu")
    assert np.array_equal(loaded.predict_proba(str(paths[0])), classifier.predict_proba(str(paths[0])))


def test_options_of_the_head_are_for_whoever_loads_to_give(vit: Published) -> None:
    given = {"single_direction": True, "views": ["global"]}
    model = CLIPM2DF.from_published(vit.file, clip=str(vit.clip), head_options=given, template="{} in a video")
    assert isinstance(model.model.head, M2DFHead)
    assert model.model.head.single_direction
    assert list(model.model.head.views) == ["global"]
    assert model.hparams["head_options"] == {"depth": 1, "hidden_dim": 64, **given}
    assert list(model.model.templates) == ["{} in a video"]


def test_what_is_said_of_the_clip_beside_its_name(vit: Published, tmp_path: Path) -> None:
    """As a bare file that says nothing of its heads; mean and std may be said again, as the published recipe does."""
    shutil.copy(vit.clip, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="head_width"):
        CLIPM2DF.from_published(vit.file, clip=tmp_path / "bare.pt")
    told: dict[str, Any] = {"activation": "quick_gelu", "head_width": 64, "tokenizer": str(TINY_CLIP)}
    told |= {"mean": [0.0] * 3, "std": [1.0, 1.0, 1.0]}
    model = CLIPM2DF.from_published(vit.file, clip=tmp_path / "bare.pt", backbone_options=told)
    with torch.no_grad():
        torch.testing.assert_close(model(vit.episode).logits[0], vit.numbers["sampled_logits"], **CLOSE)


def test_what_does_not_fit_a_published_checkpoint_is_refused(vit: Published, tmp_path: Path) -> None:
    clip = str(vit.clip)
    with pytest.raises(UserError, match=r"c\.pyth is a checkpoint of a training, .* take it as --ckpt_path, with"):
        CLIPBackbone.load(str(vit.file))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"the visual tower alone, .* give as clip the CLIP that its training began with, such as .*ViT-B-16\.pt"),
        ({"clip": clip, "head": "otam"}, "whose head is m2df and not otam: leave head out"),
        ({"clip": clip, "backbone": clip}, "give CLIP's weights as clip, not as backbone"),
        ({"clip": clip, "selektion": "sample"}, "CLIPM2DF has no option 'selektion'"),
        ({"clip": clip, "head_options": {"depth": 2}}, r"missing views\.local\.encoder\.layers\.1"),
        (
            {"clip": clip, "backbone_options": {"mean": [0.5] * 3}},
            r"mean is \[0\.5, .* trained on frames in \[0, 1\]",
        ),
        ({"clip": clip, "backbone_options": {"std": [0.5] * 3}}, r"std is \[0\.5, 0\.5, 0\.5\], but"),
        ({"clip": clip, "backbone_options": {"activation": "gelu"}}, "with hidden_act quick_gelu, not gelu"),
        ({"clip": CLIPBackbone.load(clip), "backbone_options": {"head_width": 64}}, "give clip as one"),
        ({"clip": "tiny"}, "its visual tower is another than that of tiny, with hidden_size 64, not 128"),
        ({"clip": str(tmp_path / "none.pt")}, "none.pt"),
        ({"clip": torch.load(clip, weights_only=True)}, "clip is of the type .*dict: give the file, folder or name"),
        ({"clip": clip, "backbone_options": ["mean"]}, "backbone_options is .* a table"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            CLIPM2DF.from_published(vit.file, **options)
    state = torch.load(vit.file, weights_only=True)["model_state_dict"]
    of_another = {name.replace("backbone.module.", "backbone."): 2 * weight for name, weight in state.items()}
    whole = {name: weight.long() for name, weight in state.items() if name.startswith("context2")}
    for wrong, message in ((of_another, r"module\.\w+ is unexpected"), (whole, r"torch\.int64, which is no floating")):
        torch.save({"model_state_dict": state | wrong}, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match=rf"wrong\.pt.*{message}"):
            CLIPM2DF.from_published(tmp_path / "wrong.pt", clip=clip)
    torch.save({"model_state_dict": {"weight": torch.ones(1)}, "iteration": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not a published CLIP-M²DF checkpoint"):
        CLIPM2DF.from_published(tmp_path / "other.pt", clip=clip)
    ours = save_checkpoint(CLIPM2DF.from_published(vit.file, clip=clip), tmp_path / "ours.ckpt")
    with pytest.raises(UserError, match=r"ours\.ckpt is no published checkpoint, and has its towers itself"):
        CLIPM2DF.load_from_checkpoint(ours, clip=clip)


def test_both_towers_in_a_file_need_no_clip(vit: Published, tmp_path: Path) -> None:
    state = torch.load(vit.file, weights_only=True)["model_state_dict"]
    tower = {k.replace("backbone.module.", "backbone.visual."): w for k, w in state.items()}
    text = {f"backbone.{k}": w for k, w in torch.load(vit.clip, weights_only=True).items() if "visual." not in k}
    torch.save(tower | text, tmp_path / "both.pt")
    with torch.no_grad():
        with pytest.raises(UserError, match="tokenizer"):  # the standard one is not that of these weights
            CLIPM2DF.from_published(tmp_path / "both.pt")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(vit.clip.with_name(file), tmp_path)
        logits = CLIPM2DF.from_published(tmp_path / "both.pt")(vit.episode).logits
    torch.testing.assert_close(logits[0], vit.numbers["sampled_logits"], **CLOSE)


def test_the_commands_refuse_what_does_not_go_together(
    vit: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config=hmdb51_5way1shot.yaml", f"--ckpt_path={vit.file}", f"--model.backbone={vit.clip}"]
    args += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--data.manifest=none.csv"]
    said = fails(["fit", *args], capsys)
    assert "whose training can't go on here: test and predict take it; to train from its weights" in said
    assert "whose head is m2df and not otam" in fails(["test", *args, "--model.head=otam"], capsys)
    ours = save_checkpoint(CLIPM2DF.from_published(vit.file, clip=str(vit.clip)), tmp_path / "ours.ckpt")
    write_videos(vit, tmp_path)
    told = ["predict", "--support", str(tmp_path / "support"), "--videos", str(tmp_path / "clips"), "--workers=0"]
    said = fails([*told, "--ckpt_path", str(vit.file)], capsys)
    assert "it has the visual tower alone" in said
    assert "for predict --backbone" in said
    said = fails([*told, "--ckpt_path", str(ours), "--backbone", str(vit.clip)], capsys)
    assert "ours.ckpt is no published checkpoint, and has its towers itself" in said
    said = fails([*told, "--ckpt_path", str(tmp_path / "folder"), "--backbone", str(vit.clip)], capsys)
    assert "or --backbone, CLIP's own weights; both with the file of a published checkpoint" in said
