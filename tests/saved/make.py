# mypy: ignore-errors
"""Makes the files in this folder: one of everything that clip-m2df 0.1.0 saves, tiny, and what it said of them.

Later versions are tested to load these files and to give the same numbers. This script is the record of how they were
made, and runs as a whole with the old code only; what it reads models and files with, the tests take from here.

The files are of version 0.1.0, commit 5d4579378cedb9f074c66f426a70240c8f8f9472, made by

    cd CLONE_OF_THAT_COMMIT
    OMP_NUM_THREADS=1 PYTHONPATH=src:… python …/tests/saved/make.py

with … for the folder in which this version's ``tests`` is. The options of the run and those of the head in
``pretrained/`` are read from the files here.

- ``run/config.yaml``, ``m2df.ckpt``: what ``clip-m2df fit`` wrote, the latter as ``run/checkpoints/last.ckpt``. Put
  back there, the run goes on, with this folder as the working directory, by
  ``clip-m2df fit --config run/config.yaml --ckpt_path last --trainer.max_steps 3``; after that step, taken without
  dropout, whose draws are not the same in all versions, it gives ``further/logits`` in ``expected.npz``
- ``clip_fsar.ckpt``: a checkpoint of the head ``clip_fsar``, not trained, written by a Trainer
- ``pretrained/``: a folder of ``save_pretrained``, with nearly all options of the head
- ``classifier/``: a folder of ``FewShotClassifier.save`` with the model of ``m2df.ckpt``; only the paths of its
  examples were made relative afterwards
- ``videos/``: the videos; a manifest of all, and one of those of the test split
- ``cache/``, ``episodes.jsonl``: of ``clip-m2df cache`` and ``episodes``, with the test split's manifest
- ``check.csv``: the table of ``clip-m2df check``, with the manifest of all
- ``store/``: features of the test videos, written by ``clip-m2df test --data.store store`` with ``m2df.ckpt``
- ``expected.json``, ``expected.npz``: what 0.1.0 made of all these

A cache, a store and a table of ``check`` know a video by its size and its time of modification, which no checkout
keeps: ``mtime_ns`` in ``expected.json`` has the time of each video, for ``os.utime``.

In ``expected.json``, ``test`` is what a test of ``m2df.ckpt`` measured, by bank, ``test_direct`` the same without a
bank, and ``test_of_episodes`` that of ``episodes.jsonl`` with frames from the cache. In ``expected.npz``,
``support (2, 3, 2, 4, 8)``, ``query (2, 5, 4, 8)`` and ``prompts (2, 3, 8)`` are random inputs of a head, and
``frames (2, 3, 32, 32)`` random images. Of each model in evaluation mode, NAME being ``m2df``, ``clip_fsar``,
``pretrained`` or ``classifier``, there are ``NAME/logits`` and ``NAME/prompt_probabilities`` of the head on these,
``NAME/features`` of the images, and ``NAME/prompt_table`` of ``class_names`` in ``expected.json``; of the classifier
also ``classifier/predict_proba`` of its ``queries``. ``store/features`` are of the test videos in the manifest's order;
``cache/frames``, resized and cropped as for a test, of each third of them.
"""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel

import clip_m2df
from clip_m2df import CLIPM2DF, EpisodeDataModule, FewShotClassifier
from tests.conftest import save_checkpoint, save_tokenizer

HERE = Path(__file__).resolve().parent
CODE = Path(clip_m2df.__file__).parents[2]
# 2024-01-01; each video is a second later than the one before.
FIRST_MTIME = 1_704_067_200
# With the template at most six letters, each of which is a token, are read.
CLASSES = {"train": ["jump", "wave", "clap"], "val": ["kick", "push"], "test": ["running", "throwing", "diving"]}
TEXTS = {"running": "run", "throwing": "throw"}
CLASS_NAMES = ["wave", "push", "cacao", "running fast"]


WITHOUT_DROPOUT = """
import sys, torch
from clip_m2df.cli import main
torch.nn.Dropout.forward = lambda self, x: x
sys.exit(main())
"""


def command(*args: str, dropout: bool = True) -> None:
    """Run ``clip-m2df`` in the working directory."""
    environment = os.environ | {"PYTHONPATH": str(CODE / "src")}
    program = ["-m", "clip_m2df"] if dropout else ["-c", WITHOUT_DROPOUT]
    subprocess.run([sys.executable, *program, *args], env=environment, check=True)


def make_tower(folder: Path) -> None:
    """A CLIP with random weights: 32 x 32 images, 16 tokens, embeddings of 8."""
    vocab_size = save_tokenizer(folder, ByteLevel.alphabet())
    layer = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": vocab_size, "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config={**layer, **text, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1},
        vision_config={**layer, "image_size": 32, "patch_size": 8},
        projection_dim=8,
        # So that the embeddings of the few classes and videos differ; by default they hardly do.
        initializer_factor=8.0,
    )
    torch.manual_seed(3)  # one whose two views and whose classes differ
    CLIPModel(config).save_pretrained(folder)


