"""``fit``, ``validate``, ``test`` and ``episodes`` through one LightningCLI."""

import difflib
import logging
import os
import re
import shlex
import signal
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessException

from clip_m2df.clip.adapters import check_adapters
from clip_m2df.clip.backbone import check_options
from clip_m2df.clip.formats import told_options
from clip_m2df.datasets.feature_tables import is_feature_table, read_feature_table
from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.episodes.files import write_episodes_file
from clip_m2df.errors import Stopped, UserError, ended_by_sigterm, require, say
from clip_m2df.files import FULL, locked_folder, writing
from clip_m2df.hub import is_reading
from clip_m2df.loops import raised_while_restoring
from clip_m2df.motion_shapes import NO_KNOBS
from clip_m2df.nn.baselines import head_class
from clip_m2df.nn.weights import published_state
from clip_m2df.report.evaluation import EvaluationPage
from clip_m2df.training import checkpoints
from clip_m2df.training.build import options_by_name, saved_options
from clip_m2df.training.callbacks import (
    BundleWriter,
    Calibrator,
    RunConfig,
    RunProgressBar,
    RunReport,
    calibrate_checkpoints,
    logger_of_run,
)
from clip_m2df.training.dashboard import Dashboard
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.training.wandb_run import resume_run

# What gloo and NCCL say when a process at the other end is gone.
LOST = "closed by peer|reset by peer|remote process exited|communicator was aborted|broken pipe"
# Warnings that nobody can act on.
IGNORED_WARNINGS = (
    "LeafSpec",  # a deprecation inside Lightning
    "tensorboardX",  # an advertisement
    "exists and is not empty",  # the folder of a run that goes on
    "in eval mode at the start of training",  # a frozen tower is so on purpose
    "sync_dist=True",  # the metrics that are logged have been summed over ranks already
    "does not have many workers",  # how many decode is data.num_workers, see after_instantiate_classes
    "suggested max number of worker",
    "persistent_workers",  # data.num_workers may be 0
)


class _Parser(LightningArgumentParser):
    """Opens no file that the value of an option names: a config within a config would be read unchecked."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a class, without configs of their own."""
        added: list[str] = super().add_class_arguments(*args, **kwargs | {"sub_configs": False})
        return added


