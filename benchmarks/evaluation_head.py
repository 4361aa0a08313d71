"""10,000 episodes from features, fusion included: the bank against one at a time with the double loop, a sample of it.

5-way 1-shot with a query a class, of 480 videos in 24 classes. The features lie as far from their prompts as makes PPS
right in two queries of three, so that videos meet wrong prompts too.
"""

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.ceilings import count_flops, matmul_speed
from benchmarks.double_loop import DoubleLoopHead
from benchmarks.timing import Case, report, seconds
from benchmarks.train_step import to_device
from clip_m2df.episode import IndexedEpisode
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.nn.head import HeadOutput
from clip_m2df.nn.m2df import M2DFHead

N_WAY, N_CLASSES, N_VIDEOS, FRAMES = 5, 24, 20, 8
NOISE = 20.0
BATCH = 64
BAR, MOST_OFF = 30.0, 1e-4


def cases(
    n_episodes: int = 10_000, *, dim: int = 512, sample: int = 20, repeat: int = 3, device: str = "cpu"
) -> Iterator[Case]:
    """One case, in seconds an episode; ``off`` is the largest difference of logits in the sample.

    ``floor`` is the time that the bank's matrix products and convolutions would take at the speed of a large product.
    """
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randn(N_CLASSES, dim, generator=rng)
    noise = torch.randn(N_CLASSES, N_VIDEOS, FRAMES, dim, generator=rng)
    # A video's frames share much of what sets it apart.
    features = (prompts[:, None, None] + NOISE * (0.7 * noise[:, :, :1] + 0.3 * noise)).flatten(0, 1)
    episodes = draw_episodes(n_episodes, rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head, plain_head = M2DFHead(dim=dim).eval().to(device), DoubleLoopHead(dim=dim).eval().to(device)
    plain_head.load_state_dict(head.state_dict())
    features, prompts = features.to(device), prompts.to(device)
    episodes = to_device(episodes, device)

    bank: EpisodeBank

    def play_all() -> None:
        nonlocal bank
        bank = EpisodeBank(head, features, prompts, episodes)
        for numbers in episodes["numbers"].split(BATCH):
            bank.play(numbers)

    def play_one(i: int) -> HeadOutput:
        support, query = features[episodes["support"][i]], features[episodes["query"][i]]
        output: HeadOutput = plain_head(support, query, prompts[episodes["class_indices"][i]], episodes["draws"][i])
        return output

    with torch.inference_mode():
        play_one(0)
        ours = statistics.median(seconds(play_all) for _ in range(repeat)) / n_episodes
        plain = statistics.median(seconds(lambda i=i: play_one(i)) for i in range(sample))  # type: ignore[misc]
        logits = bank.play(episodes["numbers"][:sample]).logits
        off = float((logits - torch.stack([play_one(i).logits for i in range(sample)])).abs().max())
    # Outside inference mode, under which weight norm can't be counted.
    floor = count_flops(play_all) / n_episodes / matmul_speed(device, torch.float32)
    yield report(
        "5-way 1-shot, an episode",
        ours,
        plain,
        off=off,
        floor=floor,
        pps_accuracy=share(bank.indices == episodes["query_labels"]),
        embedded=len(bank.pairs),
        bar=BAR,
        within_bar=off <= MOST_OFF,
    )


def draw_episodes(n_episodes: int, rng: torch.Generator) -> IndexedEpisode:
    """Episodes of random classes, with two videos of each."""
    classes = torch.rand(n_episodes, N_CLASSES, generator=rng).argsort(-1)[:, :N_WAY]
    videos = torch.rand(n_episodes, N_WAY, N_VIDEOS, generator=rng).argsort(-1)[..., :2]
    videos += N_VIDEOS * classes.unsqueeze(-1)
    return IndexedEpisode(
        numbers=torch.arange(n_episodes),
        support=videos[..., :1],
        query=videos[..., 1],
        query_labels=torch.arange(N_WAY).expand(n_episodes, -1),
        class_indices=classes,
        class_names=[str(c) for c in range(N_CLASSES)],
        draws=torch.rand(n_episodes, N_WAY, generator=rng),
        replaced=torch.zeros(n_episodes, dtype=torch.long),
    )


def share(correct: Tensor) -> float:
    """How many of all."""
    return float(correct.float().mean())
