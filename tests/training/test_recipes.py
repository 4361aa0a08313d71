"""The exact recipes: 20 optimiser steps by the Trainer against loops that are written from the recipes' descriptions.

Videos and random numbers are drawn by the package; tokens, towers, heads and the change of colours are its own, checked
elsewhere. Which frames, their pixels, the prompts, the losses, the decay, the schedule and Adam are written out here.
"""

import copy
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_m2df import CLIPM2DF
from clip_m2df.commands.configs import find_config
from clip_m2df.commands.trainer import CLI, run
from clip_m2df.datasets.manifest import Manifest
from clip_m2df.episode import episode_draws, episode_generator
from clip_m2df.episodes.plan import EpisodeShape, plan_episode
from clip_m2df.video.transforms import jitter_colours
from tests.conftest import read_golden, save_tokenizer

# Pixels in [0, 1] of a video and the random numbers that are drawn for it.
Read: TypeAlias = Callable[[Tensor, Sequence[float]], Tensor]

STEPS, EPISODES = 20, 16
WAY, QUERIES, FRAMES = 2, 2, 3  # smaller than published: 5, 5, 8
RESIZE, CROP = 72, 64

# Classes of HMDB51, Kinetics and Something-Something: the plain words of a manifest, and what both published code bases
# say of them.
TEXTS = {
    "Pouring [something] into [something]": "pouring something into something",
    "draw_sword": "draw sword",
    "hug": "hug",
    "hurling (sport)": "hurling sport",
}
PROMPTS = {
    "Pouring [something] into [something]": "a photo of Pouring [something] into [something]",
    "draw_sword": "a photo of draw_sword",
    "hug": "a photo of hug",
    "hurling (sport)": "a photo of hurling (sport)",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Videos as folders of images beside a manifest, by their paths; wide and high ones, of 41 frames and more."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    made, rows = {}, []
    for c, (label, text) in enumerate(TEXTS.items()):
        for v in range(5):
            height, width = ((76, 90), (90, 76), (72, 100), (80, 80), (100, 130))[v]
            base = rng.integers(0, 150, (1, height // 4 + 1, width // 4 + 1, 3)).repeat(4, 1).repeat(4, 2)
            drift = np.arange(41 + 3 * v + c).reshape(-1, 1, 1, 1) * (1 + c)
            clip = (base[:, :height, :width] + drift + rng.integers(0, 40, (len(drift), height, width, 3))) % 256
            path = folder / f"{c}_{v}"
            path.mkdir()
            for number, image in enumerate(clip.astype(np.uint8)):
                Image.fromarray(image).save(path / f"{number:03}.png", compress_level=0)
            made[str(path)] = torch.from_numpy(clip.astype(np.uint8)).permute(0, 3, 1, 2)
            rows.append([path.name, label, "train", text])
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "text"], *rows])
    return made


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A ViT in transformers' format and a ResNet in OpenAI's, both of random weights, for images of 64 pixels."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("towers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["pouring</w>", *(f"word{i}" for i in range(64))]
    for name in ("vit", "resnet"):
        assert save_tokenizer(folder / name, letters, words) == 120
    torch.save(read_golden("clip_resnet")[1], folder / "resnet" / "weights.pt")
    config = '{"quick_gelu": true, "vision_cfg": {}, "text_cfg": {"heads": 1}}'
    (folder / "resnet" / "open_clip_config.json").write_text(config)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 120, "max_position_embeddings": 32, "bos_token_id": 118, "eos_token_id": 119}
    vision = {"image_size": CROP, "patch_size": 32}
    config_of_vit = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = CLIPModel(config_of_vit)
        for name, parameter in vit.named_parameters():
            if name.endswith("bias"):
                # A key's bias has no gradient. At 0 as it is made, rounding and weight decay, divided by Adam's 1e-8,
                # would grow in each step.
                torch.nn.init.normal_(parameter, std=0.1)
    vit.save_pretrained(folder / "vit")
    return {"vit": str(folder / "vit"), "resnet": str(folder / "resnet" / "weights.pt")}


class Watched(CLI):
    """Keeps the model as it was before the training."""

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        self.first = copy.deepcopy(self.model)


