"""``clip-m2df demo``: the embedded benchmark from rendering to a table of accuracies, in minutes on two cores."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track
from rich.table import Table

from clip_m2df.commands.configs import find_config
from clip_m2df.errors import UserError, console, require, say
from clip_m2df.files import locked, locked_folder

if TYPE_CHECKING:
    from clip_m2df.episodes.datamodule import EpisodeDataModule
    from clip_m2df.training.module import CLIPM2DF

CONFIG = "demo_5way1shot.yaml"
# Tells a demo's folder, which the next one may replace, from a run that somebody wants to keep.
MARKER = ".demo"


def run_demo(*overrides: str, output: Path = Path("runs/demo"), episodes: int = 2000) -> None:
    """Render the embedded benchmark, train on it, and print a table of accuracies over shared test episodes.

    Args:
        *overrides: Further options of ``fit``.
        output: Folder of the run, replaced if an earlier demo made it.
        episodes: Test episodes of each row.

    Raises:
        UserError: ``output`` is there and is no earlier demo's, or there are too few episodes for an interval.
    """
    require(least=2, episodes=episodes)
    if output.exists() and not (output / MARKER).is_file():
        raise UserError(f"{output} is there already, and no earlier demo; give another --output")
    with locked(output / MARKER, "demo", output) as marker:
        marker.write("" if os.fstat(marker.fileno()).st_size else "made by clip-m2df demo, which replaces it\n")
        with locked_folder(output, "run folder"):
            for entry in output.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name not in (MARKER, ".lock"):
                    entry.unlink()
        _run_demo(overrides, output, episodes)


def _run_demo(overrides: Sequence[str], output: Path, episodes: int) -> None:
    import lightning
    import torch

    from clip_m2df.commands.trainer import run
    from clip_m2df.motion_shapes import render
    from clip_m2df.training.module import CLIPM2DF

    started = time.perf_counter()
    render()
    rendered = time.perf_counter()
    # One device: Lightning would start the whole command anew for each further one.
    fixed = [f"--trainer.default_root_dir={output}", "--trainer.devices=1"]
    fit = run(["fit", "--config", str(find_config(CONFIG)), *fixed, *overrides])
    trained = time.perf_counter()

    config = fit.config["fit"]
    after = CLIPM2DF.load_from_checkpoint(output / "checkpoints" / "best.ckpt", map_location="cpu").eval()
    lightning.seed_everything(config.seed_everything, verbose=False)
    before = CLIPM2DF(**config.model.as_dict()).eval()
    with torch.no_grad():
        console().print(compare(before, after, fit.datamodule, episodes))
    tested = time.perf_counter()
    say(
        f"rendering {rendered - started:.0f} s, training {trained - rendered:.0f} s, testing {tested - trained:.0f} s;"
        f" the run is in {output}"
    )


def compare(before: CLIPM2DF, after: CLIPM2DF, data: EpisodeDataModule, episodes: int) -> Table:
    """A table of accuracies on the same test episodes: OTAM on raw features, the head before and after training.

    Args:
        before: The model with the weights that training started from.
        after: The model after it; its tower may have been trained too.
        data: The benchmark, and what its test episodes are.
        episodes: How many.
    """
    import torch

    from clip_m2df.datasets.manifest import Split
    from clip_m2df.episodes.dataset import EpisodeDataset
    from clip_m2df.episodes.features import EvaluationTable
    from clip_m2df.episodes.loader import UnusableVideos
    from clip_m2df.evaluation.bank import EpisodeBank
    from clip_m2df.evaluation.metrics import EpisodeAccuracy
    from clip_m2df.motion_shapes import shared_appearance_classes
    from clip_m2df.nn.baselines import OTAMHead

    assert data.manifest is not None
    every, shape = data.manifest.split("test"), data.eval_shape
    shared = [c for c, name in enumerate(every.class_names) if name in shared_appearance_classes("test")]
    fields: tuple[tuple[Any, ...], ...] = (every.class_names, every.class_texts, every.videos)
    splits = {
        f"all {len(every.class_names)} classes": every,
        f"the {len(shared)} that share their appearance": Split("test", *(tuple(f[c] for c in shared) for f in fields)),
    }
    paths = [video.path for of_class in every.videos for video in of_class]
    frames = torch.stack([data.reader.read(path)[0] for path in track(paths, "Reading test videos", transient=True)])
    rows = {
        "OTAM on the tower's features": (before, OTAMHead(dim=before.model.backbone.dim)),
        "CLIP-M²DF before training": (before, before.model.head),
        "CLIP-M²DF after training": (after, after.model.head),
    }
    title = f"{shape.n_way}-way {shape.n_shot}-shot, accuracy in % over {episodes} episodes of classes never trained on"
    table = Table("", *splits, title=title, title_justify="left")
    for name, (model, head) in rows.items():
        features = torch.cat([model.model.encode_frames(batch) for batch in frames.split(64)])
        cells = []
        for split in splits.values():
            dataset = EpisodeDataset(split, shape, data.reader, seed=data.eval_seed, augment=False)
            videos = EvaluationTable(dataset, episodes, UnusableVideos(split, 0.0))
            played, prompts = videos.episodes(range(episodes)), model.encode_prompts(split.class_texts)
            bank = EpisodeBank(head, features[[paths.index(v.path) for v in videos.videos]], prompts, played)
            accuracy = EpisodeAccuracy()
            for numbers in torch.arange(episodes).split(64):
                accuracy.update(bank.play(numbers).logits.argmax(-1) == played["query_labels"][numbers])
            result = accuracy.compute()
            cells.append(f"{100 * result['accuracy']:.1f} ± {100 * result['interval']:.1f}")
        table.add_row(name, *cells)
    return table
