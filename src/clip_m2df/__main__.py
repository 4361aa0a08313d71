"""``python -m clip_m2df`` is ``clip-m2df``."""

from clip_m2df.cli import entry_point

if __name__ == "__main__":
    entry_point()
