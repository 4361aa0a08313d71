"""Damaged inputs for the readers of files that others may have made: each ends in a result or in one clear error.

Input number n is a pure function of (kind, seed, n). Inputs are read in processes of their own, which may take 6 GiB of
memory, so that a crash or a hang is seen and counted. A longer run than the tests':

    python -m tests.project.fuzz checkpoint --inputs 20000 --seed 1
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from clip_m2df.clip.tokenizer import encoded, read_tokenizer, saved_tokenizer
from clip_m2df.commands.configs import resolve_configs, shipped_configs
from clip_m2df.errors import UserError
from clip_m2df.video.isolation import Unreadable, isolated_map
from clip_m2df.video.reader import probe
from clip_m2df.video.transforms import ClipReader
from clip_m2df.weight_files import program_classes, read_weights
from tests import clips
from tests.clip.towers import TOKENIZERS
from tests.conftest import GOLDEN, save_checkpoint
from tests.project.damage import SCRAPS, Rng, alter, damage, damaged_archive

TIMEOUT = 300.0  # seconds of an input; on a busy machine the first waits for a minute of imports
MEMORY = 6 << 30  # bytes of a process
BUG = "BUG"


# Configs


def config(samples: Path, scratch: Path, rng: Rng) -> str:
    """A config as ``fit``, ``validate`` or ``test`` take it, up to the making of model, data and trainer."""
    from clip_m2df.commands import trainer as lightning_cli

    text = rng.choice([path for name, path in shipped_configs().items() if "_5way" in name]).read_bytes()
    if rng.random() < 0.5:
        text = damage(rng, text, SCRAPS)
    else:
        tree = yaml.safe_load(text)
        for _ in range(rng.choice([1, 1, 2, 5])):
            tree = alter(rng, tree)
        text = yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")
    (scratch / "c.yaml").write_bytes(text)
    try:
        args = resolve_configs(["fit", f"--config={scratch / 'c.yaml'}", "--model.backbone=tiny"])
        lightning_cli.run(args, _made())
    except OSError as error:  # a file name that is too long, which the command prints as it stands
        raise UserError(str(error)) from error
    return "read"


@cache
def _made() -> Any:
    """The command line, whose parser is made once, with one tower for all; nothing is run."""
    from clip_m2df.clip.backbone import CLIPBackbone
    from clip_m2df.commands import trainer as lightning_cli

    tower = CLIPBackbone.load("tiny")
    tower.image_size = 224  # what the configs say
    CLIPBackbone.load = classmethod(lambda *_, **__: tower)  # type: ignore[method-assign, assignment]

    class Made(lightning_cli.CLI):
        parts: Mapping[str, Any] = {}

        def setup_parser(self, *args: Any) -> None:
            if not Made.parts:
                super().setup_parser(*args)
                Made.parts = dict(vars(self))
            vars(self).update({**Made.parts, "args": self.args})

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    return Made


# Checkpoints and weights


def save_samples(folder: Path) -> None:
    """Write the whole files that checkpoints, weights, features and caches are made of."""
    from clip_m2df.clip.backbone import TINY_CLIP
    from clip_m2df.commands.cache import cache_frames
    from clip_m2df.training.module import CLIPM2DF

    shutil.copytree(TINY_CLIP, folder / "clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPM2DF(backbone="tiny", head_options={"hidden_dim": 8, "num_heads": 4})
    save_checkpoint(model, folder / "model.ckpt")
    for name in ("a.mp4", "b.mp4"):
        clips.render(folder / name, 6, size=(48, 32))
    (folder / "m.csv").write_text("path,label,split\na.mp4,run,train\nb.mp4,run,train\n", encoding="utf-8")
    settings = {"short_side": 24, "frames": 3, "workers": 1, "timeout": 60.0}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        cache_frames(manifest=folder / "m.csv", output=folder / "cache", **settings)  # type: ignore[arg-type]


def checkpoint(samples: Path, scratch: Path, rng: Rng) -> str:
    """A checkpoint, by ``CLIPM2DF.load_from_checkpoint``; damage to the file never ends in other weights."""
    from clip_m2df.training.module import CLIPM2DF

    file = scratch / "model.ckpt"
    whole = (samples / "model.ckpt").read_bytes()
    kind = rng.choice(["bytes", "bytes", "archive", "values"])
    if kind == "bytes":
        file.write_bytes(damage(rng, whole))
    elif kind == "archive":
        file.write_bytes(damaged_archive(rng, whole))
    else:
        content = torch.load(io.BytesIO(whole), weights_only=True)
        options = content["hyper_parameters"]
        chosen = rng.choice([content, options, options, options["backbone"]])
        for _ in range(rng.choice([1, 1, 2, 5])):
            alter(rng, chosen)
        torch.save(content, file)
    state = CLIPM2DF.load_from_checkpoint(file, map_location="cpu").state_dict()
    if kind == "bytes":
        right = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]
        assert all(torch.equal(state[name], weight) for name, weight in right.items()), "other weights"
    return f"read, {kind}"


def weights(samples: Path, scratch: Path, rng: Rng) -> str:
    """A folder in transformers' format with one file damaged, or its weights as a pickle, by ``CLIPBackbone.load``."""
    from safetensors.torch import load_file

    from clip_m2df.clip.backbone import CLIPBackbone

    folder = scratch / "clip"
    shutil.copytree(samples / "clip", folder)
    files = sorted(file.name for file in folder.iterdir() if file.suffix != ".md")
    name = rng.choice(files)
    file = folder / name
    if file.suffix == ".safetensors" and rng.random() < 0.5:
        state = load_file(file)
        file.unlink()
        whole = io.BytesIO()
        torch.save(state, whole, _use_new_zipfile_serialization=rng.random() < 0.8)
        as_archive = whole.getvalue().startswith(b"PK") and rng.random() < 0.5
        change = damaged_archive if as_archive else damage
        (folder / "pytorch_model.bin").write_bytes(change(rng, whole.getvalue()))
        name = "pytorch_model.bin"
    elif file.suffix == ".json" and rng.random() < 0.6:
        tree = json.loads(file.read_text(encoding="utf-8"))
        for _ in range(rng.choice([1, 1, 2, 5])):
            tree = alter(rng, tree)
        file.write_text(json.dumps(tree), encoding="utf-8")
    else:
        whole_bytes = file.read_bytes()
        header = 8 + int.from_bytes(whole_bytes[:8], "little") if file.suffix == ".safetensors" else len(whole_bytes)
        file.write_bytes(damage(rng, whole_bytes[:header], SCRAPS) + whole_bytes[header:])
    CLIPBackbone.load(str(folder)).tokenize(["a cat"])
    return f"read, {name}"


