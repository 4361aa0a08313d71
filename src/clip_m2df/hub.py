"""Models as folders, here or on the hub: weights, options and a card, read back without executing anything in them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import huggingface_hub
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clip_m2df.clip.formats import public_source, read_weights
from clip_m2df.errors import UserError
from clip_m2df.files import whole_file
from clip_m2df.nn import baselines as heads
from clip_m2df.nn.weights import check_weights

if TYPE_CHECKING:
    from clip_m2df.training.module import CLIPM2DF

FORMAT = "clip-m2df model 1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
REMEDY = "give a folder that save_pretrained wrote, or fetch it anew"


class HubModel(
    ModelHubMixin,
    library_name="clip-m2df",
    pipeline_tag="video-classification",
    license="apache-2.0",
    tags=["few-shot-learning", "action-recognition", "video-classification", "clip"],
):
    """What makes a model that can be saved as a folder, pushed to the hub and loaded from either.

    The folder is enough: ``model.safetensors`` has the weights; ``config.json`` the options with the towers'
    description, tokenizer included, how videos are read, and the checksum of the weights; ``README.md`` is the card.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Pass over the mixin's own, which would keep a second description of the towers, of megabytes."""
        return super(ModelHubMixin, cls).__new__(cls)

    def save_pretrained(
        self, save_directory: str | Path, *, measured: Mapping[str, str] | None = None, **options: Any
    ) -> str | None:
        """Save the model as a folder; a card that is there already is kept, as somebody may have written in it.

        Args:
            save_directory: the folder; made if need be.
            measured: figures for the card's table, by what was measured:
                ``{"motion_shapes test, 5-way 1-shot": "83.2 ± 0.8"}``.
            **options: ``push_to_hub``, ``repo_id`` and others of ``huggingface_hub.ModelHubMixin.save_pretrained``.

        Returns:
            The address of the commit, if it was pushed too.

        Raises:
            UserError: the folder can't be written, an option can't be saved as JSON, or there is a card already that
                what was measured can't go into.
        """
        folder = Path(save_directory)
        card = {"measured": measured, **(options.pop("model_card_kwargs", None) or {})}
        if card["measured"] and (folder / CARD).exists():
            raise UserError(
                f"{folder / CARD} is there already and is kept, so that what was measured would be lost: remove it,"
                " or write the figures into it yourself"
            )
        try:
            return super().save_pretrained(folder, model_card_kwargs=card, **options)
        except HfHubHTTPError:  # an OSError too
            raise
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot save the model in {folder}: {getattr(error, 'strerror', None) or error}; make room, or give"
                " another folder"
            ) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        measured: Mapping[str, str] | None = None,
        private: bool | None = None,
        token: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Save the model on the hub; its card says how to use it from there.

        Args:
            repo_id: its name there, ``user/name``; made if need be.
            measured: see :meth:`save_pretrained`.
            private: whether others may see it, if it is made.
            token: what the hub knows you by; that of ``hf auth login`` by default.
            model_card_kwargs: options of :meth:`generate_model_card`.
            **options: ``commit_message``, ``branch`` and others of ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Returns:
            The address of the commit.

        Raises:
            UserError: there is no network, or the hub refuses to make it; or the model can't be saved. What goes wrong
                with the upload itself comes from huggingface_hub as it is.
        """
        try:  # the name in full, which the card needs: without "user/" it is one's own
            name = str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)
        except Exception as error:  # the network's faults have no common class
            raise UserError(
                f"{repo_id!r} can't be made on the hub: {error}; check name, network, and hf auth login or token="
            ) from error
        card = {"measured": measured, **(model_card_kwargs or {}), "name": name}
        return super().push_to_hub(name, private=private, token=token, model_card_kwargs=card, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model that :meth:`save_pretrained` or :meth:`push_to_hub` saved, in evaluation mode.

        A folder needs no network. What comes from the hub is the latest, or else what this machine has of it.

        Args:
            pretrained_model_name_or_path: the folder, or the model's name on the hub, ``user/name``.
            force_download: fetch from the hub what is on this machine already.
            token: what the hub knows you by, for private models; that of ``hf auth login`` by default.
            cache_dir: where files of the hub are kept; huggingface_hub's own folder by default.
            local_files_only: do without the network.
            revision: a branch, tag or commit of the model on the hub; the latest by default.
            **model_kwargs: options of the model, which win over the saved ones.

        Raises:
            UserError: there is no such model, it can't be fetched, it is damaged, or it takes a head that is other
                people's code and was not asked for by ``head=``; or an option that the model doesn't have.
        """
        known = inspect.signature(cls).parameters
        if unknown := [option for option in model_kwargs if option not in known]:
            raise UserError(f"{cls.__name__} has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}")
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            folder = _fetch(
                os.fspath(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        config = _read_config(folder / CONFIG)
        saved = check_options(folder / CONFIG, config["options"], cls, head=model_kwargs.get("head"))
        _check_sum(folder / WEIGHTS, config["sha256"])
        weights = read_weights(folder / WEIGHTS)
        try:
            model = cls(**(saved | model_kwargs))
        except Exception as error:  # whatever values of other types lead to
            raise UserError(f"no model can be made of {folder / CONFIG}: {error}") from error
        loaded = cast("CLIPM2DF", model)
        try:
            check_weights(loaded, weights, f"the model that {folder / CONFIG} describes")
        except UserError as error:
            raise UserError(
                f"{folder / WEIGHTS} is {error}; leave options out that shape the model, or fetch both anew"
            ) from error
        loaded.load_state_dict(weights)
        loaded.reading = config["reading"]
        loaded.eval()
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and options; the latter last, as the mixin has removed those that were there."""
        model = cast("CLIPM2DF", self)
        description = model.model.backbone.description()
        # A path of whoever saves the model would tell others nothing but that person's folders.
        description["source"] = public_source(description["source"])
        options = {**model.hparams, "backbone": description}
        config = {"format": FORMAT, "options": options, "reading": model.reading}
        with whole_file(save_directory / WEIGHTS) as draft:
            draft.touch()
            mode = draft.stat().st_mode
            save_file(_separate(model.state_dict()), draft, {"format": "pt"})
            draft.chmod(mode)  # safetensors lets nobody but the writer read
            config["sha256"] = _sha256(draft)
        try:
            text = json.dumps(config, indent=2)
        except (TypeError, ValueError) as error:
            raise UserError(f"the model's options can't be saved as JSON: {error}; give plain values") from error
        with whole_file(save_directory / CONFIG) as draft:
            draft.write_text(text + "\n", encoding="utf-8")

    def generate_model_card(self, *, name: str = "user/name", measured: Mapping[str, str] | None = None) -> ModelCard:
        """What the model is, how it is used, and what was measured.

        Args:
            name: the model's on the hub.
            measured: figures by what was measured.
        """
        model = cast("CLIPM2DF", self)
        header = self._hub_mixin_info.model_card_data.to_yaml()
        figures = "Nothing was measured when this card was written."
        if measured:
            figures = f"| | accuracy in % |\n|---|---|\n{_rows(measured)}"
        return ModelCard(_CARD.format(header=header, rows=_rows(_facts(model)), name=name, measured=figures))


def check_options(
    path: str | os.PathLike[str], options: Mapping[str, Any], model: type, *, head: str | None = None
) -> dict[str, Any]:
    """Refuse options in a file that the model has not, or that have other people's code imported.

    Args:
        path: the file, for messages.
        options: what it says.
        model: the model's class.
        head: the head that a person asked for: no other code is imported because a file names it.

    Raises:
        UserError: names the option.
    """
    if unknown := [option for option in options if option not in inspect.signature(model).parameters]:
        raise UserError(
            f"{path} has the option {unknown[0]!r}, which {model.__name__} has not; give one of this version"
        )
    name = options["head"]
    if not isinstance(name, str):
        raise UserError(f"{path} takes the head {name!r}, which is no name; give one that {model.__name__} wrote")
    # What is imported already has been trusted.
    if name not in heads.HEADS and name != head and name.rpartition(".")[0] not in sys.modules:
        raise UserError(
            f"{path} takes the head {name!r}, code that is not this package's: if you trust it, name it yourself, by"
            f" --model.head {name} or head={name!r}"
        )
    return dict(options)


# Reading


def _fetch(name: str, **options: Any) -> Path:
    """The folder of a model of the hub; options are those of ``huggingface_hub.snapshot_download``."""
    try:
        # Two files, in one go: asked for a single one, the client takes 23 s to find out that there is no network.
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **options))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{name!r} is neither a folder here nor a model of the hub that you may see: check the name, or give token="
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name!r} has no revision {options['revision']!r}: check it on the hub") from error
    except Exception as error:  # the network's faults have no common class
        raise UserError(
            f"{name!r} is no folder here, and as a model of the hub it is not on this machine and can't be fetched:"
            f" connect once, or download {CONFIG} and {WEIGHTS} from https://huggingface.co/{name} and give the folder"
        ) from error
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(
                f"{name!r} has no {file}, or it has not been fetched: connect, or give a model that push_to_hub wrote"
            )
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    """What ``config.json`` says, checked but for the options themselves."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise UserError(f"{path} is of another model, or of another version: its format is {found!r}, not {FORMAT!r}")
    options, reading = config.get("options"), config.get("reading")
    if not isinstance(options, dict) or not isinstance(options.get("backbone"), dict) or "head" not in options:
        raise UserError(f"{path} is damaged, it has no options with head and backbone: {REMEDY}")
    if "reading" not in config or not (reading is None or _is_reading(reading)):
        raise UserError(f"{path} is damaged, its reading is no numbers of frames and pixels: {REMEDY}")
    if not isinstance(config.get("sha256"), str):
        raise UserError(f"{path} is damaged, it has no sha256 of {WEIGHTS}: {REMEDY}")
    return config


def _is_reading(value: Any) -> bool:
    numbers = value.values() if isinstance(value, dict) and value.keys() == {"frames", "resize"} else [None]
    return all(type(number) is int and number > 0 for number in numbers)


def _check_sum(path: Path, expected: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {REMEDY}") from error
    if found != expected:
        raise UserError(
            f"{path} is damaged, or was not saved with the {CONFIG} beside it: its sha256 is {found}, not {expected};"
            " fetch both anew (from the hub: force_download=True)"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as safetensors takes them: contiguous, no two in the same memory."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, weight in state.items():
        weights[key] = weight.detach().cpu().contiguous()
        if (place := weights[key].untyped_storage().data_ptr()) in seen:
            weights[key] = weights[key].clone()
        seen.add(place)
    return weights


# The card


def _facts(model: CLIPM2DF) -> dict[str, str]:
    """Rows of the card's table of what the model is."""
    backbone, hparams = model.model.backbone, model.hparams
    head_options = ", ".join(f"{option} {value}" for option, value in (hparams["head_options"] or {}).items())
    kind = {"vit": "ViT", "resnet": "ResNet"}[backbone.visual_config["kind"]]
    source = public_source(backbone.source)
    size = f"{backbone.image_size} x {backbone.image_size}"
    reading = "not recorded; the author knows how they were read"
    if model.reading is not None:
        reading = (
            f"{model.reading['frames']} frames, one from each of as many equal segments; short side scaled to"
            f" {model.reading['resize']} pixels; crop of {size}"
        )
    frozen = ", frozen" if hparams["freeze_backbone"] else ""
    return {
        "head": f"`{hparams['head']}`{f' with {head_options}' if head_options else ''}",
        "tower": f"`{source}`: {kind}, {size} pixels, embeddings of {backbone.dim}{frozen}",
        "prompt": ", ".join(f"`{template}`" for template in model.model.templates),
        "videos": reading,
    }


def _rows(table: Mapping[str, str]) -> str:
    """Rows of two cells, whose text stays in them."""
    rows = [[" ".join(text.split()).replace("|", r"\|") for text in row] for row in table.items()]
    return "\n".join(f"| {what} | {text} |" for what, text in rows)


_CARD = """---
{header}
---

# CLIP-M²DF, few-shot action recognition

Names the action in a video from a handful of examples of each class, by CLIP-M²DF (Guo et al., *Multi-view Distillation
based on Multi-modal Fusion for Few-shot Action Recognition*, [arXiv 2401.08345](https://arxiv.org/abs/2401.08345)).

| | |
|---|---|
{rows}

## Use

With the package `clip-m2df`:

```python
from clip_m2df import FewShotClassifier

classifier = FewShotClassifier.from_checkpoint("{name}")
```

Examples of one's own classes make it ready; the towers, the tokenizer and how videos are read come with the model.
For training on, `CLIPM2DF.from_pretrained("{name}")` is the LightningModule.

## Measured

{measured}
"""
