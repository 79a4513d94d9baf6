"""Tar archives of class folders, plain or compressed, read as a stream and never unpacked."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from nas.errors import UserMistake
from nas.tasks.image_sources.base import PARTS, Part, Sample, Source, check_bytes, is_image, stamp
from nas.tasks.image_sources.compressed import Bounded, decompressed, unpacked_limit

__all__ = ["ARCHIVE_SUFFIXES", "archive_source"]

ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".tar.gz", ".tgz")


def archive_source(root: Path, archives: dict[Path, Part | None]) -> Source:
    """Archives, each of one part, or with None of the parts that its own folders tell."""
    parts = [part for part in archives.values() if part is not None]
    if len(set(parts)) != len(parts):
        raise UserMistake(f"data={str(root)!r} holds several archives for one part; keep one for each part")

    def samples() -> Iterator[Sample]:
        for path, part in archives.items():
            yield from _archive_samples(path, part)

    return Source(root.name, stamp(root.parent, archives), samples)


def _archive_samples(path: Path, part: Part | None) -> Iterator[Sample]:
    folders: set[PurePosixPath] = set()
    filled: set[PurePosixPath] = set()
    last = "its start"
    limit = unpacked_limit(path)
    try:
        with decompressed(path) as file:
            stream = Bounded(file, limit)
            with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
                while (member := archive.next()) is not None:
                    # A stream never looks back; without this the list grows by a kilobyte a member.
                    cast("Any", archive).members.clear()
                    last, name = repr(member.name), PurePosixPath(member.name)
                    if ".." in name.parts or name.is_absolute():
                        raise UserMistake(f"{path.name}: member {last} points outside the archive; remove it")
                    if member.isdir():
                        folders.add(name)
                    elif member.isfile() and is_image(member.name) and "__MACOSX" not in name.parts:
                        filled.update(name.parents)
                        yield _member(archive, member, f"{last} of {path.name}", part)
                _check_end(stream, archive.offset)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserMistake(f"archive {path.name!r} is damaged after {last} ({error}); get it again") from error
    for empty in sorted(folders - filled):
        raise UserMistake(f"class folder {str(empty)!r} of {path.name!r} holds no images")


def _check_end(stream: Bounded, offset: int) -> None:
    """tarfile stops silently at a damaged header or a cut; in a whole archive only zeros follow."""
    while stream.read(1 << 20):
        pass
    if stream.end > offset or stream.count < offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("what follows is no archive member")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str, part: Part | None) -> Sample:
    folders = PurePosixPath(member.name).parts[:-1]
    if not folders or (len(folders) == 1 and folders[0] in PARTS):
        raise UserMistake(f"image {where} lies in no class folder; the folder's name is its label")
    check_bytes(member.size, where)
    content = archive.extractfile(member)
    if content is None:
        raise tarfile.ReadError(f"{member.name} cannot be read")
    inside = PARTS.get(folders[-2]) if len(folders) > 1 else None
    return Sample(part or inside or "train", folders[-1], where, content.read())
