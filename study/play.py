"""One run of the study: a training and its tests, through the package's own Trainer, module, data and metrics."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import logging
import math
import platform
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml

import clip_m2df
from clip_m2df import CLIPM2DF, EpisodeDataModule
from clip_m2df.commands.configs import find_config
from clip_m2df.evaluation.evidence import Played
from clip_m2df.files import whole_file
from clip_m2df.motion_shapes import Knobs, render
from study.results import CLEAN, METRICS, ON_VAL, SHARES, Outcome, Point, Record
from study.settings import Run, Settings, config_name, knobs_of, told

PACKAGES = ("clip-m2df", "torch", "lightning", "transformers", "peft", "numpy", "av")
# The Trainer's options that say where a run leaves its files: here it leaves none.
OF_FILES = ("default_root_dir", "log_every_n_steps")


class Curve(lightning.Callback):
    """Keeps the accuracies of all validations."""

    def __init__(self) -> None:
        self.points: list[Point] = []

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep this one's."""
        episodes = trainer.global_step * trainer.datamodule.episodes_per_step  # type: ignore[attr-defined]
        self.points.append(Point(episodes, round(float(trainer.callback_metrics["val/accuracy"]), 5)))


class Counts(lightning.Callback):
    """Keeps how many queries of each test episode were classified rightly."""

    def __init__(self) -> None:
        self.correct: list[int] = []

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        played: Played = outputs
        self.correct += (played.scores.argmax(-1) == played.episode["query_labels"]).sum(-1).tolist()


def play(run: Run, settings: Settings, store: Path) -> list[Record]:
    """Train and test.

    Args:
        run: which.
        settings: the study's.
        store: a folder for what other runs may need: features of videos, and weights by what they depend on.

    Returns:
        Its records: one of each row that is tested from its weights, for each number of shots.
    """
    started = time.perf_counter()
    part = settings.parts[run.part]
    # Before the files are read again: what changes meanwhile must not be taken for what was run.
    common = {name: getattr(run, name) for name in ("part", "purpose", "family", "seed", "lr")}
    common |= {"versions": versions(), "settings": run.digest(settings)}
    model, _, curve = trained(run, settings, store)
    records, rows = [], run.rows(settings)
    for n_shot, row in run.tested(settings):
        # It was validated with the first number of shots.
        own = tuple(curve) if row == run.row and n_shot == part.n_shots[0] else ()
        options, tests = rows[row], run.tests(settings, row)
        config = configuration(run, settings, store, {**options, "data.n_shot": n_shot})
        if options:
            as_told = CLIPM2DF(**config["model"])
            as_told.load_state_dict(model.state_dict())
        outcomes = {name: _test(as_told if options else model, config, further) for name, further in tests.items()}
        records.append(
            Record(
                **common,
                row=row,
                n_shot=n_shot,
                command=run.command(settings, n_shot),
                test_command=run.test_command(settings, n_shot, row),
                seconds=round(time.perf_counter() - started, 1),
                curve=own,
                tests=outcomes,
                weights_of=run.row if options else None,
            )
        )
        started = time.perf_counter()
    return records


def trained(run: Run, settings: Settings, store: Path) -> tuple[CLIPM2DF, dict[str, Any], list[Point]]:
    """The model of a run after its training, if it has anything to train, its config and its validations."""
    _be_quiet()
    kept = store / f"{run.training(settings)}-{versions()['source']}.pt"
    config = configuration(run, settings, store)
    lightning.seed_everything(config["seed_everything"], verbose=False)
    model = CLIPM2DF(**config["model"])
    return model, config, _train(model, config, kept) if settings.parts[run.part].trains(run.row) else []


def _train(model: CLIPM2DF, config: Mapping[str, Any], kept: Path) -> list[Point]:
    """Train, unless another run has kept the weights that this would give."""
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["weights"])
        return [Point(*point) for point in state["curve"]]
    curve = Curve()
    _trainer(config["trainer"], curve).fit(model, datamodule=EpisodeDataModule(**config["data"]))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(kept, "training") as draft:
        points = [(point.episodes, point.accuracy) for point in curve.points]
        torch.save({"weights": model.state_dict(), "curve": points}, draft)
    return curve.points


