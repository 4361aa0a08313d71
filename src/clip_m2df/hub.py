"""Models as folders, here or on the hub: weights, options and a card, read back without executing anything in them.

A folder is enough for a model: ``model.safetensors`` has the weights; ``config.json`` the options with the towers'
description, tokenizer included, how videos are read and prompts picked, and the checksum of the weights; ``README.md``
is the card, and ``calibration.safetensors`` has the thresholds of its calibration, if it has one. Of a model whose
adapters are apart, ``model.safetensors`` has the head alone, peft's two files have the adapters, and ``config.json``
has the checksum of the towers' weights, which are loaded from elsewhere.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import huggingface_hub
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from torch import Tensor

from clip_m2df.clip.adapter_files import CONFIG as ADAPTER_CONFIG
from clip_m2df.clip.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from clip_m2df.clip.families import family_of
from clip_m2df.clip.formats import known_backbone, public_source
from clip_m2df.episode import ResizeMode, Sampling
from clip_m2df.errors import UserError, some
from clip_m2df.files import check_regular, locked_folder, near_by, sha256_of, whole_file, write_text
from clip_m2df.weight_files import read_weights, write_weights

MODEL_FORMAT, APART_FORMAT = "clip-m2df model 1", "clip-m2df model 1, adapters apart"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CALIBRATION = "calibration.safetensors"
REMEDY = "give a folder that save_pretrained wrote, or fetch the model anew"
TEMPLATE = Path(__file__).parent / "assets" / "model_card.md.jinja"


def write_model(folder: str | os.PathLike[str], checkpoint: Mapping[str, Any], **card: Any) -> None:
    """Write a model's folder; a card that is there already is kept, as somebody may have written in it.

    Args:
        folder: made if need be.
        checkpoint: what Lightning's checkpoints have of a model: ``hyper_parameters``, with the towers' description as
            ``backbone``, ``state_dict``, ``reading``, ``selection`` and, if there is one, ``calibration``. Where the
            adapters are to be apart, ``state_dict`` is that of the head, ``adapter`` what
            :func:`clip_m2df.clip.adapter_files.peft_files` makes, and ``tower`` what tells the towers.
        **card: see :func:`model_card`.

    Raises:
        UserError: the folder can't be written or another process writes into it, a weight is not finite, an option
            can't be saved as JSON, or there is a card already that what was measured can't go into.
    """
    folder = Path(folder)
    if card.get("measured") and (folder / CARD).exists():
        raise UserError(
            f"{folder / CARD} is there already and is kept, so that what was measured would be lost: remove it,"
            " or write the figures into it yourself"
        )
    options, reading = checkpoint["hyper_parameters"], checkpoint["reading"]
    # A path of whoever saves the model would tell others nothing but that person's folders.
    source = public_source(options["backbone"]["source"])
    options = options | {"backbone": options["backbone"] | {"source": source}}
    adapter_config, adapter = checkpoint.get("adapter", ("", {}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All is written before the first takes its place, so that the model that was there outlives a full disk. The
        # config, which has the checksum of the weights, comes last.
        with locked_folder(folder, "model"):
            with ExitStack() as drafts:
                config_draft, draft = (drafts.enter_context(whole_file(folder / n, "model")) for n in (CONFIG, WEIGHTS))
                _save_weights(checkpoint["state_dict"], draft)
                config = {"format": MODEL_FORMAT, "options": options, "reading": reading}
                config |= {"selection": checkpoint["selection"], "sha256": sha256_of(draft)}
                if adapter:
                    drafts.enter_context(whole_file(folder / ADAPTER_CONFIG, "model")).write_text(adapter_config)
                    draft = drafts.enter_context(whole_file(folder / ADAPTER_WEIGHTS, "model"))
                    _save_weights(adapter, draft)
                    config |= {"format": APART_FORMAT, "adapter": sha256_of(draft), "tower": checkpoint["tower"]}
                if calibration := checkpoint.get("calibration"):
                    draft = drafts.enter_context(whole_file(folder / CALIBRATION, "model"))
                    _save_weights({n: value for n, value in calibration.items() if isinstance(value, Tensor)}, draft)
                    told = {n: value for n, value in calibration.items() if not isinstance(value, Tensor)}
                    config["calibration"] = told | {"sha256": sha256_of(draft)}
                try:
                    text = json.dumps(config, indent=2)
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"the model's options can't be saved as JSON: {error}; give plain values"
                    ) from error
                config_draft.write_bytes(f"{text}\n".encode())
                if not (folder / CARD).exists():
                    card["apart"] = bool(adapter)
                    write_text(folder / CARD, "model card", str(model_card(options, reading, **card)))
            # Of a model that was there before.
            old = [*([] if adapter else [ADAPTER_CONFIG, ADAPTER_WEIGHTS]), *([] if calibration else [CALIBRATION])]
            for name in old:
                (folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot save the model in {folder}: {getattr(error, 'strerror', None) or error}; make room, or give"
            " another folder"
        ) from error


def _save_weights(state: Mapping[str, Tensor], draft: Path) -> None:
    # Contiguous, and no two in the same memory, as safetensors takes them.
    copies = {name: w.cpu().clone(memory_format=torch.contiguous_format) for name, w in state.items()}
    write_weights(draft, copies, {"format": "pt"})


def push_model(
    repo_id: str,
    checkpoint: Mapping[str, Any],
    card: Mapping[str, Any],
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    **options: Any,
) -> str:
    """Write a model's folder on the hub; its card has the model's name there.

    Args:
        repo_id: its name there, ``user/name``; made if need be.
        checkpoint: see :func:`write_model`.
        card: options of :func:`model_card`.
        private: whether others may see it, if it is made.
        token: what the hub knows you by; that of ``hf auth login`` by default.
        branch: where to commit it; the main one by default.
        **options: of ``huggingface_hub.HfApi.upload_folder``.

    Returns:
        The address of the commit.

    Raises:
        UserError: there is no network, or the hub refuses to make it; or the model can't be saved. What goes wrong
            with the upload itself comes from huggingface_hub as it is.
    """
    api = HfApi(token=token)
    try:  # the name in full, which the card needs: without "user/" it is one's own
        name = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    except Exception as error:  # the network's faults have no common class
        raise UserError(
            f"{repo_id!r} can't be made on the hub: {error}; check name, network, and hf auth login or token="
        ) from error
    with TemporaryDirectory() as folder:
        write_model(folder, checkpoint, **{**card, "name": name})
        return str(api.upload_folder(repo_id=name, folder_path=folder, revision=branch, **options))


def find_model(name_or_folder: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of a model; of one on the hub the latest, or else what this machine has of it.

    Args:
        name_or_folder: ``user/name``, or the folder.
        **options: of ``huggingface_hub.snapshot_download``.

    Raises:
        UserError: there is no such model, or it can't be fetched.
    """
    name = os.fspath(name_or_folder)
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    if other := other_model(Path(name)):
        raise UserError(other)
    try:
        # All files in one go: asked for a single one, the client takes 23 s to find out that there is no network.
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=[CONFIG, WEIGHTS, ADAPTER_WEIGHTS, CALIBRATION], **options
            )
        )
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{name!r} is neither a folder here nor a model of the hub that you may see: check the name, or give token="
            + near_by(name)
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name!r} has no revision {options['revision']!r}: check it on the hub") from error
    except Exception as error:  # the network's faults have no common class
        raise UserError(
            f"{name!r} is no folder here, and as a model of the hub it is not on this machine and can't be fetched:"
            f" connect once, or download {CONFIG} and {WEIGHTS} from https://huggingface.co/{name} and give the folder"
            + near_by(name)
        ) from error


