"""TS-FSAR's matching, TS-DCM: distance correlations of frames, weighed by a matrix of the task's own."""

import torch
from torch import Tensor, nn

from clip_m2df.errors import UserError, require
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.matching import full_precision, token_cosines
from clip_m2df.nn.prompts import SelectedPrompts

# Added to squared distances before their power, whose gradient at 0 has no bound otherwise; as published.
DISTANCE_EPS = 1e-5


class TSFSARHead(Head):
    """Task-specific distance correlation matching (Long et al., AAAI 2026, arXiv 2512.11340) on frame features.

    Frames are compared by α-distance correlation, which sees nonlinear dependence too; its samples are the channels of
    a frame. How much each pair of frames counts is a matrix ``(frames, frames)`` that a linear layer makes of the task,
    the mean of the support plus that of the query. The logits have no bound: distances, minus the logits, may be
    negative.
    Note: of the published model this is the matching alone. Left out are the side network beside the tower, GLAC, which
    guides its training by the adapted CLIP, and the text's probabilities at test, in whose place the model's
    ``class_weight`` and ``text_fusion`` stand. A frame here is one vector and not a token for each patch, so that a
    distance between channels is that of two numbers, and the published weights of the patches are 1. The linear layer
    ``reduce`` stands for those that reduce the tower's width in the side network, to 256 there.

    Args:
        dim: width of the features.
        frames: of a video: the matrix of the task has as many rows and columns.
        width: channels to which a frame's features are reduced; a frame is kept as ``width (width + 1) / 2`` numbers.
        alpha: α, the power of the squared distances.
        top_k: frames that count in a prompt's score, for the log alone.
        temperature: of PPS's softmax, for the log alone.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    uses_prompts = False
    task_specific = True

    def __init__(
        self,
        *,
        dim: int,
        frames: int = 8,
        width: int = 64,
        alpha: float = 0.4,
        top_k: int = 4,
        temperature: float = 200.0,
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        require(least=1, frames=frames)
        require(least=2, width=width)
        require(above=0, alpha=alpha)
        self.frames = frames
        self.alpha = alpha
        self.reduce = nn.Linear(dim, width, bias=False)
        self.generator = nn.Linear(width, frames * frames, bias=False)

    def embed(self, videos: Tensor, prompt: Tensor | None) -> Embedded:
        """The distances among the channels of each frame, and the mean of the reduced frames.

        Raises:
            UserError: the video has another number of frames.
        """
        self.check_frames(videos.shape[-2])
        channels = self.reduce(videos)
        return Embedded(distances=channel_distances(channels, self.alpha), mean=channels.mean(-2))

    def check_frames(self, frames: int) -> None:
        """Refuse videos of another number of frames, see :meth:`clip_m2df.nn.head.Head.check_frames`."""
        if frames != self.frames:
            raise UserError(
                f"ts_fsar weighs {self.frames} frames, and videos have {frames}: set model.head_options.frames to"
                " data.frames"
            )

    def prototype(self, embedded: Embedded, prompts: Tensor) -> Embedded:
        """The means over the shots."""
        # Note: where classes have different numbers of shots, each class counts the same in the task's mean.
        return Embedded(distances=embedded["distances"].mean(-3), mean=embedded["mean"].mean(-2))

    def match(self, query: Embedded, prototypes: Embedded, selected: SelectedPrompts) -> HeadOutput:
        """The sums of the frames' correlations, weighed by the task's matrix."""
        correlations = token_cosines(query["distances"], prototypes["distances"])
        task = query["mean"] + prototypes["mean"].mean(-2, keepdim=True)
        weights = self.generator(task).unflatten(-1, (self.frames, self.frames))
        return HeadOutput.of((correlations * weights.unsqueeze(-3)).sum((-2, -1)), selected)


@full_precision
def channel_distances(channels: Tensor, alpha: float) -> Tensor:
    """The distances among the channels of frames, centred in rows and columns; cosines of them are correlations.

    Args:
        channels: ``(…, width)``.
        alpha: power of half the squared distance.

    Returns:
        The upper triangle, ``(…, width (width + 1) / 2)``.
    """
    # Note: of the two equal triangles one is kept, as published, so that in a cosine the diagonal counts twice as much.
    squared = (channels.unsqueeze(-1) - channels.unsqueeze(-2)).square() / 2
    distances = (squared + DISTANCE_EPS).pow(alpha)
    rows = distances.mean(-1, keepdim=True)
    centred = distances - rows - rows.mT + rows.mean(-2, keepdim=True)
    first, second = torch.triu_indices(channels.shape[-1], channels.shape[-1], device=channels.device)
    return centred[..., first, second]
