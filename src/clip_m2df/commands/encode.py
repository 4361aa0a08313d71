"""``clip-m2df encode``: writes the features of a manifest's videos as a feature table."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_m2df.commands.predict import Precision, parse_options
from clip_m2df.episode import ResizeMode, Sampling
from clip_m2df.errors import UserError, ended_by_sigterm, require, say, some_lines
from clip_m2df.files import check_output, lies_under, relative_path

if TYPE_CHECKING:
    from clip_m2df.datasets.manifest import Manifest
    from clip_m2df.training.module import CLIPM2DF

# Of the broken videos that are named at the end.
MOST_NAMED = 20


def encode_manifest(
    *,
    manifest: str,
    root: str | None = None,
    cache: str | None = None,
    output: Path,
    backbone: str | None = None,
    backbone_options: Sequence[str] | None = None,
    ckpt_path: str | None = None,
    template: Sequence[str] | None = None,
    class_texts: Sequence[str] | None = None,
    augmentations: int = 0,
    seed: int = 0,
    eval_seed: int = 0,
    frames: int | None = None,
    sampling: Sampling | None = None,
    resize: int | None = None,
    resize_mode: ResizeMode | None = None,
    size: int | None = None,
    flip: bool = False,
    device: str | None = None,
    precision: Precision | None = None,
    workers: int = 2,
) -> int:
    """Write the features of a manifest's videos as one table, which stands for them wherever videos are taken.

    Videos that can't be read are named and left out. The table is written at the end, whole or not at all.

    Args:
        manifest: A CSV with the columns path, label and split; or motion_shapes, motion_shapes_scene,
            motion_shapes_order or motion_shapes_mixed, the embedded benchmark.
        root: A folder outside the manifest's own in which its videos may lie too.
        cache: A folder that clip-m2df cache wrote.
        output: The table, .safetensors or .parquet. Beside it come the class embeddings, as
            NAME.classes.safetensors or NAME.classes.parquet, if the tower has text.
        backbone: The towers: a name on the hub, a folder, a file, rn50 or tiny. Either this or --ckpt_path; both with a
            checkpoint of CLIP-M²DF's published code, which lacks the text tower.
        backbone_options: What a file of weights doesn't tell, as in activation=gelu head_width=80; and tokenizer, mean,
            std, image_size, dtype.
        ckpt_path: A trained model, whose towers encode: a .ckpt file, a folder that save_pretrained wrote, or a name on
            the hub.
        template: The prompt, with {} where the class goes, or several; by default the model's own.
        class_texts: What prompts say of classes, where that is not their names: CSVs with the columns label and text.
        augmentations: Of each training video; a training from the table is then that of as many
            --data.train_augmentations. 0: each video once, with the frames of an evaluation.
        seed: Of the augmentations' draws; the training's --data.seed.
        eval_seed: Of the draws of val's and test's frames, with --sampling random_segments.
        frames: Frames of a video; as many as in the model's training by default, or 8.
        sampling: Which frames; as in the model's training by default, or segments.
        resize: Short side of the frames in pixels before the crop; by default as in the model's training, or 8/7 of
            the crop.
        resize_mode: How frames are resized; by default as in the model's training, or as images were for the tower.
        size: Side of the crop in pixels; by default that of the tower, whose positions are interpolated to another.
        flip: Mirror half of the augmentations.
        device: Where the towers run, such as cpu or cuda:1; on CUDA by default where there is any.
        precision: What the visual tower computes in; 32-true by default, and on CUDA bf16-mixed, or 16-mixed where the
            device has no bf16.
        workers: Processes that decode.

    Returns:
        The exit status: 0, or 1 if videos can't be read.

    Raises:
        UserError: Options that don't go together or are out of range, no model, a manifest at fault, not one video of a
            split that can be read, or a table that can't be written.
        Stopped: By SIGTERM; no table is written.
    """
    import torch

    from clip_m2df.classifier.clips import PRECISIONS, default_precision
    from clip_m2df.commands.trainer import leave_cores
    from clip_m2df.datasets.feature_tables import check_no_classes, classes_file, is_feature_table, write_feature_table
    from clip_m2df.episodes.datamodule import EpisodeDataModule
    from clip_m2df.evaluation.bank import encode_videos

    require(least=0, augmentations=augmentations, workers=workers)
    if not is_feature_table(output):
        raise UserError(f"--output is {output}: give it a name that ends in .safetensors or .parquet")
    if is_feature_table(manifest):
        raise UserError(f"{manifest} is a feature table already: give the manifest of videos")
    check_output(output, "feature table")
    with ended_by_sigterm():
        options: dict[str, Any] = {} if template is None else {"template": list(template)}
        options["backbone_options"] = parse_options("backbone_options", backbone_options or [])
        model = _load(ckpt_path, backbone, size, options, device)
        reading: dict[str, Any] = {"frames": 8, "resize": None, "sampling": "segments"}
        reading |= {"resize_mode": model.resize_mode} | (model.reading or {})
        given = {"frames": frames, "resize": resize, "resize_mode": resize_mode, "sampling": sampling}
        reading |= {name: value for name, value in given.items() if value is not None}
        data = EpisodeDataModule(
            manifest,
            root=root,
            class_texts=None if class_texts is None else list(class_texts),
            cache=cache,
            train_augmentations=augmentations,
            seed=seed,
            eval_seed=eval_seed,
            size=model.image_size,
            flip=flip,
            num_workers=workers,
            **reading,
        )
        data.prepare_data()
        tables = data.video_tables()
        assert data.manifest is not None
        embeddings: dict[str, torch.Tensor] = {}
        if model.model.has_prompts:
            for split in data.manifest.splits.values():  # each at once, as a training and an evaluation encode them
                prompts = model.model.encode_prompts(split.class_texts, split.class_names)
                embeddings |= dict(zip(split.class_names, prompts, strict=True))
        else:
            check_no_classes(output)
        leave_cores(workers)
        rows, parts = [], []
        computed_in = precision or default_precision(model.device)
        start, half = _start(data.manifest, root), PRECISIONS[computed_in]
        for name, table in tables.items():
            with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
                features = encode_videos(model.model, table, [], precision=computed_in)
            kept = [i for i, video in enumerate(table.videos) if video.path not in table.unusable.reasons]
            parts.append(features[kept].cpu())
            for index in kept:
                video = table.videos[index]
                row: dict[str, Any] = {"path": relative_path(video.path, start), "label": video.label, "split": name}
                row |= {"group": video.group} if video.group else {}
                rows.append(row | ({"augmentation": index % table.augmentations} if table.augmentations else {}))
        features = torch.cat(parts)
        write_feature_table(output, rows, features, embeddings)
    broken = {path: why for table in tables.values() for path, why in table.unusable.reasons.items()}
    if broken:
        lines = [f"{relative_path(path, start)}: {reason}" for path, reason in broken.items()]
        say(f"videos that could not be read, and are not in the table: {len(lines)}{some_lines(lines, MOST_NAMED)}")
    beside = f", and the embeddings of {len(embeddings)} classes in {classes_file(output)}" if embeddings else ""
    # Without class embeddings a head that needs no prompts.
    verb, head = ("fit", "") if embeddings else ("test", " --model.head otam")
    say(
        f"features of {len(rows)} clips, {features.shape[1]} frames of {features.shape[2]} numbers each, computed in"
        f" {computed_in} on {model.device}, are in {output}{beside}; next:",
        f"  clip-m2df {verb} --data.manifest {shlex.quote(str(output))} --model.backbone features{head}",
    )
    return 1 if broken else 0


def _load(
    ckpt_path: str | None, backbone: str | None, size: int | None, options: dict[str, Any], device: str | None
) -> CLIPM2DF:
    """The model whose towers encode, in evaluation mode."""
    from clip_m2df.classifier.classifier import FewShotClassifier
    from clip_m2df.classifier.clips import placed
    from clip_m2df.training.module import CLIPM2DF

    if ckpt_path is None and backbone is None:
        raise UserError(
            "give the towers: --backbone, weights of CLIP or another family, or --ckpt_path, a trained model"
        )
    if ckpt_path is not None:
        options = {name: value for name, value in options.items() if value}
        model = FewShotClassifier.from_checkpoint(ckpt_path, clip=backbone, device=device, **options).model
        if size not in (None, model.image_size):
            raise UserError(f"size is {size}, but {ckpt_path} has a tower for {model.image_size} pixels: leave it out")
    else:
        if size is not None:
            options["backbone_options"] = {"image_size": size} | options["backbone_options"]
        # A head that has no part in this, and needs no prompts.
        model = placed(CLIPM2DF(str(backbone), head="nearest_prototype", freeze_backbone=True, **options), device)
    if not model.image_size:
        raise UserError(f"{ckpt_path or backbone} has no tower: give the one that makes the features")
    return model.eval()


def _start(manifest: Manifest, root: str | None) -> str | None:
    """The folder that paths start at in the table: as in the manifest, its own or the root."""
    if root is None or all(lies_under(video.path, str(manifest.root)) for video in manifest.videos):
        return manifest.root
    folder = os.path.abspath(root)
    return folder if all(lies_under(video.path, folder) for video in manifest.videos) else manifest.root