class CLI(LightningCLI):
    """The trainer's commands for :class:`CLIPM2DF` and :class:`EpisodeDataModule`.

    Args:
        args: a command and its options.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args)
        self.goes_on = False
        self.checkpoint: dict[str, Any] | None = None  # read once; the Trainer's plugin takes it over
        self.is_published = False  # then the model has its weights from the start
        with ExitStack() as self.until_end:
            if _is_first_process():
                # Before and after what listens to signals itself, Lightning would note this one and go on.
                self.until_end.enter_context(ended_by_sigterm())
            self._run()

    def _run(self) -> None:
        super().__init__(
            CLIPM2DF,
            EpisodeDataModule,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs"},
            parser_class=_Parser,
            # Whole names alone: an option that is added later may begin like another.
            parser_kwargs={"prog": "clip-m2df", "exit_on_error": False, "allow_abbrev": False}
            | {name: {"exit_on_error": False} for name in self.subcommands()},
            # Otherwise any ``optimizer:`` group would replace the model's own two learning rates.
            auto_configure_optimizers=False,
            # Otherwise checkpoints made here could be loaded by the command line only.
            load_from_checkpoint_support=False,
            args=self.args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and what of the Trainer's methods is not an option."""
        return {name: {*out, "verbose"} for name, out in LightningCLI.subcommands().items() if name != "predict"}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # RunReport says what an evaluation found.
        own: dict[str, Any] = {} if subcommand == "fit" else {"verbose": False}
        if self.is_published:
            own["ckpt_path"] = None
        return super()._prepare_subcommand_kwargs(subcommand) | own

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of :class:`clip_m2df.training.checkpoints.RunCheckpoint` and :class:`Dashboard`."""
        parser.add_lightning_class_args(checkpoints.RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            text = "a page for a browser, .html: accuracies, what is taken for what, the hardest episodes"
            parser.add_argument("--report", type=str | None, default=None, help=text)
            text = "a further manifest, as often as you like: each is tested, and one table has a row for each"
            parser.add_argument("--also", action="append", type=str, help=text)
            text = "a file by which others replay the test without a video, by clip-m2df verify"
            parser.add_argument("--bundle", type=str | None, default=None, help=text)
        if subcommand == "validate":
            text = (
                "numbers of examples of a class, such as [1,5]: calibrate sets of labels for them on val, and put the"
                " calibration into the checkpoint in the place of its own; fit does so for 1, 3, 5 and 10"
            )
            parser.add_argument("--calibrate", type=list[int] | None, default=None, help=text)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without LightningCLI's warning about arguments that don't come from ``sys.argv``."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            of_command = self._subcommand_parsers[args[0]]
            options = [option.dest for option in of_command._actions]
            command = of_command.prog.rpartition(" ")[2]
            why = textwrap.shorten(_explain(" ".join(str(error).split()), options, args[0]), 1000, placeholder=" …")
            raise UserError(f"{why}\n(clip-m2df {command} --help explains the options)") from error
        except Exception as error:  # values that the parser itself trips over
            raise UserError(f"the options can't be read: {' '.join(str(error).split())}") from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would let a checkpoint's options win silently. See ``_take_options_from``."""

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Make the trainer, with the run's report, and its progress bar unless none is wanted."""
        subcommand = str(self.subcommand)
        options = self.config_init[subcommand].trainer
        checkpoint, self.checkpoint = self.checkpoint, None
        folder = Path(options.default_root_dir or ".")
        self.report = RunReport(several=bool(self.others))
        options.callbacks = [*_listed(options.callbacks), self.report]
        if subcommand == "fit" and not any(isinstance(c, Calibrator) for c in options.callbacks):
            # before a dashboard gives the best checkpoint away
            options.callbacks.insert(0, Calibrator())
        if options.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in options.callbacks):
            options.callbacks.append(RunProgressBar())
        options.plugins = _listed(options.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in options.plugins):
            options.plugins.append(checkpoints.RunCheckpointIO(self.config[subcommand].ckpt_path or "", checkpoint))
        told = TorchElasticEnvironment.detect() or any(isinstance(p, ClusterEnvironment) for p in options.plugins)
        if SLURMEnvironment.detect() and not told:
            # Lightning would save wherever a signal comes, into a file that later runs take without being asked.
            options.plugins.append(SLURMEnvironment(auto_requeue=False))
        if options.logger in (None, True):  # Lightning's own choice depends on what happens to be installed
            options.logger = CSVLogger(folder, flush_logs_every_n_steps=1)
        first = checkpoints.steps_made(checkpoint) if self.goes_on and checkpoint else 0
        loggers = [logger_of_run(logger, subcommand, first) for logger in _listed(options.logger or None)]
        options.logger = [logger for logger in loggers if logger is not None] or False
        if self.goes_on:
            resume_run(options.logger or [], folder)
        if subcommand == "test" and self.config.test.report is not None:
            text = self._parser("test").dump(self.config.test, skip_unset=False)
            options.callbacks.append(EvaluationPage(Path(self.config.test.report), yaml.safe_load(text)))
        if subcommand == "test" and self.config.test.bundle is not None:
            options.callbacks.append(BundleWriter(Path(self.config.test.bundle)))
        trainer = super().instantiate_trainer(**kwargs)
        if subcommand == "fit" and checkpoint is not None:
            path = self.config.fit.ckpt_path
            checkpoints.check_training_state(path, checkpoint, trainer, self.model, self.datamodule)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
            for number, data in enumerate(self.others, 2):
                self.model.test_name = f"test_{number}"
                self.model.model.take_class_embeddings({})  # of the manifest before
                self.trainer.test(**self._prepare_subcommand_kwargs(subcommand) | {"datamodule": data})
            self.report.summarise(self.trainer)
        except (UserError, MisconfigurationException):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:  # of a logger, say
                with writing(error.filename or self.trainer.default_root_dir, "files of the run"):
                    raise
            if not raised_while_restoring(error):
                raise
            raise UserError(
                f"{self.config[subcommand].ckpt_path} holds what can't be taken over"
                f" ({type(error).__name__}: {' '.join(str(error).split()):.200}): give another checkpoint"
            ) from error

    def after_fit(self) -> None:
        """Say where the best checkpoint is, and what to type next."""
        if not self.trainer.is_global_zero or self.config.fit.trainer.fast_dev_run:
            return
        # Beside which people may have checkpoint callbacks of their own.
        kept = next(c for c in self.trainer.checkpoint_callbacks if isinstance(c, checkpoints.RunCheckpoint))
        if not kept.last_model_path:
            return
        config = Path(self.trainer.default_root_dir) / "config.yaml"
        test = f"clip-m2df test --config {shlex.quote(str(config))} --ckpt_path"
        if kept.best_model_path and kept.best_model_score is not None:
            score = float(kept.best_model_score)
            worth = f"{100 * score:.1f} %" if "accuracy" in str(kept.monitor) else f"{score:.4g}"
            say(f"the best checkpoint is {kept.best_model_path}, with {kept.monitor} {worth}; next:", f"  {test} best")
        else:
            say(
                f"there was no validation to tell the best; the last is {kept.last_model_path}; next:", f"  {test} last"
            )

    def after_validate(self) -> None:
        """Calibrate, if that is asked for."""
        if self.config.validate.calibrate and self.trainer.is_global_zero:
            files, n_shots = [self.config.validate.ckpt_path], self.config.validate.calibrate
            calibrate_checkpoints(self.trainer, self.model, self.datamodule, files, n_shots)

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def instantiate_classes(self) -> None:
        """Make model, data and trainer.

        Raises:
            UserError: an option has a value that they don't take.
        """
        try:
            further, reading = self._further_data(), (self.checkpoint or {}).get("reading")
            self.others = [data for _, data in further]
            super().instantiate_classes()
            for checked, _ in further:
                self._check_fits(checked, reading if is_reading(reading) else None)
        except (UserError, MisconfigurationException):
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"an option has a value that it can't have: {' '.join(str(error).split())}") from error

    def _further_data(self) -> list[tuple[EpisodeDataModule, EpisodeDataModule]]:
        """The data of the further manifests of a test, checked before the first is tested, and the same untouched.

        All options hold for them too, but those that name something of the first: its cache and its texts.

        Raises:
            UserError: one can't be tested, or an option is of one manifest alone.
        """
        config = self.config[str(self.subcommand)]
        others = []
        for manifest in config.get("also") or []:
            of_one = {"report": config.report, "bundle": config.bundle, "data.episodes_file": config.data.episodes_file}
            for option, value in of_one.items():
                if value is not None:
                    raise UserError(f"{option} is of one manifest, and --also names another: leave out one of them")
            options = config.data.as_dict() | {"manifest": manifest, "cache": None, "class_texts": None}
            try:
                if is_feature_table(manifest):
                    options |= {"root": None, "frames": read_feature_table(manifest).frames}
                checked = EpisodeDataModule(**options)
                checked.setup("test")
            except UserError as error:
                raise UserError(f"--also {manifest}: {error}") from error
            others.append((checked, EpisodeDataModule(**options)))
        return others

    def _check_fits(self, data: EpisodeDataModule, reading: dict[str, Any] | None) -> None:
        """Refuse the data of a further manifest that the model does not take."""
        try:
            data.check_tower(self.model)
            self.model.check_data(data, reading)
        except UserError as error:
            raise UserError(f"--also {data.manifest_path}: {error}") from error

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and take the model's options from it.

        Raises:
            UserError: there is no such checkpoint, an option contradicts it, or a run would overwrite another.
        """
        config = self.config[str(self.subcommand)]
        run_folder = Path(config.trainer.default_root_dir or ".")
        folder = run_folder / checkpoints.FOLDER
        if self.subcommand == "fit" and not config.trainer.fast_dev_run and _is_first_process():
            # Before anything in the folder is read. Validations and tests write files of their own, and may run beside.
            self.until_end.enter_context(locked_folder(run_folder, "run folder"))
        if config.ckpt_path == "last":
            path, self.checkpoint = checkpoints.read_last(run_folder)
            config.ckpt_path = str(path)
        elif config.ckpt_path == "best":
            config.ckpt_path = str(folder / checkpoints.BEST)
        if is_feature_table(config.data.manifest):
            self._take_table(config)
        if self.subcommand == "validate" and config.calibrate is not None:
            require(least=1, **{f"calibrate[{i}]": number for i, number in enumerate(config.calibrate)})
            if not config.calibrate or config.ckpt_path is None:
                raise UserError(
                    "--calibrate puts numbers into a checkpoint: give numbers of examples, and the file by --ckpt_path"
                )
        if self.subcommand == "fit":
            self.goes_on = config.ckpt_path is not None and Path(config.ckpt_path).resolve().parent == folder.resolve()
            held = any((folder / name).exists() for name in (checkpoints.LAST, checkpoints.PREVIOUS))
            if held and not self.goes_on and not config.trainer.fast_dev_run:
                raise UserError(
                    f"the run folder {run_folder} holds a run already: go on with it by --ckpt_path last, or give"
                    " another --trainer.default_root_dir"
                )
        elif config.ckpt_path is None and (
            head_class(config.model.head).trained
            or not (config.model.freeze_backbone or config.model.backbone == "features")
        ):
            raise UserError(
                f"{self.subcommand} measures a checkpoint: give --ckpt_path best, last, or a file; where"
                " nothing is trained, neither head nor tower (--model.freeze_backbone true), it takes none"
            )
        if config.ckpt_path is not None:
            self.checkpoint = self.checkpoint or checkpoints.read_checkpoint(config.ckpt_path)
            if published_state(self.checkpoint) is not None:
                self._take_published(config)
                return
            self._take_options_from(self.checkpoint, config)
            self.parser.add_instantiator(partial(_build_model, self.saved_options), CLIPM2DF, subclasses=False)
        elif config.data.size is not None and not is_feature_table(config.data.manifest):
            self.parser.add_instantiator(partial(_build_sized, config.data.size), CLIPM2DF, subclasses=False)

    def after_instantiate_classes(self) -> None:
        """Check that the data module makes frames of the tower's size; leave cores to the workers that decode.

        Raises:
            UserError: they are of another size.
        """
        leave_cores(self.datamodule.num_workers)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.datamodule.num_workers > 2 * max(cores, 2):
            warnings.warn(
                f"data.num_workers is {self.datamodule.num_workers}, but there are {cores} cores: more processes than"
                " cores decode no faster, and take memory",
                stacklevel=2,
            )
        size, wanted = self.datamodule.size, self.model.image_size
        if size not in (None, wanted) and not is_feature_table(self.datamodule.manifest_path):
            raise UserError(
                f"data.size is {size}, but the tower takes frames of {wanted} pixels, which a checkpoint keeps: give"
                f" --data.size {wanted}, and --data.resize {wanted} or more"
            )

    def _take_table(self, config: Namespace) -> None:
        """Take from a feature table what no option says: how many frames a video has, and a model of its features."""
        given = self.parser.parse_args(self.args, defaults=False)[str(self.subcommand)]
        table = read_feature_table(config.data.manifest)
        if given.get("data.frames") is None:
            config.data.frames = table.frames
        if config.ckpt_path is None and given.get("model.backbone", "features") == "features":
            config.model.backbone = "features"
            config.model.backbone_options = {"dim": table.dim} | (config.model.backbone_options or {})
            if _is_first_process():
                say(
                    f"{config.data.manifest} has features of {table.frames} frames, {table.dim} numbers each: the model"
                    " has no tower, model.backbone features"
                )

    def _take_published(self, config: Namespace) -> None:
        """Have the model made of a published checkpoint: it keeps no options, so that those given hold."""
        if self.subcommand == "validate" and config.calibrate:
            raise UserError(
                f"{config.ckpt_path} is a checkpoint of CLIP-M²DF's published code, which keeps no calibration: load it"
                " by FewShotClassifier.from_checkpoint, whose calibrate takes a folder of further classes"
            )
        if self.subcommand == "fit":
            raise UserError(
                f"{config.ckpt_path} is a checkpoint of CLIP-M²DF's published code, whose training can't go on here:"
                " test and predict take it; to train from its weights, take CLIPM2DF.from_published and Trainer.fit in"
                " Python"
            )
        self.checkpoint, self.is_published = None, True
        self.parser.add_instantiator(partial(_build_published, config.ckpt_path), CLIPM2DF, subclasses=False)

    def _take_options_from(self, checkpoint: dict[str, Any], config: Namespace) -> None:
        saved = checkpoint.get(CLIPM2DF.CHECKPOINT_HYPER_PARAMS_KEY)
        saved = saved_options(config.ckpt_path, saved, CLIPM2DF, head=config.model.head)
        given = self.parser.parse_args(self.args, defaults=False)[str(self.subcommand)].get("model")
        source = saved["backbone"]["source"]
        kept = {"model.adapters": None} | options_by_name(saved) | {"model.backbone": source}
        asked = {f"model.{option}": value for option, value in (given.as_dict() if given else {}).items()}
        if asked.get("model.adapters") is not None:
            asked["model.adapters"] = check_adapters(asked["model.adapters"])
        of_head = "model.head_options."
        asked |= {f"{of_head}{option}": v for option, v in (asked.pop("model.head_options", None) or {}).items()}
        run_config = Path(config.ckpt_path).parent.parent / "config.yaml"
        of_backbone = "model.backbone_options."
        kept |= {f"{of_backbone}{option}": value for option, value in told_options(saved["backbone"]).items()}
        for option, value in check_options(asked.pop("model.backbone_options", None) or {}).items():
            # As the tower has them. What file a tokenizer was in is not kept.
            asked[f"{of_backbone}{option}"] = (
                torch.tensor(value).float().tolist() if option in ("mean", "std") else value
            )
        hint = f", or take the run's own --config {run_config}" if run_config.exists() else ""
        for option, value in asked.items():
            if option in kept and (list(value) if isinstance(value, tuple) else value) != kept[option]:
                raise UserError(
                    f"{option} is {value!r}, but {kept[option]!r} in {config.ckpt_path}: a checkpoint keeps the"
                    f" options that it was trained with; leave it out{hint}"
                )
            if option.startswith(of_head) and option not in kept:
                own = ", ".join(name.removeprefix(of_head) for name in kept if name.startswith(of_head))
                raise UserError(
                    f"{option} is not an option of the head in {config.ckpt_path}, which has {own}; selection is an"
                    " option of the model itself, --model.selection"
                )
        self.saved_options = saved
        for option, value in (saved | {"backbone": source}).items():
            config.model[option] = value


def _build_model(saved_options: dict[str, Any], cls: type[CLIPM2DF], *args: Any, **kwargs: Any) -> CLIPM2DF:
    """With the towers' description that a checkpoint holds: as an option it would be parsed once more."""
    return cls(*args, **kwargs | saved_options | {"backbone_options": None})


