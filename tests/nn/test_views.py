from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from clip_m2df.nn.views import FusionEncoder, GlobalTemporalContext, LocalTemporalContext, WeightNormConv
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
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_the_weight_norm_is_torchs_own_bit_for_bit(dilation: int, dtype: torch.dtype) -> None:
    def of(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return make().to(dtype)

    expected = of(lambda: weight_norm(nn.Conv1d(8, 8, 3, dilation=dilation)))
    conv = of(lambda: WeightNormConv(8, 3, dilation))
    assert [name for name, _ in conv.named_parameters()] == [name for name, _ in expected.named_parameters()]
    x = torch.randn(4, 8, 20, dtype=dtype)
    for _ in range(2):  # as initialised, and after a step
        assert all(torch.equal(w, expected.state_dict()[name]) for name, w in conv.state_dict().items())
        assert torch.equal(conv(x), expected(x))
        for module in (conv, expected):
            module.zero_grad()
            module(x).square().sum().backward()
            torch.optim.SGD(module.parameters(), 0.1).step()
