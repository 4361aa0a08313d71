"""The page of ``clip-m2df predict``: what each video was taken for, and why."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import track
from torch import Tensor

from clip_m2df.classifier.classifier import FewShotClassifier
from clip_m2df.classifier.clips import ClipEncoder, Unreadable, read_clips
from clip_m2df.evaluation.explanation import Explanation
from clip_m2df.files import plain
from clip_m2df.report.page import alignment_cells, frame_pictures, percent, prompt_rows, strip_picture, write_page

# Videos that are explained; of more the least certain ones.
MOST_EXPLAINED = 200
# Classes that a video's bars and its table of prompts name.
MOST_CLASSES = 5
# Colours of segments, in the style sheet.
COLOURS = 12

# A row of the table by its columns, but for the path: text, numbers as they are printed, or None.
Row: TypeAlias = "dict[str, Any]"
_Content: TypeAlias = "dict[str, Any]"


def write_predictions(
    page: Path,
    classifier: FewShotClassifier,
    videos: Mapping[str, Sequence[Row]],
    model: str,
    support: Path | None,
    *,
    reject: bool,
    segments: bool,
) -> None:
    """Write the page.

    Args:
        page: where to.
        classifier: which labelled them.
        videos: rows of the table, by the video's path, in the order of the table.
        model: what the model is called.
        support: the examples' folder; None where the model brought its own.
        reject: whether videos may show none of the classes.
        segments: whether rows are segments.

    Raises:
        UserError: the page can't be written.
    """
    counts = Counter(row["label"] for rows in videos.values() for row in rows if row["label"] is not None)
    labels = [label for label, _ in counts.most_common()]
    contents = [
        _video(number, path, rows, labels, segments=segments) for number, (path, rows) in enumerate(videos.items(), 1)
    ]
    explained = _least_certain(videos)
    paths = list(videos)
    for place, frames in _read(classifier, [paths[place] for place in explained]):
        content = contents[explained[place]]
        content["frames"] = frame_pictures(frames)
        if not segments:
            content["why"] = _why(_explain(classifier, frames, reject=reject), content["id"])
    readable = sum(not content["error"] for content in contents)
    write_page(
        page,
        "predictions.html.j2",
        {
            "title": "Segments of videos" if segments else "Predictions",
            "segments": segments,
            "facts": _facts(classifier, model, support, reject=reject),
            "videos": contents,
            "labels": labels,
            "counts": [(label, count, count / counts.total()) for label, count in counts.most_common()],
            "n_labelled": readable,
            "n_broken": len(contents) - readable,
            "n_explained": len(explained),
        },
    )
    print(f"the report is {plain(str(page))}")


def _facts(classifier: FewShotClassifier, model: str, support: Path | None, *, reject: bool) -> dict[str, str]:
    """What was run."""
    return {
        "model": model,
        "head": str(classifier.model.hparams["head"]),
        "support": "of the saved classifier" if support is None else str(support),
        "classes": str(len(classifier.classes_)),
        "frames of a clip": str(classifier.encoder.reader.frames),
        "none of these": f"beyond a distance of {classifier.threshold_:.2f}" if reject else "not asked for",
    }


def _least_certain(videos: Mapping[str, Sequence[Row]]) -> list[int]:
    """The places of the videos to explain, in the order of the table."""
    certainties = {
        place: min((max(_probabilities(row).values()) for row in rows), default=0.0)
        for place, rows in enumerate(videos.values())
        if not any(row["error"] for row in rows)
    }
    return sorted(sorted(certainties, key=certainties.__getitem__)[:MOST_EXPLAINED])


def _probabilities(row: Row) -> dict[str, float]:
    return {name.removeprefix("p_"): value for name, value in row.items() if name.startswith("p_")}


def _read(classifier: FewShotClassifier, paths: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
    """The frames of videos as the model sees them; what has become unreadable meanwhile is passed over."""
    encoder = classifier.encoder
    read = read_clips(paths, encoder.reader, workers=encoder.workers, timeout=encoder.timeout)
    with closing(read) as results:  # type: ignore[type-var]
        bar = track(results, "reporting", total=len(paths), console=Console(stderr=True), disable=not paths)
        for place, frames in bar:
            if not isinstance(frames, Unreadable):
                yield place, frames


def _explain(classifier: FewShotClassifier, frames: Tensor, *, reject: bool) -> Explanation:
    """Explain frames that are of the tower's size already, and are not to be resized once more."""
    explainer, reader = copy.copy(classifier), classifier.encoder.reader
    explainer.encoder = ClipEncoder(
        classifier.model, frames=reader.frames, resize=reader.size, workers=0, timeout=classifier.encoder.timeout
    )
    return explainer.explain(frames.permute(0, 2, 3, 1), reject=reject)


