"""A training episode's head: features and prompts in, loss and gradients out, against its published structure.

5-way with 5 queries a class, 8 frames, float32, dropout on, gradients of the weights and of the features; one episode,
and eight at once, which the plain version loops over. ``share`` is the time of ours over the plain one's, and may be
``bar_share`` at most. ``floor`` is the time that our matrix products and convolutions alone would take at the speed of
a large matrix product. ``off`` is the largest difference of the loss or of a gradient without dropout, over the largest
entry of its tensor; ``kept`` and ``plain_kept`` are the MiB that autograd keeps of all episodes for the backward pass,
beside the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.ceilings import count_flops, matmul_speed
from benchmarks.plain_head import PlainHead
from benchmarks.timing import Case, compare
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.weights import published_head

N_WAY, N_QUERY, FRAMES, BATCH = 5, 5, 8, 8
# Of the plain version's time, by width: one episode, and a batch.
BARS = {512: (0.75, 0.55), 1024: (0.95, 0.75)}
MOST_OFF = 1e-5

Inputs = dict[str, Tensor]


def cases(dims: Sequence[int] = (512, 1024), *, shots: Sequence[int] = (1, 5), repeat: int = 15) -> Iterator[Case]:
    """A case a width, a number of shots, and one episode or a batch."""
    for dim in dims:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = PlainHead(dim)
        ours = M2DFHead.from_published(plain.state_dict())
        ours.scale.requires_grad_(False)
        for n_shot in shots:
            for n_episodes, bar in zip((1, BATCH), BARS.get(dim, (None, None)), strict=True):
                inputs = draw(dim, n_shot, n_episodes)
                steps = Step(ours, our_losses, inputs), Step(plain, plain_losses, inputs)
                memory = {"kept": steps[0].kept(), "plain_kept": steps[1].kept()}
                off = difference(*steps)
                name = f"D = {dim}, {n_shot}-shot, {n_episodes} at once"
                case = compare(name, *steps, repeat=repeat, calls=1, off=off) | memory
                case["share"], case["within_bar"] = 1 / case["ratio"], off <= MOST_OFF
                flops = 3 * count_flops(partial(list, our_losses(ours, inputs)))  # twice as many on the way back
                case["floor"] = flops / matmul_speed("cpu", torch.float32)
                if bar is not None:
                    case["bar_share"] = bar
                    case["within_bar"] &= case["share"] <= bar
                yield case


def draw(dim: int, n_shot: int, n_episodes: int) -> Inputs:
    """Episodes of noise."""
    rng = torch.Generator().manual_seed(0)
    n_queries = N_WAY * N_QUERY
    return {
        "support": torch.randn(n_episodes, N_WAY, n_shot, FRAMES, dim, generator=rng).requires_grad_(),
        "query": torch.randn(n_episodes, n_queries, FRAMES, dim, generator=rng).requires_grad_(),
        "prompts": torch.randn(n_episodes, N_WAY, dim, generator=rng),
        "draws": torch.rand(n_episodes, n_queries, generator=rng),
        "labels": torch.arange(N_WAY).repeat_interleave(N_QUERY).repeat(n_episodes, 1),
    }


def our_losses(head: nn.Module, inputs: Inputs) -> Iterator[Tensor]:
    """The mean loss of all episodes at once."""
    output = head(*(inputs[name] for name in ("support", "query", "prompts", "draws")))
    labels = inputs["labels"]
    match = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum") / len(labels)
    yield match + output.distillation_loss.mean()


def plain_losses(head: nn.Module, inputs: Inputs) -> Iterator[Tensor]:
    """Each episode's part of the mean."""
    for episode in zip(*inputs.values(), strict=True):
        yield head(*episode) / len(inputs["labels"])


class Step:
    """A head in training on episodes: forward and backward.

    Args:
        head: ours or the plain one.
        losses: from the head and the episodes to what is added up; each is gone through backwards before the next.
        inputs: the episodes.
    """

    def __init__(self, head: nn.Module, losses: Callable[[nn.Module, Inputs], Iterator[Tensor]], inputs: Inputs):
        self.head = head.train()
        self.losses = losses
        self.inputs = inputs

    def __call__(self) -> Tensor:
        """The loss; gradients are left where torch puts them."""
        for tensor in (*self.head.parameters(), *self.inputs.values()):
            tensor.grad = None
        total = torch.zeros(())
        for loss in self.losses(self.head, self.inputs):
            loss.backward()
            total += loss.detach()
        return total

    def without_dropout(self) -> dict[str, Tensor]:
        """The loss and all gradients, by the names of published weights."""
        dropouts = [part for part in self.head.modules() if isinstance(part, nn.Dropout)]
        for part in dropouts:
            part.eval()
        found = {"loss": self()}
        for part in dropouts:
            part.train()
        weights = {name: weight.grad for name, weight in self.head.named_parameters() if weight.grad is not None}
        inputs = {name: tensor.grad for name, tensor in self.inputs.items() if tensor.grad is not None}
        return found | inputs | (published_head(weights)[0] if isinstance(self.head, PlainHead) else weights)

    def kept(self) -> float:
        """MiB that autograd keeps of all episodes, weights and inputs left out."""
        kept: dict[int, int] = {}
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.head.parameters(), *self.inputs.values())}
        graphs: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            graphs.extend(self.losses(self.head, self.inputs))  # all alive, or a storage's place would be used twice
        return sum(kept.values()) / 2**20


def difference(ours: Step, plain: Step) -> float:
    """How far losses and gradients lie apart without dropout, each by the largest entry of its tensor."""
    found, expected = ours.without_dropout(), plain.without_dropout()
    assert found.keys() == expected.keys()
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())
