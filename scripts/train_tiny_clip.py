"""Train the tiny CLIP of ``src/clip_m2df/assets/tiny_clip`` from nothing, on frames that motion_shapes renders.

Usage: python scripts/train_tiny_clip.py [--out FOLDER] [--steps N] [--seed N]

The model sees single frames of random motions and captions of what they show, never a colour and shape that a val or
test class uses. The script writes the whole directory: configuration, weights, tokenizer, preprocessing and the README
with the figures of this very run. On a CPU the same seed and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clip_m2df.motion_shapes import CLASSES, COLOURS, appearances_of
from clip_m2df.motion_shapes.classes import MOTIONS, OF_TWO_SHAPES, SHAPES, MotionClass, noun_phrase
from clip_m2df.motion_shapes.scenes import draw_scene, paint

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src/clip_m2df/assets/tiny_clip"
INPUT, PATCH = 40, 8  # pixels
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SIZES = ("small", "medium", "large")
GAPS = ("close together", "far apart")
PREFIXES = ("", "a photo of ", "a picture of ", "a frame of ", "a video of ")
PLURAL = {shape: noun_phrase("red", shape, two=True).split()[-1] for shape in SHAPES}


@dataclass(frozen=True)
class Frames:
    """Frames and what they show, one row a frame.

    Attributes:
        pixels: (frames, 3, SIZE, SIZE) uint8.
        appearance: (frames,) number of colour and shape in `appearances`.
        motion: (frames,) number of the motion in `MOTIONS`.
        geometry: (frames, 4): centre x, centre y and radius as fractions of the picture, opacity.
        gap: (frames,) distance between the centres of two shapes, as a fraction of the picture.
        appearances: colours and shapes.
    """

    pixels: Tensor
    appearance: NDArray[np.int64]
    motion: NDArray[np.int64]
    geometry: NDArray[np.float64]
    gap: NDArray[np.float64]
    appearances: tuple[tuple[str, str], ...]


def unseen_appearances() -> tuple[tuple[str, str], ...]:
    """Colours and shapes of the val and test classes."""
    return tuple(dict.fromkeys(c.appearance for c in CLASSES if c.split != "train"))


def render_frames(
    appearances: Sequence[tuple[str, str]], scenes: int, per_scene: int, rng: np.random.Generator
) -> Frames:
    """Render random frames of random scenes: any appearance with any motion."""
    pixels, rows, gaps = [], [], []
    for number in range(scenes):
        appearance, motion = number % len(appearances), int(rng.integers(len(MOTIONS)))
        scene = draw_scene(MotionClass("clip", *appearances[appearance], MOTIONS[motion]), rng)
        at = np.sort(rng.choice(len(scene.radius), per_scene, replace=False))
        pixels.append(torch.from_numpy(paint(scene, at)).permute(0, 3, 1, 2))
        geometry = (scene.x.mean(0)[at], scene.y.mean(0)[at], scene.radius[at], scene.opacity[at])
        rows += [(appearance, motion, *values) for values in zip(*geometry, strict=True)]
        gaps.append(np.hypot(np.ptp(scene.x, 0), np.ptp(scene.y, 0))[at])
    table = np.array(rows)
    return Frames(
        torch.cat(pixels),
        table[:, 0].astype(np.int64),
        table[:, 1].astype(np.int64),
        table[:, 2:],
        np.concatenate(gaps),
        tuple(appearances),
    )


def preprocess(pixels: Tensor, short_side: int = INPUT, corner: tuple[int, int] = (0, 0)) -> Tensor:
    """Resize uint8 frames, crop them to the model's input from `corner` on, scale to [0, 1] and normalise."""
    resized = F.interpolate(pixels, size=(short_side, short_side), mode="bilinear", antialias=True)
    row, column = corner
    crop = resized[..., row : row + INPUT, column : column + INPUT].float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (crop - mean) / std


FORMS = ("appearance", "motion", "place", "size", "colour", "shape", "all")


