"""The classes of ``motion_shapes``: colours, shapes, motions, and the four families made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from clip_m2df.errors import UserError

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (225, 40, 45),
        "green": (50, 170, 60),
        "blue": (45, 80, 220),
        "yellow": (240, 215, 50),
        "white": (245, 245, 245),
        "purple": (145, 60, 180),
        "orange": (245, 135, 35),
        "cyan": (60, 205, 220),
    }
)

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent")

LEFT, RIGHT, UP, DOWN = "moving to the left", "moving to the right", "moving up", "moving down"
GROWING, SHRINKING, APPEARING, VANISHING = "growing", "shrinking", "appearing", "vanishing"
BOUNCING, TURNING, TURNING_BACK = "bouncing", "turning clockwise", "turning anticlockwise"
APPROACHING, PARTING = OF_TWO_SHAPES = ("approaching each other", "moving apart")
_EIGHT = (LEFT, RIGHT, UP, DOWN, GROWING, SHRINKING, APPEARING, VANISHING)
MOTIONS = (*_EIGHT, BOUNCING, TURNING, TURNING_BACK, *OF_TWO_SHAPES)

# What the classes of ``order`` are made of: each event and what it is played backwards.
CIRCLING, CIRCLING_BACK = "circling clockwise", "circling anticlockwise"
_PAIRS = ((LEFT, RIGHT), (UP, DOWN), (GROWING, SHRINKING), (CIRCLING, CIRCLING_BACK))
BACKWARDS: Mapping[str, str] = MappingProxyType(
    {event: other for a, b in (*_PAIRS, (APPEARING, VANISHING), OF_TWO_SHAPES) for event, other in ((a, b), (b, a))}
)
THEN = " then "

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class MotionClass:
    """One class of the benchmark.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        colour: one of ``COLOURS``; empty where each video has its own.
        shape: one of ``SHAPES``; empty where each video has its own.
        motion: one of ``MOTIONS``; where colour and shape are empty, events of ``BACKWARDS`` joined by ``THEN``.
    """

    split: str
    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        parts: list[tuple[str, str, Collection[str]]] = [("motion", event, BACKWARDS) for event in self.events]
        if self.colour or self.shape:
            parts = [("colour", self.colour, COLOURS), ("shape", self.shape, SHAPES), ("motion", self.motion, MOTIONS)]
        for name, value, choices in parts:
            if value not in choices:
                raise UserError(f"motion_shapes knows no {name} {value!r}; choose from {', '.join(choices)}")

    @property
    def appearance(self) -> tuple[str, str]:
        """Colour and shape: all that a single frame shows."""
        return self.colour, self.shape

    @property
    def events(self) -> tuple[str, ...]:
        """What happens, in its order."""
        return tuple(self.motion.split(THEN))

    @property
    def twin(self) -> MotionClass:
        """The class whose videos are those of this one played backwards; for classes of events only."""
        motion = THEN.join(BACKWARDS[event] for event in reversed(self.events))
        return MotionClass(self.split, self.colour, self.shape, motion)

    @property
    def label(self) -> str:
        """The class as a sentence, such as "a red star moving to the left"."""
        two = self.motion in OF_TWO_SHAPES
        if not self.colour:
            return f"{'two things' if two else 'something'} {self.motion}"
        return f"{noun_phrase(self.colour, self.shape, two=two)} {self.motion}"

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return self.label.replace(" ", "_")


def noun_phrase(colour: str, shape: str, *, size: str = "", two: bool = False) -> str:
    """Name what is in the picture: "a red star", "an orange ring", "two small red crosses"."""
    words = f"{size} {colour} {shape}".strip()
    if two:
        return f"two {words}{'es' if shape == 'cross' else 's'}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_Table = Mapping[str, Mapping[tuple[str, str], tuple[str, ...]]]
"""The motions of each colour and shape, by split."""

_DEMO: _Table = {
    "train": {
        ("red", "circle"): (LEFT, RIGHT, UP, DOWN, GROWING, SHRINKING),
        ("yellow", "ring"): (UP, DOWN, GROWING, SHRINKING, APPEARING, VANISHING),
        ("blue", "square"): (LEFT, RIGHT, APPEARING, VANISHING),
        ("white", "star"): OF_TWO_SHAPES,
        ("green", "crescent"): (TURNING, TURNING_BACK),
        ("cyan", "cross"): (BOUNCING,),
        ("orange", "square"): (BOUNCING,),
        ("purple", "triangle"): (LEFT,),
        ("green", "circle"): (APPROACHING,),
    },
    "val": {
        ("orange", "star"): (LEFT, RIGHT, APPEARING, VANISHING),
        ("cyan", "circle"): (UP, DOWN),
        ("red", "ring"): (GROWING,),
        ("white", "cross"): (BOUNCING,),
        ("yellow", "square"): (VANISHING,),
        ("blue", "triangle"): (TURNING_BACK,),
    },
    "test": {
        ("red", "star"): _EIGHT,
        ("green", "square"): _EIGHT,
        ("blue", "ring"): OF_TWO_SHAPES,
        ("orange", "circle"): (RIGHT,),
        ("yellow", "cross"): (BOUNCING,),
        ("purple", "crescent"): (TURNING,),
        ("cyan", "triangle"): (SHRINKING,),
        ("white", "circle"): (DOWN,),
    },
}


def _classes(table: _Table) -> tuple[MotionClass, ...]:
    return tuple(
        MotionClass(split, colour, shape, motion)
        for split, appearances in table.items()
        for (colour, shape), motions in appearances.items()
        for motion in motions
    )


CLASSES = _classes(_DEMO)


def shared_appearance_classes(split: str = "test") -> tuple[str, ...]:
    """Labels of the demo's classes that share colour and shape with another of ``split``, as ``CLASSES`` has them."""
    if split not in SPLITS:
        raise UserError(f"motion_shapes has no split {split!r}; choose from {', '.join(SPLITS)}")
    members = [c for c in CLASSES if c.split == split]
    count = Counter(c.appearance for c in members)
    return tuple(c.label for c in members if count[c.appearance] > 1)