def save_tokenizers(folder: Path) -> None:
    """Write the folders of whole tokenizers, of the kinds that SentencePiece trains."""
    for name, (save, _) in TOKENIZERS.items():
        save(folder / name)


def tokenizer(samples: Path, scratch: Path, rng: Rng) -> str:
    """A folder with a tokenizer, or the same in a description, and texts for it; CLIP's is in the folder of weights."""
    name = rng.choice(sorted(TOKENIZERS))
    folder = scratch / name
    shutil.copytree(samples / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tower = TOKENIZERS[name][1] | {"vocab_size": len(content["model"]["vocab"])}
    file = folder / rng.choice(["tokenizer.json"] * 9 + ["tokenizer_config.json"])
    if rng.random() < 0.6:
        tree = json.loads(file.read_text(encoding="utf-8"))
        for _ in range(rng.choice([1, 1, 2, 5])):
            tree = alter(rng, tree)
        file.write_text(json.dumps(tree), encoding="utf-8")
    else:
        file.write_bytes(damage(rng, file.read_bytes(), SCRAPS))
    if rng.random() < 0.5:
        made = read_tokenizer(folder, tower, "it")
    else:
        made = saved_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8", errors="replace"), tower, "it")
    for tokens in encoded(made, ["", "A photo of\ta fox, jumping over", "\ufdfae\u0301\u0300" * 99, "</s><eos>"], "it"):
        assert len(tokens) == tower["max_position_embeddings"]
        assert all(0 <= token < tower["vocab_size"] for token in tokens), tokens
    return f"read, {name}"


def archive(samples: Path, scratch: Path, rng: Rng) -> str:
    """A TorchScript archive of OpenAI's class, by ``read_weights``; damage to the file never ends in other weights."""
    whole = (GOLDEN / "openai_archive.pt").read_bytes()
    kind = rng.choice(["bytes", "archive"])
    (scratch / "w.pt").write_bytes((damage if kind == "bytes" else damaged_archive)(rng, whole))
    program_classes(scratch / "w.pt")
    state = read_weights(scratch / "w.pt")
    if kind == "bytes":
        right = read_weights(GOLDEN / "openai_archive.pt")
        assert list(state) == list(right)
        assert all(torch.equal(state[name], weight) for name, weight in right.items()), "other weights"
    return f"read, {kind}"


# Features and frames that were kept


def features(samples: Path, scratch: Path, rng: Rng) -> str:
    """A file of a bank's features: what is damaged is not used."""
    from clip_m2df.evaluation.bank import FeatureStore

    store = FeatureStore(scratch, torch.nn.Linear(2, 2, bias=False).requires_grad_(False), "frames 2")
    kept = {f"{k}.mp4 1:2:3": torch.full((2, 4), float(k + 1)) for k in range(5)}
    store.write(kept)
    store.path.write_bytes(damage(rng, store.path.read_bytes(), (b"0", b"]", b'"', b"}", b"[" * 3000)))
    found = store.read()
    assert all(value.equal(kept[name]) for name, value in found.items()), "other features"
    return "read" if found else "refused"


def save_bundle(folder: Path) -> None:
    """Write the bundle of a few episodes."""
    from tests.evaluation.test_bank import episodes, make_head
    from tests.evaluation.test_bundle import predictions, with_more, write

    head, played = make_head(), with_more(episodes(9))
    predicted = {name: scores.argmax(-1) for name, scores in predictions(head, played, 0).items()}
    write(folder / "bundle", head, "m2df", played, predicted)


def bundle(samples: Path, scratch: Path, rng: Rng) -> str:
    """A bundle, read and replayed: damage is refused, and content of a right digest ends in a result or an error."""
    from clip_m2df.evaluation.bundle import read_bundle
    from tests.evaluation.test_bundle import parts, seal, sealed

    file, whole = scratch / "bundle", (samples / "bundle").read_bytes()
    kind = rng.choice(["bytes", "header", "facts", "tensors"])
    if kind == "bytes":
        file.write_bytes(damage(rng, whole))
        read_bundle(file)
        assert file.read_bytes() == whole, "damage that was not seen"
    elif kind == "header":
        end = 8 + int.from_bytes(whole[:8], "little")
        header = whole[8:100] + damage(rng, whole[100:end], (b"0", b"]", b'"', b"}", b"[" * 3000))
        file.write_bytes(sealed(len(header).to_bytes(8, "little") + header + whole[end:]))
    else:
        facts, tensors = parts(samples / "bundle")
        name = rng.choice(list(tensors))
        for _ in range(rng.choice([1, 1, 2, 5])):
            if kind == "facts":
                facts = alter(rng, facts)
                continue
            tensor = tensors.get(name, torch.zeros(0))
            content = bytearray(tensor.flatten().view(torch.uint8).numpy().tobytes())
            content[: len(content)] = damage(rng, bytes(content)).ljust(len(content), b"\xff")[: len(content)]
            changed = torch.frombuffer(content, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
            tensors[rng.choice([name, name, rng.choice(list(tensors))])] = changed.clone()
            name = rng.choice(list(tensors))
        seal(file, facts, tensors)
    read_bundle(file).replay()
    return f"read, {kind}"


def frames(samples: Path, scratch: Path, rng: Rng) -> str:
    """A shard of a frame cache: damage never ends in other frames."""
    from clip_m2df.video.frame_cache import DamagedCacheError, FrameCache

    (shard,) = (samples / "cache").iterdir()
    (scratch / shard.name).write_bytes(damage(rng, shard.read_bytes(), (b"0", b"]", b'"', b"}", b"[" * 3000)))
    opened = FrameCache.open(scratch, samples)
    outcomes = set()
    for name in ("a.mp4", "b.mp4"):
        right = FrameCache.open(samples / "cache", samples).read_frames(str(samples / name), range)
        try:
            found = opened.read_frames(str(samples / name), range)
        except DamagedCacheError:
            outcomes.add("refused")
            continue
        assert right is not None
        assert found is None or found[0].equal(right[0]), "other frames"
        outcomes.add("absent" if found is None else "read")
    return " and ".join(sorted(outcomes))


# Videos


def save_videos(folder: Path) -> None:
    """Write the whole videos and a folder of images."""
    size, b_frames = (48, 32), {"bf": "2", "g": "8"}
    fast = {"container_options": {"movflags": "faststart"}}
    clips.render(folder / "h264.mp4", 16, options=b_frames, size=size)
    clips.render(folder / "h264_faststart.mp4", 16, options=b_frames, size=size, **fast)  # type: ignore[arg-type]
    clips.render(folder / "h264.ts", 16, options=b_frames, size=size)
    clips.render(folder / "h264.mkv", 16, options=b_frames, size=size, audio=4)
    clips.render(folder / "vp9.webm", 16, "libvpx-vp9", options={"cpu-used": "8", "g": "8"}, size=size)
    clips.render(folder / "vp8.webm", 16, "libvpx", size=size)
    clips.render(folder / "asp.avi", 16, "mpeg4", options=b_frames, size=size)
    (folder / "images").mkdir()
    for k, suffix in enumerate((".jpg", ".jpg", ".png", ".webp", ".bmp")):
        clips.save_image(folder / "images" / f"{k}{suffix}", k, size=size)


def video(samples: Path, scratch: Path, rng: Rng) -> str:
    """A video or a folder of images, through ``ClipReader`` and ``probe``."""
    source = rng.choice(sorted(samples.iterdir()))
    path = scratch / source.name
    if source.is_dir():
        shutil.copytree(source, path)
        for image in path.iterdir():
            if rng.random() < 0.4:
                image.write_bytes(damage(rng, image.read_bytes()))
    else:
        path.write_bytes(damage(rng, source.read_bytes()))
    draws = torch.rand(11, generator=torch.Generator().manual_seed(rng.randrange(1 << 31)))
    clip, length = ClipReader(8, 32, 32, flip=True).read(str(path), draws if rng.random() < 0.5 else None)
    assert (clip.shape, clip.dtype) == ((8, 3, 32, 32), torch.uint8)
    assert length > 0
    if not path.is_dir():
        probe(str(path))
    return f"read, {source.name}"


# Runs

Attempt = Callable[[Path, Path, Rng], str]
KINDS: dict[str, tuple[Attempt, Callable[[Path], None] | None]] = {
    "config": (config, None),
    "checkpoint": (checkpoint, save_samples),
    "weights": (weights, save_samples),
    "tokenizer": (tokenizer, save_tokenizers),
    "archive": (archive, None),
    "features": (features, None),
    "bundle": (bundle, save_bundle),
    "frames": (frames, save_samples),
    "video": (video, save_videos),
}


def _work(task: tuple[str, str, int, int]) -> str:
    """What becomes of one input, in a process that may be lost."""
    kind, samples, seed, number = task
    _confine()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return KINDS[kind][0](Path(samples), Path(scratch), Rng(f"{kind} {seed} {number}"))
        except UserError:
            return "refused"
        except BaseException:  # Rust's panics are no exceptions
            return f"{BUG} in {kind}, seed {seed}, input {number}:\n{traceback.format_exc()}"


@cache
def _confine() -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def fuzz(kind: str, *, seed: int, inputs: int, workers: int = 1, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Read damaged inputs.

    Args:
        kind: A key of ``KINDS``.
        seed: Of all inputs.
        inputs: How many.
        workers: Processes.
        first: The number of the first input.

    Returns:
        How often each outcome came, and what should not have come: other errors, crashes, hangs.
    """
    outcomes: Counter[str] = Counter()
    bugs: list[str] = []
    with tempfile.TemporaryDirectory() as samples:
        if prepare := KINDS[kind][1]:
            prepare(Path(samples))
        tasks = [(kind, samples, seed, number) for number in range(first, first + inputs)]
        for task, result in isolated_map(_work, tasks, workers=workers, timeout=TIMEOUT):
            if isinstance(result, Unreadable) or result.startswith(BUG):
                outcomes["lost" if isinstance(result, Unreadable) else BUG] += 1
                bugs.append(f"input {task[3]}: {result}")
                print(bugs[-1], file=sys.stderr, flush=True)
            else:
                outcomes[result] += 1
    return outcomes, bugs


def main() -> int:
    """Fuzz from the command line; 1 if anything but a result or a ``UserError`` came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    outcomes, bugs = fuzz(**vars(options))
    print(f"{options.kind}, seed {options.seed}, inputs {options.first} to {options.first + options.inputs - 1}:")
    for outcome, count in outcomes.most_common():
        print(f"  {count:7} {outcome}")
    return int(bool(bugs))


if __name__ == "__main__":
    sys.exit(main())
