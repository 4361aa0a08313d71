"""Damages files: their bytes, the values of trees in them, the members of archives."""

import copy
import io
import math
import random
import zipfile
from typing import Any

Rng = random.Random


def damage(rng: Rng, data: bytes, scraps: tuple[bytes, ...] = ()) -> bytes:
    """Some bytes, cut off, flipped, moved, or overwritten with what readers trip over."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not damaged:
            break
        start = rng.randrange(len(damaged))
        end = min(len(damaged), start + rng.choice([1, 4, 16, 200, len(damaged) // 4]))
        kind = rng.choice(["cut", "flip", "flip", "flip", "overwrite", "number", "swap", "delete", "repeat", "scrap"])
        if kind == "cut":
            del damaged[start:]
        elif kind == "flip":
            for _ in range(rng.choice([1, 1, 2, 8, 64, 512])):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        elif kind == "overwrite":
            damaged[start:end] = rng.choice([bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)])
        elif kind == "number":
            value = rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
            damaged[start : start + 4] = value.to_bytes(4, rng.choice(["big", "little"]))
        elif kind == "swap":
            other = rng.randrange(len(damaged))
            block = damaged[start:end]
            damaged[start:end] = damaged[other : other + len(block)]
            damaged[other : other + len(block)] = block
        elif kind == "delete":
            del damaged[start:end]
        elif kind == "repeat":
            damaged[start:start] = damaged[start:end]
        elif scraps:
            damaged[start : rng.choice([start, end])] = rng.choice(scraps)
    return bytes(damaged)


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**30, 0.0, 0.5, -2.5, 1e308, math.inf, -math.inf, math.nan),
    *("", " ", "1", "1e-3", "nan", "true", "null", "x" * 10_000, "\0", "\ud800", "é\n", "../../x", "/dev/zero"),
    *("os.system", "torch.nn.Linear", "{}", "{0}", "%s", "!!python/name:os.system", "argmax", "cpu"),
    *([], [[]], [1, 2], ["a", None], {}, {"a": 1}, {"class_path": "os.system", "init_args": {"command": "false"}}),
)
SCRAPS = (
    *(b"!!python/object/apply:os.system ['false']", b"&a ", b"*a", b"<<: ", b"- ", b": ", b"\n", b"\n  ", b"\t", b"#"),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b"|", b">", b"%", b"@", b"\0", b"\xff", b"\xef\xbb\xbf", b"---\n", b"...\n"),
    *(b"null", b".inf", b".nan", b"1e999", b"-1", b"0", b"[" * 3000, b"? ", b"!!binary x", b"2001-01-01"),
)


def alter(rng: Rng, tree: Any) -> Any:
    """A tree of dicts and lists with one of its values replaced, left out or copied elsewhere, or a key renamed."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in pairs:
            places.append((node, key))
            visit(value)

    visit(tree)
    if not places:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    node, key = rng.choice(places)
    kind = rng.choice(["value", "value", "value", "delete", "rename", "move"])
    if kind == "value":
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif kind == "move":
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place])
    else:
        value = node.pop(key)
        if kind == "rename" and isinstance(node, dict):
            node[rng.choice([f"{key}s", str(key)[:-1], "x", "", 3, None, "_instantiator", "class_path"])] = value
    return tree


def members_of(whole: bytes) -> dict[str, bytes]:
    """The members of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def damaged_archive(rng: Rng, whole: bytes) -> bytes:
    """What torch wrote, taken apart and put together otherwise, with checksums that are right again."""
    members = members_of(whole)
    names = list(members)
    pickled = next(name for name in names if name.endswith("/data.pkl"))
    chosen = pickled if rng.random() < 0.6 else rng.choice(names)
    kind = rng.choice(["damage", "damage", "damage", "delete", "rename", "swap", "add"])
    if kind == "damage":
        members[chosen] = damage(rng, members[chosen], (b"cos\nsystem\n", b"builtins\nexec\n", b"torch\nload\n", b"."))
    elif kind == "rename":
        members[rng.choice([chosen + "x", "../" + chosen, "/" + chosen])] = members.pop(chosen)
    elif kind == "swap":
        other = rng.choice(names)
        members[chosen], members[other] = members[other], members[chosen]
    elif kind == "delete":
        del members[chosen]
    else:
        members[f"{names[0].split('/')[0]}/{rng.choice(['constants.pkl', 'code/x.py', 'extra'])}"] = b"\x80\x02."
    return zipped(members, zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED)