def appearances_of(split: str) -> tuple[tuple[str, str], ...]:
    """Colours and shapes of a split, whatever the family: those of ``val`` and ``test`` occur nowhere else."""
    held_out = {c.appearance: c.split for c in CLASSES if c.split != "train"}
    return tuple((c, s) for c in COLOURS for s in SHAPES if held_out.get((c, s), "train") == split)


def _scene() -> _Table:
    """Mostly a class has an appearance of its own; some pairs share one, and differ in their motion."""
    singles = (LEFT, UP, GROWING, APPEARING, BOUNCING, RIGHT, DOWN, SHRINKING, VANISHING)
    opposites = (*_PAIRS[:3], (APPEARING, VANISHING))
    train = appearances_of("train")
    val = ((UP, DOWN), (LEFT, RIGHT), (GROWING,), (APPEARING,), (SHRINKING,), (BOUNCING,))
    test = (*opposites, (BOUNCING,), (UP,), (LEFT,), (GROWING,))
    return {
        "train": {a: opposites[k % 4] if k < 8 else (singles[k % 9],) for k, a in enumerate(train[::2] + train[1:6:2])},
        # With the appearances of the demo.
        "val": dict(zip(_DEMO["val"], val, strict=True)),
        "test": dict(zip(_DEMO["test"], test, strict=True)),
    }


def _mixed() -> _Table:
    """Few appearances, each with several motions and their opposites: words and frames narrow it down, motion decides.

    In training an appearance has all eight motions, so that it tells as much of a class there as in the other splits,
    which have fewer classes.
    """
    across, along, size, presence = (*_PAIRS[:3], (APPEARING, VANISHING))
    val = {("orange", "star"): along + size, ("cyan", "circle"): across + presence, ("red", "ring"): across + size}
    test = {
        ("red", "star"): across + along,
        ("green", "square"): size + presence,
        ("orange", "circle"): along + presence,
    }
    return {"train": dict.fromkeys(appearances_of("train")[::9], _EIGHT), "val": val, "test": test}


# One of each pair of twins; all other pairs are for training.
_ORDER = {
    "val": (UP, LEFT + THEN + GROWING, APPEARING + THEN + GROWING, SHRINKING + THEN + CIRCLING),
    "test": (LEFT, GROWING, UP + THEN + RIGHT, GROWING + THEN + UP, CIRCLING + THEN + DOWN, APPEARING + THEN + RIGHT),
}


def _order() -> tuple[MotionClass, ...]:
    """Every event, and every two of different kinds, with their twins; what is invisible can't go first."""
    events = [event for pair in _PAIRS for event in pair]
    two = [a + THEN + b for i, pair in enumerate(_PAIRS) for a in pair for b in events if b not in _PAIRS[i]]
    two += [APPEARING + THEN + event for event in events]
    split_of = {motion: split for split, motions in _ORDER.items() for motion in motions}
    split_of |= {MotionClass(split, "", "", motion).twin.motion: split for motion, split in split_of.items()}
    ones = [MotionClass(split_of.get(motion, "train"), "", "", motion) for motion in (*BACKWARDS, *two)]
    classes = dict.fromkeys(c for one in ones for c in (one, one.twin))
    return tuple(sorted(classes, key=lambda c: SPLITS.index(c.split)))


# Of each family its classes. ``demo`` is the small mixture that clip-m2df demo trains on.
FAMILIES: Mapping[str, tuple[MotionClass, ...]] = MappingProxyType(
    {"demo": CLASSES, "scene": _classes(_scene()), "order": _order(), "mixed": _classes(_mixed())}
)
