"""``fit``, ``validate`` and ``test`` through one LightningCLI."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clip_m2df.episodes.datamodule import EpisodeDataModule
from clip_m2df.episodes.files import write_episodes_file
from clip_m2df.errors import Stopped, UserError
from clip_m2df.motion_shapes import NO_KNOBS
from clip_m2df.nn.baselines import head_class
from clip_m2df.report.evaluation import EvaluationPage
from clip_m2df.training.build import saved_options
from clip_m2df.training.callbacks import RunConfig, RunProgressBar, RunReport
from clip_m2df.training.checkpoints import (
    BEST,
    FOLDER,
    LAST,
    PREVIOUS,
    RunCheckpoint,
    RunCheckpointIO,
    read_checkpoint,
    read_last,
)
from clip_m2df.training.dashboard import Dashboard
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.training.wandb_run import go_on_with_run

# What gloo and NCCL say when a process at the other end is gone.
LOST = "closed by peer|reset by peer|remote process exited|communicator was aborted|broken pipe"


# Of a config; a few lines of aliases of aliases stand for as many as one likes, all of which the parser would visit.
MOST_VALUES = 10_000


class CLI(LightningCLI):
    """The trainer's commands for :class:`CLIPM2DF` and :class:`EpisodeDataModule`.

    Args:
        args: a command and its options.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args)
        self.goes_on = False
        self.checkpoint: dict[str, Any] | None = None  # read once; the Trainer's plugin takes it over
        super().__init__(
            CLIPM2DF,
            EpisodeDataModule,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs"},
            parser_kwargs={"exit_on_error": False} | {c: {"exit_on_error": False} for c in self.subcommands()},
            # Otherwise any ``optimizer:`` group would replace the model's own two learning rates.
            auto_configure_optimizers=False,
            # Otherwise checkpoints made here could be loaded by the command line only.
            load_from_checkpoint_support=False,
            args=self.args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and what of the Trainer's methods is not an option."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of :class:`RunCheckpoint` and :class:`Dashboard`, and ``profile``."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_argument(
            "--profile",
            type=bool,
            default=False,
            help="print at the end where the time of the training went, and the achieved share of the device's peak",
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            text = "a page for a browser, .html: accuracies, what is taken for what, the hardest episodes"
            parser.add_argument("--report", type=str | None, default=None, help=text)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without LightningCLI's warning about arguments that don't come from ``sys.argv``."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError:
            raise
        except Exception as error:  # values that the parser itself trips over
            raise UserError(f"the options can't be read: {' '.join(str(error).split())}") from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would let a checkpoint's options win silently. See ``_take_options_from``."""

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Make the trainer, with the run's report, and its progress bar unless none is wanted."""
        trainer_options = self.config_init[str(self.subcommand)].trainer
        trainer_options.callbacks = [*_listed(trainer_options.callbacks), RunReport()]
        plugins = _listed(trainer_options.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(RunCheckpointIO(self.config[str(self.subcommand)].ckpt_path or "", self.checkpoint))
        self.checkpoint = None
        by_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
        if by_slurm and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            # Lightning would save wherever a signal comes, into a file that later runs take without being asked.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer_options.plugins = plugins
        if trainer_options.enable_progress_bar is not False:
            trainer_options.callbacks.append(RunProgressBar())
        if trainer_options.logger in (None, True):  # Lightning's own choice depends on what happens to be installed
            trainer_options.logger = CSVLogger(trainer_options.default_root_dir or ".")
        if self.goes_on:
            go_on_with_run(trainer_options.logger, Path(trainer_options.default_root_dir or "."))
        if self.subcommand == "test" and self.config_init.test.report is not None:
            text = self._parser("test").dump(self.config.test, skip_unset=False)
            trainer_options.callbacks.append(EvaluationPage(Path(self.config.test.report), yaml.safe_load(text)))
        return super().instantiate_trainer(**kwargs)

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
            super().instantiate_classes()
        except (UserError, MisconfigurationException):
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"an option has a value that it can't have: {' '.join(str(error).split())}") from error

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and take the model's options from it.

        Raises:
            UserError: there is no such checkpoint, an option contradicts it, or a run would overwrite another.
        """
        config = self.config[str(self.subcommand)]
        run_folder = Path(config.trainer.default_root_dir or ".")
        folder = run_folder / FOLDER
        if config.ckpt_path == "last":
            path, self.checkpoint = read_last(run_folder)
            config.ckpt_path = str(path)
        elif config.ckpt_path == "best":
            config.ckpt_path = str(folder / BEST)
        if self.subcommand == "fit":
            goes_on = config.ckpt_path is not None and Path(config.ckpt_path).resolve().parent == folder.resolve()
            held = any((folder / name).exists() for name in (LAST, PREVIOUS))
            if held and not goes_on and not config.trainer.fast_dev_run:
                raise UserError(
                    f"the run folder {run_folder} holds a run already: go on with it by --ckpt_path last, or give"
                    " another --trainer.default_root_dir"
                )
            self.goes_on = goes_on
        elif config.ckpt_path is None and (
            getattr(head_class(config.model.head), "trained", True) or not config.model.freeze_backbone
        ):
            raise UserError(
                f"{self.subcommand} measures a checkpoint: give --ckpt_path best, last, or a .ckpt file; only a head"
                " with nothing to train does without, and --model.freeze_backbone true"
            )
        if config.ckpt_path is not None:
            self.checkpoint = self.checkpoint or read_checkpoint(config.ckpt_path)
            self._take_options_from(self.checkpoint, config)
            self.parser.add_instantiator(self._build_model, CLIPM2DF, subclasses=False)

    def after_instantiate_classes(self) -> None:
        """Check that the data module makes frames of the tower's size; leave cores to the workers that decode.

        Raises:
            UserError: they are of another size.
        """
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - self.datamodule.num_workers))
        size, wanted = self.datamodule.reader.size, self.model.model.backbone.image_size
        if size != wanted:
            raise UserError(
                f"data.size is {size}, but the tower takes frames of {wanted} pixels: give --data.size {wanted}, and"
                f" --data.resize {wanted} or more"
            )

    def _take_options_from(self, checkpoint: dict[str, Any], config: Namespace) -> None:
        saved = checkpoint.get(CLIPM2DF.CHECKPOINT_HYPER_PARAMS_KEY)
        saved = saved_options(config.ckpt_path, saved, CLIPM2DF, head=config.model.head)
        given = self.parser.parse_args(self.args, defaults=False)[str(self.subcommand)].get("model")
        kept = saved | {"backbone": saved["backbone"]["source"]}
        asked = given.as_dict() if given else {}
        # Options of the head one by one, those that the checkpoint doesn't name at their defaults.
        kept |= {
            f"head_options.{option}": (saved["head_options"] or {}).get(option, parameter.default)
            for option, parameter in inspect.signature(head_class(saved["head"])).parameters.items()
            if option != "selection"
        }
        asked |= {f"head_options.{option}": value for option, value in (asked.pop("head_options", None) or {}).items()}
        run_config = Path(config.ckpt_path).parent.parent / "config.yaml"
        hint = f", or take the run's own --config {run_config}" if run_config.exists() else ""
        for option, value in asked.items():
            if option in kept and _plain(value) != _plain(kept[option]):
                raise UserError(
                    f"model.{option} is {value!r}, but {kept[option]!r} in {config.ckpt_path}: a checkpoint keeps the"
                    f" options that it was trained with; leave it out{hint}"
                )
            if option.startswith("head_options.") and option not in kept:
                own = ", ".join(name.removeprefix("head_options.") for name in kept if name.startswith("head_options."))
                raise UserError(
                    f"model.{option} is no option of the head in {config.ckpt_path}, which has {own}; selection is an"
                    " option of the model itself, --model.selection"
                )
        self.saved_options = saved
        for option in saved:
            config.model[option] = kept[option]

    def _build_model(self, cls: type[CLIPM2DF], *args: Any, **kwargs: Any) -> CLIPM2DF:
        """With the towers' description that a checkpoint holds: as an option it would be parsed once more."""
        return cls(*args, **kwargs | self.saved_options)


def run(args: Sequence[str]) -> CLI:
    """Run ``fit``, ``validate`` or ``test``.

    Returns:
        Model, data module and trainer, as they are at the end.

    Raises:
        UserError: whatever a person can mend in the options.
    """
    return _run(CLI, args)


def _run(cli: type[CLI], args: Sequence[str]) -> CLI:
    _check_configs(args)
    # Advertisements, and a deprecation inside Lightning that nobody here can mend.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*tensorboardX.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # that of a run that goes on
    # Towers that are frozen are so on purpose.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    # The metrics that are logged have been summed over ranks already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    try:
        return cli(args)
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())}\n(clip-m2df {args[0]} --help explains the options)") from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if re.search(LOST, str(error), re.IGNORECASE):
            raise UserError(f"another process of this run has ended; what it said says why ({error})") from error
        raise
    except SIGTERMException as error:  # Lightning's own, where nothing is trained
        raise Stopped(signal.SIGTERM) from error


