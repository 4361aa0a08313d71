"""``clip-m2df demo``: the embedded benchmark from rendering to a table of accuracies, in minutes on two cores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from clip_m2df.commands.configs import find_config
from clip_m2df.commands.trainer import run
from clip_m2df.datasets.manifest import Manifest, Split, Video
from clip_m2df.episodes.plan import EpisodeShape, plan_episode
from clip_m2df.errors import UserError
from clip_m2df.evaluation.features import Scorer, encode_clips, play_episodes
from clip_m2df.motion_shapes import render, shared_appearance_classes
from clip_m2df.nn.baselines import OTAMHead
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.transforms import ClipReader

CONFIG = "demo_5way1shot.yaml"


# Tells a demo's folder, which the next one may replace, from a run that somebody wants to keep.
MARKER = ".demo"


def run_demo(output: Path, episodes: int, overrides: Sequence[str] = ()) -> None:
    """Render, train, and print one table over shared test episodes.

    Args:
        output: folder of the run; an earlier demo's there is replaced.
        episodes: test episodes of each cell.
        overrides: further options of ``fit``.

    Raises:
        UserError: ``output`` is there and is no earlier demo's.
    """
    if episodes < 2:
        raise UserError(f"episodes {episodes}: an interval needs at least 2")
    if output.exists() and not (output / MARKER).is_file():
        raise UserError(f"{output} is there already, and no earlier demo; give another --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    started = time.perf_counter()
    console = Console()

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
    data = fit.datamodule
    assert data.manifest is not None
    console.print(compare(before, after, data.manifest, data.reader, data.eval_shape, episodes, data.eval_seed))
    tested = time.perf_counter()
    console.print(
        f"rendering {rendered - started:.0f} s, training {trained - rendered:.0f} s, testing {tested - trained:.0f} s;"
        f" the run is in {output}"
    )


def compare(
    before: CLIPM2DF,
    after: CLIPM2DF,
    manifest: Manifest,
    reader: ClipReader,
    shape: EpisodeShape,
    episodes: int,
    seed: int,
) -> Table:
    """A table of accuracies on the same test episodes: OTAM on raw features, the head before and after training.

    Args:
        before: the model with the weights that training started from.
        after: the model after it; its tower may have been trained too.
        manifest: the benchmark's.
        reader: how videos are read.
        shape: of the episodes.
        episodes: how many.
        seed: of the episodes.
    """
    everything = manifest.split("test")
    shared = _restrict(everything, shared_appearance_classes("test"))
    columns = {f"all {len(everything.class_names)} classes": everything}
    columns[f"the {len(shared.class_names)} that share their appearance"] = shared

    videos = [video for row in everything.videos for video in row]
    places = {video.path: place for place, video in enumerate(videos)}
    clips = torch.cat(list(_read_clips(videos, reader)))
    features = {model: encode_clips(model.model, clips.split(64)) for model in (before, after)}
    otam = OTAMHead(dim=before.model.backbone.dim)
    rows: list[tuple[str, CLIPM2DF, Scorer]] = [
        ("OTAM on the tower's features", before, lambda *inputs: otam(*inputs).logits),
        ("CLIP-M²DF before training", before, lambda *inputs: before.model.head(*inputs).logits),
        ("CLIP-M²DF after training", after, lambda *inputs: after.model.head(*inputs).logits),
    ]
    title = f"{shape.n_way}-way {shape.n_shot}-shot, accuracy in % over {episodes} episodes of classes never trained on"
    table = Table("", *columns, title=title, title_justify="left")
    for name, model, scorer in rows:
        cells = []
        for split in columns.values():
            plans = [plan_episode(split, shape, seed=seed, episode=i) for i in range(episodes)]
            result = play_episodes(
                scorer,
                features[model],
                model.encode_prompts(split.class_texts),
                support=_places([plan.support for plan in plans], places),
                query=_places([plan.query for plan in plans], places),
                classes=torch.tensor([plan.classes for plan in plans]),
            )
            cells.append(f"{100 * result['accuracy']:.1f} ± {100 * result['interval']:.1f}")
        table.add_row(name, *cells)
    return table


def _restrict(split: Split, labels: Sequence[str]) -> Split:
    """The same split with these classes only."""
    kept = [place for place, name in enumerate(split.class_names) if name in labels]
    return Split(
        split.name,
        tuple(split.class_names[place] for place in kept),
        tuple(split.class_texts[place] for place in kept),
        tuple(split.videos[place] for place in kept),
    )


def _read_clips(videos: Sequence[Video], reader: ClipReader) -> Iterator[Tensor]:
    for video in track(videos, "Reading test videos", transient=True):
        yield reader.read(video.path)[0].unsqueeze(0)


def _places(rows: Sequence[tuple[tuple[Video, ...], ...]], places: dict[str, int]) -> Tensor:
    return torch.tensor([[[places[video.path] for video in row] for row in episode] for episode in rows])
