"""A page that is one file: styles, script and pictures are in it, and it fetches nothing."""

import base64
import hashlib
import io
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from clip_m2df.__about__ import __version__
from clip_m2df.errors import UserError, printable
from clip_m2df.evaluation.figures import shown_frames, strip
from clip_m2df.files import check_output, write_text

# Steps from white to the darkest; each has a class of its own in the style sheet, which the policy of the page demands.
SHADES = 10
# Pixels of a frame's side: in a row of its own, and beside a table of frames.
FRAME, SMALL = 112, 40
_QUALITY = 72  # of JPEGs


def check_page(path: Path) -> None:
    """Refuse a page that could not be written, before there is something to lose.

    Raises:
        UserError: its name doesn't end in ``.html``, or it is no file in a folder that can be written.
    """
    if path.suffix != ".html":
        raise UserError(f"--report is {path}: give it a name that ends in .html")
    check_output(path, "report")


def write_page(path: Path, template: str, content: Mapping[str, object]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: where to.
        template: its name in this package.
        content: what the template asks for; text in it is shown as it stands, but for control characters and marks of
            direction, which are shown as escapes.

    Raises:
        UserError: it can't be written.
    """
    style, script = _own_text("page.css"), _own_text("page.js")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none';"
        f" style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    own = {"style": Markup(style), "script": Markup(script), "policy": policy, "version": __version__}
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = templates().get_template(template).render(**content, **own, written=written)
    write_text(path, "report", text)


def percent(share: float | None) -> str:
    """A share of 1 in words; a dash where there is none."""
    return "-" if share is None or share != share else f"{100 * share:.1f} %"


def name(text: object) -> Markup:
    """A name among other words: what is written from right to left moves none of them."""
    return Markup("<bdi>{}</bdi>").format(_shown(text))


def _shown(value: object) -> str:
    """What a template writes of a value: its text as :func:`clip_m2df.errors.printable` has it."""
    return value if isinstance(value, Markup) else printable(str(value), keep="\n")


def shade(value: float) -> int:
    """The step of a value between 0 and 1."""
    return round(SHADES * min(max(value, 0.0), 1.0)) if value == value else 0


def frame_pictures(clip: Tensor, most: int = 8) -> list[str]:
    """Frames ``(frames, 3, height, width)`` of a clip, evenly chosen, each as a data URI."""
    return [_as_uri(strip(frame.unsqueeze(0), FRAME)) for frame in shown_frames(clip, most)]


def strip_picture(clip: Tensor, *, upright: bool = False, most: int | None = None) -> str:
    """The frames of a clip ``(frames, 3, height, width)`` beside one another, small, as a data URI."""
    return _as_uri(strip(clip, SMALL, most=most, upright=upright))


def _as_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@cache
def templates() -> Environment:
    """The templates of pages, with filters for shares, shades and frames of a clip."""
    environment = Environment(
        loader=PackageLoader("clip_m2df.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"name": name, "percent": percent, "shade": shade, "strip": strip_picture}
    environment.filters["basename"] = lambda path: os.path.basename(os.path.normpath(path))
    environment.globals["zip"] = zip
    return environment


def _own_text(name: str) -> str:
    return (resources.files("clip_m2df.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the policy knows an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
