"""A test as one file that others can replay without a video: features, prompts, episodes, the head, and what came out.

The file is safetensors. Its header begins with the SHA-256 of the whole file, taken with zeros in the digest's own
place: a bit that flips anywhere, in the header too, is noticed before anything else is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load, save
from torch import Tensor

from clip_m2df.__about__ import __version__
from clip_m2df.episode import IndexedEpisode, select_episodes
from clip_m2df.errors import UserError, require
from clip_m2df.evaluation.bank import EpisodeBank
from clip_m2df.evaluation.metrics import StageMetrics
from clip_m2df.files import check_output, read_bytes, whole_file
from clip_m2df.nn.baselines import HEADS, build_head, check_asked_for
from clip_m2df.nn.class_text import fuse_text
from clip_m2df.nn.head import Head
from clip_m2df.nn.weights import check_finite, check_weights

BUNDLE_FORMAT = "clip-m2df bundle 1"
# What the file begins with, after the 8 bytes of the header's length, and then come the 64 digits of the digest.
_START = b'{"__metadata__":{"sha256":"'
_DIGITS = slice(8 + len(_START), 8 + len(_START) + 64)
_HEAD = "head/"
_EPISODES = "episodes/"
# Of each tensor but the head's the axes, those of one name of one size; and what it holds: finite ``numbers``,
# ``counts``, ``flags``, or indices of an axis.
_TENSORS = {
    "features": ("videos frames dim", "numbers"),
    "prompt_table": ("n_classes dim", "numbers"),
    "episodes/numbers": ("episodes", "counts"),
    "episodes/support": ("episodes n_way n_shot", "videos"),
    "episodes/query": ("episodes n_queries", "videos"),
    "episodes/query_labels": ("episodes n_queries", "n_way"),
    "episodes/class_indices": ("episodes n_way", "n_classes"),
    "episodes/draws": ("episodes n_queries", "numbers"),
    "predicted": ("episodes n_queries", "n_way"),
    "episodes/replaced": ("episodes", "counts"),
    "episodes/twins": ("episodes n_queries", "flags"),
    "episodes/unknown": ("episodes n_unknown", "videos"),
    "episodes/unknown_classes": ("episodes n_unknown", "n_classes"),
    "episodes/unknown_draws": ("episodes n_unknown", "numbers"),
    "unknown_predicted": ("episodes n_unknown", "n_way"),
}
# What a test may lack; the latter as a whole.
_ALONE, _OF_UNKNOWN = {"episodes/replaced", "episodes/twins"}, {name for name in _TENSORS if "unknown" in name}
# Two replays may differ by this much in a share: in what depends on how scores are rounded, and not on predictions.
TOLERANCE = 1e-6
_PRECISIONS = {
    **{"32-true": torch.float32, "64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16},
    **{"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16},
}


class Facts(NamedTuple):
    """How a test was played, and what it counted: the part of a bundle that is no tensor.

    Attributes:
        head: the head's name, or its class path.
        head_options: options of its class but ``dim``.
        text_fusion: β, see :func:`clip_m2df.nn.class_text.fuse_text`.
        precision: the Trainer's.
        block: episodes that were played together.
        memory: bytes for embedded videos, see :class:`EpisodeBank`.
        prompts: whether there were any.
        class_names: of the split, as the prompts say them.
        numbers: what was counted, by the names under which it was logged, without the stage.
        device: what it was played on, such as ``cpu``.
        versions: of this package and of torch.
    """

    head: str
    head_options: dict[str, Any]
    text_fusion: float
    precision: str
    block: int
    memory: float
    prompts: bool
    class_names: list[str]
    numbers: dict[str, float]
    device: str = "cpu"
    versions: dict[str, str] = {"clip-m2df": __version__, "torch": torch.__version__}  # noqa: RUF012


class Bundle(NamedTuple):
    """What a file holds.

    Attributes:
        path: of the file.
        facts: how it was played, and what was counted.
        head: with its weights.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        episodes: all that were played.
        predicted: by ``predicted`` the classes of the queries, int64 ``(episodes, n_queries)``, as indices in the
            episode; by ``unknown_predicted`` those of unknown queries, where there are any.
    """

    path: str
    facts: Facts
    head: Head
    features: Tensor
    prompt_table: Tensor
    episodes: IndexedEpisode
    predicted: dict[str, Tensor]

    def replay(self) -> Replayed:
        """Play all episodes again, in the batches and the precision of the test.

        Raises:
            UserError: they can't be played.
        """
        facts, metrics = self.facts, StageMetrics()
        parts: dict[str, list[Tensor]] = {name: [] for name in self.predicted}
        with _replayable(self.path), torch.inference_mode(), _precision(facts.precision):
            bank = EpisodeBank(self.head, self.features, self.prompt_table, self.episodes, memory=facts.memory)
            for rows in torch.arange(len(self.episodes["numbers"])).split(facts.block):
                batch = select_episodes(self.episodes, rows)
                prompts = self.prompt_table[batch["class_indices"]]
                output = bank.play(batch["numbers"])
                scores = self._fused(output.logits, batch["query"], prompts)
                parts["predicted"].append(scores)
                metrics.count(output, scores.argmax(-1), batch, {}, prompts=facts.prompts)
                if bank.of_unknown is not None:
                    logits = bank.of_unknown.play(batch["numbers"]).logits
                    parts["unknown_predicted"].append(self._fused(logits, batch["unknown"], prompts))
                    metrics.count_unknown(scores, batch["query_labels"], parts["unknown_predicted"][-1])
        numbers = {name: float(value) for name, value in metrics.take().numbers.items()}
        return Replayed({name: torch.cat(scores) for name, scores in parts.items()}, _finite(numbers))

    def _fused(self, logits: Tensor, videos: Tensor, prompts: Tensor) -> Tensor:
        scores = fuse_text(self.head, self.facts.text_fusion, logits, self.features[videos], prompts)
        check_finite(scores, "the replayed episodes")
        return scores


class Replayed(NamedTuple):
    """What a replay gave.

    Attributes:
        scores: by the names of :attr:`Bundle.predicted`, what the classes are predicted by, ``(episodes, n, n_way)``.
        numbers: what was counted, as :attr:`Facts.numbers`, without the losses.
    """

    scores: dict[str, Tensor]
    numbers: dict[str, float]

    def gaps(self, predicted: Mapping[str, Tensor]) -> Tensor:
        """By how much the best score of each query exceeds that of the class that was predicted for it before.

        Args:
            predicted: :attr:`Bundle.predicted`.

        Returns:
            ``(episodes, n)``, of all queries; not a number where the same class is predicted.
        """
        scores = torch.cat([*self.scores.values()], 1)
        before = torch.cat([predicted[name] for name in self.scores], 1)
        gaps = scores.amax(-1) - scores.gather(-1, before.unsqueeze(-1)).squeeze(-1)
        return gaps.masked_fill(scores.argmax(-1) == before, math.nan)

    def others(self, numbers: Mapping[str, float]) -> dict[str, tuple[float | None, float | None]]:
        """The numbers that are others than in the test, or are there in one of them alone: then and now."""
        known = {name: value for name, value in numbers.items() if not name.startswith("loss/")}
        return {
            name: (known.get(name), self.numbers.get(name))
            for name in known | self.numbers
            if not math.isclose(known.get(name, math.inf), self.numbers.get(name, math.nan), abs_tol=TOLERANCE)
        }


def check_bundle(path: Path, precision: str) -> None:
    """Refuse a bundle that could not be written, or not be replayed, before there is something to lose.

    Args:
        path: the file.
        precision: the Trainer's.

    Raises:
        UserError: it is no file in a folder that can be written, or there is another file already that is no bundle;
            or the precision is one that a CPU has not.
    """
    check_output(path, "bundle")
    if path.exists():
        with path.open("rb") as file:
            if not file.read(_DIGITS.start).endswith(_START):
                raise UserError(f"--bundle is {path}, which is there and is no bundle: name a new file")
    if precision not in _PRECISIONS:
        raise UserError(f"--bundle takes no trainer.precision {precision}: give one of {', '.join(_PRECISIONS)}")


def write_bundle(path: Path, bank: EpisodeBank, facts: Facts, predicted: Mapping[str, Tensor]) -> None:
    """Write a test; the same test has the same bytes.

    Args:
        path: where to.
        bank: that it was played from.
        facts: how, and what was counted.
        predicted: see :attr:`Bundle.predicted`, in the order of the bank's episodes.

    Raises:
        UserError: the file can't be written, or an option of the head is no plain value.
    """
    tensors = {"features": bank.features, "prompt_table": bank.prompt_table, **predicted}
    tensors |= {f"{_EPISODES}{name}": column for name, column in bank.episodes.items() if isinstance(column, Tensor)}
    tensors |= {f"{_HEAD}{name}": weight for name, weight in bank.head.state_dict().items()}
    try:
        told = json.dumps(facts._replace(numbers=_finite(facts.numbers))._asdict())
    except (TypeError, ValueError) as error:
        raise UserError(f"the head's options can't be saved as JSON: {error}; give plain values") from error
    # Contiguous, and no two in the same memory, as safetensors takes them.
    content = save({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = {"sha256": "0" * 64, "format": BUNDLE_FORMAT, "facts": told}
    header = json.dumps({"__metadata__": metadata} | json.loads(content[8:end]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    whole = bytearray(len(header).to_bytes(8, "little") + header + content[end:])
    whole[_DIGITS] = _digest(whole).encode()
    with whole_file(path, "bundle") as draft:
        draft.write_bytes(whole)


def read_bundle(path: str | os.PathLike[str], head: str | None = None) -> Bundle:
    """Read a bundle, held against its digest.

    Args:
        path: the file.
        head: the head that a person asked for: no other code is imported because a file names it.

    Raises:
        UserError: there is no such file, it is damaged or no bundle, or its head is other people's code.
    """
    content = bytearray(read_bytes(Path(path), "bundle"))
    if content[8 : _DIGITS.start] != _START:
        raise UserError(f"{path} is no bundle, or damaged: give a file that clip-m2df test --bundle wrote")
    said = content[_DIGITS].decode(errors="backslashreplace")
    if (found := _digest(content)) != said:
        raise UserError(f"{path} is damaged: the digest of its content is {found}, not {said}; fetch it again")
    with _replayable(path):
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if metadata["format"] != BUNDLE_FORMAT:
            raise ValueError(f"its format is {metadata['format']!r:.40}, not {BUNDLE_FORMAT!r}")
        return _bundle(path, Facts(**json.loads(metadata["facts"])), load(bytes(content)), head)


@contextmanager
def _replayable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever content leads to, whose digest may be right, into an error that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} can't be replayed: {error}") from error
    except Exception as error:  # which have no common class
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path} can't be replayed ({why:.300}): give one that clip-m2df test --bundle wrote"
        ) from error


def _digest(content: bytearray) -> str:
    digest = hashlib.sha256(content[: _DIGITS.start])
    digest.update(b"0" * 64)
    digest.update(memoryview(content)[_DIGITS.stop :])
    return digest.hexdigest()


def _bundle(path: str | os.PathLike[str], facts: Facts, tensors: dict[str, Tensor], asked: str | None) -> Bundle:
    _check_facts(facts)
    _check_tensors({name: t for name, t in tensors.items() if not name.startswith(_HEAD)}, len(facts.class_names))
    check_asked_for(facts.head, asked, path, "--head")
    weights = {name.removeprefix(_HEAD): t for name, t in tensors.items() if name.startswith(_HEAD)}
    options = {"dim": tensors["prompt_table"].shape[-1], **facts.head_options}
    what = f"weights of the head {facts.head}"
    if facts.head in HEADS:  # sizes that a file only claims would fill the memory
        with torch.device("meta"):
            check_weights(build_head(facts.head, options), weights, what)
    with torch.random.fork_rng(devices=[]):
        head = build_head(facts.head, options).to(weights["scale"].dtype).eval()
    check_weights(head, weights, what)
    head.load_state_dict(weights)
    columns = {n.removeprefix(_EPISODES): t for n, t in tensors.items() if n.startswith(_EPISODES)}
    episodes = cast(IndexedEpisode, {**columns, "class_names": facts.class_names})
    predicted = {name: tensor for name, tensor in tensors.items() if name in ("predicted", "unknown_predicted")}
    return Bundle(str(path), facts, head, tensors["features"], tensors["prompt_table"], episodes, predicted)


def _check_facts(facts: Facts) -> None:
    """Refuse, by a ``ValueError`` or a ``UserError``, values that no test writes."""
    require(least=0, most=1, text_fusion=facts.text_fusion)
    require(least=1, block=facts.block)
    require(least=0, memory=facts.memory)
    texts = [facts.head, facts.device, *facts.class_names, *facts.numbers, *facts.versions.values()]
    if not all(isinstance(text, str) for text in texts) or not isinstance(facts.class_names, list):
        raise ValueError("its names are no texts")
    if facts.precision not in _PRECISIONS:
        raise ValueError(f"its precision is {facts.precision!r:.40}")
    if not isinstance(facts.head_options, dict) or not isinstance(facts.prompts, bool) or type(facts.block) is not int:
        raise ValueError("its options are not of their types")
    if not all(type(value) is float and math.isfinite(value) for value in facts.numbers.values()):
        raise ValueError("its numbers are not finite")


def _check_tensors(tensors: Mapping[str, Tensor], n_classes: int) -> None:
    """Refuse, by a ``ValueError``, tensors of other shapes and types than a test has, and indices that lead nowhere."""
    if tensors.keys() - _TENSORS.keys() or _TENSORS.keys() - tensors.keys() - _ALONE - _OF_UNKNOWN:
        raise ValueError(f"it has the tensors {', '.join(sorted(tensors)):.300}")
    if tensors.keys() & _OF_UNKNOWN not in (set(), _OF_UNKNOWN):
        raise ValueError(f"of its unknown queries it has {', '.join(sorted(tensors.keys() & _OF_UNKNOWN))} alone")
    sizes = {"n_classes": n_classes}
    for name, (axes, holds) in _TENSORS.items():
        if (tensor := tensors.get(name)) is None:
            continue
        shape = dict(zip(axes.split(), tensor.shape, strict=True))
        if 0 in shape.values() or any(sizes.setdefault(axis, size) != size for axis, size in shape.items()):
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}")
        if tensor.dtype not in {"numbers": _PRECISIONS.values(), "flags": [torch.bool]}.get(holds, [torch.int64]):
            raise ValueError(f"{name} is of type {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        if holds in sizes and (tensor.min() < 0 or tensor.max() >= sizes[holds]):
            raise ValueError(f"{name} leads beyond its {holds}")
    numbers = tensors["episodes/numbers"]
    if not (numbers[1:] > numbers[:-1]).all():
        raise ValueError("the numbers of its episodes do not rise")
    _check_episodes({name.removeprefix(_EPISODES): t for name, t in tensors.items()}, sizes["videos"])


def _check_episodes(episodes: Mapping[str, Tensor], n_videos: int) -> None:
    """Refuse, by a ``ValueError``, episodes that no test deals, in which a query could know its answer."""
    own, support, query = (episodes[name] for name in ("class_indices", "support", "query"))
    _check_distinct(own, "have a class twice")
    videos, classes = [support.flatten(1), query], [own.repeat_interleave(support.shape[-1], -1)]
    classes.append(own.gather(-1, episodes["query_labels"]))
    if "unknown" in episodes:
        videos.append(episodes["unknown"])
        classes.append(episodes["unknown_classes"])
        if (classes[-1].unsqueeze(-1) == own.unsqueeze(-2)).any():
            raise ValueError("unknown queries of its episodes are of classes that these have")
    _check_distinct(torch.cat(videos, -1), "have a video twice")
    of_videos = torch.cat(videos, -1).flatten()
    found = own.new_zeros(n_videos).scatter_(0, of_videos, torch.cat(classes, -1).flatten())
    if (found[of_videos] != torch.cat(classes, -1).flatten()).any():
        raise ValueError("a video of its episodes is of two classes")


def _check_distinct(rows: Tensor, what: str) -> None:
    ordered = rows.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"its episodes {what}")


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Those that there are: a share of nothing is not a number."""
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """As Lightning's plugin of that name plays a batch on a CPU."""
    dtype, before = _PRECISIONS[name], torch.get_default_dtype()
    if name.endswith("mixed"):
        with torch.autocast("cpu", dtype, cache_enabled=False):
            yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
