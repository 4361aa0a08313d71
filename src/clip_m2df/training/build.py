"""What the options of :class:`clip_m2df.training.module.CLIPM2DF` may be, and the model that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.errors import UserError
from clip_m2df.nn import baselines as heads
from clip_m2df.nn.m2df import M2DF
from clip_m2df.nn.prompts import Selection


def check_adam(*, weight_decay: float, **rates: float) -> None:
    """Refuse learning rates that are not above 0, and a negative weight decay.

    Raises:
        UserError: names the first.
    """
    for option, value in rates.items():
        if not value > 0:
            raise UserError(f"{option} is {value}; it must be positive")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay is {weight_decay}; it must not be negative")


def check_evaluation(bank_memory: float, text_fusion: float) -> None:
    """Refuse a negative size of the bank, and a share of the text that is none.

    Raises:
        UserError: says what it may be.
    """
    if not bank_memory >= 0:
        raise UserError(f"bank_memory is {bank_memory}; it must not be negative")
    if not 0 <= text_fusion <= 1:
        raise UserError(f"text_fusion is {text_fusion}; it must be between 0 and 1")


def check_warmup(warmup_steps: int, warmup_start: float) -> None:
    """Refuse a warm-up that takes a negative time, or starts at no share of the peak.

    Raises:
        UserError: says what they may be.
    """
    if warmup_steps < 0 or not 0 < warmup_start <= 1:
        raise UserError(
            f"warmup_steps {warmup_steps} must not be negative, and warmup_start {warmup_start} between 0 and 1"
        )


def build_model(
    backbone: str | Mapping[str, Any],
    head: str,
    head_options: Mapping[str, Any] | None,
    template: str | Sequence[str],
    *,
    selection: Selection,
    freeze_backbone: bool,
    freeze_batch_norm: bool,
    gradient_checkpointing: bool,
    compile: bool,
) -> M2DF:
    """Load the tower, make the head, and put them together; the options are those of ``CLIPM2DF``.

    Raises:
        UserError: an option that the head doesn't have, weights that can't be had, or a head that does not exist.
    """
    # What is asked of the head is checked before a tower is loaded, which takes longer.
    options = dict(head_options or {})
    if "selection" in options:
        raise UserError("head_options: selection is an option of the model itself, --model.selection; move it there")
    if "dim" in options:
        raise UserError("head_options: dim follows from the backbone; leave it out")
    if "selection" in heads.options_of(heads.head_class(head)):
        options["selection"] = selection
    tower = CLIPBackbone.from_description(backbone) if isinstance(backbone, Mapping) else CLIPBackbone.load(backbone)
    tower.freeze_batch_norm = freeze_batch_norm
    if gradient_checkpointing:
        tower.enable_gradient_checkpointing()
    model = M2DF(tower, heads.build_head(head, {"dim": tower.dim, **options}), template, freeze_backbone)
    if compile:  # in place, so that the weights keep their names
        tower.visual.compile()
        model.head.compile()
    return model
