"""EpisodeDataModule: N-way K-shot episodes from the videos of a manifest."""

import dataclasses
import hashlib
import importlib.util
import itertools
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from torch.utils.data import DataLoader

import clip_m2df.motion_shapes as motion_shapes
from clip_m2df.datasets.feature_tables import FeatureTable, is_feature_table, read_feature_table
from clip_m2df.datasets.manifest import Manifest, Split, Video
from clip_m2df.episode import Dealing, ResizeMode, Sampling, episode_generator, of_all_ranks
from clip_m2df.episodes.dataset import EpisodeDataset, collate_episodes
from clip_m2df.episodes.features import EvaluationTable, TrainingTable
from clip_m2df.episodes.files import read_episodes_file
from clip_m2df.episodes.loader import ReadingNow, UnusableVideos, VideoLoader
from clip_m2df.episodes.plan import EpisodePlan, EpisodeSampler, EpisodeShape, plan_episode, source, with_outliers
from clip_m2df.errors import UserError, require, some
from clip_m2df.files import relative_path
from clip_m2df.loops import batches_limit, batches_of_step, between_steps, check_goes_on, count_in_steps
from clip_m2df.video.frame_cache import FrameCache
from clip_m2df.video.reader import Decoder, VideoError, decoder_doubt
from clip_m2df.video.transforms import ClipReader

# Share of unusable videos that a training may find by default.
TRAINING_UNUSABLE = 0.05


# Of an evaluation from a bank: how many episodes are played together, and devices that each get some.
MOST_PLAYED, MOST_DEVICES = 64, 64


# The embedded benchmark's families by the names under which they stand for a manifest.
EMBEDDED = {"motion_shapes": "demo"} | {f"motion_shapes_{name}": name for name in ("scene", "order", "mixed")}


KNOBS = tuple(field.name for field in dataclasses.fields(motion_shapes.Knobs))


Evaluation = Literal["bank", "direct"]


