"""Write tests/golden/published_*.npz: from frames to logits by CLIP-M²DF's published code, run with small weights.

    PYTHONPATH=src python scripts/golden_published.py CLIP-MDMF

CLIP-MDMF is the folder of the published code (github.com/cofly2014/CLIP-MDMF); einops is needed beside torch. The
published model, its towers, a step of its training and its way of saving are run as they are. Replaced are only: sizes
that are written into the code (features of 16 numbers, 64 inside the feed-forward parts, small towers); the GPU; the
vocabulary, by this package's own small tokenizer; and modules that are imported there but play no part. A file has

- ``clip/*``, the CLIP that the training begins with, in OpenAI's layout, and ``state/*``, what the training saved as
  ``model_state_dict``: by default its tower is wrapped in DataParallel. Both are float16.
- ``frames`` uint8 ``(videos, 8, 3, side, side)``, the support first, and ``labels``; ``class_names``, and ``tokens`` of
  their prompts.
- ``logits`` of the queries with the likeliest prompts, and ``sampled_logits`` with those drawn at ``draws``.
"""

import argparse
import importlib
import os
import random
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import packaging.version
import torch
from torch import Tensor

from clip_m2df import CLIPBackbone

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
WAY, SHOT, FRAMES, DIM = 5, 2, 8, 16
NAMES = ["open door", "shut door", "push door", "pull door", "lift door"]
# What the published code calls the tower; width, layers, patch size; side of the frames.
TOWERS = {"vit": ("ViT-B/16", 64, 1, 8, 32), "resnet": ("RN50", 2, (1, 1, 1, 1), None, 64)}
UNUSED = ("torchvision", "torchvision.models", "torchvision.transforms", "ipdb", "ftfy", "oss2", "simplejson", "psutil")


def import_published(folder: Path) -> tuple[Any, Any, Any]:
    """The modules of the published training, model and CLIP."""
    sys.path.insert(0, str(folder))
    sys.modules.update({name: mock.MagicMock() for name in UNUSED})
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)  # type: ignore[assignment]
    Path("runs_trms").mkdir()  # where the training logs as soon as it is imported
    names = ("run_clip_fsar_decison_now", "models.base.few_shot_clip_two_trans", "models.base.clip_model")
    return tuple(importlib.import_module(name) for name in names)  # type: ignore[return-value]


def small_clip(clip_model: Any, tower: str, vocabulary: int) -> dict[str, Tensor]:
    """Random weights of a CLIP of the published class, rounded to float16."""
    _, width, layers, patch_size, side = TOWERS[tower]
    clip = clip_model.CLIP(DIM, side, layers, width, patch_size, 77, vocabulary, 64, 1, 1)
    with torch.no_grad():
        for name, weight in clip.state_dict().items():
            if name.endswith("running_var"):
                weight.uniform_(0.5, 1.5)
            elif name.startswith("visual.") and weight.is_floating_point():
                # Features that tell videos apart come of large weights and small positions; no weight is as it starts.
                weight.mul_(3.0 if "weight" in name and weight.ndim > 1 else 1.0)
                weight.add_(0.02 * torch.randn(weight.shape))
            elif name == "ln_final.weight":
                weight.mul_(0.2)  # prompts that differ little from each other, so that PPS is in doubt
            elif name == "ln_final.bias":
                weight.normal_()
            if weight.is_floating_point():
                weight.copy_(weight.half())
    return dict(clip.state_dict())


