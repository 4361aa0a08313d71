"""CLIP-FSAR behind the interface of a head: one transformer over prompt and frames, then OTAM."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_m2df.nn.baselines import Baseline
from clip_m2df.nn.head import check_positive, check_shares
from clip_m2df.nn.matching import frame_costs, otam
from clip_m2df.nn.views import FusionEncoder


class CLIPFSARHead(Baseline):
    """CLIP-FSAR on frame features and prompt embeddings (Wang et al., IJCV 2023, arXiv 2303.02982).

    Its video-text loss is the model's ``class_weight``, its fusion with the text's probabilities ``text_fusion``.
    Note: the published code fuses with ``softmax(−d/8)`` and an exact cosine; the model does so with ``softmax(−d)``
    and the cosine of the training, the same for every head. The best β is therefore another.

    Args:
        dim: width of the features, a multiple of ``heads``.
        depth: layers of the transformer.
        heads: its attention heads.
        hidden_dim: width inside its feed-forward parts.
        attention_dropout: dropout after its attention.
        dropout: dropout in its feed-forward parts.
        smoothing: λ of OTAM's soft minimum.
        single_direction: match each query with a prototype by OTAM one way, not both.
        top_k: frames that count in a prompt's score, for the log alone.
        temperature: of PPS's softmax, for the log alone.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    trained = True

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 1,
        heads: int = 8,
        hidden_dim: int = 2048,
        attention_dropout: float = 0.2,
        dropout: float = 0.05,
        smoothing: float = 0.5,
        single_direction: bool = False,
        top_k: int = 4,
        temperature: float = 200.0,
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        check_positive(smoothing=smoothing, hidden_dim=hidden_dim)
        check_shares(attention_dropout=attention_dropout, dropout=dropout)
        self.smoothing = smoothing
        self.single_direction = single_direction
        self.transformer = FusionEncoder(dim, depth, heads, hidden_dim, attention_dropout, dropout)

    def score(self, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
        """Minus OTAM's distances, see :meth:`clip_m2df.nn.baselines.Baseline.score`."""
        # Note: shots are averaged before the transformer, as the published 5-shot configs have it (MERGE_BEFORE); their
        # code can do so after it too. With one shot both are the same.
        frames = support.mean(-3)
        # A class beside its prompt; a query, whose class nobody knows, without
        token = prompts.to(frames.dtype).unsqueeze(-2)
        prototype = self.attend(torch.cat((token, frames), -2))[..., 1:, :]
        costs = frame_costs(self.attend(query), prototype)
        return -otam(costs, smoothing=self.smoothing, single_direction=self.single_direction)

    def attend(self, tokens: Tensor) -> Tensor:
        """Self-attention among ``tokens (…, tokens, dim)``, which have no positions: the same shape."""
        leading = tokens.shape[:-2]
        tokens = tokens.flatten(0, -3)
        for layer in self.transformer.layers:
            tokens = layer(tokens, tokens)
        unflattened: Tensor = tokens.unflatten(0, leading)
        return unflattened

    def class_logits(
        self, support: Tensor, query: Tensor, prompts: Tensor, prompt_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same as :meth:`clip_m2df.nn.head.Head.class_logits`, but a video stands by the mean of all its frames."""
        return self._scaled_cosine(support, prompt_table.unsqueeze(-3)), self._scaled_cosine(query, prompt_table)