def _build_sized(size: int, cls: type[CLIPM2DF], *args: Any, **kwargs: Any) -> CLIPM2DF:
    """With a tower for frames of some size, whatever its own was."""
    options = kwargs.get("backbone_options") or {}
    if (asked := options.get("image_size")) not in (None, size):
        raise UserError(f"data.size is {size}, and model.backbone_options.image_size {asked}: leave out one of them")
    return cls(*args, **kwargs | {"backbone_options": {**options, "image_size": size}})


def _build_published(path: str, cls: type[CLIPM2DF], *, backbone: str, **options: Any) -> CLIPM2DF:
    """With the weights of a published checkpoint, whose text tower is that of the backbone."""
    return cls.from_published(path, clip=backbone, **options)


def leave_cores(workers: int) -> None:
    """Compute on the cores that are left by processes that decode, unless the environment says on how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - workers))


def _is_first_process() -> bool:
    """Whether this is the process of rank 0, as far as that is known before there is a Trainer."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    mpi = MPIEnvironment().global_rank() if MPIEnvironment.detect() else 0
    return getattr(rank_zero_only, "rank", 0) == 0 and node in ("", "0") and mpi == 0


class EpisodesCLI(CLI):
    """Makes the data module alone, from the options of ``test``, and writes its test episodes.

    Args:
        args: ``episodes`` and the options.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(["test", *args[1:]])

    def setup_parser(self, *args: Any) -> None:
        """Make the parser, whose help names the command as it was typed."""
        super().setup_parser(*args)
        parser = self._subcommand_parsers["test"]
        parser.prog, parser.description = "clip-m2df episodes", "Write the test episodes of a config."
        parser.add_argument("--output", type=str, required=True, help="the file to write, a JSON line an episode")

    def before_instantiate_classes(self) -> None:
        """Nothing: there is no checkpoint."""

    def instantiate_classes(self) -> None:
        """Make the data module."""
        self.datamodule = EpisodeDataModule(**self.config.test.data.as_dict())

    def after_instantiate_classes(self) -> None:
        """Nothing: there is no tower whose size the frames could miss."""

    def _run_subcommand(self, subcommand: str) -> None:
        data, output = self.datamodule, self.config.test.output
        if data.knobs != NO_KNOBS:
            raise UserError(
                "an episodes file names the usual videos, and can't hold what data.knobs changes; leave data.knobs out:"
                " a test with the same knobs and data.eval_seed plays the same episodes without a file"
            )
        split, plans = data.test_plans()
        write_episodes_file(output, plans, split, data.manifest.root)
        say(f"{len(plans)} test episodes are in {output}; --data.episodes_file {output} reads them back")
        if any(video.group for row in split.videos for video in row):
            twins = [twin for plan in plans for twin in plan.twins]
            say(
                f"{sum(twins)} of their {len(twins)} queries, {sum(twins) / len(twins):.1%}, have a twin: a video of"
                " their group, cut from the same as they are, is in the support"
            )


def run(args: Sequence[str], cli: type[CLI] | None = None) -> CLI:
    """Run ``fit``, ``validate``, ``test`` or ``episodes``.

    Args:
        args: The command and its options; configs by the paths of their files.
        cli: What runs it; by default what belongs to the command.

    Returns:
        Model, data module and trainer, as they are at the end.

    Raises:
        UserError: Whatever a person can mend in the options.
        Stopped: A signal asked the command to end.
    """
    cli = cli or (EpisodesCLI if args[0] == "episodes" else CLI)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    try:
        return cli(args)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ProcessException as error:  # of ddp_spawn, which knows errors as text alone
        _, ours, said = str(error).rpartition("clip_m2df.errors.UserError: ")
        if ours:
            raise UserError(said.strip()) from error
        raise
    except ModuleNotFoundError as error:  # of a package that a callback or a logger needs
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "conditioned on metric" in str(error):  # EarlyStopping's, where others may have logged more than is known
            raise UserError(str(error)) from error
        if re.search(LOST, str(error), re.IGNORECASE):
            raise UserError(f"another process of this run has ended; what it said says why ({error})") from error
        raise
    except SIGTERMException as error:  # Lightning's own, where nothing is trained
        raise Stopped(signal.SIGTERM) from error


def _explain(message: str, options: Sequence[str], command: str) -> str:
    """What is wrong with the options, in their names as they are typed, and what may have been meant.

    Args:
        message: the parser's, in one line.
        options: that there are.
        command: whose they are; the parser puts it before the names of options that are missing.
    """
    if not message.startswith("Parser key") and (found := re.search("are required: (.*)", message)):
        missing = [name.strip().removeprefix(f"{command}.") for name in found[1].split(",")]
        typed = " and ".join(f"--{name}" for name in missing if name != "data.manifest")
        if "data.manifest" not in missing:
            return f"give {typed}"
        also = f", and {typed}" if typed else ""
        return f"give --config NAME (clip-m2df configs lists them) or --data.manifest{also}"
    if found := re.search("unrecognized arguments: (.*)|does not accept option '(.*)'", message):
        name = (found[1] or found[2]).split(" ")[0].partition("=")[0]
        bare = name.lstrip("-").rstrip("+").removeprefix(f"{command}.")
        if bare in options:  # in a table of the command's, say
            return f"there is no option {name}; write it without {command}: in a config, which serves all commands"
        if found[1] and not name.startswith("-"):
            return f"{found[1]!r} belongs to no option; each value comes after the --NAME of its option"
        near = difflib.get_close_matches(bare, options, n=1)
        # An option without its section does not look alike.
        near = near or [option for option in options if option.rpartition(".")[2] == bare][:1]
        hint = f"; did you mean {'--' if found[1] else ''}{near[0]}?" if near else ""
        return f"there is no option {name}{hint}"
    if found := re.match(r'Parser key "([\w.]+)": (.*)', message):
        name, why = found[1].removeprefix(f"{command}."), found[2]
        given = why.partition("Got value: ")[2] or why.partition("Given value: ")[2]
        choices = [c.strip(" '") for group in re.findall(r"Literal\[(.*?)\]", why) for c in group.split(",")]
        names = [n for module in (lightning.pytorch.loggers, lightning.pytorch.callbacks) for n in module.__all__]
        near = difflib.get_close_matches(given, choices or names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if os.path.isfile(given):
            return f"{name} is the file {given}, which is not read: write out what is in it in a --config"
        if choices:
            return f"{name} is {given!r}; it must be one of {', '.join(dict.fromkeys(choices))}{hint}"
        reasons = re.search("Problem with given class_path '([^']*)': (.*?) - ", why)
        if reasons:
            return f"{name}: {reasons[1]}: {reasons[2]}"
        if "Union subtypes" in why:
            return f"{name} is {given!r}, which it can't be{hint}"
        return f"{found[0]}{hint}".replace(found[1], name, 1)
    return message


def _listed(option: Any) -> list[Any]:
    """What may be given once, several times or not at all."""
    return [*option] if isinstance(option, list) else [] if option is None else [option]


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
