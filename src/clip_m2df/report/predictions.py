"""The page of ``clip-m2df predict``: what each video was taken for, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import track

from clip_m2df.classifier.classifier import FewShotClassifier
from clip_m2df.classifier.clips import Clip, has_features, read_clips
from clip_m2df.errors import console, say
from clip_m2df.evaluation.explanation import likeliest
from clip_m2df.report.page import frame_pictures, write_page
from clip_m2df.video.isolation import Unreadable

# Videos that are explained; of more the least certain ones.
MOST_EXPLAINED = 200

# A row of the table by its columns, but for the path: text, numbers as they are printed, or None.
Row: TypeAlias = "dict[str, Any]"


def write_predictions(
    page: Path,
    classifier: FewShotClassifier,
    videos: Mapping[str, Sequence[Row]],
    clips: Mapping[str, Clip],
    model: str,
    support: Path | None,
    *,
    reject: bool,
    segments: bool,
    error: float | None = None,
) -> None:
    """Write the page.

    Args:
        page: where to.
        classifier: which labelled them.
        videos: rows of the table, by the video's path, in the order of the table.
        clips: the same videos; of those that came as features there are no frames to show.
        model: what the model is called.
        support: the examples' folder; None where the model brought its own.
        reject: whether videos may show none of the classes.
        segments: whether rows are segments.
        error: the rate at which the sets of labels may miss the truth; None without sets.

    Raises:
        UserError: the page can't be written.
    """
    counts = Counter(row["label"] for rows in videos.values() for row in rows if row["label"] is not None)
    labels = [label for label, _ in counts.most_common()]
    contents: list[dict[str, Any]] = [
        {
            "path": path,
            "rows": rows,
            "error": next((row["error"] for row in rows if row["error"]), None),
            # By number: names may hold whatever separates names.
            "labels": sorted({labels.index(row["label"]) for row in rows if row["label"] is not None}),
            "frames": [],
            "why": None,
        }
        for path, rows in videos.items()
    ]
    readable = [content for content in contents if not content["error"]]
    explained = sorted(readable, key=_certainty)[:MOST_EXPLAINED]
    encoder = classifier.encoder
    for content in explained:
        if has_features(clip := clips[content["path"]]) and not segments:
            content["why"] = classifier.explain(clip, reject=reject)
    shown = [content for content in explained if not has_features(clips[content["path"]])]
    options: dict[str, Any] = {"workers": encoder.workers, "timeout": encoder.timeout}
    read = read_clips([clips[content["path"]] for content in shown], encoder.reader, **options)
    with closing(read) as found:
        for i, frames in track(found, "reporting", len(shown), console=console(error=True), disable=not shown):
            if isinstance(frames, Unreadable):  # since it was labelled
                continue
            shown[i]["frames"] = frame_pictures(frames)
            if not segments:
                shown[i]["why"] = classifier.explain(encoder.encode_frames(frames), reject=reject)
    write_page(
        page,
        "predictions.html.j2",
        {
            "title": "Segments of videos" if segments else "Predictions",
            "segments": segments,
            "facts": {
                "model": model,
                "head": classifier.model.hparams["head"],
                "support": support or "of the saved classifier",
                "classes": len(classifier.classes_),
                "frames of a clip": encoder.reader.frames,
                "none of these": f"beyond a distance of {classifier.threshold_:.2f}" if reject else "not asked for",
                **({} if error is None else {"sets of labels": _promise(classifier, error)}),
            },
            "with_sets": error is not None,
            "videos": contents,
            "labels": labels,
            "counts": counts,
            "n_labelled": len(readable),
            "n_explained": len(explained),
            "with_frames": bool(shown),
            "probabilities": _probabilities,
        },
    )
    say(f"the report is {page}")


def _promise(classifier: FewShotClassifier, error: float) -> str:
    """What is promised of sets, on what it is calibrated, and what is assumed."""
    sizes = () if classifier.calibration is None else classifier.calibration.settings[:, 2].tolist()
    return (
        f"each holds the truth in {100 * (1 - error):g} % of the cases or more, if these classes are such as the"
        f" {max(sizes, default=0)} of the calibration"
    )


def _probabilities(row: Row) -> list[tuple[str, float]]:
    """Those of the classes, the likeliest first."""
    probabilities = {name.removeprefix("p_"): value for name, value in row.items() if name.startswith("p_")}
    return [(name, probabilities[name]) for name in likeliest(probabilities)]


def _certainty(content: Mapping[str, Any]) -> float:
    """The probability of the likeliest class, of segments that of the least certain one."""
    return min((_probabilities(row)[0][1] for row in content["rows"]), default=0.0)