def trained(configs: Sequence[str], backbone: str, videos: dict[str, Tensor], folder: Path, *more: str) -> Watched:
    """20 steps of shipped configs, made small by options."""
    done = run(
        [
            "fit",
            *(f"--config={find_config(name)}" for name in configs),
            f"--model.backbone={backbone}",
            f"--data.manifest={Path(next(iter(videos))).parent / 'manifest.csv'}",
            *(f"--model.head_options.{name}=0.0" for name in ("attention_dropout", "dropout")),
            "--model.head_options.hidden_dim=32",
            f"--data.n_way={WAY}",
            f"--data.n_query={QUERIES}",
            f"--data.frames={FRAMES}",
            f"--data.resize={RESIZE}",
            f"--data.size={CROP}",
            "--data.num_workers=0",
            f"--trainer.max_steps={STEPS}",
            "--trainer.precision=64-true",
            "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={folder}",
            *more,
        ],
        Watched,
    )
    assert isinstance(done, Watched)
    assert done.trainer.global_step == STEPS
    return done


# --------------------------------------------------------------------------------- the recipes' descriptions


def of_clip_fsar(clip: Tensor, uniforms: Sequence[float]) -> Tensor:
    """A random frame of each segment of whole frames, squashed to a square; one crop for all, no flip."""
    length = len(clip) // FRAMES
    return squashed(clip, [k * length + int(uniforms[k] * length) for k in range(FRAMES)], uniforms)


