"""Directories of class folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nas.errors import UserMistake
from nas.tasks.image_sources.base import ACCEPTED, PARTS, Part, Sample, Source, check_bytes, is_image, stamp

__all__ = ["folder_source"]


def folder_source(root: Path) -> Source:
    """Class folders, or folders train, validation, test of class folders."""
    parts = {folder: PARTS[folder.name] for folder in _folders(root) if folder.name in PARTS}
    if "train" not in parts.values():
        parts = {root: "train"}
    found: list[tuple[Part, str, Path]] = []
    for folder, part in parts.items():
        for group in _folders(folder):
            files = sorted(file for file in group.rglob("*") if is_image(file.name) and file.is_file())
            if not files:
                raise UserMistake(f"class folder {group.name!r} of {str(folder)!r} holds no images")
            found += [(part, group.name, file) for file in files]
    if not found:
        raise UserMistake(f"data={str(root)!r} holds no class folders with images; give {ACCEPTED}")

    def samples() -> Iterator[Sample]:
        for part, label, file in found:
            check_bytes(file.stat().st_size, repr(str(file)))
            yield Sample(part, label, repr(str(file)), file.read_bytes())

    return Source(root.name, stamp(root, (file for _, _, file in found)), samples)


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
