from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def save_tokenizer(folder: Path, letters: Iterable[str], words: Iterable[str] = ()) -> int:
    """Save a tokenizer in CLIP's manner that knows the letters, the merge "c a" and further words; its size."""
    from transformers import CLIPTokenizer

    letters = sorted(letters)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", *words, "<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("c", "a")]  # declared as strings, read as pairs
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges).save_pretrained(folder)
    return len(tokens)


def save_checkpoint(model: Any, path: Path) -> Path:
    """Save a model that was not trained as a Trainer does; the path."""
    import lightning

    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases without an account, its files in the test's folder, and no run of another test."""
    from tests.training.wandb_file import end_wandb

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_files"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    end_wandb()
    yield
    end_wandb()


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP in transformers' format, with random weights: 32 x 32 images, 16 tokens, embeddings of 32."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("tiny_clip")
    vocab_size = save_tokenizer(folder, ByteLevel.alphabet())
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": vocab_size, "max_position_embeddings": 16, "bos_token_id": vocab_size - 2}
    config = CLIPConfig(
        text_config={**tower, **text, "eos_token_id": vocab_size - 1},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of H.264 videos, 48 x 32 pixels: train 4 classes of 4, val 3 of 3, test 3 of 3; texts for test."""
    from tests import clips

    folder = tmp_path_factory.mktemp("videos")
    lines = ["path,label,split,text"]
    for split, n_classes, n_videos in (("train", 4, 4), ("val", 3, 3), ("test", 3, 3)):
        for c in range(n_classes):
            for v in range(n_videos):
                name = f"{split}{c}_{v}.mp4"
                clips.render(folder / name, n_frames=9 + c + v, size=(48, 32))
                lines.append(f"{name},{split} class {c},{split},{'' if split != 'test' else f'the text of {c}'}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.csv"