def configuration(
    run: Run, settings: Settings, store: Path, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config of a run's command as a tree, with features that heads train on in ``store``; ``options`` on top."""
    name = config_name(run.family, settings.parts[run.part].n_shots[0])
    config: dict[str, Any] = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
    everything = run.options(settings)
    if everything.get("data.train_augmentations", config["data"].get("train_augmentations")):
        # A folder each for what one process encodes: several would overwrite each other's features.
        everything["data.store"] = str(store / "features" / f"{config['data']['manifest']}_seed{run.seed}")
    # Runs share the cores already.
    return _with(config, {**everything, **(options or {}), "data.num_workers": 0})


def _with(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A config with options on top, such as ``data.n_shot``."""
    changed = copy.deepcopy(dict(config))
    for option, value in options.items():
        node = changed
        *path, last = option.split(".")
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return changed


def _trainer(options: Mapping[str, Any], *callbacks: lightning.Callback) -> lightning.Trainer:
    kept = {name: value for name, value in options.items() if name not in OF_FILES}
    return lightning.Trainer(
        **kept | {"accelerator": "cpu", "devices": 1},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _test(model: CLIPM2DF, config: Mapping[str, Any], further: Mapping[str, Any]) -> Outcome:
    """Test with further options; where there are unknown queries, also on val, which chooses their score."""
    counts = Counts()
    trainer = _trainer(config["trainer"], counts)
    options = _with(config, further)["data"]
    if "store" in options:
        # A folder for each rendering.
        knobs = ",".join(f"{knob}={level}" for knob, level in knobs_of(further).items())
        options["store"] = str(Path(options["store"]).with_name(f"{options['manifest']}_{knobs or CLEAN}"))
    data = EpisodeDataModule(**options)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    of_test = {name.removeprefix("test/"): round(value, 5) for name, value in found.items() if not math.isnan(value)}
    metrics = {name: value for name, value in of_test.items() if name.startswith(METRICS)}
    if options.get("unknown_queries"):
        (found,) = trainer.validate(model, datamodule=data, verbose=False)
        metrics |= {name: round(value, 5) for name, value in found.items() if name.startswith(ON_VAL)}
    shares = {name: of_test[name] for name in SHARES if name in of_test}
    n_queries = data.eval_shape.n_way * data.eval_shape.n_query
    return Outcome("".join(map(str, counts.correct)), n_queries, **shares, metrics=metrics, options=told(further))


@functools.cache
def versions() -> dict[str, str]:
    """Of the packages on which a number may depend, and a digest of this one's source."""
    package = Path(clip_m2df.__file__).parent
    source = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        source.update(file.read_bytes())
    known = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **known, "source": source.hexdigest()[:12]}


def render_videos(settings: Settings) -> None:
    """Render all videos that the study needs."""
    for part in settings.parts.values():
        for family, row in itertools.product(part.families, part.rows):
            render(family=family)
            for options in part.tests(row).values():
                render(family=family, knobs=Knobs(**knobs_of(options)))


def encode_videos(run: Run, settings: Settings, store: Path, test: str) -> None:
    """Encode the videos of a training with the frozen tower, or those of a test, for all runs that need them."""
    _be_quiet()
    config = configuration(run, settings, store)
    model = CLIPM2DF(**config["model"])
    if test:
        for n_shot in settings.parts[run.part].n_shots:
            config["data"]["n_shot"] = n_shot
            _test(model, config, settings.parts[run.part].tests(run.row)[test])
    else:
        data = EpisodeDataModule(**config["data"])
        _trainer(config["trainer"] | {"max_steps": 1}).fit(model, datamodule=data)


def _be_quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*in eval mode at the start.*", ".*sync_dist.*"):
        warnings.filterwarnings("ignore", message=message)
