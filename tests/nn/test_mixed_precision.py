"""Losses, gradients and features are finite whatever goes in, under autocast of both kinds."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.clip.backbone import CLIPBackbone
from clip_m2df.nn.baselines import build_head
from clip_m2df.nn.class_text import class_text_logits
from clip_m2df.nn.m2df import M2DFHead

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N_WAY, N_SHOT, FRAMES, DIM = 3, 2, 4, 16
LABELS = torch.tensor([0, 1, 2, 0])  # of the queries

# 1,000 episodes: each of these heads plays each kind of video with each kind of prompts.
N_HEADS = 20
OPTIONS: dict[str, list[Any]] = {
    "views": [["local", "global"], ["local"], ["global"]],
    "pps": [True, False],
    "train_selection": ["sample", "argmax", "expectation", "each"],
    "reliability": [["text"], ["visual"], ["text", "visual"], []],
    "direction": ["global_to_local", "local_to_global", "mutual"],
    "single_direction": [False, True],
    "detach_teacher": [False, True],
    "depth": [1, 2],
    "smoothing": [0.5, 0.05],
}


def zeros_at(*places: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def change(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        support[places], query[places] = 0, 0
        return support, query

    return change


# What becomes of support (n_way, n_shot, frames, dim) and query (n_queries, frames, dim).
VIDEOS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "noise": lambda support, query: (support, query),
    "equal frames": lambda support, query: (support[:, :, :1].expand_as(support), query[:, :1].expand_as(query)),
    "equal videos": lambda support, query: (support[0, 0].expand_as(support), support[0, 0].expand_as(query)),
    "one feature": lambda support, query: (F.pad(support[..., :1], (0, DIM - 1)), F.pad(query[..., :1], (0, DIM - 1))),
    "query is support": lambda support, query: (support, support[LABELS, 0]),
    "query is minus support": lambda support, query: (support, -support[LABELS, 0]),
    "zeros": zeros_at(...),
    "a zero video": zeros_at(0),
    "a zero frame": zeros_at(..., 1, slice(None)),
    "frames of all norms": lambda support, query: (support, query),
}
# And of prompts (n_way, dim), at first of norm 1.
PROMPTS: dict[str, Callable[[Tensor], Tensor]] = {
    "prompts": lambda prompts: 10 * prompts,
    "equal prompts": lambda prompts: 10 * prompts[:1].expand_as(prompts),
    "zero prompts": torch.zeros_like,
    "tiny prompts": lambda prompts: 1e-4 * prompts,
    "huge prompts": lambda prompts: 1e4 * prompts,
}


class Episodes(NamedTuple):
    names: list[str]
    support: Tensor
    query: Tensor
    prompts: Tensor
    draws: Tensor


def adversarial_episodes(seed: int) -> Episodes:
    """One for each kind of video and of prompts; the norms of the frames go from 1e-4 to 1e4."""
    generator = torch.Generator().manual_seed(seed)

    def directions(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, DIM, generator=generator), dim=-1)

    names, episodes = [], []
    for number, (video, prompt) in enumerate(itertools.product(VIDEOS, PROMPTS)):
        powers = torch.full((FRAMES, 1), float((seed + number) % 9 - 4))
        if video == "frames of all norms":
            powers = 8 * torch.rand(FRAMES, 1, generator=generator) - 4
        support, query = directions(N_WAY, N_SHOT, FRAMES), directions(len(LABELS), FRAMES)
        support, query = VIDEOS[video](10**powers * support, 10**powers * query)
        episodes.append((support, query, PROMPTS[prompt](directions(N_WAY))))
        names.append(f"{video}, {prompt}, norms {[f'{10**power:.0e}' for power in powers.flatten().tolist()]}")
    support, query, prompts = (torch.stack(parts).requires_grad_() for parts in zip(*episodes, strict=True))
    return Episodes(names, support, query, prompts, torch.rand(len(names), len(LABELS), generator=generator))


def make_heads(n: int) -> list[M2DFHead]:
    rng = random.Random(0)
    heads = []
    for _ in range(n):
        torch.manual_seed(0)
        options = {option: rng.choice(values) for option, values in OPTIONS.items()}
        heads.append(M2DFHead(dim=DIM, num_heads=2, hidden_dim=32, **options).train())
    return heads


def losses(head: M2DFHead, episodes: Episodes, dtype: torch.dtype) -> Tensor:
    """The training loss of each episode, as of a batch of its own: match, distill and class."""
    _, support, query, prompts, draws = episodes
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        support, query = support.to(dtype), query.to(dtype)  # as the tower gives them
        output = head(support, query, prompts, draws)
        of_support, of_query = class_text_logits(head, support, query, prompts, prompts)
        labels = LABELS.expand(len(support), -1)
        classes = torch.arange(N_WAY).repeat_interleave(N_SHOT).expand(len(support), -1)
        sums = [
            F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(-1)
            for logits, targets in (
                (output.logits, labels),
                (of_query, labels),
                (of_support.flatten(1, 2), classes),
            )
        ]
        return torch.stack([*sums, output.distillation_loss]).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_of_adversarial_episodes_are_finite(dtype: torch.dtype) -> None:
    played = 0
    for seed, head in enumerate(make_heads(N_HEADS)):
        episodes = adversarial_episodes(seed)
        loss = losses(head, episodes, dtype)
        loss.sum().backward()
        assert [name for name, value in zip(episodes.names, loss, strict=True) if not value.isfinite()] == []
        gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        assert len(gradients) > len(list(head.parameters())) / 2
        assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
        for features in (episodes.support, episodes.query, episodes.prompts):
            assert features.grad is not None
            finite = features.grad.flatten(1).isfinite().all(1).tolist()
            bad = [name for name, fine in zip(episodes.names, finite, strict=True) if not fine]
            # See test_float16_cannot_hold_the_gradient_of_a_zero_vector_beside_a_huge_prompt
            assert [name for name in bad if dtype != torch.float16 or "huge prompts" not in name] == []
        played += len(loss)
    assert played == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [("trx", {"width": 32}), ("ts_fsar", {"frames": FRAMES, "width": 16}), ("tip_adapter", {}), ("linear_probe", {})],
)
def test_heads_to_compare_with_are_finite_on_adversarial_episodes(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    head = build_head(name, {"dim": DIM} | options).train()
    for seed in range(2):
        _, support, query, prompts, draws = adversarial_episodes(seed)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = head(support.to(dtype), query.to(dtype), prompts.to(dtype), draws).logits
        assert logits.isfinite().all()
        if head.differentiable:
            F.cross_entropy(logits.transpose(1, 2), LABELS.expand(len(support), -1)).backward()
            for tensor in (support, query, *head.parameters()):
                assert tensor.grad is None or tensor.grad.isfinite().all()


def test_float16_cannot_hold_the_gradient_of_a_zero_vector_beside_a_huge_prompt() -> None:
    # The gradient of x·y / (|x||y| + 0.01) at x = 0 is 100 y, and float16 ends at 65,504. With 16-mixed the scaler
    # leaves out such a step.
    head = make_heads(1)[0]
    for norm, fits in ((10.0, True), (1e4, False)):
        videos = torch.zeros(1, N_WAY, 1, FRAMES, DIM, dtype=torch.float16, requires_grad=True)
        prompts = F.one_hot(torch.arange(N_WAY), DIM).float().unsqueeze(0) * norm
        class_text_logits(head, videos, videos[:, :, 0], prompts, prompts)[0].diagonal(dim1=1, dim2=3).sum().backward()
        assert videos.grad is not None
        assert videos.grad.isfinite().all() == fits


def test_loss_scaling_settles_on_adversarial_episodes() -> None:
    # What Lightning's 16-mixed does: scaled gradients that overflow leave the step out and halve the scale.
    for seed, head in enumerate(make_heads(2)):
        optimizer = torch.optim.Adam(head.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        before = [p.detach().clone() for p in head.parameters()]
        scales = [scaler.get_scale()]
        while len(scales) < 2 or scales[-1] < scales[-2]:
            optimizer.zero_grad()
            scaler.scale(losses(head, adversarial_episodes(seed), torch.float16).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert 1 <= scales[-1] < scales[0]
        assert all(p.isfinite().all() for p in head.parameters())
        assert any(not p.equal(old) for p, old in zip(head.parameters(), before, strict=True))


def extreme_images(size: int) -> Tensor:
    """uint8 ``(7, 3, size, size)``: black, white, noise, a chessboard, one white pixel, one colour, one half white."""
    images = torch.zeros(7, 3, size, size, dtype=torch.uint8)
    images[1] = 255
    images[2] = torch.randint(256, images[2].shape, generator=torch.Generator().manual_seed(0))
    images[3] = 255 * (torch.arange(size)[:, None] + torch.arange(size)).remainder(2)
    images[4, :, 0, 0] = 255
    images[5, 0] = 255
    images[6, :, : size // 2] = 255
    return images


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["vit", "resnet", "resnet with moving batch norm"])
def test_features_of_extreme_images_are_finite_and_near_float32(
    kind: str, dtype: torch.dtype, tiny_clip_dir: Path
) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        tower = CLIPBackbone.load(str(tiny_clip_dir))
    else:
        # Heads of 64 channels; the feature map has 32 times the width.
        config = {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 8, "dim": 32, "image_size": 64}
        tower = CLIPBackbone(config, freeze_batch_norm=kind == "resnet")
    images = tower.normalise(extreme_images(tower.image_size))
    expected = tower.encode_frames(images).detach()
    with torch.autocast("cpu", dtype):
        features = tower.encode_frames(images)
    features.float().square().sum().backward()
    assert features.dtype == dtype
    assert F.cosine_similarity(features.float(), expected).min() > 0.98
    torch.testing.assert_close(features.float().norm(dim=-1), expected.norm(dim=-1), rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in tower.visual.parameters() if p.grad is not None)
