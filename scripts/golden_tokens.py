"""Write tests/golden/tokens.npz: the tokens that OpenAI's own tokenizer makes of 2,000 prompts.

    python -m pip install --no-deps --target FOLDER clip-anytorch==2.6.0
    python scripts/golden_tokens.py FOLDER

Of that package only ``clip/simple_tokenizer.py`` is run, which needs ftfy and regex.
"""
# ruff: noqa: RUF001

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "tokens.npz"
PROMPTS, LENGTH = 2000, 77

# What two tokenizers may take differently.
PIECES = (
    *("a photo of", "a person", "draw_sword", "hurling (sport)", "[something]", "HandstandPushups"),
    *("it's", "IT'S", "don't", "they'LL", "we've", "I'm", "he'd", "…'re", "'S", "'ſ", "it'ſ", "''", "'s's", "_", "—"),
    *("12345", "3.14", "1,000", "½", "²", "Ⅷ", "١٢٣", "０１２", "x" * 100, "antidisestablishmentarianism"),
    *("<|endoftext|>", "<|ENDOFTEXT|>", "!<|endoftext|>", "x<|endoftext|>y", "<|startoftext|>", "<|ſtartoftext|>"),
    *("&amp;", "&amp;amp;", "&amp;amp;amp;", "&lt;b&gt;", "&#39;", "&#x1F600;", "&eacute;", "&#0;", "&notit;"),
    *("<e&#769;>", "e&#769;", "cafe\u0301", "café", "CAFÉ", "a\u0300\u0301", "Ã©", "schÃ¶n", "â€™", "â€œquoteâ€\x9d"),
    *("“curly”", "‘q’", "ﬁre", "ﬂy", "ＦＵＬＬ", "𝒜𝓫", "İstanbul", "ΟΔΟΣ", "ß", "ẞ", "ǅ", "ŉ", "¿Qué?"),
    *("日本語", "跳ねる", "한국어", "हिन्दी", "ไทย", "مرحبا", "😀", "👩\u200d👩\u200d👧", "🏃🏽", "🇩🇪"),
    *("\u200b", "\ufeff", "\u00ad", "\0", "\x07", "\x1b[31mred\x1b[0m", "\x1c", "\x85", "\u2028", "\t", "\n", "\r\n"),
    *("http://a.b/c?d=e&f", "#$%", "&nbsp;", "\u3000", "\u00a0"),
    *("\ud83d\ude00", "\ud800", "\udfff", "\U00020000", "\ue000", "\ufffd", "\u0378"),
)
BLOCKS = ((0x20, 0x250), (0x20, 0x250), (0x250, 0x3000), (0x3000, 0x10000), (0x10000, 0x110000))


def prompts() -> list[str]:
    """Prompts of few or many pieces, or any characters, with or without blanks between them."""
    rng = random.Random(0)
    made = dict.fromkeys(["", " ", *PIECES])
    while len(made) < PROMPTS:
        words = []
        for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 30))):
            letters = "".join(chr(rng.randrange(*rng.choice(BLOCKS))) for _ in range(rng.randint(1, 5)))
            words += [rng.choice(PIECES) if rng.random() < 0.7 else letters, rng.choice(("", " ", " ", "  "))]
        made["".join(words)] = None
    return list(made)


def main(folder: Path) -> None:
    """Write the prompts, as JSON in UTF-8 with surrogates, and their tokens ``(n, 77)``, 0 after the end of text."""
    reference: Any = runpy.run_path(str(folder / "clip" / "simple_tokenizer.py"))["SimpleTokenizer"]()
    start, end = (reference.encoder[f"<|{which}oftext|>"] for which in ("start", "end"))
    texts = prompts()
    tokens = np.zeros((len(texts), LENGTH), dtype=np.int32)
    for row, text in zip(tokens, texts, strict=True):
        ids = [start, *reference.encode(text)[: LENGTH - 2], end]
        row[: len(ids)] = ids
    encoded = json.dumps(texts, ensure_ascii=False).encode(errors="surrogatepass")
    np.savez_compressed(GOLDEN, prompts=np.frombuffer(encoded, dtype=np.uint8), tokens=tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