def has_adapters_apart(folder: str | os.PathLike[str]) -> bool:
    """Whether this is the folder of a model whose adapters are apart, so that its towers come from elsewhere."""
    return os.path.isfile(os.path.join(folder, ADAPTER_WEIGHTS))


def other_model(path: Path) -> str:
    """What to give in the place of a name or a folder that is not a model of :func:`write_model`, if that can be told.

    Args:
        path: a run's folder or that of its checkpoints, what a checkpoint is called in a run, or CLIP's own name.
    """
    name = str(path)
    if path.exists() and not path.is_dir():
        return f"{name} is no folder of a model, and no file of a checkpoint: give one of them"
    if path.is_dir() and not (path / CONFIG).exists():
        patterns = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")
        found = [file for pattern in patterns for file in sorted(path.glob(pattern))]
        best = [str(file) for file in found if file.name == "best.ckpt"] or [str(file) for file in found]
        return f"{name} is the folder of a run and not a model: give its checkpoint, {some(best)}" if best else ""
    if name.removesuffix(".ckpt") in ("best", "last") and not path.exists():
        file = f"{name.removesuffix('.ckpt')}.ckpt"
        patterns = (f"checkpoints/{file}", f"*/checkpoints/{file}", f"runs/*/checkpoints/{file}")
        here = [str(found) for pattern in patterns for found in sorted(Path().glob(pattern))]
        known = f"{some(here)} here" if here else f"RUN/checkpoints/{file}"
        return f"{name!r} is what fit and test call a checkpoint of their own run: give the path of the file, {known}"
    if backbone := known_backbone(name):
        return f"{name!r} is CLIP's own and not a trained model: give it as --backbone, or backbone=, {backbone!r}"
    return ""


