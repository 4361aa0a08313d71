"""What a run of the command line shows and leaves in its folder: progress, configuration, tables of an evaluation."""

import csv
import enum
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import lightning
import torch
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.table import Table
from torch import Tensor

from clip_m2df.episode import TableEpisodes, of_all_ranks
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.errors import UserError, console, ended_by_sigterm, require, say, some
from clip_m2df.evaluation.bank import EpisodeBank, encode_videos
from clip_m2df.evaluation.bundle import Facts, check_bundle, write_bundle
from clip_m2df.evaluation.conformal import MOST_CLIPS, N_SHOTS, least_error
from clip_m2df.evaluation.evidence import Played
from clip_m2df.evaluation.metrics import OPEN_SET, class_results
from clip_m2df.evaluation.open_set import MEASURES, SCORES, best_score
from clip_m2df.files import for_spreadsheet, read_text, sha256_of, write_table, write_text, writing
from clip_m2df.loops import logs_step, number_steps
from clip_m2df.nn.baselines import head_class, options_of
from clip_m2df.training.checkpoints import RunCheckpoint, RunCheckpointIO, read_checkpoint
from clip_m2df.training.module import CLIPM2DF


class RunProgressBar(RichProgressBar):
    """Counts a training's optimiser steps to the end of the run; Lightning's own counts batches."""

    @property
    def total_train_batches(self) -> int | float:
        """Optimiser steps of the run, those before a resume included."""
        most = self.trainer.max_steps if self.trainer.max_steps > 0 else math.inf
        steps = min(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches, most)
        return steps if math.isinf(steps) else math.ceil(steps)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the optimiser steps that have been made."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


# What a callback's own default may be, such as that of Timer.
yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))


class RunConfig(SaveConfigCallback):
    """Writes the configuration of a run into its folder, not beside a logger's files, once the run has started.

    A run that is refused at its start leaves the configuration of the one before as it was.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save it."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write ``<run folder>/config.yaml``, and give the loggers the whole configuration."""
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
        config = self.config.clone()
        config.ckpt_path = None  # the run's, not that of whoever starts from its configuration
        path = Path(trainer.default_root_dir) / "config.yaml"
        write_text(path, "config", self.parser.dump(config, skip_unset=False))


