"""The archives that ``torch.save`` writes: zip files, whose checksums ``torch.load`` passes over."""

import os
import zipfile

_ZIP = b"PK\3\4"


def check_archive(path: str | os.PathLike[str]) -> None:
    """Hold all of an archive against its checksums: damage in a tensor is a wrong number otherwise.

    A file that is no zip file, such as those of torch before 1.6, has none, and is left to ``torch.load``.

    Args:
        path: The file; it is read once, from one end to the other.

    Raises:
        ValueError: If it is damaged, or not as ``torch.save`` writes it: nothing in it is compressed or overlaps, so it
            takes no more memory than disk.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("it is compressed")
                if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                    raise ValueError("its members are larger than the whole")
                damaged = archive.testzip()
        except ValueError:
            raise
        except Exception as error:  # what zipfile makes of damage has no common class
            raise ValueError(f"it is no whole zip file: {error}") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")