def _video(number: int, path: str, rows: Sequence[Row], labels: Sequence[str], *, segments: bool) -> _Content:
    """What the page says of a video without looking at it again."""
    error = next((row["error"] for row in rows if row["error"]), None)
    content = {
        "id": f"video-{number}",
        "name": os.path.basename(os.path.normpath(path)),
        "path": path,
        "error": error,
        "label": rows[0]["label"] if rows and not segments else None,
        "probability": rows[0]["probability"] if rows and not segments else None,
        # By number: names may hold whatever separates names.
        "labels": sorted({labels.index(row["label"]) for row in rows if row["label"] is not None}),
        "frames": [],
        "why": None,
        "bars": [],
        "timeline": None,
    }
    if error is None and rows and segments:
        content["timeline"] = _timeline(rows, labels)
    elif error is None and rows:
        content |= _bars(_probabilities(rows[0]), rows[0]["label"])
    return content


def _bars(probabilities: Mapping[str, float], label: str) -> _Content:
    order = sorted(probabilities, key=lambda name: -probabilities[name])
    rest = order[MOST_CLASSES:]
    return {
        "bars": [(name, probabilities[name], name == label) for name in order[:MOST_CLASSES]],
        "n_more": len(rest),
        "rest": sum(probabilities[name] for name in rest),
    }


def _timeline(rows: Sequence[Row], labels: Sequence[str]) -> _Content:
    """Segments by their places on a line that ends with the last of them."""
    end = max(row["end"] for row in rows)
    return {
        "end": f"{end:.1f}",
        "segments": [
            {
                "x": f"{100 * row['start'] / end:.3f}",
                "width": f"{100 * (row['end'] - row['start']) / end:.3f}",
                "colour": labels.index(row["label"]) % COLOURS,
                "label": row["label"],
                "start": f"{row['start']:.3f}",
                "end": f"{row['end']:.3f}",
                "probability": row["probability"],
            }
            for row in rows
        ],
    }


def _why(found: Explanation, video: str) -> _Content:
    """An explanation in the words and pictures of the template."""
    likeliest = sorted(found.prompt_probabilities, key=lambda name: -found.prompt_probabilities[name])[:MOST_CLASSES]
    if found.prompt is not None and found.prompt not in likeliest:
        likeliest[-1] = found.prompt
    places = [list(found.prompt_probabilities).index(name) for name in likeliest]
    closest = found.compared[0]
    example = found.examples.get(closest)
    distances = {view: vote.distances[closest] for view, vote in found.views.items()}
    return {
        "closest": closest,
        "distance": f"{found.distance:.2f}",
        "threshold": None if found.threshold is None else f"{found.threshold:.2f}",
        "rejected": found.rejected,
        "prompt": found.prompt,
        "prompt_probability": None if found.prompt is None else percent(found.prompt_probabilities[found.prompt]),
        "prompts": prompt_rows(
            likeliest,
            [found.prompt_probabilities[name] for name in likeliest],
            found.frame_scores[places],
            found.counted[places],
            chosen=found.prompt,
        ),
        "votes": [
            {
                "view": view,
                "label": vote.label,
                "distance": f"{vote.distances[vote.label]:.2f}",
                "visual": f"{vote.visual_confidence:.3f}",
                "text": f"{vote.text_confidence:.3f}",
            }
            for view, vote in found.views.items()
        ],
        "teacher": found.teacher,
        "alignment": {
            "id": f"{video}-alignment",
            "clip": strip_picture(found.frames, upright=True),
            "example": None if example is None else strip_picture(example),
            "maps": alignment_cells({view: maps[0] for view, maps in found.alignments.items()}, distances),
        }
        if found.alignments
        else None,
    }