def read_model(folder: Path) -> dict[str, Any]:
    """Read a model's folder; its options are as they stand there, and still to be checked.

    Returns:
        See :func:`write_model`; ``adapter`` are the weights alone.

    Raises:
        UserError: a file is missing, damaged, or of another model.
    """
    path = folder / CONFIG
    if other := other_model(folder):
        raise UserError(other)
    for file in (path, folder / WEIGHTS, folder / ADAPTER_WEIGHTS, folder / CALIBRATION):
        check_regular(file, "model's file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config if isinstance(config, dict) else {}
        apart = config.get("format") == APART_FORMAT
        sums = {WEIGHTS: config.get("sha256")} | ({ADAPTER_WEIGHTS: config.get("adapter")} if apart else {})
        calibration = config.get("calibration")
        if calibration is not None:
            sums[CALIBRATION] = calibration.pop("sha256", None) if isinstance(calibration, dict) else None
        found_sums = {name: sha256_of(folder / name) for name in sums}
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from error
    if (found := config.get("format")) not in (MODEL_FORMAT, APART_FORMAT):
        hint = (
            "; CLIP's own weights are given as --backbone, or backbone=" if config.get("model_type") == "clip" else ""
        )
        raise UserError(f"{path} is of another model or version: its format is {found!r}, not {MODEL_FORMAT!r}{hint}")
    reading = config.get("reading", {})
    if not is_reading(reading):
        raise UserError(f"{path} is damaged, its reading is not a number of frames and one of pixels: {REMEDY}")
    for name, expected in sums.items():
        if expected != found_sums[name]:
            raise UserError(
                f"{folder / name} is damaged, or was not saved with the {CONFIG} beside it: its sha256 is"
                f" {found_sums[name]}, not {expected}; fetch both anew (from the hub: force_download=True)"
            )
    told = {"reading": reading, "selection": config.get("selection", "argmax")}
    if apart:
        told |= {"adapter": read_weights(folder / ADAPTER_WEIGHTS), "tower": config.get("tower")}
    if calibration is not None:
        told["calibration"] = calibration | read_weights(folder / CALIBRATION)
    return {"hyper_parameters": config.get("options"), **told, "state_dict": read_weights(folder / WEIGHTS)}


def is_reading(reading: object) -> bool:
    """Whether this says how a model's videos were read: a number of frames and one of pixels, or None: not known.

    With them ``resize_mode`` and ``sampling``; those of earlier versions lack both, which were ``short_side`` and
    ``segments``.
    """
    if not isinstance(reading, dict):
        return reading is None
    numbers, how = {"frames", "resize"}, {"resize_mode": ResizeMode, "sampling": Sampling}
    return (
        reading.keys() in (numbers, numbers | how.keys())
        and all(type(reading[name]) is int and reading[name] > 0 for name in numbers)
        and all(reading[name] in get_args(choices) for name, choices in how.items() if name in reading)
    )


def model_card(
    options: Mapping[str, Any],
    reading: Mapping[str, Any] | None,
    *,
    name: str = "user/name",
    measured: Mapping[str, str] | None = None,
    apart: bool = False,
) -> ModelCard:
    """What a model is, how it is used, and what was measured.

    Args:
        options: of ``CLIPM2DF``, with the towers' description as ``backbone``.
        reading: how the videos of its training were read, ``{"frames": T, "resize": short side}`` with
            ``resize_mode`` and ``sampling``; None: not known.
        name: the model's on the hub.
        measured: figures by what was measured.
        apart: the adapters are, and the towers are not in the folder.
    """
    data = ModelCardData(
        library_name="clip-m2df",
        pipeline_tag="video-classification",
        license="apache-2.0",
        tags=["few-shot-learning", "action-recognition", "video-classification", "clip"],
    )
    facts: dict[str, Any] = {"options": options, "reading": reading, "name": name, "measured": measured, "apart": apart}
    facts["family"] = family_of(options["backbone"]["visual_config"]["kind"])
    card: ModelCard = ModelCard.from_template(data, template_path=str(TEMPLATE), **facts)
    return card
