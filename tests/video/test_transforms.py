from collections.abc import Iterator
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clip_m2df.episode import ResizeMode, Sampling
from clip_m2df.errors import UserError
from clip_m2df.video.frame_cache import FrameCache, Settings
from clip_m2df.video.transforms import (
    SAMPLINGS,
    ClipReader,
    jitter_colours,
    linspace_indices,
    random_segment_indices,
    resize_and_crop,
    resize_clip,
    segment_indices,
    window_indices,
)

# Made by scripts/golden_reading.py with the published code of CLIP-FSAR and of CLIP-M²DF.
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "reading.npz"))


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


# The published code bases' own


def lengths() -> Iterator[tuple[int, int, Tensor]]:
    rows = zip(GOLDEN["lengths"].tolist(), torch.from_numpy(GOLDEN["uniforms"]), strict=True)
    yield from ((row, *of_row) for row, of_row in enumerate(rows))


@pytest.mark.parametrize("stage", ["train", "test"])
@pytest.mark.parametrize("sampling", ["random_segments", "window", "linspace"])
def test_frames_are_those_of_the_published_code(sampling: Sampling, stage: str) -> None:
    golden = GOLDEN[f"{sampling}/{stage}"].tolist()
    compared = 0
    for row, n_frames, uniforms in lengths():
        draws = uniforms if stage == "train" or sampling == "random_segments" else None
        chosen = ClipReader(8, sampling=sampling).choose(n_frames, draws)
        assert len(chosen) == 8
        assert 0 <= min(chosen) <= max(chosen) < n_frames
        if golden[row][0] == -1:  # the published code fails
            assert chosen == segment_indices(n_frames, 8, draws)
        else:
            assert chosen == golden[row]
            compared += 1
    assert compared == len(golden) - (7 if sampling == "random_segments" else 0)


def test_frames_as_the_published_code_has_them_at_test() -> None:
    assert linspace_indices(80, 8) == [1, 12, 23, 34, 45, 56, 67, 78]
    assert window_indices(300, 8) == [2, 39, 77, 114, 151, 188, 226, 263]
    # Frames without draws, as of clips that somebody brings: the middles of segments of ten frames.
    assert random_segment_indices(87, 8) == [5, 15, 25, 35, 45, 55, 65, 75]


@pytest.mark.parametrize("sampling", get_args(Sampling))
def test_any_draw_chooses_frames_that_are_there(sampling: Sampling) -> None:
    extremes = [torch.zeros(16), torch.full((16,), 1 - 2**-24), torch.full((16,), 1 - 2**-53).double()]
    generator = torch.Generator().manual_seed(0)
    for frames in (2, 3, 8, 16):
        for n_frames in (1, 2, 3, 7, 8, 9, 10, 11, 34, 36, 1000, 100_000):
            for draws in [*extremes, *torch.rand(5, 16, generator=generator)]:
                chosen = SAMPLINGS[sampling](n_frames, frames, draws[:frames])
                assert len(chosen) == frames
                assert 0 <= min(chosen) <= max(chosen) < n_frames
                assert sampling == "window" or chosen == sorted(chosen)


def test_random_segments_reach_every_frame_but_the_rest_at_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {n for _ in range(400) for n in random_segment_indices(23, 4, torch.rand(4, generator=generator))}
    assert seen == set(range(20))


