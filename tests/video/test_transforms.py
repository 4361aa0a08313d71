from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.video.transforms import resize_and_crop, segment_indices


def clip_of(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        256, (frames, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


# Which frames


def test_the_middle_of_each_segment() -> None:
    assert segment_indices(80, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert segment_indices(8, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert segment_indices(9, 1) == [4]
    assert segment_indices(1, 3) == [0, 0, 0]
    assert segment_indices(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("frames", [1, 3, 8, 16])
def test_the_middle_agrees_with_exact_arithmetic(frames: int) -> None:
    for n_frames in range(1, 400):
        exact = [floor(Fraction(n_frames * (2 * k + 1), 2 * frames)) for k in range(frames)]
        assert segment_indices(n_frames, frames) == exact


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_offsets_choose_within_each_segment(frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    extremes = [torch.zeros(frames), torch.full((frames,), 1 - 2**-24), torch.full((frames,), 1 - 2**-53).double()]
    for n_frames in (1, 2, 7, 8, 9, 31, 1000):
        for offsets in [*extremes, *torch.rand(20, frames, generator=generator)]:
            chosen = segment_indices(n_frames, frames, offsets)
            assert len(chosen) == frames
            assert chosen == sorted(chosen)
            for k, number in enumerate(chosen):
                assert (
                    floor(Fraction(n_frames * k, frames))
                    <= number
                    < min(n_frames, Fraction(n_frames * (k + 1), frames) + 1)
                )


def test_random_offsets_reach_every_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {n for _ in range(400) for n in segment_indices(21, 4, torch.rand(4, generator=generator))}
    assert seen == set(range(21))


@pytest.mark.parametrize(("n_frames", "frames"), [(0, 8), (8, 0)])
def test_no_frames(n_frames: int, frames: int) -> None:
    with pytest.raises(ValueError, match="cannot choose"):
        segment_indices(n_frames, frames)


def test_one_offset_a_segment() -> None:
    with pytest.raises(ValueError, match="zip"):
        segment_indices(8, 4, torch.zeros(3))


# Which part of them


def slow_resize(frame: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Antialiased bilinear resizing of (3, H, W), written out: a triangle as wide as an output pixel, at least 1."""

    def weights(inputs: int, outputs: int) -> NDArray[np.float64]:
        scale = inputs / outputs
        table = np.zeros((outputs, inputs))
        for i in range(outputs):
            for j in range(inputs):
                distance = abs((j + 0.5) - (i + 0.5) * scale) / max(scale, 1.0)
                table[i, j] = max(0.0, 1.0 - distance)
        return np.asarray(table / table.sum(1, keepdims=True))

    rows, columns = weights(frame.shape[1], height), weights(frame.shape[2], width)
    return np.asarray(np.einsum("yi,cij,xj->cyx", rows, frame, columns))


@pytest.mark.parametrize(
    ("height", "width", "resized"),
    [(24, 41, (16, 27)), (41, 24, (27, 16)), (30, 30, (16, 16)), (10, 13, (16, 20)), (16, 23, (16, 23))],
)
def test_short_side_and_aspect_agree_with_a_slow_resize(height: int, width: int, resized: tuple[int, int]) -> None:
    clip = clip_of(2, height, width)
    new_height, new_width = resized
    for position in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5)):
        top, left = round(position[0] * (new_height - 12)), round(position[1] * (new_width - 12))
        cropped = resize_and_crop(clip, resize=16, size=12, position=position)
        for frame, got in zip(clip, cropped, strict=True):
            expected = slow_resize(frame.numpy().astype(np.float64), new_height, new_width)
            expected = expected[:, top : top + 12, left : left + 12]
            # Two roundings, one a direction.
            assert np.abs(expected - got.numpy()).max() <= 1.01


def test_a_clip_of_that_size_is_left_alone() -> None:
    clip = clip_of(3, 16, 16)
    assert resize_and_crop(clip, resize=16, size=16).equal(clip)


def test_the_crop_is_a_part_of_the_resized_clip_the_same_for_every_frame() -> None:
    clip = clip_of(1, 20, 31).expand(4, -1, -1, -1)
    cropped = resize_and_crop(clip, resize=20, size=9, position=(0.25, 0.75))
    assert cropped.equal(clip[..., 3:12, 16:25])  # round(2.75) and round(16.5)


def test_flip_mirrors_the_square_and_nothing_else() -> None:
    clip = clip_of(3, 20, 31)
    straight = resize_and_crop(clip, resize=16, size=12, position=(0.3, 0.1))
    assert resize_and_crop(clip, resize=16, size=12, position=(0.3, 0.1), flip=True).flip(-1).equal(straight)


def test_memory_order_changes_nothing() -> None:
    clip = clip_of(2, 30, 41)
    pictures = clip.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as decoders return them
    assert resize_and_crop(pictures, resize=16, size=12).equal(resize_and_crop(clip, resize=16, size=12))


@pytest.mark.parametrize("flip", [False, True])
def test_the_result_owns_no_more_than_its_pixels(flip: bool) -> None:
    cropped = resize_and_crop(clip_of(2, 30, 41), resize=16, size=12, flip=flip)
    assert cropped.dtype == torch.uint8
    assert cropped.shape == (2, 3, 12, 12)
    assert cropped.is_contiguous()
    assert cropped.untyped_storage().nbytes() == cropped.numel()


@pytest.mark.parametrize(("resize", "size"), [(16, 17), (16, 0), (0, 0)])
def test_a_square_that_does_not_fit(resize: int, size: int) -> None:
    with pytest.raises(UserError, match=f"the crop's size is {size} and the short side's resize {resize}: set 1 <="):
        resize_and_crop(clip_of(1, 20, 20), resize=resize, size=size)


@pytest.mark.parametrize("position", [(-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_a_position_outside(position: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="position"):
        resize_and_crop(clip_of(1, 20, 20), resize=16, size=12, position=position)