def caption(form: str, frames: Frames, i: int, x: float, y: float, radius: float) -> str:
    """Say of frame i what the form asks for; x, y and radius are those of the crop."""
    if frames.geometry[i, 3] < 0.2:
        return "nothing"
    colour, shape = frames.appearances[frames.appearance[i]]
    motion = MOTIONS[frames.motion[i]]
    two = motion in OF_TWO_SHAPES
    size = SIZES[int(np.digitize(radius, (0.13, 0.2)))]
    place = PLACES[int(np.digitize(y, (0.4, 0.6)))][int(np.digitize(x, (0.4, 0.6)))]
    if two:
        place = GAPS[int(frames.gap[i] > 0.5)]
    match form:
        case "appearance":
            return noun_phrase(colour, shape, two=two)
        case "motion":
            # A frame does not tell the motion: every motion is right, so any will do, the same for all such frames.
            return f"{noun_phrase(colour, shape, two=two)} {{}}"
        case "place":
            return f"{'two things' if two else 'something'} {place}"
        case "size":
            return f"{'two ' if two else 'a '}{size} thing{'s' if two else ''} {place}"
        case "colour":
            return noun_phrase(colour, "thing", two=two)
        case "shape":
            return f"two {PLURAL[shape]}" if two else f"a {shape}"
        case _:
            return f"{noun_phrase(colour, shape, size=size, two=two)} {place}"


def fill_motion(text: str, rng: np.random.Generator) -> str:
    """Put a motion that can be true into a caption that leaves it open."""
    if "{}" not in text:
        return text
    possible = OF_TWO_SHAPES if text.startswith("two") else [m for m in MOTIONS if m not in OF_TWO_SHAPES]
    return text.format(rng.choice(possible))


def all_words() -> list[str]:
    """Every word that a caption or a label of the benchmark can hold."""
    texts = [c.label for c in CLASSES] + [*MOTIONS, *COLOURS, *SHAPES, *PLURAL.values(), *SIZES, *GAPS, *PREFIXES]
    texts += [place for row in PLACES for place in row]
    texts += ["a an two something thing things nothing in at on of with the shape action person doing someone photo"]
    return sorted({word for text in texts for word in text.split()})


def make_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token and any other text is spelt in bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]

    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[Any] = []  # pairs, which the annotation of CLIPTokenizer leaves out
    while pairs := [pair for word in spelt for pair in pairwise(word)]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        tokens.append("".join(best))
        for word in spelt:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokens = list(dict.fromkeys(tokens))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A CLIP of two small transformers with random weights."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": 64,
        "pad_token_id": tokenizer.pad_token_id,
        **ids,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": INPUT,
        "patch_size": PATCH,
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids and mask, padded to the longest text."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt"))


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Normalised embeddings, (images, dim)."""
    return F.normalize(model.get_image_features(images).pooler_output, dim=-1)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Normalised embeddings, (texts, dim)."""
    return F.normalize(model.get_text_features(**tokenize(tokenizer, texts)).pooler_output, dim=-1)


def train(
    model: CLIPModel, tokenizer: CLIPTokenizer, frames: Frames, steps: int, batch: int, rng: np.random.Generator
) -> None:
    """Train contrastively: in a batch all captions are of one form, and frames with the same caption share it."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1.5e-3,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.08)
    weights = np.array([3, 3, 2, 2, 1, 2, 4]) / 17
    model.train()
    started, losses = time.perf_counter(), []
    for step in range(steps):
        form, prefix = str(rng.choice(FORMS, p=weights)), str(rng.choice(PREFIXES))
        rows = rng.choice(len(frames.motion), batch, replace=False)
        side = int(rng.integers(INPUT, round(1.2 * INPUT)))
        corner = (int(rng.integers(side - INPUT + 1)), int(rng.integers(side - INPUT + 1)))
        x, y, radius, _ = frames.geometry[rows].T * (side / INPUT)
        x, y = x - corner[1] / INPUT, y - corner[0] / INPUT
        said = [caption(form, frames, i, *xyr) for i, *xyr in zip(rows, x, y, radius, strict=True)]
        texts, target = np.unique(said, return_inverse=True)
        labels = torch.from_numpy(target)
        images = embed_images(model, preprocess(frames.pixels[rows], side, corner))
        captions = embed_texts(model, tokenizer, [prefix + fill_motion(str(text), rng) for text in texts])
        logits = model.logit_scale.exp() * images @ captions.T
        # From text to frames the right answer is any of the frames of which the caption is true.
        right = F.one_hot(labels, len(texts)).T / torch.bincount(labels)[:, None]
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # CLIP's limit, ln 100
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            print(
                f"step {step + 1}: loss {np.mean(losses[-200:]):.3f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    model.train(False)


@torch.no_grad()
def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, frames: Frames) -> tuple[float, int]:
    """How often "a photo of ..." of the right colour and shape is the nearest among all of `frames.appearances`.

    Returns:
        The share, and the number of frames asked about: those on which something is to be seen.
    """
    shown = np.flatnonzero(frames.geometry[:, 3] >= 0.5)
    single = torch.stack(
        [
            embed_texts(model, tokenizer, [f"a photo of {noun_phrase(*a, two=two)}" for a in frames.appearances])
            for two in (False, True)
        ]
    )
    two = torch.tensor([MOTIONS[m] in OF_TWO_SHAPES for m in frames.motion[shown]]).long()
    images = torch.cat([embed_images(model, preprocess(part)) for part in frames.pixels[shown].split(512)])
    guess = torch.einsum("id,icd->ic", images, single[two]).argmax(1)
    right = guess == torch.from_numpy(frames.appearance[shown])
    return float(right.float().mean()), len(shown)


README = string.Template("""# A tiny CLIP