class EpisodesCLI(CLI):
    """Makes the data module alone: for the commands that need no model."""

    def before_instantiate_classes(self) -> None:
        """Nothing: there is no checkpoint."""

    def instantiate_classes(self) -> None:
        """Make the data module."""
        self.datamodule = EpisodeDataModule(**self.config[str(self.subcommand)].data.as_dict())

    def after_instantiate_classes(self) -> None:
        """Nothing: there is no tower whose size the frames could miss."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def write_episodes(args: Sequence[str], output: Path) -> None:
    """Write the test episodes of a config (see :mod:`clip_m2df.episodes.files`).

    Args:
        args: ``test`` and its options; those of the data count.
        output: the file.

    Raises:
        UserError: the config or the manifest is at fault, has knobs, or the file can't be written.
    """
    data = _run(EpisodesCLI, args).datamodule
    if data.knobs != NO_KNOBS:
        raise UserError(
            "an episodes file names the usual videos, and can't hold what data.knobs changes; leave data.knobs out: a"
            " test with the same knobs and data.eval_seed plays the same episodes without a file"
        )
    split, plans = data.test_plans()
    write_episodes_file(output, plans, split, data.manifest.root)
    print(f"{len(plans)} test episodes are in {output}; --data.episodes_file {output} reads them back")


def _check_configs(args: Sequence[str]) -> None:
    """Name the file where a config is no YAML, which the parser's message doesn't."""
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, inline = flag.partition("=")
        if name in ("--config", "-c"):
            path = Path(inline if equals else value)
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
                if _count(content, {}) > MOST_VALUES:
                    raise ValueError(f"with its aliases written out, it has more than {MOST_VALUES} values")
            except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
                raise UserError(f"config {path} can't be read: {' '.join(str(error).split())}") from error
            if not isinstance(content, dict | None):
                raise UserError(f"config {path} is not a table of options; start from one that clip-m2df configs lists")
            sections = {name: (content or {}).get(name, {}) for name in ("model", "data", "trainer", "checkpoint")}
            for name, section in sections.items():
                if not isinstance(section, dict):
                    raise UserError(f"config {path}: {name} is {section!r} and no table of options")


def _count(node: Any, known: dict[int, int]) -> int:
    """Count the values of a tree, what stands in several places in each of them."""
    if id(node) not in known:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _listed(option: Any) -> list[Any]:
    """What may be given once, several times or not at all."""
    return [*option] if isinstance(option, list) else [] if option is None else [option]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