class RunLogger(CSVLogger):
    """Writes metrics as Lightning's ``CSVLogger`` does, and goes on with the file of a run that goes on.

    Args:
        save_dir: see ``CSVLogger``.
        first: the optimiser steps that were made before; what the file has of later ones, which come anew, goes.
        **options: of ``CSVLogger``.
    """

    def __init__(self, save_dir: str | Path, *, first: int, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self.first = first

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the files."""
        if self._experiment is None:
            self._experiment = _MetricsFile(Path(self.log_dir), self.first)  # type: ignore[assignment]
        return self._experiment

    def finalize(self, status: str) -> None:
        """Write what is left; where a run failed, that has been said, and a full disk is not a further error."""
        with suppress(*[] if status == "success" else [UserError]):
            super().finalize(status)


class _MetricsFile:
    """``metrics.csv`` and ``hparams.yaml``: the whole of them is there at any moment, on a full disk too."""

    def __init__(self, folder: Path, first: int) -> None:
        self.path = folder / "metrics.csv"
        self.hparams: dict[str, Any] = {}
        self._first = first
        self._new: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file, once this has written it

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Add hyper-parameters to those of the run so far, and write all."""
        path = self.path.with_name("hparams.yaml")
        if self._first and not self.hparams and path.exists():
            with suppress(UserError, yaml.YAMLError):
                self.hparams |= yaml.safe_load(read_text(path, "hyper-parameters")) or {}
        self.hparams |= params
        text = yaml.safe_dump(yaml.safe_load(yaml.dump(self.hparams)))
        write_text(path, "hyper-parameters", text)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take a row."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._new.append(values | {"step": step})

    def save(self) -> None:
        """Write the rows that were taken since the last time.

        Raises:
            UserError: They can't be written; what was written before still is there.
        """
        if not self._new:
            return
        if self._columns is None or not set().union(*self._new) <= set(self._columns):
            self._write_all()
        else:
            self._append([[row.get(column, "") for column in self._columns] for row in self._new])
        self._new = []

    def _write_all(self) -> None:
        rows = [*self._kept(), *self._new]
        columns = sorted(set().union(*rows))
        write_table(self.path, "metrics", [columns, *([row.get(column, "") for column in columns] for row in rows)])
        self._columns = columns

    def _append(self, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with writing(self.path, "metrics"), self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            left = text.getvalue().encode()
            try:
                while left:
                    left = left[file.write(left) or 0 :]
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise

    def _kept(self) -> list[dict[str, Any]]:
        """The rows that the file has; of a run that goes on, those of steps that don't come anew."""
        if not self.path.exists() or (self._columns is None and not self._first):
            return []
        header, *rows = csv.reader(io.StringIO(read_text(self.path, "metrics"))) or [[]]
        kept = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]  # else it was cut short
        kept = [{column: value for column, value in row.items() if value} for row in kept]
        if self._columns is not None:
            return kept
        again = {(str(row["step"]), *sorted(row)) for row in self._new}  # a validation that is made up for
        kept = [row for row in kept if row.get("step", "").isdecimal() and int(row["step"]) < self._first]
        return [row for row in kept if (row["step"], *sorted(row)) not in again]


def logger_of_run(logger: Any, command: str, first: int = 0) -> Any:
    """What logs a command, in the place of a logger that a person has chosen.

    A run has one version of a logger's files: ``fit`` makes it, and goes on with it; ``test`` and ``validate`` leave a
    CSV file to the training and write their numbers into the run's folder.

    Args:
        logger: The logger.
        command: ``fit``, ``validate`` or ``test``.
        first: Optimiser steps that were made before the training goes on.

    Returns:
        The logger, or another in its place; None for none.
    """
    if not isinstance(logger, CSVLogger | TensorBoardLogger):
        return logger
    if isinstance(logger, CSVLogger) and command != "fit":
        return None
    if logger._version is None and (first or command != "fit"):
        logger._version = _latest_version(Path(logger.root_dir))
    if isinstance(logger, TensorBoardLogger):
        if first:
            logger._kwargs.setdefault("purge_step", first)
    elif type(logger) is CSVLogger:
        options = {"prefix": logger._prefix, "flush_logs_every_n_steps": logger._flush_logs_every_n_steps}
        return RunLogger(logger.save_dir, name=logger.name, version=logger._version, first=first, **options)
    return logger


def _latest_version(folder: Path) -> int | None:
    """The latest version that a training has written; earlier versions of this package made some for tests, too."""
    found = []
    for path in folder.glob("version_*"):
        number = path.name.removeprefix("version_")
        if number.isdecimal() and path.is_dir():
            metrics = path / "metrics.csv"
            header = read_text(metrics, "metrics").partition("\n")[0] if metrics.is_file() else ""
            found.append(("train/" in header, "test/" not in header, int(number)))
    return max(found)[2] if found else None


# What the table of several manifests shows beside the accuracy, of what was counted.
_SHOWN = {
    "twin_share": "queries with a twin",
    "accuracy_without_twins": "accuracy without twins",
    "auroc/distance": "AUROC (distance)",
    "oscr/distance": "OSCR",
    "fpr95/distance": "FPR95",
}


class RunReport(lightning.Callback):
    """Writes what an evaluation says of the classes into the run's folder, and prints the hardest ones.

    In training it lets all ranks know of the videos that one of them found unusable, as often as the Trainer logs.

    Args:
        several: whether several manifests are tested, one after the other: then one table is printed of all.
    """

    def __init__(self, several: bool = False) -> None:
        self.several = several
        self._tested: list[dict[str, Any]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Number what is logged by the steps of the whole run."""
        number_steps(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let ranks know of each other's unusable videos."""
        if logs_step(trainer, batch_idx):
            trainer.datamodule.share_unusable()  # type: ignore[attr-defined]

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write ``test_metrics.csv``, ``test_classes.csv`` and ``test_confusion.csv``."""
        self._write("test", trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write ``val_metrics.csv``, ``val_classes.csv`` and ``val_confusion.csv`` where that is all there is to do."""
        if trainer.state.fn == "validate":
            self._write("val", trainer, pl_module)

    def _write(self, split: str, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        evaluated, data = getattr(pl_module, "evaluated", None), trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or evaluated is None:
            return
        folder = Path(trainer.default_root_dir)
        classes = data.manifest.split(split).class_names
        if split == "test":
            split = str(pl_module.test_name)
        numbers = {name: float(value) for name, value in evaluated.numbers.items()}
        rows = [[f"{split}/{name}", repr(value)] for name, value in numbers.items()]
        write_table(folder / f"{split}_metrics.csv", "table", [["metric", "value"], *rows])
        files = [folder / f"{split}_metrics.csv"]
        if evaluated.confusion.numel():
            confusion = evaluated.confusion.cpu()
            files += write_report(folder, split, classes, confusion)
            if not self.several:
                console().print(hardest_classes(classes, confusion))
        shape, queries = data.eval_shape, int(evaluated.confusion.sum())
        episodes = queries // (shape.n_way * shape.n_query)
        if self.several:
            told = {"name": split, "manifest": data.manifest_path, "classes": len(classes), "episodes": episodes}
            self._tested.append(told | numbers)
        else:
            played = f"{episodes} {'grouped ' if shape.grouped else ''}episodes"
            console().print(result_table(split, numbers, f"{played}, {shape.n_way}-way {shape.n_shot}-shot"))
        if numbers.keys() & {*OPEN_SET} and not self.several:
            # A validation chooses now; a test has what the training's own chose, where that was asked.
            calibration = getattr(pl_module, "calibration", None)  # other people's modules have none
            own = {score: numbers[f"auroc/{score}"] for score in SCORES}
            of_val = own if split == "val" else {} if calibration is None else calibration.aurocs
            chosen = best_score(of_val) if of_val else ""
            console().print(open_set_table(numbers, f"{shape.n_unknown} unknown queries an episode", chosen))
            if of_val:
                say(chosen_score(of_val))
        say(f"all numbers and classes are in {some(map(str, files))}")

    def summarise(self, trainer: lightning.Trainer) -> None:
        """Print the table of several manifests, and write ``test_manifests.csv``, with all numbers of each."""
        if not self._tested:
            return
        names = list(dict.fromkeys(itertools.chain(*self._tested)))
        rows = [
            [for_spreadsheet(cell) if isinstance(cell := row.get(name, ""), str) else cell for name in names]
            for row in self._tested
        ]
        path = Path(trainer.default_root_dir) / "test_manifests.csv"
        write_table(path, "table", [names, *rows])
        shown = [name for name in _SHOWN if name in names]
        shape = trainer.datamodule.eval_shape  # type: ignore[attr-defined]
        title = f"{shape.n_way}-way {shape.n_shot}-shot"
        headings = "manifest", "classes", "episodes", "test/accuracy", *(_SHOWN[name] for name in shown)
        table = Table(*headings, title=title, title_justify="left")
        for row in self._tested:
            accuracy, interval = (100 * row.get(name, math.nan) for name in ("accuracy", "interval"))
            facts = (str(row[name]) for name in headings[:3])
            cells = (f"{100 * row[name]:.1f} %" if name in row else "" for name in shown)
            table.add_row(*facts, f"{accuracy:.1f} ± {interval:.1f} %", *cells)
        console().print(table)
        say(f"all numbers are in {path}")


class Calibrator(lightning.Callback):
    """Ends a training by calibrating its checkpoints, the best and the last.

    Args:
        n_shots: numbers of examples of a class; with none nothing is calibrated.
    """

    def __init__(self, n_shots: Sequence[int] = N_SHOTS) -> None:
        require(least=1, **{f"n_shots[{i}]": number for i, number in enumerate(n_shots)})
        self.n_shots = n_shots

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Calibrate, in the process of rank 0."""
        kept = next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None)
        if not self.n_shots or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if kept is None or not kept.last_model_path:
            return
        if not trainer.limit_val_batches:
            return
        best = kept.best_model_path if kept.best_model_score is not None else ""
        files = [path for path in (best, kept.last_model_path) if path]
        try:
            calibrate_checkpoints(trainer, cast(CLIPM2DF, pl_module), trainer.datamodule, files, self.n_shots)  # type: ignore[attr-defined]
        except UserError as error:  # the training itself is worth more
            say(f"clip-m2df: warning: the checkpoints have no calibration: {error}", error=True)


def calibrate_checkpoints(
    trainer: lightning.Trainer, model: CLIPM2DF, data: EpisodeDataModule, files: Sequence[str], n_shots: Sequence[int]
) -> None:
    """Calibrate the models in checkpoints on val, and put what comes of it into their files.

    Args:
        trainer: of the run.
        model: its weights are replaced by those of the checkpoints.
        data: has the val split.
        files: the checkpoints.
        n_shots: numbers of examples of a class.

    Raises:
        UserError: the videos can't be read or are too few, or a file can't be written.
    """
    model.to(trainer.strategy.root_device).eval()
    features, found = None, {}
    with ended_by_sigterm(f"the training is whole in {files[-1]}; validate --calibrate calibrates it"):
        table = data.calibration_table(MOST_CLIPS)
        if table is None:
            return
        for file in files:
            checkpoint = read_checkpoint(file)
            if (step := checkpoint.get("global_step")) not in found:
                model.load_state_dict(checkpoint["state_dict"])
                if features is None or not model.model.freeze_backbone:
                    features = encode_videos(model.model, table, [])
                rows: list[list[int]] = [[] for _ in table.dataset.split.class_names]
                number = {label: c for c, label in enumerate(table.dataset.split.class_names)}
                for index in table.named([]):
                    rows[number[table.videos[index].label]].append(index)
                prompts = model.encode_prompts(table.dataset.split.class_texts)
                found[step] = model.calibrate(features, prompts, rows, n_shots)
            if (calibration := found[step]) is not None:
                checkpoint["calibration"] = calibration.state()
                RunCheckpointIO().save_checkpoint(checkpoint, file)
    if calibration is None:
        raise UserError(
            f"sets of labels can't be calibrated for {', '.join(map(str, sorted({*n_shots})))} examples: no two classes"
            f" of val have {min(n_shots) + 1} videos that can be read and are cut from different sources; add videos to"
            " val, or calibrate for fewer examples"
        )
    left_out = sorted({*n_shots} - {*calibration.n_shots})
    missing = f"; val has too few videos of a class for {', '.join(map(str, left_out))}" if left_out else ""
    least = least_error(int(calibration.settings[:, 2].min()))
    say(
        f"sets of labels are calibrated on val for {calibration}{missing}; predict --error gives them, with a promise"
        f" for rates from {least:g} on"
    )
    if best := next(c.aurocs for c in found.values() if c is not None):
        say(chosen_score(best))


class BundleWriter(lightning.Callback):
    """Writes a test as a file that others can replay, see :mod:`clip_m2df.evaluation.bundle`.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start anew.

        Raises:
            UserError: the bundle could not be written, or not be replayed.
        """
        if trainer.datamodule.evaluation != "bank":  # type: ignore[attr-defined]
            raise UserError(
                "--bundle keeps the features of each video once, as a bank has them: give --data.evaluation bank"
            )
        check_bundle(self.path, str(trainer.precision))
        self._predicted: dict[int, dict[str, Tensor]] = {}
        self._bank: EpisodeBank | None = None
        self._block = 1

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep what was predicted."""
        if isinstance(batch, TableEpisodes) and isinstance(outputs, Played):
            scores = {"predicted": outputs.scores}
            if outputs.unknown is not None:
                scores["unknown_predicted"] = outputs.unknown
            predicted = {name: of_queries.argmax(-1).cpu() for name, of_queries in scores.items()}
            for row, number in enumerate(batch.numbers.tolist()):
                self._predicted[number] = {name: classes[row] for name, classes in predicted.items()}
            self._block, self._bank = batch.table.block, cast(CLIPM2DF, pl_module).bank

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gather what all ranks predicted, and write the bundle."""
        model, of_ranks = cast(CLIPM2DF, pl_module), of_all_ranks(self._predicted, trainer.world_size)
        bank, self._bank = self._bank, None
        if not trainer.is_global_zero or bank is None or model.evaluated is None:
            return
        predicted = {number: row for of_rank in of_ranks for number, row in of_rank.items()}
        head = str(model.hparams["head"])
        options = dict(model.hparams["head_options"] or {})
        if "selection" in options_of(head_class(head)):
            options["selection"] = model.model.head.selection
        facts = Facts(
            head=head,
            head_options=options,
            text_fusion=float(model.text_fusion),
            precision=str(trainer.precision),
            block=self._block,
            memory=model.bank_memory * 2**30,
            prompts=model.model.has_prompts,
            class_names=list(bank.episodes["class_names"]),
            numbers={name: float(value) for name, value in model.evaluated.numbers.items()},
            device=model.device.type,
        )
        rows = [predicted[number] for number in bank.episodes["numbers"].tolist()]
        write_bundle(self.path, bank, facts, {name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        say(f"the bundle is {self.path}, of the SHA-256 {sha256_of(self.path)}; clip-m2df verify replays it")


# Numbers of an evaluation that are not shares.
_COUNTS, _LOSSES = ("replaced_videos",), "loss/"


def result_table(split: str, numbers: Mapping[str, float], what: str) -> Table:
    """A table of what an evaluation found, its accuracy with the 95 % interval first.

    Args:
        split: ``val`` or ``test``.
        numbers: by the names under which they are logged, without the stage.
        what: was played.
    """
    accuracy, interval = (100 * numbers.get(name, math.nan) for name in ("accuracy", "interval"))
    table = Table(f"{split}/accuracy", f"{accuracy:.1f} ± {interval:.1f} %", title=what, title_justify="left")
    for name, value in numbers.items():
        if name not in ("accuracy", "interval", *OPEN_SET):
            share = name not in _COUNTS and not name.startswith(_LOSSES)
            table.add_row(f"{split}/{name}", f"{100 * value:.1f} %" if share else f"{value:.4g}")
    return table


def open_set_table(numbers: Mapping[str, float], what: str, chosen: str = "") -> Table:
    """A table of how well each score tells unknown queries from the others.

    Args:
        numbers: see :func:`result_table`.
        what: was played.
        chosen: the score that val chose, if that is known.
    """
    headings = ("AUROC", "OSCR", "FPR at 95 % recall")
    bound = f"the accuracy, {100 * numbers['accuracy']:.1f} %, is the upper bound of OSCR"
    table = Table("score", *headings, title=what, title_justify="left", caption=bound, caption_justify="left")
    for score in SCORES:
        name = f"{score} (chosen by val)" if score == chosen else score
        table.add_row(name, *(f"{100 * numbers[f'{measure}/{score}']:.1f} %" for measure in MEASURES))
    return table


def chosen_score(aurocs: Mapping[str, float]) -> str:
    """Which score a validation chooses to tell unknown queries by, and by how much, in words.

    Args:
        aurocs: of each score in the validation.
    """
    chosen = best_score(aurocs)
    second = best_score({score: value for score, value in aurocs.items() if score != chosen})
    ahead = 100 * (aurocs[chosen] - aurocs[second])
    than = f"{ahead:.1f} points more than {second}" if ahead else f"as much as {second}"
    best = f"AUROC {100 * aurocs[chosen]:.1f} % on val, {than}"
    return f"val chooses the score {chosen} to tell unknown queries by: {best}"


def write_report(folder: Path, stage: str, class_names: Sequence[str], confusion: Tensor) -> list[Path]:
    """Write ``<stage>_classes.csv`` and ``<stage>_confusion.csv``.

    Args:
        folder: where to.
        stage: ``val`` or ``test``.
        class_names: of the split, in its order.
        confusion: int64 ``(n_classes, n_classes)``, queries by their own class and by that which was predicted.

    Returns:
        The files.
    """
    results = class_results(class_names, confusion)
    accuracies = [
        [for_spreadsheet(r.name), r.queries, r.correct, f"{r.accuracy:.4f}" if r.queries else ""] for r in results
    ]
    tables: dict[Path, list[list[Any]]] = {
        folder / f"{stage}_classes.csv": [["class", "queries", "correct", "accuracy"], *accuracies],
        folder / f"{stage}_confusion.csv": [
            ["class", *map(for_spreadsheet, class_names)],
            *([for_spreadsheet(r.name), *r.counts] for r in results),
        ],
    }
    for path, content in tables.items():
        write_table(path, "table", content)
    return list(tables)


def hardest_classes(class_names: Sequence[str], confusion: Tensor, most: int = 5) -> Table:
    """A table of the classes that are recognised least often, and what each is most often taken for."""
    table = Table("hardest classes", "accuracy", "most often taken for")
    results = [result for result in class_results(class_names, confusion) if result.queries]
    for result in sorted(results, key=lambda result: result.accuracy)[:most]:
        other = f"{result.taken_for} ({result.taken / result.queries:.1%})" if result.taken else ""
        table.add_row(result.name, f"{result.accuracy:.1%}", other)
    return table
