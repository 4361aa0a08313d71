"""The tiny CLIP as it lies in the package: read offline, complete, and able to tell unseen appearances."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

import clip_m2df
from clip_m2df.motion_shapes import CLASSES, appearances_of

FOLDER = Path(clip_m2df.__file__).parent / "assets" / "tiny_clip"
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        return importlib.import_module("train_tiny_clip")


@pytest.fixture(scope="module")
def model() -> Any:
    return CLIPModel.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_size(model: Any) -> None:
    assert sum(p.numel() for p in model.parameters()) <= 900_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000
    assert model.config.projection_dim % 8 == 0
    assert (FOLDER / "README.md").is_file()


def test_preprocessing_is_that_of_training(model: Any, script: ModuleType) -> None:
    settings = json.loads((FOLDER / "preprocessor_config.json").read_text())
    side = model.config.vision_config.image_size
    assert settings["size"] == {"shortest_edge": side}
    assert settings["crop_size"] == {"height": side, "width": side}
    assert (tuple(settings["image_mean"]), tuple(settings["image_std"])) == (script.MEAN, script.STD)


def test_tokenizer_is_whole(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.text_config.vocab_size > 600
    assert tokenizer.eos_token_id == model.config.text_config.eos_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token_id == model.config.text_config.bos_token_id
    for c in CLASSES:
        text = f"a photo of {c.label}"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) + 2  # every word is one token
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["zoë juggles 3 knives!", "пешеход", "弓を引く", "brush-hair"])
def test_any_text_can_be_encoded(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in ids[1:-1]  # which is the unknown token as well
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


@torch.no_grad()
def test_padding_does_not_change_an_embedding(model: Any, tokenizer: Any) -> None:
    texts = ["a red star", "a photo of two blue rings moving apart"]
    short = {"truncation": True, "max_length": 77, "return_tensors": "pt"}
    whole = [tokenizer(texts, padding=padding, **short) for padding in (True, "max_length")]
    first, second = (model.get_text_features(**inputs).pooler_output for inputs in whole)
    alone = model.get_text_features(**tokenizer(texts[:1], return_tensors="pt")).pooler_output
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first[:1], alone)


def test_script_never_shows_a_held_out_appearance(script: ModuleType) -> None:
    held_out = {c.appearance for c in CLASSES if c.split != "train"}
    assert set(script.unseen_appearances()) == held_out
    assert held_out.isdisjoint(appearances_of("train"))
    rng = np.random.Generator(np.random.PCG64(0))
    frames = script.render_frames(appearances_of("train"), 20, 2, rng)
    assert held_out.isdisjoint(frames.appearances)
    said = {script.caption(form, frames, i, 0.5, 0.5, 0.2) for form in script.FORMS for i in range(40)}
    assert not [text for text in said for colour, shape in held_out if f"{colour} {shape}" in text]


def test_frames_of_unseen_appearances_find_their_caption(model: Any, tokenizer: Any, script: ModuleType) -> None:
    rng = np.random.Generator(np.random.PCG64(123))
    frames = script.render_frames(script.unseen_appearances(), 140, 2, rng)
    share, count = script.accuracy(model, tokenizer, frames)
    assert count > 200
    assert share > 0.6  # chance is 1 in 14
