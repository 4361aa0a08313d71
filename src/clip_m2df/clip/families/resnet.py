"""CLIP's modified ResNet, under the names of OpenAI's released weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clip_m2df.clip.families import Family, Tower


class Bottleneck(nn.Module):
    """A residual bottleneck that shrinks by average pooling, so that no stride aliases.

    Args:
        channels: Channels that come in.
        planes: Channels of the 3x3 convolution; four times as many go out.
        stride: By how much height and width shrink.
    """

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
            if stride > 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to ``(n, 4 * planes, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.pool(y)))
        return F.relu(y + self.downsample(self.pool(x)))


class AttentionPool(nn.Module):
    """Pools a feature map by attention, with the mean of all positions as the one query.

    Args:
        grid: Height and width of the feature map.
        width: Channels of the feature map.
        num_heads: Attention heads.
        dim: Width of the embedding that comes out.
    """

    def __init__(self, grid: int, width: int, num_heads: int, dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) / width**0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, width, grid, grid)`` to ``(n, dim)``."""
        positions = rearrange(x, "n c h w -> n (h w) c")
        tokens = torch.cat([positions.mean(dim=1, keepdim=True), positions], dim=1) + self.positional_embedding
        q, k, v = (
            rearrange(t, "n l (heads d) -> n heads l d", heads=self.num_heads)
            for t in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)
        embedding: Tensor = self.c_proj(rearrange(pooled, "n heads 1 d -> n (heads d)"))
        return embedding


class ModifiedResNet(nn.Module):
    """The ResNet of CLIP (Radford et al., 2021, section 2.4): ResNet-D's stem, anti-aliased strides, attention pooling.

    Args:
        layers: Bottlenecks in each of the four stages; (3, 4, 6, 3) is RN50.
        width: Channels behind the stem, an even number; the feature map has 32 times as many. 64 for RN50.
        dim: Width of the embedding that comes out; 1024 for RN50.
        image_size: Height and width of the images, a multiple of 32.
        head_width: Channels of each head of the attention pooling; 64 in OpenAI's, as in CLIP's transformers.
    """

    def __init__(self, layers: Sequence[int], width: int, dim: int, image_size: int, head_width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(2)

        self.layer1 = _stage(width, width, layers[0], stride=1)
        self.layer2 = _stage(width * 4, width * 2, layers[1], stride=2)
        self.layer3 = _stage(width * 8, width * 4, layers[2], stride=2)
        self.layer4 = _stage(width * 16, width * 8, layers[3], stride=2)

        self.attnpool = AttentionPool(image_size // 32, width * 32, width * 32 // head_width, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(n, 3, image_size, image_size)`` to embeddings ``(n, dim)``."""
        # What convolutions like best on a GPU in half precision; the values are the same.
        x = F.relu(self.bn1(self.conv1(images.contiguous(memory_format=torch.channels_last))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        embedding: Tensor = self.attnpool(x)
        return embedding


def _stage(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    out = planes * Bottleneck.expansion
    return nn.Sequential(Bottleneck(channels, planes, stride), *(Bottleneck(out, planes) for _ in range(blocks - 1)))


class ResNet(Family):
    """The modified ResNet as a visual tower; the text tower beside it is that of CLIP."""

    kind = "resnet"
    name = "CLIP's ResNet"
    visual = Tower(("layers", "width", "dim", "image_size", "head_width"), "dim")
    positions = "attnpool.positional_embedding"
    prefix = 1

    def visual_tower(self, config: Mapping[str, Any]) -> nn.Module:
        """The modified ResNet, of random weights."""
        values = {key: value for key, value in config.items() if key != "kind"}
        return ModifiedResNet(**values).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def blocks(self, tower: nn.Module) -> list[nn.Module]:
        """The bottlenecks."""
        return [module for module in tower.modules() if isinstance(module, Bottleneck)]

    def grid(self, config: Mapping[str, Any]) -> int:
        """Height and width of the last feature map."""
        return int(config["image_size"]) // 32


FAMILY = ResNet()