def frame(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """As scripts/golden_reading.py makes it."""
    y, x, c = np.ogrid[:height, :width, :3]
    return np.asarray((3 * x * x + 5 * y * y + x * y * (number + 7) // 16 + 31 * number + 61 * c) % 256, np.uint8)


@pytest.mark.parametrize("number", range(len(GOLDEN["videos"])))
@pytest.mark.parametrize("stage", ["train", "test"])
@pytest.mark.parametrize(
    ("mode", "sampling", "most"),
    # Theirs are floats, ours whole: half a grey level, and 1e-3 for their other order of operations.
    [("squash", "random_segments", 0.501), ("short_side", "linspace", 1.0)],
)
def test_frames_and_pixels_are_those_of_the_published_code(
    mode: ResizeMode, sampling: Sampling, most: float, stage: str, number: int
) -> None:
    length, height, width = GOLDEN["videos"][number].tolist()
    draws = torch.from_numpy(GOLDEN["draws"][number])
    reader = ClipReader(resize_mode=mode, sampling=sampling)
    chosen = reader.choose(length, draws[:8] if stage == "train" or sampling == "random_segments" else None)
    name = f"{mode}/{stage}/{number}"
    assert chosen == GOLDEN[f"{name}/frames"].tolist()
    clip = torch.from_numpy(np.stack([frame(k, height, width) for k in chosen])).permute(0, 3, 1, 2)
    mirrored, across, down = draws[8:].tolist()
    position, flip = (0.5, 0.5), False
    if stage == "train" and mode == "squash":
        position = (down, across)
    elif stage == "train":
        # It draws one of the corners, in the clip that may be mirrored; ours is found by its share of the way.
        rows, columns = (256 * side // min(height, width) - 224 for side in (height, width))
        top, left, flip = int(down * (rows + 1)), int(across * (columns + 1)), mirrored < 0.5
        position = (top / rows, (columns - left if flip else left) / columns)
    cropped = reader.crop(clip, position, flip=flip).double().numpy()
    golden = GOLDEN[f"{name}/pixels"]
    assert golden.std() > 30
    assert np.abs(cropped[..., 5::32, 5::32] - golden).max() <= most
    # All the others too.
    assert np.abs(cropped.mean((1, 2, 3)) - GOLDEN[f"{name}/mean"]).max() <= (0.01 if mode == "squash" else 0.1)


@pytest.mark.parametrize("number", range(len(GOLDEN["colours/draws"])))
def test_colours_change_as_in_the_published_code(number: int) -> None:
    clip = torch.from_numpy(np.stack([frame(k, 30, 40) for k in range(2)])).permute(0, 3, 1, 2)
    changed = jitter_colours(clip, torch.from_numpy(GOLDEN["colours/draws"][number]))
    assert np.abs(changed[..., ::3, ::4].numpy() - GOLDEN["colours/pixels"][number]).max() <= 0.501
    assert (changed.float() - clip).abs().mean() > 5


def test_grey_is_one_clip_in_three_of_ten_and_stays_grey() -> None:
    assert (GOLDEN["colours/draws"][:, 7] < 0.3).any()
    clip = clip_of(2, 12, 17)
    for draw, grey in ((0.29, True), (0.31, False)):
        changed = jitter_colours(clip, torch.tensor([0.3, 0.6, 0.9, 0.1, 0.2, 0.4, 0.8, draw]))
        assert changed[:, :1].expand_as(changed).equal(changed) is grey
    # A half each, and no turn: the clip itself.
    same = jitter_colours(clip, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.2, 0.4, 0.8, 0.9]))
    assert same.equal(clip)


# Which part of them


def slow_squash(frame: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Bilinear resizing of (3, H, W) to a square, not antialiased: a mean of the four pixels around a point."""
    _, height, width = frame.shape
    squashed = np.zeros((3, side, side))
    for i in range(side):
        y = min(max((i + 0.5) * height / side - 0.5, 0.0), height - 1.0)
        for j in range(side):
            x = min(max((j + 0.5) * width / side - 0.5, 0.0), width - 1.0)
            for row in (floor(y), floor(y) + 1):
                for column in (floor(x), floor(x) + 1):
                    weight = (1 - abs(row - y)) * (1 - abs(column - x))
                    squashed[:, i, j] += weight * frame[:, min(row, height - 1), min(column, width - 1)]
    return squashed


@pytest.mark.parametrize(("height", "width"), [(24, 41), (41, 24), (30, 30), (10, 13), (16, 23)])
def test_squash_agrees_with_a_slow_resize(height: int, width: int) -> None:
    clip = clip_of(2, height, width)
    for frame, got in zip(clip, resize_clip(clip, 16, "squash"), strict=True):
        expected = slow_squash(frame.numpy().astype(np.float64), 16)
        assert np.abs(expected - got.numpy()).max() <= 0.501
    same = clip_of(2, 16, 16)
    assert resize_clip(same, 16, "squash").equal(same)


@pytest.mark.parametrize(("height", "width"), [(24, 41), (41, 24), (30, 30), (10, 13), (16, 23)])
def test_bicubic_is_that_of_pil(height: int, width: int) -> None:
    clip = clip_of(2, height, width)
    resized = resize_clip(clip, 16, "short_side_bicubic").permute(0, 2, 3, 1).numpy()
    for picture, got in zip(clip.permute(0, 2, 3, 1).numpy(), resized, strict=True):
        expected = Image.fromarray(picture).resize(got.shape[1::-1], Image.Resampling.BICUBIC)
        # Two roundings, one a direction.
        assert np.abs(np.asarray(expected, int) - got).max() <= 2
        assert np.abs(np.asarray(expected, int) - got).mean() <= 0.02
    if min(height, width) != 16:
        assert not resize_clip(clip, 16).equal(resize_clip(clip, 16, "short_side_bicubic"))


def test_the_corners_of_squashed_clips_are_cut_off() -> None:
    clip = clip_of(1, 16, 16)
    for share, corner in ((0.0, 0), (0.249, 0), (0.25, 1), (0.5, 2), (0.999, 3)):
        cropped = resize_and_crop(clip, resize=16, size=12, position=(share, 0.5), mode="squash")
        assert cropped.equal(clip[..., corner : corner + 12, 2:14])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "middle"}, "sampling: there is no 'middle'; there are segments, random_segments, window"),
        ({"resize_mode": "x"}, "resize_mode: there is no 'x'; there are short_side, short_side_bicubic, squash"),
        ({"sampling": "window", "frames": 1}, "frames is 1, but sampling window spaces at least 2"),
        ({"sampling": "linspace", "frames": 1}, "frames is 1, but sampling linspace spaces at least 2"),
        (
            {"resize_mode": "squash", "cache": FrameCache(Settings(256, 24, 95), [])},
            "resize_mode is squash, but the frames in the cache were resized by short_side: give --data.resize_mode",
        ),
    ],
)
def test_a_reader_of_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClipReader(**options)


def test_what_decides_the_frames_is_told_as_before() -> None:
    # Of the features in folders of earlier versions.
    assert repr(ClipReader(4, 36, 32)) == (
        "ClipReader(frames=4, resize=36, size=32, flip=False, decoder='auto', cache=None)"
    )
    assert repr(ClipReader(4, 36, 32, sampling="window", resize_mode="squash")) == (
        "ClipReader(frames=4, resize=36, size=32, flip=False, decoder='auto', cache=None, resize_mode='squash',"
        " sampling='window')"
    )


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
