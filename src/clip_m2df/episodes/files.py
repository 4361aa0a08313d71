"""Episodes as files, so that others can repeat them.

A line an episode, each a JSON object: for both roles the videos of each class by its label, paths relative to the
manifest's folder or absolute; and ``unknown``, if there are any, the same of queries of other classes. The order of the
classes is that of ``support``. Further keys are passed over.

    {"support": {"open_door": ["a.mp4"], "wave": ["b.mp4"]}, "query": {"open_door": ["c.mp4"], "wave": ["d.mp4"]}}
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clip_m2df.datasets.manifest import Split, Video, class_key
from clip_m2df.episodes.plan import EpisodePlan, EpisodeShape, source
from clip_m2df.errors import UserError
from clip_m2df.files import read_text, relative_path, whole_file


def write_episodes_file(file: str | Path, plans: Iterable[EpisodePlan], split: Split, root: str | None) -> None:
    """Write episodes, whole or not at all.

    Args:
        file: where to; a file that is there is replaced.
        plans: the episodes.
        split: where their videos come from.
        root: the manifest's folder.

    Raises:
        UserError: the file can't be written.
    """
    with whole_file(file, "episodes file") as draft, draft.open("w", encoding="utf-8") as lines:
        for plan in plans:
            labels = [split.class_names[c] for c in plan.classes]
            roles = {"support": plan.support, "query": plan.query}
            episode: dict[str, dict[str, list[str]]] = {
                role: {
                    label: [relative_path(video.path, root) for video in row]
                    for label, row in zip(labels, rows, strict=True)
                }
                for role, rows in roles.items()
            }
            for video in plan.unknown:
                row = episode.setdefault("unknown", {}).setdefault(video.label, [])
                row.append(relative_path(video.path, root))
            lines.write(json.dumps(episode, ensure_ascii=False) + "\n")


def read_episodes_file(file: str | Path, split: Split, root: str | None, shape: EpisodeShape) -> list[EpisodePlan]:
    """Read episodes and check them.

    Args:
        file: what :func:`write_episodes_file` or another tool wrote.
        split: where their videos come from.
        root: the manifest's folder.
        shape: what each must have: ``n_way`` classes of ``n_shot`` videos, ``n_way · n_query`` queries in all, and
            ``n_unknown`` unknown ones (where that is 0, those that it has are left out). If it is grouped, no query may
            share a group with the support.

    Raises:
        UserError: the file can't be read, or an episode is at fault; names the line.
    """
    text = read_text(file, "episodes file")
    videos = {video.path: (c, video) for c, row in enumerate(split.videos) for video in row}
    classes = {class_key(label): c for c, label in enumerate(split.class_names)}
    plans = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                plans.append(_plan(line, classes, videos, root or ".", shape))
            except ValueError as error:
                raise UserError(f"line {number} of the episodes file {file}: {error}") from error
    if not plans:
        raise UserError(f"the episodes file {file} has no episodes: give one that clip-m2df episodes wrote")
    return plans


def _plan(
    line: str, classes: Mapping[str, int], videos: Mapping[str, tuple[int, Video]], root: str, shape: EpisodeShape
) -> EpisodePlan:
    """The episode of a line; a ``ValueError`` says what is wrong with it."""
    wanted = 'an object with "support" and "query", each an object that has a list of paths by label'
    try:
        episode: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error}); expected {wanted}") from error
    if not isinstance(episode, dict) or not all(_is_role(episode.get(role)) for role in ("support", "query")):
        raise ValueError(f"expected {wanted}")
    roles = {role: episode[role] for role in ("support", "query")}
    if shape.n_unknown:
        roles["unknown"] = episode.get("unknown", {})
        if not _is_role(roles["unknown"]):
            raise ValueError('expected "unknown" to be an object that has a list of paths by label')
    support, query, unknown = (
        {class_key(label): paths for label, paths in roles.get(role, {}).items()}
        for role in ("support", "query", "unknown")
    )
    if len(support) + len(query) + len(unknown) < sum(map(len, roles.values())):
        raise ValueError("it has one class in two spellings: use the manifest's labels")
    labels = {class_key(label): label for role in reversed(roles.values()) for label in role}
    if nowhere := [label for key, label in labels.items() if key in support | unknown and key not in classes]:
        raise ValueError(f"there is no class {nowhere[0]!r} in the split: use the manifest's labels")
    if strangers := [label for label in roles["query"] if class_key(label) not in support]:
        raise ValueError(f"the class {strangers[0]!r} has queries, but no support")
    if known := [label for label in roles.get("unknown", {}) if class_key(label) in support]:
        raise ValueError(f"the class {known[0]!r} has support, and so can't be an unknown one")
    seen: set[str] = set()

    def find(key: str, path: str) -> Video:
        known, video = videos.get(os.path.abspath(os.path.join(root, path)), (None, None))
        if video is None or known != classes[key]:
            raise ValueError(f"the split has no video {path!r} of the class {labels[key]!r}: paths start at {root}")
        if video.path in seen:
            raise ValueError(f"the video {path!r} comes twice")
        seen.add(video.path)
        return video

    plan = EpisodePlan(
        tuple(classes[key] for key in support),
        tuple(tuple(find(key, path) for path in paths) for key, paths in support.items()),
        tuple(tuple(find(key, path) for path in query.get(key, [])) for key in support),
        tuple(find(key, path) for key, paths in unknown.items() for path in paths),
    )
    n_queries = sum(map(len, plan.query))
    if len(plan.classes) != shape.n_way:
        raise ValueError(f"it has {len(plan.classes)} classes, but n_way is {shape.n_way}")
    if any(len(row) != shape.n_shot for row in plan.support):
        raise ValueError(f"n_shot is {shape.n_shot}, but not every class has as many support videos")
    if n_queries != shape.n_way * shape.n_query:
        raise ValueError(f"it has {n_queries} queries, but n_way times n_query_eval is {shape.n_way * shape.n_query}")
    if len(plan.unknown) != shape.n_unknown:
        raise ValueError(f"it has {len(plan.unknown)} unknown queries, but unknown_queries is {shape.n_unknown}")
    sources = plan.sources
    if shape.grouped and (twins := [v for v in itertools.chain(*plan.query, plan.unknown) if source(v) in sources]):
        raise ValueError(
            f"the query {relative_path(twins[0].path, root)!r} is of the group {twins[0].group!r}, and so is a support"
            " video: deal grouped episodes anew (clip-m2df episodes --data.episodes grouped), or give --data.episodes"
            " random"
        )
    return plan


def _is_role(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(paths, list) and all(isinstance(path, str) for path in paths) for paths in value.values()
    )
