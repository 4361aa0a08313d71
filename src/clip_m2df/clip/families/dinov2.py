"""DINOv2 (Oquab et al., 2023), an encoder of images alone."""

from collections.abc import Collection, Mapping

from torch import Tensor

from clip_m2df.clip.families import Family, Tower

# ImageNet's, which the preprocessing of all its releases has.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DINOv2(Family):
    """A vision transformer whose class token is the embedding.

    Its releases have positions for images of 518 pixels and preprocess images to 224: positions are interpolated.
    """

    def renamed(self, state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
        """The weights by the tower's names; files of the largest model stack two layers of each block in one."""
        unstacked: dict[str, Tensor] = {}
        for name, weight in super().renamed(state, own).items():
            if name not in own and ".mlp.weights_in." in name and weight.ndim and not len(weight) % 2:
                for part, layer in zip(weight.chunk(2), ("gate_proj", "up_proj"), strict=True):
                    unstacked[name.replace("weights_in", layer)] = part
            else:
                unstacked[name] = weight
        return unstacked


FAMILY = DINOv2(
    kind="dinov2",
    name="DINOv2",
    config="Dinov2Config",
    visual=Tower(
        fields=(
            *("hidden_size", "mlp_ratio", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
            *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "qkv_bias", "use_swiglu_ffn"),
            *("image_size", "patch_size", "num_channels"),
        ),
        dim="hidden_size",
        model="Dinov2Model",
        unused=("embeddings.mask_token",),
    ),
    projections={
        # The last of each are those of earlier versions of transformers, gates those of the largest model.
        "q": ("attention.q_proj", "attention.attention.query"),
        "k": ("attention.k_proj", "attention.attention.key"),
        "v": ("attention.v_proj", "attention.attention.value"),
        "o": ("attention.o_proj", "attention.output.dense"),
        "fc1": ("mlp.fc1", "mlp.gate_proj", "mlp.up_proj", "mlp.weights_in"),
        "fc2": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
    },
    positions="model.embeddings.position_embeddings",
    prefix=1,
    any_size=True,
    processor="BitImageProcessor",
    mean=MEAN,
    std=STD,
    crops=True,
    renames=(
        (r"attention\.attention\.query", "attention.q_proj"),
        (r"attention\.attention\.key", "attention.k_proj"),
        (r"attention\.attention\.value", "attention.v_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"mlp\.weights_out", "mlp.down_proj"),
    ),
)
