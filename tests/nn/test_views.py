from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from clip_m2df.nn.views import Dropout, FusionEncoder, GlobalTemporalContext, LocalTemporalContext, WeightNormConv
from tests.nn import references


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("depth", [1, 2])
def test_fusion_encoder_equals_the_loop(depth: int) -> None:
    torch.manual_seed(0)
    encoder = FusionEncoder(16, depth, num_heads=4, hidden_dim=24).double().eval()
    prompt, frames, context = (
        features(2, 16).double(),
        features(2, 5, 16, seed=1).double(),
        features(2, 5, 16, seed=2).double(),
    )
    fused = encoder(prompt, frames, context)
    for video in range(2):
        tokens = [prompt[video].tolist(), *context[video].tolist()]
        key_value = [prompt[video].tolist(), *frames[video].tolist()]
        for layer in encoder.layers:
            tokens = references.fusion_layer(layer, tokens, key_value)
            key_value = tokens  # further layers attend to themselves
        torch.testing.assert_close(fused[video], torch.tensor(tokens, dtype=torch.float64))


def test_fusion_encoder_drops_out_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = FusionEncoder(16)
    inputs = features(2, 16), features(2, 5, 16), features(2, 5, 16)
    assert not torch.equal(encoder(*inputs), encoder(*inputs))
    encoder.eval()
    assert torch.equal(encoder(*inputs), encoder(*inputs))


def test_local_context_sees_two_frames_on_either_side() -> None:
    torch.manual_seed(0)
    context = LocalTemporalContext(4)
    frames = features(1, 9, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(context(frames)[0, 4].sum(), frames)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [False, False, True, True, True, True, True, False, False]


def test_global_context_is_the_last_step_added_to_every_frame() -> None:
    torch.manual_seed(0)
    context = GlobalTemporalContext(4).eval()
    frames = features(2, 8, 4)
    # Block by block: causal convolutions written as sums over taps, weights normalised by hand.
    x = frames.transpose(1, 2)
    block: Any
    for block, dilation in zip(context.blocks, (1, 2, 4), strict=True):
        y = x
        for conv in (block.conv1, block.conv2):
            g, v = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
            weight = g * v / v.flatten(1).norm(dim=1)[:, None, None]
            steps = []
            for t in range(8):
                step = conv.bias[None].repeat(2, 1)
                for tap in range(3):
                    if (source := t - (2 - tap) * dilation) >= 0:
                        step = step + y[:, :, source] @ weight[:, :, tap].T
                steps.append(F.relu(step))
            y = torch.stack(steps, -1)
        x = F.relu(y + x)
    torch.testing.assert_close(context(frames), frames + x[:, None, :, -1])


@pytest.mark.filterwarnings("ignore:.*the global view sees the last 29")
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 23, 27, 28, 29, 30, 31, 32, 33, 64])
def test_the_steps_that_global_context_computes_are_all_that_its_last_one_needs(frames: int) -> None:
    torch.manual_seed(0)
    context = GlobalTemporalContext(4).double().eval()
    videos = features(2, frames, 4).double().requires_grad_()
    x = videos.transpose(1, 2)
    block: Any
    for block, dilation in zip(context.blocks, (1, 2, 4), strict=True):  # all steps, dilated
        y = x
        for conv in (block.conv1, block.conv2):
            weight = torch._weight_norm(conv.parametrizations.weight.original1, conv.parametrizations.weight.original0)
            y = F.relu(F.conv1d(F.pad(y, (2 * dilation, 0)), weight, conv.bias, dilation=dilation))
        x = F.relu(y + x)
    expected, found = videos + x[:, None, :, -1], context(videos)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-15)
    leaves, ones = [videos, *context.parameters()], features(2, frames, 4, seed=1).double()
    for one, other in zip(*(torch.autograd.grad(out, leaves, ones) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("p", "share"), [(0.0, 0.0), (0.05, 0.05), (0.2, 0.2), (0.999, 0.999), (1e-6, 0.0), (1.0, 1.0)]
)
def test_dropout_drops_its_share_and_scales_the_rest(p: float, share: float) -> None:
    torch.manual_seed(0)
    x = features(1, 333, 301).requires_grad_()  # no multiple of four
    out = Dropout(p)(x)
    dropped = out == 0
    n = x.numel()
    assert abs(dropped.sum().item() - share * n) <= 5 * (share * (1 - share) * n) ** 0.5
    torch.testing.assert_close(out[~dropped], x[~dropped] / (1 - p) if p < 1 else x[:0].flatten(), rtol=1e-2, atol=0)
    # Neighbours are dropped on their own: so is every distance's share of pairs.
    for distance in (1, 2, 3, 4, 301):
        pairs = (dropped.flatten()[distance:] & dropped.flatten()[:-distance]).float().mean().item()
        assert pairs == pytest.approx(share**2, abs=5e-3)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad == 0, dropped)
    assert torch.equal(Dropout(p).eval()(x), x)


def test_global_context_reaches_29_frames_and_warns_beyond() -> None:
    torch.manual_seed(0)
    context = GlobalTemporalContext(4).double().eval()
    for parameter in context.parameters():  # all positive: no ReLU hides a path
        parameter.data.abs_()
    frames = features(1, 40, 4).double().abs().requires_grad_()
    with pytest.warns(UserWarning, match="40 frames a video: the global view sees the last 29 only"):
        out = context(frames)
    (gradient,) = torch.autograd.grad((out - frames)[0, 0].sum(), frames)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 11 + [True] * 29


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_weight_norm_is_torchs_own_bit_for_bit(kernel_size: int, dtype: torch.dtype) -> None:
    def of(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return make().to(dtype)

    expected = of(lambda: weight_norm(nn.Conv1d(8, 8, kernel_size)))
    conv = of(lambda: WeightNormConv(8, kernel_size))
    assert [name for name, _ in conv.named_parameters()] == [name for name, _ in expected.named_parameters()]
    x = torch.randn(4, 8, 20, dtype=dtype)
    for _ in range(2):  # as initialised, and after a step
        assert all(torch.equal(w, expected.state_dict()[name]) for name, w in conv.state_dict().items())
        assert torch.equal(conv(x), expected(x))
        for module in (conv, expected):
            module.zero_grad()
            module(x).square().sum().backward()
            torch.optim.SGD(module.parameters(), 0.1).step()