def of_clip_fsar_on_kinetics(clip: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Evenly spaced frames of the video less its last 35."""
    length = len(clip) // FRAMES * FRAMES
    start = uniforms[0] * (len(clip) - length + 1)
    step = (length - 35) / (FRAMES - 1)
    return squashed(clip, [min(max(int(start + k * step), 0), len(clip) - 1) for k in range(FRAMES)], uniforms)


def squashed(clip: Tensor, numbers: Sequence[int], uniforms: Sequence[float]) -> Tensor:
    frames = F.interpolate(clip[list(numbers)].float(), (RESIZE, RESIZE), mode="bilinear").round()
    top, left = (int(u * (RESIZE - CROP)) for u in uniforms[FRAMES : FRAMES + 2])
    return frames[:, :, top : top + CROP, left : left + CROP] / 255


def as_query_on_kinetics(clip: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Mirrored by chance, and then of other colours."""
    shown = clip.flip(-1) if uniforms[0] < 0.5 else clip
    return jitter_colours((255 * shown).round().to(torch.uint8), torch.tensor(uniforms[1:], dtype=torch.float64)) / 255


def of_clip_m2df(clip: Tensor, uniforms: Sequence[float]) -> Tensor:
    """From one of the first 6 frames to one of the last 6; short side resized, one crop for all, flips by chance."""
    first, last = int(uniforms[0] * 6), len(clip) - 6 + int(uniforms[1] * 6)
    numbers = [int(first + k * (last - first) / (FRAMES - 1)) for k in range(FRAMES)]
    height, width = clip.shape[-2:]
    size = (RESIZE, RESIZE * width // height) if height < width else (RESIZE * height // width, RESIZE)
    frames = clip[numbers]
    if min(height, width) != RESIZE:
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (round(u * (side - CROP)) for u, side in zip(uniforms[FRAMES:], frames.shape[-2:], strict=False))
    frames = frames[:, :, top : top + CROP, left : left + CROP].float()
    return (frames.flip(-1) if uniforms[FRAMES + 2] < 0.5 else frames) / 255


@dataclass
class Plain:
    """An episode as a loop by hand has it: frames in [0, 1], support ``(n_way, frames, …)`` by class."""

    support: Tensor
    query: Tensor
    classes: Tensor
    labels: Tensor
    draws: Tensor


def episodes(
    videos: dict[str, Tensor], step: int, read: Read, as_query: Read = lambda clip, _: clip
) -> Iterator[Plain]:
    """The 16 one-shot episodes of a step. A video looks the same in all of them, as support and as a query."""
    split = Manifest.read(Path(next(iter(videos))).parent / "manifest.csv").split("train")
    assert list(split.class_names) == sorted(PROMPTS)
    paths = [video.path for of_class in split.videos for video in of_class]
    for number in range(step * EPISODES, (step + 1) * EPISODES):
        plan = plan_episode(split, EpisodeShape(WAY, 1, QUERIES), seed=0, episode=number)
        clips: list[Tensor] = []
        for video in plan.videos:
            index = paths.index(video.path)
            uniforms = episode_generator(0, "train", step, "augmentation", index).random(FRAMES + 3)
            clip = read(videos[video.path], uniforms.tolist())
            if len(clips) >= WAY:
                clip = as_query(clip, episode_generator(0, "train", step, "colours", index).random(9).tolist())
            clips.append(clip)
        yield Plain(
            torch.stack(clips[:WAY]),
            torch.stack(clips[WAY:]),
            torch.tensor(plan.classes),
            torch.arange(WAY).repeat_interleave(QUERIES),
            episode_draws(0, "train", number, WAY * QUERIES),
        )


class Adam:
    """Kingma and Ba's, with weight decay in the gradient, for the parameters that have one."""

    def __init__(self, decay: dict[str, float]) -> None:
        self.decay, self.steps = decay, 0
        self.means: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, parameters: Mapping[str, Tensor], rate: float) -> None:
        self.steps += 1
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            gradient = parameter.grad + self.decay[name] * parameter
            self.means[name] = 0.9 * self.means.get(name, torch.zeros(1)) + 0.1 * gradient
            self.squares[name] = 0.999 * self.squares.get(name, torch.zeros(1)) + 0.001 * gradient**2
            mean = self.means[name] / (1 - 0.9**self.steps)
            square = self.squares[name] / (1 - 0.999**self.steps)
            parameter -= rate * mean / (square.sqrt() + 1e-8)
            parameter.grad = None


def prompts_of(model: CLIPM2DF) -> Tensor:
    """Encoded once, before the training."""
    towers = model.model.backbone
    with torch.no_grad():
        table: Tensor = towers.encode_text(towers.tokenize([PROMPTS[label] for label in sorted(PROMPTS)]))
    return table


def cosines(x: Tensor, y: Tensor) -> Tensor:
    norms: Tensor = x.norm(dim=-1)[:, None] * y.norm(dim=-1)[None]
    return x @ y.T / (norms + 0.01)


def name_in_clip_fsar(name: str) -> str:
    """What a parameter is called there: OpenAI's names in the tower, its own in the head, whose norms are ``norm``."""
    for ours, theirs in (("layer_norm", "ln_"), ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        name = name.replace(ours, theirs)
    return name


def by_hand_clip_fsar(
    model: CLIPM2DF,
    videos: dict[str, Tensor],
    read: Read,
    rate: Callable[[int], float],
    class_weight: float,
    as_query: Read = lambda clip, _: clip,
) -> None:
    """CLIP-FSAR's training. ``rate`` is that of an iteration, of which 4 accumulate to a step of 16 episodes."""
    model = model.double().train()
    tower, head, table = model.model.backbone.visual.train(), model.model.head, prompts_of(model)  # batch norm, too
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float32).double().view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float32).double().view(3, 1, 1)
    trained = {f"visual.{name}": p for name, p in tower.named_parameters()}
    trained |= {f"head.{name}": p for name, p in head.named_parameters()}
    exempt = [name for name in trained if any(part in name_in_clip_fsar(name) for part in ("bn", "norm"))]
    adam = Adam({name: 0.0 if name in exempt else 1e-3 for name in trained})
    for step in range(STEPS):
        for episode in episodes(videos, step, read, as_query):
            # A pass of its own for the support, by whose frames batch norm goes, and one for the queries.
            support, query = (
                tower(((clips.double() - mean) / std).flatten(0, 1)).unflatten(0, (-1, FRAMES))
                for clips in (episode.support, episode.query)
            )
            logits = head(support[None, :, None], query[None], table[episode.classes][None]).logits[0]
            match = (logits.logsumexp(-1) - logits[range(len(query)), episode.labels]).mean()
            scores = head.scale * cosines(torch.cat((support, query)).mean(1), table)
            classes = torch.cat((episode.classes, episode.classes[episode.labels]))
            text = (scores.logsumexp(-1) - scores[range(len(scores)), classes]).mean()
            ((match + class_weight * text) / EPISODES).backward()
        adam.step(trained, rate(4 * step + 3))