def make_frames(side: int) -> Tensor:
    """Frames of support and queries: coarse blocks, a picture for each class and something of each video's own."""
    grid = torch.rand(WAY, 1, 1, 3, 4, 4) + 0.5 * torch.rand(WAY, SHOT + 1, FRAMES, 3, 4, 4)
    blocks = (255 * grid / 1.5).to(torch.uint8).repeat_interleave(side // 4, -1).repeat_interleave(side // 4, -2)
    return torch.cat((blocks[:, :SHOT].flatten(0, 1), blocks[:, SHOT]))


def episode(frames: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """An episode as the published loader makes it, without its batch axis; frames and labels in its order."""
    labels = torch.cat((torch.arange(WAY).repeat_interleave(SHOT), torch.arange(WAY)))
    order = torch.cat((torch.randperm(WAY * SHOT), WAY * SHOT + torch.randperm(WAY)))
    frames, labels = frames[order], labels[order]
    parts = {"support": slice(0, WAY * SHOT), "target": slice(WAY * SHOT, None)}
    task = {f"{role}_set": frames[part].flatten(0, 1).float().div(255) for role, part in parts.items()}
    task |= {f"{role}_labels": labels[part].float() for role, part in parts.items()}
    task |= {f"real_{role}_labels": labels[part].float() for role, part in parts.items()}
    return task | {"batch_class_list": torch.arange(WAY).float()}, frames, labels


def run(tower: str, tokens: Tensor, training: Any, model_module: Any, clip_model: Any) -> dict[str, Any]:
    """A step of the published training, what it saves, and the logits of what was saved."""
    clip = small_clip(clip_model, tower, int(tokens.max()) + 1)
    name, *_, side = TOWERS[tower]
    task, frames, labels = episode(make_frames(side))

    class Small(model_module.MDMF_CLIPFSAR):  # type: ignore[misc]
        mid_dim = property(lambda self: DIM, lambda self, value: None)

    train = SimpleNamespace(CLASS_NAME=NAMES, USE_CLASSIFICATION=True)
    config = SimpleNamespace(
        VIDEO=SimpleNamespace(HEAD=SimpleNamespace(BACKBONE_NAME=name)),
        TRAIN=train,
        TEST=SimpleNamespace(CLASS_NAME=NAMES),
    )
    args = SimpleNamespace(
        seq_len=FRAMES, way=WAY, num_gpus=3, is_pps=True, dist_condition=[1, 0], dist_direction="up2down",
        lambdas=[0, 1, 1], tasks_per_batch=1,
    )  # fmt: skip
    with (
        mock.patch.object(model_module, "load", return_value=(clip_model.build_model(dict(clip)), None)),
        mock.patch.object(model_module, "tokenize", return_value=tokens),
        mock.patch.object(model_module, "Transformer_v1", partial(model_module.Transformer_v1, mlp_dim=64)),
    ):
        model = Small(args, config)
    model.distribute_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    learner = SimpleNamespace(
        args=args, model=model, optimizer=optimizer, checkpoint_dir=".", accuracy_fn=training.aggregate_accuracy,
        scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1600000], gamma=1),
        loss=lambda logits, labels, device: training.loss(logits, labels, "cpu"),
    )  # fmt: skip
    learner.prepare_task = partial(training.Learner.prepare_task, learner)
    training.Learner.train_task(learner, {key: value.unsqueeze(0) for key, value in task.items()})
    optimizer.step()
    for weight in model.state_dict().values():
        if weight.is_floating_point():
            weight.copy_(weight.half())
    training.Learner.save_checkpoint(learner, 200)

    model.eval()
    with torch.no_grad():
        with mock.patch.object(random, "choices", lambda population, weights: [int(weights.argmax())]):
            logits = model(task)["dis_logits"]
        random.seed(0)
        sampled = model(task)["dis_logits"]
    random.seed(0)
    draws = torch.tensor([random.random() for _ in range(WAY)], dtype=torch.float64)
    state = torch.load("checkpoint.pt", weights_only=True)["model_state_dict"]
    stored = {f"clip/{k}": v for k, v in clip.items()} | {f"state/{k}": v for k, v in state.items()}
    stored = {key: value.half() if value.is_floating_point() else value for key, value in stored.items()}
    found = {
        "frames": frames,
        "labels": labels,
        "tokens": tokens,
        "logits": logits,
        "sampled_logits": sampled,
        "draws": draws,
    }
    return {key: value.numpy() for key, value in (stored | found).items()} | {"class_names": np.array(NAMES)}


def main() -> None:
    """Run the published code in a folder of its own, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help="the folder of the published code")
    published = parser.parse_args().published.resolve()
    # Before modules are replaced that transformers looks for.
    tokens = CLIPBackbone.load("tiny").tokenize([f"a photo of {name}" for name in NAMES])
    # There is no GPU to copy to.
    on_cpu = [mock.patch.object(kind, "cuda", lambda self, *_: self) for kind in (Tensor, torch.nn.Module)]
    with TemporaryDirectory() as folder, on_cpu[0], on_cpu[1], mock.patch.dict(os.environ):
        os.chdir(folder)
        modules = import_published(published)
        for tower in TOWERS:
            torch.manual_seed(0)
            random.seed(0)
            np.savez_compressed(GOLDEN / f"published_{tower}.npz", **run(tower, tokens, *modules))


if __name__ == "__main__":
    main()
