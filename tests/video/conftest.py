"""Videos of each codec and container that is read, for the tests of reading and of sampling."""

from pathlib import Path
from typing import Any

import pytest

from tests.clips import render

N_FRAMES = 40
B_FRAMES = {"bf": "3", "g": "12"}
ALT_REF = {"lag-in-frames": "10", "auto-alt-ref": "1", "cpu-used": "8", "g": "20"}
SHIFTED = [30 + 2 * k for k in range(100)]
UNEVEN = [2 * k + (k % 3 == 0) + 10 * (k > 20) for k in range(N_FRAMES)]

CLIPS: dict[str, dict[str, Any]] = {
    "h264_b_frames.mp4": {"options": B_FRAMES},
    "h264_no_b_frames.mp4": {"options": {"bf": "0", "g": "12"}},
    "h264_shifted.mp4": {"options": B_FRAMES, "times": SHIFTED},
    "h264_open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=2:scenecut=0"}},
    "h264_fragmented.mp4": {"options": B_FRAMES, "container_options": {"movflags": "frag_keyframe"}},
    "h264_with_sound.mp4": {"options": B_FRAMES, "audio": 40},
    "h264_uneven.mp4": {"options": B_FRAMES, "times": UNEVEN},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=3:log-level=none"}},
    "mpeg4_b_frames.mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "h264.avi": {"options": B_FRAMES},
    "h264.mkv": {"options": B_FRAMES},
    "h264.ts": {"options": B_FRAMES},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "mpeg4_odd_size.avi": {"codec": "mpeg4", "size": (97, 65)},
    "xvid.avi": {"codec": "mpeg4", "options": {"bf": "0", "g": "12"}, "tag": "XVID"},
    "vp9_alt_ref.webm": {"codec": "libvpx-vp9", "options": ALT_REF},
    "vp9_odd_size.webm": {"codec": "libvpx-vp9", "options": ALT_REF, "size": (97, 65)},
    "vp9_shifted.webm": {"codec": "libvpx-vp9", "options": ALT_REF, "times": SHIFTED},
    "vp9_uneven.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}, "times": UNEVEN},
    "vp8_alt_ref.webm": {"codec": "libvpx", "options": ALT_REF},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "11"}},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``CLIPS``, of 40 frames each."""
    folder = tmp_path_factory.mktemp("clips")
    for name, how in CLIPS.items():
        render(folder / name, N_FRAMES, **how)
    return folder
