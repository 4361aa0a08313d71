import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    import lightning

GOLDEN = Path(__file__).parent / "golden"


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A golden file's tensors, and the weights among them."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    state = {key.removeprefix("state/"): tensors.pop(key) for key in list(tensors) if key.startswith("state/")}
    return tensors, state


def quiet_trainer(folder: Path, **options: Any) -> "lightning.Trainer":
    """A trainer on one CPU that says and logs nothing."""
    import lightning

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**(quiet | {"accelerator": "cpu", "default_root_dir": folder, "devices": 1} | options))


def save_tokenizer(folder: Path, letters: Iterable[str], words: Iterable[str] = ()) -> int:
    """Save a tokenizer in CLIP's manner that knows the letters, the merge "c a" and further words; its size."""
    from transformers import CLIPTokenizer

    letters = sorted(letters)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", *words, "<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("c", "a")]  # declared as strings, read as pairs
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges).save_pretrained(folder)
    return len(tokens)


def fails(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with status 2: no traceback, and a line or two but for wrong usage."""
    from clip_m2df.cli import main

    capsys.readouterr()
    try:
        status: object = main(arguments)
    except SystemExit as ended:  # argparse's own
        status = ended.code
    assert status == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    _, error, message = said.partition("clip-m2df: error: ")
    assert len(message.strip().splitlines()) <= 2
    return error + message or said


def options(manifest: Path, tiny_clip_dir: Path, folder: Path, *more: str) -> list[str]:
    """A run of two optimiser steps on the tests' own videos, through the shipped demo config."""
    return [
        "--config=demo_5way1shot.yaml",
        f"--model.backbone={tiny_clip_dir}",
        "--model.head_options.hidden_dim=32",
        "--model.head_options.num_heads=4",
        f"--data.manifest={manifest}",
        "--data.n_way=3",
        "--data.n_query=2",
        "--data.frames=2",
        "--data.resize=32",
        "--data.size=32",
        "--data.batch_size=2",
        "--data.episodes_per_step=4",
        "--data.validate_every=1",
        "--data.val_episodes=4",
        "--data.test_episodes=6",
        "--data.num_workers=0",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        *more,
    ]


def save_checkpoint(model: Any, path: Path) -> Path:
    """Save a model that was not trained as a Trainer does; the path."""
    import lightning

    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As on a full disk: no file grows beyond some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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
    """A CLIP in transformers' format, with random weights: 32 x 32 images, 77 tokens, embeddings of 32."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("tiny_clip")
    vocab_size = save_tokenizer(folder, ByteLevel.alphabet())
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": vocab_size, "max_position_embeddings": 77, "bos_token_id": vocab_size - 2}
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


@pytest.fixture(scope="session")
def fitted(manifest: Path, tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; nobody may change its checkpoints."""
    from clip_m2df.cli import main

    folder = tmp_path_factory.mktemp("fitted") / "run"
    assert main(["fit", *options(manifest, tiny_clip_dir, folder)]) == 0
    return folder