class EpisodeDataModule(lightning.LightningDataModule):
    """Deals episodes to a Trainer: an endless stream for training, the same ones each time at evaluation.

    Runs are counted in whole optimiser steps: it sets the Trainer's gradient accumulation, and when to validate, from
    ``episodes_per_step``, ``batch_size`` and the number of devices.

    Args:
        manifest: a CSV with the columns path, label, split and, if wanted, text (what the prompt says); paths relative
            to the CSV's folder, of videos or of folders of numbered images. Or ``motion_shapes``,
            ``motion_shapes_scene``, ``motion_shapes_order`` or ``motion_shapes_mixed``, the embedded benchmark,
            rendered when first used. Or a feature table (``.safetensors`` or ``.parquet``), as ``clip-m2df encode`` and
            other tools write it: then no video is read, and no tower needed.
        knobs: how much harder than usual the test episodes of the embedded benchmark are: shares by the names
            ``overlap``, ``outliers`` and ``noise``; and ``twins``, how many recordings are cut into several videos (see
            :class:`clip_m2df.motion_shapes.Knobs`).
        root: a folder outside the manifest's own in which its videos may lie too; those elsewhere are refused.
        class_texts: a CSV with the columns label and text: what the prompt says of these classes instead; or several,
            the later over the earlier. Each is a file in the working directory, or else one that comes with the
            package, such as ``texts/published/hmdb51.csv``.
        cache: a folder that ``clip-m2df cache`` wrote: frames come from there where they are those of the videos.
        n_way: classes of an episode.
        n_shot: support videos a class.
        train_n_shot: the same in training; ``n_shot`` by default.
        n_query: query videos a class in training.
        n_query_eval: query videos a class in validation and test.
        val_episodes: episodes of a validation.
        test_episodes: episodes of a test.
        episodes_file: a file that ``clip-m2df episodes`` or another tool wrote: a test plays its first
            ``test_episodes`` episodes.
        episodes: how episodes are dealt. ``random``: classes and videos are drawn. ``grouped``: so that no query shares
            a group with a support video, by the manifest's column ``group``, which says what a video was cut from.
        unknown_queries: so many queries of classes that the episode does not have are added to each episode of
            validation and test. The others, and what is measured of them, stay the same.
        evaluation: ``bank`` encodes each video of the episodes once; ``direct`` yields the frames of each episode, and
            encodes a video as often as it comes. The numbers are the same unless frames are drawn (``sampling``).
        store: a folder in which the features of a bank are kept for the next evaluation: another way, shot or seed of
            the same weights takes seconds. What has changed is never used.
        train_augmentations: how many augmentations of each training video are encoded before the training, which then
            takes features and no frames: for a frozen tower, on a laptop. 0: frames are read and encoded for each
            episode. A feature table has as many as it was written with.
        seed: of the training episodes.
        eval_seed: of the validation and test episodes.
        frames: frames a video.
        sampling: which frames. ``segments``: one from each of as many equal segments, at random in training and the
            middle one at evaluation. ``random_segments``: at random at evaluation too, from segments of whole frames,
            as CLIP-FSAR does on HMDB51, UCF101 and SSv2; with ``bank`` a video has one draw for all episodes, with
            ``direct`` one for each, as published, and either repeats. ``window``: evenly spaced over all but the last
            35 frames, as CLIP-FSAR does on Kinetics. ``linspace``: evenly spaced from the second frame to the last but
            one, from end to end with a jitter in training, as CLIP-M²DF's own code does.
        resize: short side of the frames in pixels before the crop; by default 8/7 of ``size``, 256 for 224.
        resize_mode: ``short_side``: bilinear, antialiased, the aspect kept; ``short_side_bicubic``: the same by bicubic
            interpolation; ``squash``: both sides to ``resize``, bilinear, not antialiased, as CLIP-FSAR does. By
            default ``short_side_bicubic`` where the tower was trained with it, or else ``short_side``.
        size: side of the square crop in pixels, what the visual tower takes; by default the tower's own. On the command
            line another one changes a tower whose weights are loaded anew: its position embeddings are interpolated.
        flip: mirror half of the training clips. Leave it off where classes have a left and a right.
        jitter_queries: mirror half of the training *queries* and change their colours (brightness, contrast and
            saturation by up to a half, hue by up to a quarter, three in ten grey), as CLIP-FSAR does on Kinetics.
        decoder: which library decodes; ``auto`` takes the fastest that gives the right frames.
        batch_size: episodes that go through the model at once, on each device.
        episodes_per_step: episodes of an optimiser step, whatever the number of devices.
        validate_every: optimiser steps between validations; a shorter run is validated at its end.
        num_workers: processes that decode, for each device.
        stuck_after: seconds without a batch after which a worker counts as stuck, and the run ends with the name of the
            video that it was reading.
        max_unusable: share of a split's videos that may turn out unusable, before the run stops with their names; the
            others of their class take their places. By default 0.05 in training; at evaluation all videos that its
            episodes name are checked at start-up, and each must be usable. A share that is given holds for both.

    Raises:
        UserError: an option out of its range, or ``episodes_per_step`` that does not divide; in ``setup``, a manifest
            that can't supply such episodes.
    """

    def __init__(
        self,
        manifest: str,
        knobs: dict[str, float] | None = None,
        root: str | None = None,
        class_texts: str | list[str] | None = None,
        cache: str | None = None,
        n_way: int = 5,
        n_shot: int = 1,
        train_n_shot: int | None = None,
        n_query: int = 5,
        n_query_eval: int = 1,
        val_episodes: int = 1000,
        test_episodes: int = 10000,
        episodes_file: str | None = None,
        episodes: Dealing = "random",
        unknown_queries: int = 0,
        evaluation: Evaluation = "bank",
        store: str | None = None,
        train_augmentations: int = 0,
        seed: int = 0,
        eval_seed: int = 0,
        frames: int = 8,
        sampling: Sampling = "segments",
        resize: int | None = None,
        resize_mode: ResizeMode | None = None,
        size: int | None = None,
        flip: bool = False,
        jitter_queries: bool = False,
        decoder: Decoder = "auto",
        batch_size: int = 1,
        episodes_per_step: int = 16,
        validate_every: int = 100,
        num_workers: int = 2,
        stuck_after: float = 300.0,
        max_unusable: float | None = None,
    ) -> None:
        super().__init__()
        require(least=1, n_shot=n_shot, train_n_shot=train_n_shot, n_query=n_query, n_query_eval=n_query_eval)
        require(least=1, val_episodes=val_episodes, test_episodes=test_episodes)
        require(least=1, frames=frames, resize=resize, size=size)
        require(least=1, batch_size=batch_size, episodes_per_step=episodes_per_step, validate_every=validate_every)
        require(least=0, seed=seed, eval_seed=eval_seed, num_workers=num_workers)
        require(least=0, train_augmentations=train_augmentations, unknown_queries=unknown_queries)
        require(least=2, n_way=n_way)
        require(above=0, stuck_after=stuck_after)
        require(least=0, most=1, max_unusable=max_unusable)
        if store is not None and os.path.exists(store) and not os.path.isdir(store):
            raise UserError(f"store {store} is no folder; name one, which is made if need be")
        if decoder in ("decord", "torchcodec") and importlib.util.find_spec(decoder) is None:
            raise UserError(f"decoder {decoder} is not installed; install it, or take auto")
        for option, value, choices in (
            ("episodes", episodes, get_args(Dealing)),
            ("evaluation", evaluation, get_args(Evaluation)),
            ("decoder", decoder, get_args(Decoder)),
            *(("knobs", name, KNOBS) for name in knobs or ()),
        ):
            if value not in choices:
                raise UserError(f"{option}: there is no {value!r}; there are {', '.join(choices)}")
        if jitter_queries and train_augmentations:
            raise UserError(
                "jitter_queries makes a video look otherwise as a query, and train_augmentations keeps its features"
                " for both: leave out one of them"
            )
        if store is not None and evaluation == "direct" and not train_augmentations:
            raise UserError(
                "store keeps what a bank encodes, and with evaluation direct each episode is encoded anew: leave out"
                " store, or give --data.evaluation bank"
            )
        if knobs and manifest not in EMBEDDED:
            raise UserError(f"knobs are those of the embedded benchmark ({', '.join(EMBEDDED)}), not of {manifest}")
        if knobs and episodes_file is not None:
            raise UserError("knobs and episodes_file both say what a test plays; leave out one of them")
        of_videos = {"root": root, "cache": cache, "jitter_queries": jitter_queries or None}
        of_videos["evaluation"] = "direct" if evaluation == "direct" else None
        if is_feature_table(manifest) and (given := [name for name, value in of_videos.items() if value is not None]):
            raise UserError(
                f"{given[0]} is of videos, and the feature table {manifest} has none: leave it out, or give the"
                " manifest of the videos"
            )

        self.manifest_path = manifest
        self.knobs = motion_shapes.Knobs(**knobs or {})
        self.root = root
        self.class_texts = class_texts
        self.cache = cache
        grouped = episodes == "grouped"
        self.train_shape = EpisodeShape(
            n_way, n_shot if train_n_shot is None else train_n_shot, n_query, grouped=grouped
        )
        self.eval_shape = EpisodeShape(n_way, n_shot, n_query_eval, unknown_queries, grouped)
        self.val_episodes = val_episodes
        self.test_episodes = test_episodes
        self.episodes_file = episodes_file
        self.evaluation = evaluation
        self.store = store
        self.train_augmentations = train_augmentations
        self.seed = seed
        self.eval_seed = eval_seed
        self.resize = resize
        self.resize_mode = resize_mode
        self.size = size
        self.jitter_queries = jitter_queries
        self.reader = ClipReader(frames, flip=flip, decoder=decoder, sampling=sampling, **self._looks(None))
        self.batch_size = batch_size
        self.episodes_per_step = episodes_per_step
        self.validate_every = validate_every
        self.num_workers = num_workers
        self.stuck_after = stuck_after
        self.max_unusable = max_unusable
        self.manifest: Manifest | None = None
        self.table: FeatureTable | None = None
        self._datasets: dict[str, EpisodeDataset] = {}
        self._notes: dict[str, ReadingNow] = {}
        self._unusable: dict[str, UnusableVideos] = {}
        self._tables: dict[str, EvaluationTable | TrainingTable] = {}
        self._checked: set[Video] = set()
        self.accumulation(world_size=1)

    @property
    def rank(self) -> int:
        """This process among ``world_size``."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Number of processes, a device each."""
        return self.trainer.world_size if self.trainer else 1

    def accumulation(self, world_size: int) -> int:
        """Batches of an optimiser step on each device.

        Raises:
            UserError: the episodes of a step don't divide over batches and devices.
        """
        return batches_of_step(self.episodes_per_step, self.batch_size, world_size)

    def prepare_data(self) -> None:
        """Render the embedded benchmark if it is asked for and not there yet."""
        if self.manifest_path in EMBEDDED:
            self._render()

    def setup(self, stage: str) -> None:
        """Read and check the manifest; for ``fit`` also count the Trainer's run in whole optimiser steps.

        Args:
            stage: ``fit``, ``validate`` or ``test``.
        """
        if stage != "test" and self.knobs != motion_shapes.NO_KNOBS:
            raise UserError("data.knobs changes the episodes of tests alone; leave it out for anything but a test")
        self._look_as_the_tower()
        if self.manifest is None:
            self._read_manifest()
        for option in ("val_episodes", "test_episodes"):
            if getattr(self, option) < self.world_size:
                raise UserError(
                    f"{option} is {getattr(self, option)} on {self.world_size} devices; give at least one a device"
                )
        if stage == "fit":
            self._add_dataset("train")
            if self.trainer:
                count_in_steps(
                    self.trainer, self.episodes_per_step, self.accumulation(self.world_size), self.validate_every
                )
        if stage == "test":
            self._add_dataset("test")
        elif stage == "validate" or not self.trainer or self.trainer.limit_val_batches:
            self._add_dataset("val")
        if self.table is not None:  # all of which was checked when it was read
            return
        for name in self._datasets:
            self._check_decoder(name)
        # A bank reads its videos before it plays: only in fit is that long after the start.
        name = "test" if stage == "test" else "val"
        if name in self._tables and (self.evaluation == "direct" or stage == "fit"):
            self._check_videos(name)

    def _looks(self, model: object) -> dict[str, Any]:
        """How frames are resized and cropped: what no option says is as for the tower of a model.

        Raises:
            UserError: the crop is larger than the frames.
        """
        own = getattr(model, "image_size", None)
        size = self.size or (own if isinstance(own, int) else 224)
        resize = self.resize or round(size * 8 / 7)
        if resize < size and (self.size or own):
            whose = "size" if self.size else "the tower's size"
            raise UserError(f"resize {resize} is smaller than {whose} {size}, the crop; give {size} or more, or none")
        mode = self.resize_mode or getattr(model, "resize_mode", "short_side")
        return {"resize": resize, "size": size, "resize_mode": mode}

    def _look_as_the_tower(self) -> None:
        """Have frames as the tower of the Trainer's model takes them, which may be a new one."""
        if is_feature_table(self.manifest_path):
            return
        model = self.trainer.lightning_module if self.trainer else None
        self.check_tower(model)
        looks = self._looks(model) if self.trainer else {}
        if any(value != getattr(self.reader, name) for name, value in looks.items()):
            self.reader = dataclasses.replace(self.reader, **looks, cache=None)
            self.manifest = None
            self._datasets, self._tables, self._checked = {}, {}, set()

    def check_tower(self, model: object) -> None:
        """Refuse a model that takes no videos, where these are videos.

        Raises:
            UserError: says what to give.
        """
        if getattr(model, "image_size", None) == 0 and not is_feature_table(self.manifest_path):
            raise UserError(
                f"the model was made for features and has no tower that takes videos: give a feature table as"
                f" data.manifest in the place of {self.manifest_path}, as clip-m2df encode writes it with the tower of"
                " its training; or a model with a tower"
            )

    def _check_decoder(self, name: str) -> None:
        """Refuse at the start a split of which the decoder that was chosen may give other frames."""
        reader, doubts = self.reader, {}
        if reader.decoder in ("auto", "pyav"):  # exact by themselves
            return
        for video in itertools.chain(*self._datasets[name].split.videos):
            if not reader.is_cached(video.path):
                with suppress(VideoError):  # which is said when it is read
                    if doubt := decoder_doubt(video.path, reader.decoder):
                        doubts[video.path] = doubt
        if doubts:
            raise UserError(
                f"of {len(doubts)} videos of the {name} split {next(iter(doubts.values()))}: {some(doubts)}; take the"
                f" decoder auto (--data.decoder auto), or leave them out by clip-m2df check --decoder {reader.decoder}"
                " --fix"
            )

    def video_tables(self) -> dict[str, TrainingTable]:
        """All videos of each split, to be encoded: those of train in their augmentations, if there are to be any."""
        if self.manifest is None:
            self._read_manifest()
        assert self.manifest is not None
        tables = {}
        for name, split in self.manifest.splits.items():
            tables[name] = self._table_of(split)
            self._datasets[name] = tables[name].dataset
            self._check_decoder(name)
        return tables

    def calibration_table(self, most: int) -> TrainingTable | None:
        """Videos of val, to be encoded as an evaluation sees them; None where there is no val split.

        Of videos of a class that were cut from one source there is one: others would be closer to it than a clip is to
        examples from elsewhere.

        Args:
            most: videos of a class; of more, some from beginning to end, since neighbours may be cut from one source.
        """
        if self.manifest is None:
            self._read_manifest()
        assert self.manifest is not None
        if "val" not in self.manifest.splits:
            return None
        split = self.manifest.split("val")
        chosen = []
        for videos in split.videos:
            sources: dict[str, Video] = {}
            for video in videos:
                sources.setdefault(source(video), video)
            row, count = list(sources.values()), min(most, len(sources))
            chosen.append(tuple(row[i * len(row) // count] for i in range(count)))
        return self._table_of(dataclasses.replace(split, videos=tuple(chosen)))

    def _table_of(self, split: Split) -> TrainingTable:
        """All videos of a split, to be encoded: those of train in their augmentations, if there are to be any."""
        assert self.manifest is not None
        train = split.name == "train"
        seed = self.seed if train else self.eval_seed
        dataset = EpisodeDataset(split, self.train_shape, self.reader, seed=seed, augment=train, plans=[])
        options: dict[str, Any] = {"root": self.manifest.root, "num_workers": self.num_workers}
        options |= {"stuck_after": self.stuck_after, "progress": True, "known": self.table}
        unusable = UnusableVideos(split, 1.0, "it is left out")
        return TrainingTable(dataset, self.train_augmentations if train else 0, unusable, **options)

    def test_plans(self) -> tuple[Split, list[EpisodePlan]]:
        """The test split and the videos of its episodes; from the manifest alone, no video is needed."""
        if self.manifest is None:
            self._read_manifest(check_files=False)
        assert self.manifest is not None
        split = self.manifest.split("test")
        return split, self._test_plans(split)

    def state_dict(self) -> dict[str, Any]:
        """How a run counts, how far it is, and what its episodes depend on, for its checkpoints."""
        return {
            "seed": self.seed,
            "episodes_per_step": self.episodes_per_step,
            "batches_per_step": self.accumulation(self.world_size),
            "steps": self.trainer.global_step if self.trainer else 0,
            "whole_step": between_steps(self.trainer) if self.trainer else True,
            "episodes": self._episodes(),
        }

    def _episodes(self) -> dict[str, Any]:
        """What the episodes of a run depend on, by the names of the options: those of val, and those of training."""
        depends: dict[str, Any] = {
            "data.n_way": self.train_shape.n_way,
            "data.episodes": "grouped" if self.train_shape.grouped else "random",
        }
        if "val" in self._datasets:
            depends |= {
                "data.n_shot": self.eval_shape.n_shot,
                "data.n_query_eval": self.eval_shape.n_query,
                "data.val_episodes": self.val_episodes,
                "data.eval_seed": self.eval_seed,
                "data.unknown_queries": self.eval_shape.n_unknown,
                "the val split of data.manifest": self._contents("val"),
            }
        if "train" in self._datasets:
            cache = self.reader.cache
            depends |= {
                "data.train_n_shot": self.train_shape.n_shot,
                "data.n_query": self.train_shape.n_query,
                **{
                    f"data.{name}": getattr(self.reader, name)
                    for name in ("frames", "sampling", "resize", "resize_mode", "size", "flip")
                },
                "data.jitter_queries": self.jitter_queries,
                "data.cache": None if cache is None else f"one of {cache.settings}",
                "data.train_augmentations": self.train_augmentations,
                "the train split of data.manifest": self._contents("train"),
            }
        return depends

    def _contents(self, name: str) -> str:
        """A split in words: its size, and a checksum of its classes, their texts and its videos, wherever they are.

        The groups of videos count where episodes are grouped, and are passed over where they change nothing.
        """
        assert self.manifest is not None
        split = self.manifest.split(name)
        outside = None if self.root is None else os.path.abspath(self.root)
        state = hashlib.sha256()
        for label, text, videos in zip(split.class_names, split.class_texts, split.videos, strict=True):
            paths = (relative_path(video.path, self.manifest.root) for video in videos)
            cells = [label, text, *(relative_path(p, outside) if os.path.isabs(p) else p for p in paths), ""]
            if self.train_shape.grouped:
                cells += [*(video.group for video in videos), ""]
            state.update("\0".join(cells).encode(errors="surrogateescape"))
        count = sum(map(len, split.videos))
        return f"{count} videos of {len(split.class_names)} classes (checksum {state.hexdigest()[:8]})"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with a run that counts otherwise (it would repeat episodes, or cut a step), or is over.

        What would change its episodes is refused too, those of val included, by which the best is chosen.

        Raises:
            UserError: says what to set.
        """
        if self.trainer and self.trainer.state.fn == "fit":
            # Earlier versions lacked these options; their trainings were as with these values.
            only = {"data.resize_mode": "short_side", "data.sampling": "segments", "data.jitter_queries": False}
            only |= {"data.episodes": "random", "data.unknown_queries": 0}
            state_dict = state_dict | {"episodes": only | state_dict.get("episodes", {})}
            check_goes_on(state_dict, self.state_dict(), most=self.trainer.max_steps)

    def train_dataloader(self) -> DataLoader[Any]:
        """The endless stream of training episodes, from where the run stands."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation episodes; none if the Trainer wants none."""
        return self._loader("val") if "val" in self._datasets else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test episodes."""
        return self._loader("test")

    def _render(self) -> Path:
        return motion_shapes.render(family=EMBEDDED[self.manifest_path], knobs=self.knobs)

    def _read_manifest(self, *, check_files: bool = True) -> None:
        if is_feature_table(self.manifest_path):
            manifest = self._read_table()
        else:
            path = self._render() if self.manifest_path in EMBEDDED else self.manifest_path
            manifest = Manifest.read(path, self.root, check_files=check_files and self.cache is None)
            if self.cache is not None:
                self.reader = read_from_cache(self.cache, manifest, self.reader, str(path), check_files=check_files)
        if self.eval_shape.grouped and not any(video.group for video in manifest.videos):
            remedy = (
                "let clip-m2df prepare write the manifest, or check --fix find videos that look alike, or fill the"
                " column in by hand with what each video was cut from"
            )
            if self.manifest_path in EMBEDDED:
                remedy = "only its tests with --data.knobs.twins have groups"
            raise UserError(
                f"grouped episodes go by the column group, and no video of {self.manifest_path} has a group: {remedy};"
                " or give --data.episodes random"
            )
        self.manifest = manifest if self.class_texts in (None, []) else manifest.with_texts(self.class_texts)

    def _read_table(self) -> Manifest:
        self.table = table = read_feature_table(self.manifest_path)
        for option, value, own in (
            ("frames", self.reader.frames, table.frames),
            ("train_augmentations", self.train_augmentations or table.augmentations, table.augmentations),
        ):
            if value != own:
                raise UserError(
                    f"{option} is {value}, but {own} in the feature table {self.manifest_path}: give --data.{option}"
                    f" {own}"
                )
        if self.class_texts not in (None, []) and table.class_embeddings:
            raise UserError(
                f"class_texts say what prompts say, and {self.manifest_path} has class embeddings in the place of"
                " prompts: leave one of them out"
            )
        self.train_augmentations = table.augmentations
        return table.manifest

    def _add_dataset(self, name: str) -> None:
        if name in self._datasets:
            return
        assert self.manifest is not None
        split, train = self.manifest.split(name), name == "train"
        limit = (TRAINING_UNUSABLE if train else 0.0) if self.max_unusable is None else self.max_unusable
        plans = self._test_plans(split) if name == "test" and (self.knobs.outliers or self.episodes_file) else None
        self._notes[name] = ReadingNow(self.num_workers)
        self._unusable[name] = UnusableVideos(split, limit)
        dataset = self._datasets[name] = EpisodeDataset(
            split,
            self.train_shape if train else self.eval_shape,
            self.reader,
            seed=self.seed if train else self.eval_seed,
            augment=train,
            replace=limit > 0,
            plans=plans,
            step=self.episodes_per_step,
            jitter_queries=self.jitter_queries,
            note=self._notes[name],
        )
        progress = self.rank == 0 and bool(self.trainer and self.trainer.progress_bar_callback)
        options: dict[str, Any] = {"progress": progress, "root": self.manifest.root, "store": self.store}
        options |= {"num_workers": self.num_workers, "stuck_after": self.stuck_after, "known": self.table}
        if not train:
            count = len(plans) if plans is not None else self.val_episodes if name == "val" else self.test_episodes
            # Episodes that are played together: a number that doesn't depend on the devices.
            options["block"] = min(max(count // MOST_DEVICES, 1), MOST_PLAYED)
            self._tables[name] = EvaluationTable(dataset, count, self._unusable[name], **options)
        elif self.train_augmentations or self.table is not None:
            options["block"] = self.batch_size
            self._tables[name] = TrainingTable(dataset, self.train_augmentations, self._unusable[name], **options)

    def _test_plans(self, split: Split) -> list[EpisodePlan]:
        """The test episodes: those of a file, if one is given, which has the last word on how many there are."""
        if self.episodes_file is not None:
            assert self.manifest is not None
            plans = read_episodes_file(self.episodes_file, split, self.manifest.root, self.eval_shape)
            if len(plans) < self.test_episodes:
                warnings.warn(f"{self.episodes_file} has {len(plans)} episodes, fewer than test_episodes", stacklevel=2)
            return plans[: self.test_episodes]
        self.eval_shape.check(split)
        numbers = range(self.test_episodes)
        plans = [plan_episode(split, self.eval_shape, seed=self.eval_seed, episode=number) for number in numbers]
        if self.knobs.outliers:
            generators = (episode_generator(self.eval_seed, split.name, number, "outliers") for number in numbers)
            share = self.knobs.outliers
            plans = [with_outliers(plan, share, rng) for plan, rng in zip(plans, generators, strict=True)]
        return plans

    def _check_videos(self, name: str) -> None:
        """Refuse to start an evaluation in which too many videos turn out unusable; every rank with the same words."""
        table = self._tables[name]
        count = len(table)
        if self.trainer:
            block = table.block if self.evaluation == "bank" else self.batch_size
            count = min(count, batches_limit(self.trainer, name) * block * self.world_size)
        indices = [i for i in table.named(range(count)) if table.videos[i] not in self._checked]
        read = table.clips([[index] for index in indices[self.rank :: self.world_size]])
        self._unusable[name].add(self._of_all_ranks({p: why for clips in read for p, why in clips.unusable.items()}))
        self._checked.update(table.videos[index] for index in indices)

    def share_unusable(self) -> None:
        """Count the training videos that any rank found unusable; to be called on all ranks.

        Raises:
            UserError: they are too many; on every rank.
        """
        if self.world_size > 1 and "train" in self._unusable:
            unusable = self._unusable["train"]
            unusable.add(self._of_all_ranks(unusable.reasons), say=False)

    def _of_all_ranks(self, unusable: dict[str, str]) -> dict[str, str]:
        """Unusable videos with their reasons, those of this rank and of the others."""
        return dict(itertools.chain(*(of_rank.items() for of_rank in of_all_ranks(unusable, self.world_size))))

    def _loader(self, name: str) -> DataLoader[Any]:
        """The loader of a stage: here it is decided whether its batches are episodes of a table, or frames."""
        table = self._tables.get(name)
        from_table = table is not None and (name == "train" or self.evaluation == "bank")
        sampler = EpisodeSampler(
            None if name == "train" or table is None else len(table),
            block=table.block if table is not None and from_table and name != "train" else 1,
            first=self._first_episode,
            rank=self.rank,
            world_size=self.world_size,
        )
        if table is not None and from_table:
            return DataLoader(table, table.block, sampler=sampler, collate_fn=table.batch)
        return VideoLoader(
            self._datasets[name],
            note=self._notes[name],
            receive=self._unusable[name].receive,
            collate_fn=collate_episodes,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            stuck_after=self.stuck_after,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=name == "val" and self.num_workers > 0,
        )

    def _first_episode(self) -> int:
        """How many training episodes the optimiser has had: a resumed run goes on there, with no loader state."""
        return self.trainer.global_step * self.episodes_per_step if self.trainer else 0


def read_from_cache(folder: str, manifest: Manifest, reader: ClipReader, name: str, *, check_files: bool) -> ClipReader:
    """Let a reader take its frames from a cache, where they are those of the videos.

    Args:
        folder: the cache.
        manifest: of the videos.
        reader: what is read of each.
        name: of the manifest, for messages.
        check_files: refuse videos that are neither in the cache nor there themselves.

    Raises:
        UserError: the cache has frames that are too few or too small, or those of other videos.
    """
    cache = FrameCache.open(folder, manifest.root)
    cached = dataclasses.replace(reader, cache=cache)
    if reader.resize > cache.short_side:
        raise UserError(
            f"resize is {reader.resize}, but the cache {folder} holds frames of {cache.short_side}"
            f" pixels: give --data.resize {cache.short_side} or less, or make a cache of larger ones"
        )
    if reader.resize_mode == "squash" and reader.resize != cache.short_side:
        raise UserError(
            f"resize is {reader.resize}, but the cache {folder} holds frames squashed to {cache.short_side} pixels:"
            f" give --data.resize {cache.short_side}, or make a cache of that size"
        )
    if reader.frames > cache.frames:
        raise UserError(
            f"frames is {reader.frames}, but the cache {folder} holds {cache.frames} of each video:"
            f" give --data.frames {cache.frames} or less, or make a cache of more"
        )
    if check_files:
        manifest.check_files(lambda video: cached.is_cached(video) or os.path.exists(video))
    others = sum(not cached.is_cached(video.path) for video in manifest.videos)
    if others == len(manifest.videos) and reader.sampling != "segments":
        raise UserError(
            f"the cache {folder} has not one video of {name} with all of its frames, of which sampling"
            f" {reader.sampling} takes some by their numbers: leave it out, or make one that keeps as many --frames as"
            " the longest video has"
        )
    if others == len(manifest.videos):
        raise UserError(
            f"the cache {folder} has none of the {others} videos of {name}, or all have changed since: name"
            " another, or make it anew; names in it start at the folder of the manifest that it was made of"
        )
    if reader.sampling == "segments" and (cache.frames / reader.frames) % 2 != 1:
        warnings.warn(
            f"the cache {folder} keeps {cache.frames} frames of a video, no odd multiple of frames,"
            f" {reader.frames}: evaluation takes others than from the videos themselves",
            stacklevel=3,
        )
    if others:
        partly, remedy = "", "clip-m2df cache adds them"
        if reader.sampling != "segments":  # which takes frames by their numbers
            partly = f" with all of their frames, as sampling {reader.sampling} needs them"
            remedy = "a cache with as many --frames as the longest video has would have them"
        warnings.warn(
            f"{others} of the {len(manifest.videos)} videos are not in the cache {folder}{partly}, or have changed"
            f" since: they are read themselves; {remedy}",
            stacklevel=3,
        )
    return cached