def by_hand_clip_m2df(model: CLIPM2DF, videos: dict[str, Tensor]) -> None:
    """CLIP-M²DF's training: Adam at a constant rate of 1e-6."""
    model = model.double().train()
    tower, head, table = model.model.backbone.visual.eval(), model.model.head, prompts_of(model)  # batch norm is frozen
    trained = {f"visual.{name}": p for name, p in tower.named_parameters()}
    trained |= {f"head.{name}": p for name, p in head.named_parameters() if name != "scale"}
    adam = Adam(dict.fromkeys(trained, 0.0))
    for step in range(STEPS):
        for episode in episodes(videos, step, of_clip_m2df):
            support, query = (
                tower(clips.double().flatten(0, 1)).unflatten(0, (-1, FRAMES))
                for clips in (episode.support, episode.query)
            )
            output = head(support[None, :, None], query[None], table[episode.classes][None], episode.draws[None])
            of = {view: (-output.views[view].distances[0]).softmax(-1) for view in ("local", "global")}
            texts = {view: output.views[view].text_similarities[0].softmax(-1).amax(-1) for view in of}
            logits = -sum(output.views[view].distances[0] for view in of)
            match = (logits.logsumexp(-1) - logits[range(len(query)), episode.labels]).sum()
            # The global view teaches the local one where its text part is surer.
            weights = (of["global"].amax(-1) + texts["global"]) * (texts["global"] > texts["local"])
            divergence = (of["global"] * (of["global"].log() - of["local"].log())).sum(-1)
            distill = (weights * divergence).sum() / weights.sum() if weights.any() else 0.0
            ((match + distill) / EPISODES).backward()
        adam.step(trained, 1e-6)


def assert_same(done: Watched, by_hand: CLIPM2DF) -> None:
    """All weights, and the running statistics of batch norm."""
    expected = by_hand.state_dict()
    for name, value in done.model.state_dict().items():
        difference = (value.double() - expected[name].double()).abs().max().item()
        assert difference <= 1e-10, name


# ------------------------------------------------------------------------------------------------ the tests

FAST = ("--model.lr=1e-3", "--model.warmup_start=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_clip_fsar(videos: dict[str, Tensor], towers: dict[str, str], tmp_path: Path, tower: str) -> None:
    schedule = ("--model.warmup_steps=6", "--model.milestones=[10, 15]")
    configs = ("hmdb51_5way5shot.yaml", "recipes/clip_fsar.yaml")
    done = trained(configs, towers[tower], videos, tmp_path, *FAST, *schedule)

    def rate(iteration: int) -> float:
        if iteration < 24:
            return 1e-4 + (1e-3 - 1e-4) * iteration / 24
        return 1e-3 if iteration < 40 else 1e-4 if iteration < 60 else 1e-5

    by_hand_clip_fsar(done.first, videos, of_clip_fsar, rate, class_weight=1.2)
    assert_same(done, done.first)


@pytest.mark.slow
def test_clip_fsar_on_kinetics(videos: dict[str, Tensor], towers: dict[str, str], tmp_path: Path) -> None:
    configs = ("kinetics100_5way1shot.yaml", "recipes/clip_fsar.yaml", "recipes/clip_fsar_kinetics100.yaml")
    done = trained(configs, towers["vit"], videos, tmp_path, *FAST)

    def rate(iteration: int) -> float:
        return 1e-4 + (1e-3 - 1e-4) * iteration / 250

    by_hand_clip_fsar(done.first, videos, of_clip_fsar_on_kinetics, rate, 1.5, as_query_on_kinetics)
    assert_same(done, done.first)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_clip_m2df(videos: dict[str, Tensor], towers: dict[str, str], tmp_path: Path, tower: str) -> None:
    configs = ("ssv2_5way1shot.yaml", "recipes/published.yaml")
    done = trained(configs, towers[tower], videos, tmp_path, "--model.head_options.context_dropout=0.0")
    by_hand_clip_m2df(done.first, videos)
    assert_same(done, done.first)
