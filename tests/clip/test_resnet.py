import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

from clip_m2df.clip.families.resnet import AttentionPool, Bottleneck, ModifiedResNet


def test_rn50_has_openais_weights() -> None:
    with torch.device("meta"):
        resnet = ModifiedResNet(layers=(3, 4, 6, 3), width=64, dim=1024, image_size=224)
        features = resnet.eval()(torch.empty(2, 3, 224, 224))

    state = resnet.state_dict()
    assert len(state) == 339  # OpenAI's 489 less the 150 of the text tower
    assert sum(parameter.numel() for parameter in resnet.parameters()) == 38_316_896
    assert state["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)
    assert state["attnpool.positional_embedding"].shape == (50, 2048)
    assert resnet.attnpool.num_heads == 32
    assert features.shape == (2, 1024)


def test_attention_pool_is_multi_head_attention_of_the_mean() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(grid=3, width=16, num_heads=4, dim=6)
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    projections = (pool.q_proj, pool.k_proj, pool.v_proj)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        assert reference.in_proj_bias is not None
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        reference.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(2, 16, 3, 3)

    places = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([places.mean(1, keepdim=True), places], 1) + pool.positional_embedding
    expected = pool.c_proj(reference(tokens[:, :1], tokens, tokens)[0][:, 0])

    torch.testing.assert_close(pool(x), expected)


def test_a_strided_bottleneck_pools_before_its_last_convolution() -> None:
    torch.manual_seed(0)
    block = Bottleneck(8, 4, stride=2).eval()
    x = torch.randn(2, 8, 6, 6)

    y = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    assert y.shape[-2:] == (6, 6)
    assert isinstance(block.downsample, nn.Sequential)
    expected = F.relu(block.bn3(block.conv3(F.avg_pool2d(y, 2))) + block.downsample(F.avg_pool2d(x, 2)))

    torch.testing.assert_close(block(x), expected)
    assert isinstance(Bottleneck(16, 4).downsample, nn.Identity)


def test_imports_stay_light() -> None:
    code = (
        "import sys, clip_m2df.clip.families.resnet, clip_m2df.clip.backbone;"
        "print(*sorted({'transformers', 'huggingface_hub', 'tokenizers', 'lightning'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
