"""Weights and inputs of the towers whose embeddings are in golden/towers.npz: drawn anew, so that they need no file."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def drawn_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights as large as trained ones, so that activations and heads matter; numpy keeps this generator's numbers."""
    generator = np.random.RandomState(seed)
    state = {}
    for name in sorted(shapes):
        values = generator.standard_normal(shapes[name])
        if name.endswith("running_var"):
            values = np.exp(0.2 * values)
        elif len(shapes[name]) < 2:  # of norms the scales, and all biases
            values = 0.1 * values + name.endswith("weight")
        else:
            rows = name in ("visual.proj", "text_projection", "text.text_projection")
            inputs = shapes[name][0] if rows else np.prod(shapes[name][1:])
            values *= (1.0 if len(shapes[name]) == 4 else 1.5) / np.sqrt(inputs) if "embedding" not in name else 0.5
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def drawn_inputs(image_size: int, context_length: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two normalised images, and the tokens of three texts, whose end is the largest and which zeros follow."""
    generator = np.random.RandomState(seed)
    images = generator.standard_normal((2, 3, image_size, image_size))
    tokens = np.zeros((3, context_length), dtype=np.int64)
    for row, length in zip(tokens, (3, context_length // 2, context_length), strict=True):
        row[:length] = [vocab_size - 2, *generator.randint(1, vocab_size - 2, length - 2), vocab_size - 1]
    return torch.tensor(images, dtype=torch.float32), torch.tensor(tokens)