def render(path: Path, numbers: list[int]) -> None:
    """Render a video of 64 x 40 pixels, each frame of which is eight blocks, their colours drawn by its number."""
    with av.open(str(path), "w") as container:
        # Its fast code makes a file that differs now and then.
        stream = container.add_stream("libx264", rate=12, options={"threads": "1", "x264-params": "no-asm=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 40, "yuv420p"
        for number in numbers:
            colours = np.random.default_rng(number).integers(256, size=(2, 4, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(colours.repeat(20, 0).repeat(16, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make_videos(folder: Path) -> dict[str, int]:
    """Nineteen videos with their manifests; returns the times of their modification."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lines, mtimes = ["path,label,split,text"], {}
    for split, n_videos in (("train", 2), ("val", 2), ("test", 3)):
        for c, label in enumerate(CLASSES[split]):
            numbers = random.integers(1000, size=8)
            for v in range(n_videos):
                name = f"{split}{c}_{v}.mp4"
                # Those of a class have most of their frames in common.
                render(folder / name, [*random.integers(1000, size=v), *numbers[v:], *random.integers(1000, size=v)])
                mtimes[name] = (FIRST_MTIME + len(mtimes)) * 10**9
                os.utime(folder / name, ns=(mtimes[name], mtimes[name]))
                lines.append(f"{name},{label},{split},{TEXTS.get(label, '')}")
    for name, rows in {"manifest": lines[1:], "test": [line for line in lines if ",test," in line]}.items():
        (folder / f"{name}.csv").write_text("\n".join([lines[0], *rows]) + "\n", encoding="utf-8")
    return mtimes


def make_models() -> None:
    """All models but the first, which ``fit`` makes."""
    torch.manual_seed(1)
    model = CLIPM2DF(backbone="tower", head="clip_fsar", head_options={"heads": 2, "hidden_dim": 16})
    save_checkpoint(model, Path("clip_fsar.ckpt"))

    model = CLIPM2DF(
        backbone="tower",
        head_options=json.loads((HERE / "expected.json").read_text(encoding="utf-8"))["head_options"]["pretrained"],
        template=["a photo of {}", "{}"],
        class_weight=1.0,
    )
    model.reading = {"frames": 4, "resize": 36}
    model.save_pretrained("pretrained", measured={"nothing, untrained": "33.3 ± 0.1"})

    classifier = FewShotClassifier.from_checkpoint("m2df.ckpt", device="cpu", selection="expectation", text_fusion=0.25)
    support = {label: [f"videos/test{c}_{v}.mp4" for v in range(c + 1)] for c, label in enumerate(CLASSES["test"])}
    classifier.fit(support, texts={"throwing": "throw"}).save("classifier")
    table = Path("classifier/classifier.json")
    table.write_text(table.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""), encoding="utf-8")


def head_inputs() -> dict[str, np.ndarray]:
    """Random features and prompts whose cosines are close to each other, as those of a CLIP are, and images."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    common = 3 * draw(8)
    inputs = {"support": draw(2, 3, 2, 4, 8), "query": draw(2, 5, 4, 8), "prompts": draw(2, 3, 8)}
    found = {name: (common + values).numpy() for name, values in inputs.items()}
    return found | {"frames": torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8).numpy()}


@torch.no_grad()
def numbers_of(name: str, model: CLIPM2DF, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a model makes of the inputs."""
    model.eval()
    output = model.model.head(*(torch.from_numpy(inputs[key]) for key in ("support", "query", "prompts")))
    found = {
        "logits": output.logits,
        "prompt_probabilities": output.prompt_probabilities,
        "features": model.model.encode_frames(torch.from_numpy(inputs["frames"])),
        "prompt_table": model.encode_prompts(CLASS_NAMES),
    }
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in found.values())
    return {f"{name}/{key}": values.numpy() for key, values in found.items()}


def measured(folder: Path) -> dict[str, object]:
    """What a test has measured: the figures of its table, and the confusion matrix."""
    _, *metrics = csv.reader((folder / "test_metrics.csv").read_text(encoding="utf-8").splitlines())
    _, *confusion = csv.reader((folder / "test_confusion.csv").read_text(encoding="utf-8").splitlines())
    return {
        "metrics": {name: float(value) for name, value in metrics},
        "confusion": [list(map(int, counts[1:])) for counts in confusion],
    }


def stored_features(videos: list[str]) -> np.ndarray:
    """The features in the store, in the order of these videos."""
    (file,) = Path("store").iterdir()
    with safe_open(file, framework="numpy") as content:
        names = [name.split(" ")[0] for name in json.loads(content.metadata()["videos"])]
        features = content.get_tensor("features")
    return np.stack([features[names.index(video)] for video in videos])


def cached_frames(videos: list[str]) -> np.ndarray:
    """What a test reads from the cache of each third of these videos."""
    data = EpisodeDataModule("videos/test.csv", cache="cache", n_way=2, frames=4, resize=36, size=32)
    data.setup("test")
    return torch.stack([data.reader.read(f"videos/{name}")[0] for name in videos[::3]]).numpy()


def described(classifier: FewShotClassifier, queries: list[str]) -> dict[str, object]:
    """How a classifier predicts, and what."""
    return {
        "classes": classifier.classes_.tolist(),
        "threshold": classifier.threshold_,
        "frames": classifier.encoder.reader.frames,
        "resize": classifier.encoder.reader.resize,
        "text_fusion": classifier.model.text_fusion,
        "selection": classifier.model.model.head.selection,
        "queries": queries,
        "labels": classifier.predict(queries).tolist(),
        "labels_with_reject": classifier.predict(queries, reject=True).tolist(),
    }


def main() -> None:
    """Make everything in the working directory."""
    make_tower(Path("tower"))
    mtimes = make_videos(Path("videos"))

    command("fit", "--config", str(HERE / "run/config.yaml"))
    shutil.copy("run/checkpoints/last.ckpt", "m2df.ckpt")
    shutil.copytree("run", "further")
    further = ["--trainer.max_steps", "3", "--trainer.default_root_dir", "further"]
    command("fit", "--config", "run/config.yaml", "--ckpt_path", "last", *further, dropout=False)
    test = ["--config", "run/config.yaml", "--ckpt_path", "m2df.ckpt"]
    command("test", *test, "--data.store", "store", "--trainer.default_root_dir", "test")
    command("test", *test, "--data.evaluation", "direct", "--trainer.default_root_dir", "direct")
    command("check", "--manifest", "videos/manifest.csv", "--frames", "4", "--workers", "1", "--output", "check.csv")
    cache = ["--short_side", "36", "--frames", "4", "--workers", "1", "--output", "cache"]
    command("cache", "--manifest", "videos/test.csv", *cache)
    data = ["--data.manifest", "videos/test.csv"]
    command("episodes", "--config", "run/config.yaml", *data, "--data.eval_seed", "7", "--output", "episodes.jsonl")
    data += ["--data.episodes_file", "episodes.jsonl", "--data.cache", "cache"]
    command("test", *test, *data, "--trainer.default_root_dir", "cached")

    make_models()
    inputs = head_inputs()
    models = {name: CLIPM2DF.load_from_checkpoint(f"{name}.ckpt") for name in ("m2df", "clip_fsar")}
    models |= {name: CLIPM2DF.from_pretrained(name) for name in ("pretrained", "classifier")}
    arrays = dict(inputs)
    for name, model in models.items():
        arrays |= numbers_of(name, model, inputs)
    model = CLIPM2DF.load_from_checkpoint("further/checkpoints/last.ckpt")
    arrays["further/logits"] = numbers_of("further", model, inputs)["further/logits"]

    classifier = FewShotClassifier.load("classifier", device="cpu")
    queries = ["videos/test0_1.mp4", "videos/test0_2.mp4", "videos/test1_2.mp4", "videos/val0_0.mp4"]
    arrays["classifier/predict_proba"] = classifier.predict_proba(queries)
    tested = [name for name in mtimes if name.startswith("test")]
    arrays["store/features"] = stored_features(tested)
    arrays["cache/frames"] = cached_frames(tested)
    np.savez_compressed("expected.npz", **arrays)

    git = ["git", "-C", str(CODE), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    packages = ("torch", "lightning", "transformers", "tokenizers", "safetensors", "av", "pillow", "numpy")
    expected = {
        "version": clip_m2df.__version__,
        "commit": commit,
        "made_with": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "class_names": CLASS_NAMES,
        "mtime_ns": mtimes,
        "global_step": torch.load("m2df.ckpt", weights_only=True)["global_step"],
        "reading": {name: model.reading for name, model in models.items()},
        "head_options": {name: model.hparams["head_options"] for name, model in models.items()},
        "test": measured(Path("test")),
        "test_direct": measured(Path("direct")),
        "test_of_episodes": measured(Path("cached")),
        "classifier": described(classifier, queries),
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        os.chdir(Path(work).resolve())
        main()
        for name in ("videos", "cache", "store", "pretrained", "classifier"):
            shutil.rmtree(HERE / name)
            shutil.copytree(name, HERE / name)
        tables = ("check.csv", "episodes.jsonl", "expected.json", "expected.npz")
        for name in ("run/config.yaml", "m2df.ckpt", "clip_fsar.ckpt", *tables):
            shutil.copy(name, HERE / name)
        os.chdir(HERE)
