"""The two views: local and global temporal context, and the multi-modal fusion encoder (paper, section 3.3)."""

import warnings
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clip_m2df.errors import UserError


class Dropout(nn.Dropout):
    """torch's dropout; on a CPU a quarter of the draws, and a byte an entry kept for the backward pass, not a float."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if not (self.training and 0 < self.p < 1 and x.device.type == "cpu"):
            return super().forward(x)
        # A number of 64 bits makes four draws, each of 2^16 values.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        dropped = min(round(2**16 * self.p), 2**16 - 1)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return (x * kept).mul_(2**16 / (2**16 - dropped))


class LocalTemporalContext(nn.Module):
    """LTCE: two convolutions over time, no activation between; each frame sees two on either side.

    Args:
        dim: width of the features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, kernel_size=3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """``(videos, frames, dim)`` to the same."""
        x: Tensor = self.conv2(self.conv1(rearrange(frames, "n t d -> n d t")))
        return rearrange(x, "n d t -> n t d")


class WeightNormConv(nn.Module):
    """A convolution whose weight is ``g · v / ‖v‖``, a norm for each output channel.

    torch's own ``weight_norm`` makes a module that can't be pickled, which processes that are spawned take; the
    weights have the names that it gives them.

    Args:
        dim: channels of its input and output.
        kernel_size: taps.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, dim, kernel_size)
        assert conv.bias is not None
        self.bias = conv.bias
        g, v = torch.norm_except_dim(conv.weight.detach()), conv.weight.detach()
        self.parametrizations = nn.ModuleDict({"weight": nn.ParameterDict({"original0": g, "original1": v})})

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """``(videos, dim, frames)`` to ``(videos, dim, 1 + (frames − kernel_size) // stride)``."""
        norm = cast(nn.ParameterDict, self.parametrizations["weight"])
        weight = torch._weight_norm(norm["original1"], norm["original0"])
        if stride == 1 and x.shape[-1] >= 2 * weight.shape[-1]:
            return F.conv1d(x, weight, self.bias)
        # One product of matrices: on a CPU convolutions with strides, or of few steps, take up to three times as long.
        windows = rearrange(x.unfold(-1, weight.shape[-1], stride), "n d t k -> n t (d k)")
        return rearrange(F.linear(windows, weight.flatten(1), self.bias), "n t d -> n d t")


class CausalBlock(nn.Module):
    """A residual block of the temporal convolutional network, for every second frame, counted from the last.

    Frame t sees t and four frames before it, through two convolutions.

    Args:
        dim: width of the features.
        dropout: share dropped after each convolution.
    """

    kernel_size = 3

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = WeightNormConv(dim, self.kernel_size)
        self.conv2 = WeightNormConv(dim, self.kernel_size)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, most: int) -> Tensor:
        """``(videos, dim, frames)`` to ``(videos, dim, min(most, ⌈frames / 2⌉))``, its output at the last frames.

        Args:
            x: frames before the first are taken for zeros.
            most: how many frames of the output are wanted at most.
        """
        y = x
        for conv, stride, wanted in ((self.conv1, 1, self.reach(most) - 2), (self.conv2, 2, most)):
            wanted = min(wanted, -(-y.shape[-1] // stride))
            # Zeros before the first frame where the earliest window reaches there; frames that none needs are cut off.
            seen = F.pad(y, ((wanted - 1) * stride + self.kernel_size - y.shape[-1], 0))
            y = self.dropout(F.relu(conv(seen, stride)))
        return F.relu(y + x[..., x.shape[-1] - 2 * y.shape[-1] + 1 :: 2])

    @classmethod
    def reach(cls, steps: int) -> int:
        """How many frames its last ``steps`` outputs see."""
        return 2 * (steps - 1) + 1 + 2 * (cls.kernel_size - 1)


class GlobalTemporalContext(nn.Module):
    """GTCE: the last step of a temporal convolutional network, added to every frame.

    The network has dilations 1, 2 and 4. Its last step depends on every second step of the second block's input and on
    every fourth of the third's, counted from the end: among these alone each block is the same without a dilation.

    Args:
        dim: width of the features.
        dropout: share dropped after each convolution.
    """

    # How many steps of each block's output the next one needs, and how many frames the first one.
    steps = (13, 5, 1)
    receptive_field = CausalBlock.reach(steps[0])

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock(dim, dropout) for _ in self.steps)

    def forward(self, frames: Tensor) -> Tensor:
        """``(videos, frames, dim)`` to the same."""
        if frames.shape[1] > self.receptive_field:
            warnings.warn(
                f"{frames.shape[1]} frames a video: the global view sees the last {self.receptive_field} only",
                stacklevel=2,
            )
        # Note: the frame count comes from the shape; the published code has 8 written in.
        x = rearrange(frames, "n t d -> n d t")
        for block, steps in zip(self.blocks, self.steps, strict=True):
            x = block(x, steps)
        return frames + rearrange(x, "n d 1 -> n 1 d")


class FusionLayer(nn.Module):
    """Pre-norm attention and a feed-forward part without norm.

    Args:
        dim: width of the tokens.
        num_heads: attention heads, contiguous in the width.
        hidden_dim: width inside the feed-forward part.
        attention_dropout: share dropped after the attention's output map.
        dropout: share dropped in the feed-forward part.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), Dropout(attention_dropout))
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(), Dropout(dropout), nn.Linear(hidden_dim, dim), Dropout(dropout)
        )

    def forward(self, query: Tensor, key_value: Tensor) -> Tensor:
        """``query (videos, tokens, dim)`` and ``key_value (videos, tokens, dim)`` to the shape of ``query``."""
        # One norm serves both, and the residual is the query before it.
        x, y = self.norm(query), self.norm(key_value)
        q, k, v = (
            rearrange(part, "n t (h d) -> n h t d", h=self.num_heads)
            for part in (self.to_q(x), self.to_k(y), self.to_v(y))
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)")
        fused: Tensor = query + self.to_out(attended)
        refined: Tensor = self.feed_forward(fused)
        return fused + refined


class FusionEncoder(nn.Module):
    """MMFE: fuses a video's prompt, its frames and their temporal context.

    Args:
        dim: width of the tokens, a multiple of ``num_heads``.
        depth: layers; those after the first are self-attention.
        num_heads: attention heads.
        hidden_dim: width inside the feed-forward part.
        attention_dropout: share dropped after the attention's output map.
        dropout: share dropped in the feed-forward part.

    Raises:
        UserError: ``dim`` is no multiple of ``num_heads``, or ``depth`` is less than 1.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 1,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        attention_dropout: float = 0.2,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(
                f"dim {dim} is no multiple of {num_heads} attention heads; give a num_heads that divides it"
            )
        if depth < 1:
            raise UserError(f"depth {depth}: the fusion encoder needs at least 1 layer")
        self.layers = nn.ModuleList(
            FusionLayer(dim, num_heads, hidden_dim, attention_dropout, dropout) for _ in range(depth)
        )

    def forward(self, prompt: Tensor, frames: Tensor, context: Tensor) -> Tensor:
        """Fuse.

        Args:
            prompt: ``(videos, dim)``.
            frames: ``(videos, frames, dim)``.
            context: ``(videos, frames, dim)``.

        Returns:
            The fused sequence ``(videos, 1 + frames, dim)``: token 0, where the prompt went in, is the text part, the
            others are the visual part.
        """
        token = rearrange(prompt, "n d -> n 1 d")
        first, *further = self.layers
        tokens: Tensor = first(torch.cat((token, context), 1), torch.cat((token, frames), 1))
        for layer in further:
            tokens = layer(tokens, tokens)
        return tokens


class View(nn.Module):
    """One view of a video: its temporal context and the fusion encoder that reads it.

    Args:
        context: :class:`LocalTemporalContext` or :class:`GlobalTemporalContext`.
        encoder: this view's own fusion encoder.
    """

    def __init__(self, context: nn.Module, encoder: FusionEncoder) -> None:
        super().__init__()
        self.context = context
        self.encoder = encoder

    def forward(self, frames: Tensor, prompt: Tensor) -> Tensor:
        """``frames (…, frames, dim)`` with ``prompt (…, dim)`` to the fused sequence ``(…, 1 + frames, dim)``.

        Where an axis of the frames is 1 and the prompts' is not, a video is fused with several prompts.
        """
        of_videos, leading = frames.shape[:-2], prompt.shape[:-1]
        frames, prompt = frames.flatten(0, -3), prompt.to(frames.dtype).flatten(0, -2)
        context: Tensor = self.context(frames)
        if of_videos != leading:  # the context is a video's own, whatever its prompt
            frames, context = (
                tensor.unflatten(0, of_videos).expand(*leading, -1, -1).flatten(0, -3) for tensor in (frames, context)
            )
        fused: Tensor = self.encoder(prompt, frames, context).unflatten(0, leading)
        return fused