A `CLIPModel` of transformers, $parameters parameters, $megabytes MB in this folder: a vision transformer for
pictures of $input by $input pixels in patches of $patch, a text transformer, and a tokenizer of $vocabulary tokens
in which each word of the embedded benchmark's sentences is one token. It knows coloured shapes on textured backgrounds
and nothing else; it is here so that the whole package runs, trains and is tested offline.

It is trained from random weights on frames that `clip_m2df.motion_shapes` renders, with captions of what a frame
shows (colour, shape, place, size). It saw $seen of the $all combinations of colour and shape, none of the $unseen that
the benchmark's val and test classes use.

    $command

made this folder and this page in $minutes minutes on $threads thread(s) of a CPU:
$steps steps of $batch frames, out of $frames rendered. The same command with the same versions
(torch $torch, transformers $transformers) repeats the weights on the same kind of CPU.

How often, among the captions "a photo of …" of all combinations of a row, the right one is nearest to a new frame:

| combinations | accuracy | chance | frames |
|---|---|---|---|
| $unseen unseen: those of the val and test classes | $unseen_accuracy % | $unseen_chance % | $unseen_frames |
| $seen seen in training | $seen_accuracy % | $seen_chance % | $seen_frames |

Preprocessing: short side to $input pixels (bilinear, antialiased), a square crop, CLIP's mean and deviation.
""")


def write_preprocessing(folder: Path) -> None:
    """Write `preprocessor_config.json` in the form that transformers' image processors read."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": INPUT},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": INPUT, "width": INPUT},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Train, measure and write the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the directory to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps")
    parser.add_argument("--scenes", type=int, default=6000, help="scenes to render for training, four frames of each")
    parser.add_argument("--batch", type=int, default=128, help="frames in a batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes, weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="threads, on which the last bits of the weights depend")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(arguments.threads)

    seen, unseen = appearances_of("train"), unseen_appearances()
    if set(seen) & set(unseen):
        raise SystemExit(f"these appearances are the val and test classes' own: {set(seen) & set(unseen)}")
    started = time.perf_counter()
    rng = np.random.Generator(np.random.PCG64([arguments.seed, len(CLASSES)]))
    frames = render_frames(seen, arguments.scenes, 4, rng)
    print(f"{len(frames.motion)} frames rendered in {time.perf_counter() - started:.0f} s", flush=True)
    tokenizer = make_tokenizer(all_words())
    model = make_model(tokenizer, arguments.seed)
    train(model, tokenizer, frames, arguments.steps, arguments.batch, rng)
    minutes = (time.perf_counter() - started) / 60

    figures: dict[str, object] = {}
    for name, appearances in (("seen", seen), ("unseen", unseen)):
        share, count = accuracy(model, tokenizer, render_frames(appearances, 1000, 2, rng))
        figures |= {f"{name}_accuracy": f"{100 * share:.1f}", f"{name}_frames": count}
        figures |= {name: len(appearances), f"{name}_chance": f"{100 / len(appearances):.1f}"}

    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    write_preprocessing(folder)
    figures |= {
        "command": f"python scripts/train_tiny_clip.py --steps {arguments.steps} --scenes {arguments.scenes}"
        f" --batch {arguments.batch} --seed {arguments.seed} --threads {arguments.threads}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "megabytes": f"{sum(f.stat().st_size for f in folder.iterdir() if f.name != 'README.md') / 1e6:.1f}",
        "input": INPUT,
        "patch": PATCH,
        "vocabulary": len(tokenizer),
        "all": len(seen) + len(unseen),
        "minutes": f"{minutes:.1f}",
        "frames": f"{len(frames.motion):,}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = README.substitute(vars(arguments) | figures)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
