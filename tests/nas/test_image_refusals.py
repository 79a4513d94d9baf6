"""Damaged, hostile and contradictory sources of images are refused in one line."""

from __future__ import annotations

import io
import lzma
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from nas.errors import UserMistake
from tests.nas._images import (
    check,
    corpus,
    draw,
    load,
    members,
    png,
    write_folder,
    write_idx,
    write_parquet,
    write_tar,
)


def test_wrong_folders(tmp_path: Path) -> None:
    cache, data = tmp_path / "cache", tmp_path / "data"
    data.mkdir()
    with pytest.raises(UserMistake, match=r"holds no class folders with images; give 'digits'"):
        load(data, cache)
    write_folder(data, {("", "ant"): draw(3)})
    with pytest.raises(UserMistake, match=r"has one class only \('ant'\); at least 2 are needed"):
        load(data, cache)
    (data / "bee").mkdir()
    with pytest.raises(UserMistake, match=r"class folder 'bee' of .* holds no images"):
        load(data, cache)
    (data / "bee" / "broken.jpg").write_bytes(png(draw(1, (40, 40, 3))[0], "JPEG")[:400])
    with pytest.raises(
        UserMistake, match=r"image '.*bee/broken\.jpg' cannot be decoded \(.*\); repair or remove it"
    ):
        load(data, cache)
    (data / "bee" / "broken.jpg").write_bytes(b"no image at all")
    with pytest.raises(UserMistake, match=r"broken\.jpg' cannot be decoded"):
        load(data, cache)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UserMistake, match=r"x\.zip' is a file of an unknown kind"):
        load(tmp_path / "x.zip", cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_classes_must_agree(tmp_path: Path) -> None:
    images = corpus({"train": 3, "test": 2})
    images["test", "dog"] = draw(1)
    with pytest.raises(UserMistake, match=r"class 'dog' of test has no training images"):
        load(write_folder(tmp_path / "data", images), tmp_path / "cache")


def test_images_without_a_class(tmp_path: Path) -> None:
    for number, name in enumerate(("stray.png", "train/stray.png")):
        path = write_tar(
            tmp_path / f"{number}.tar", [*members(corpus({"train": 2})), (name, png(draw(1)[0]))]
        )
        with pytest.raises(UserMistake, match=r"stray\.png' of \d\.tar lies in no class folder"):
            load(path, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../../ant/evil.png", "/ant/evil.png", "ant/../../evil.png"])
def test_members_cannot_leave_the_archive(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = write_tar(folder / "x.tar", [(name, png(draw(1)[0]))])
    with pytest.raises(UserMistake, match=r"x\.tar: member '.*evil\.png' points outside the archive"):
        load(path, folder / "cache")
    assert not list(tmp_path.rglob("evil.png"))


def test_links_and_other_files_are_passed_over(tmp_path: Path) -> None:
    images = corpus({"": 3})
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in [*members(images), ("ant/readme.txt", b"x"), ("__MACOSX/ant/._0.png", b"x")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    check(load(path, tmp_path / "cache"), images, {"train": ""})


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz"])
def test_cut_archives_are_noticed(tmp_path: Path, suffix: str) -> None:
    whole = write_tar(tmp_path / f"x{suffix}", members(corpus({"": 4}, (30, 30, 3)))).read_bytes()
    content = len(whole) if suffix != ".tar" else whole.rstrip(b"\0").__len__()
    for place in np.linspace(0.05, 0.99, 12):
        (tmp_path / f"x{suffix}").write_bytes(whole[: int(place * content)])
        with pytest.raises(UserMistake, match=r"archive 'x\.tar.*' is damaged after .*; get it again"):
            load(tmp_path / f"x{suffix}", tmp_path / "cache")


def test_archive_with_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(corpus({"": 4})))
    with tarfile.open(path) as archive:
        place = archive.getmembers()[7].offset
    content = bytearray(path.read_bytes())
    content[place + 130] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserMistake, match=r"archive 'x\.tar' is damaged after 'bee/002\.png'"):
        load(path, tmp_path / "cache")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = png(draw(1)[0])
    size = struct.pack(">II", 60_000, 60_000)
    huge = (
        small[:16]
        + size
        + small[24:29]
        + struct.pack(">I", zlib.crc32(small[12:16] + size + small[24:29]))
        + small[33:]
    )
    with pytest.raises(UserMistake, match=r"'ant/huge\.png' of x\.tar cannot be decoded \(.*pixels"):
        load(write_tar(tmp_path / "x.tar", [("ant/huge.png", huge)]), tmp_path / "cache")
    monkeypatch.setattr("nas.tasks.image_sources.compressed._MIN_UNPACKED_BYTES", 1 << 20)
    swollen = tmp_path / "swollen.tar.xz"
    swollen.write_bytes(
        lzma.compress(write_tar(tmp_path / "y.tar", [("ant/zeros.txt", bytes(8 << 20))]).read_bytes())
    )
    with pytest.raises(UserMistake, match=r"it swells to more than 200 times its size"):
        load(swollen, tmp_path / "cache")
    monkeypatch.setattr("nas.tasks.image_sources.base._MAX_IMAGE_BYTES", 100)
    with pytest.raises(UserMistake, match=r"is larger than \d+ MiB; shrink or remove it"):
        load(write_folder(tmp_path / "data", corpus({"": 3})), tmp_path / "cache")


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    deep = png(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)  # type: ignore[arg-type]
    with pytest.raises(UserMistake, match="has more than 8 bits a channel; convert it to 8 bits"):
        load(write_tar(tmp_path / "x.tar", [("ant/deep.png", deep)]), tmp_path / "cache")


def test_damaged_parquet_and_idx(tmp_path: Path) -> None:
    images = corpus({"train": 3, "test": 3}, (9, 8))
    file = write_parquet(tmp_path / "x.parquet", images, "train", nested=True)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserMistake, match=r"parquet file 'x\.parquet' cannot be read \(.*\); get it again"):
        load(file, tmp_path / "cache")
    folder = write_idx(tmp_path / "idx", images)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(UserMistake, match=r"IDX file 'train-labels-idx1-ubyte' is damaged"):
        load(folder, tmp_path / "cache")


def test_parquet_without_labels(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [png(image) for image in draw(4)]
    pq.write_table(pa.table({"image": content, "score": [0.5] * 4}), tmp_path / "x.parquet")
    with pytest.raises(UserMistake, match=r"x\.parquet has no column of labels; its columns: image, score"):
        load(tmp_path / "x.parquet", tmp_path / "cache")
    pq.write_table(pa.table({"image": content, "a": [1] * 4, "b": [2] * 4}), tmp_path / "y.parquet")
    with pytest.raises(
        UserMistake, match=r"y\.parquet has several label columns; choose label_column from a, b"
    ):
        load(tmp_path / "y.parquet", tmp_path / "cache")
    pq.write_table(pa.table({"image": content, "label": [1, 2, None, 1]}), tmp_path / "z.parquet")
    with pytest.raises(UserMistake, match=r"row 2 of z\.parquet has no label; remove the row"):
        load(tmp_path / "z.parquet", tmp_path / "cache")
