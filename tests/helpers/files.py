"""Folders compared, and files damaged as disks and interrupted copies damage them."""

from pathlib import Path


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, byte: int = -1) -> None:
    """Change one bit of a byte in place; a negative number counts from the end."""
    with path.open("r+b") as file:
        file.seek(byte, 0 if byte >= 0 else 2)
        found = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([found ^ 1]))


def truncate(path: Path) -> None:
    """Cut off the last byte."""
    path.write_bytes(path.read_bytes()[:-1])
