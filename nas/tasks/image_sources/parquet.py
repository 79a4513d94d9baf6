"""Parquet files with a column of encoded images and one of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nas.errors import UserMistake
from nas.tasks.image_sources.base import (
    PART_IN_NAME,
    Columns,
    Part,
    Sample,
    Source,
    first_line,
    part_of,
    stamp,
)

__all__ = ["parquet_source"]


def parquet_source(root: Path, files: Sequence[Path], columns: Columns) -> Source:
    """Files of the parts that their names tell, or all of training where no name tells one."""
    told = any(PART_IN_NAME.search(file.name.lower()) for file in files)

    def samples() -> Iterator[Sample]:
        for file in files:
            yield from _parquet_samples(file, part_of(file, root) if told else "train", columns)

    return Source(root.name, stamp(root if root.is_dir() else root.parent, files), samples)


def _parquet_samples(file: Path, part: Part, columns: Columns) -> Iterator[Sample]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        table = pq.ParquetFile(file)
        image = _column(table.schema_arrow, file, "image", columns[0], _holds_images)
        label = _column(table.schema_arrow, file, "label", columns[1], _holds_labels)
        for batch in table.iter_batches(batch_size=256, columns=[image, label]):
            contents, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
            for content, value in zip(contents, labels, strict=True):
                content = content.get("bytes") if isinstance(content, dict) else content
                if content is None or value is None:
                    lacking = "label" if value is None else "image bytes"
                    raise UserMistake(f"row {row} of {file.name} has no {lacking}; remove the row")
                yield Sample(part, value, f"in row {row} of {file.name}", content)
                row += 1
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserMistake(f"parquet file {file.name!r} cannot be read ({reason}); get it again") from error


def _column(schema: Any, file: Path, kind: str, asked: str | None, fits: Callable[[Any], bool]) -> str:
    """The column that holds ``kind`` (image, label): as asked, else by type, else by its usual names."""
    found = [str(field.name) for field in schema if fits(field.type)]
    if asked is not None:
        if asked not in found:
            known = ", ".join(found) or "none"
            raise UserMistake(
                f"{kind}_column={asked!r} is no fitting column of {file.name}; fitting: {known}"
            )
        return asked
    if len(found) > 1:
        usual = [name for name in (kind, f"{kind}s", "img") if name in found]
        if not usual:
            known = ", ".join(found)
            raise UserMistake(f"{file.name} has several {kind} columns; choose {kind}_column from {known}")
        found = usual
    if not found:
        raise UserMistake(f"{file.name} has no column of {kind}s; its columns: {', '.join(schema.names)}")
    return found[0]


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))
