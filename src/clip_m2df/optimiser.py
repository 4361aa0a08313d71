"""Adam for tower and head."""

from __future__ import annotations

import torch

from clip_m2df.errors import UserError
from clip_m2df.nn.m2df import M2DF


def adam(model: M2DF, lr: float, backbone_lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam on what is trained of a model, with a learning rate each for head and tower.

    Raises:
        UserError: nothing is trained.
    """
    tower = [p for p in model.backbone.parameters() if p.requires_grad]
    head = [p for p in model.head.parameters() if p.requires_grad]
    groups = [{"params": head, "lr": lr, "name": "head"}] if head else []
    if tower:
        groups.append({"params": tower, "lr": backbone_lr, "name": "backbone"})
    if not groups:
        raise UserError(
            "nothing to train: the tower is frozen and the head has no parameters; measure it as it is, by"
            " clip-m2df test without --ckpt_path"
        )
    return torch.optim.Adam(groups, weight_decay=weight_decay, fused=model.device.type == "cuda" or None)
