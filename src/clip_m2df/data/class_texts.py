"""Spellings: how a class reads in a prompt, and when two names mean the same thing."""

import re
import unicodedata

# A capital after a small letter or a digit, and the last capital of a run: HandstandPushups, TVShow.
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def readable(label: str) -> str:
    """Return a class name as a prompt says it: plain lower-case words.

    ``HandstandPushups`` becomes "handstand pushups", ``draw_sword`` "draw sword", ``hurling (sport)`` "hurling sport"
    and ``Pouring [something] into [something]`` "pouring something into something". A name without any word is
    returned as it is.
    """
    words = label.replace("_", " ")
    if " " not in words:
        words = _CAMEL_CASE.sub(" ", words)
    words = re.sub(r"[\[(]|[\])](?=\w)", " ", words)
    words = re.sub(r"[\])]", "", words)
    return " ".join(words.lower().split()) or label


def fold(name: str) -> str:
    """Return what spellings of a name share: its letters whatever their case and encoding, a space as an underscore."""
    if name.isascii():
        return name.lower().replace(" ", "_")
    folded = unicodedata.normalize("NFC", name).casefold()
    return unicodedata.normalize("NFC", folded).replace(" ", "_")


def class_key(label: str) -> str:
    """Return what spellings of a class share: ``draw_sword``, ``Draw sword`` and ``DrawSword`` have one key."""
    return fold(label).replace("_", "")
