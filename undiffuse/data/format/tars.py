"""Tar files: shards as webdataset writes them, whose members `0001.jpg`, `0001.cls` are one example, and others.

Each archive is walked once for the places of its pictures; after that any of them is read directly, so the order of
the examples is not bound to that of the files. A compressed one has no places to go back to: its pictures are kept in
memory. What a shard says after its end mark is not read.
"""

import importlib
import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from undiffuse.data import labelfile, picture
from undiffuse.data.arrange import arrange, no_split
from undiffuse.data.format import webdataset
from undiffuse.data.format.folder import LZMAError, Pictures
from undiffuse.data.listing import ending, inner, is_hidden, is_picture, own_folders, split_inside, splits, walk
from undiffuse.data.passed import Passed, beside, kinds, line, split_own
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Source, Split
from undiffuse.errors import DataError

PLAIN = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
LOOKED_AT = 16  # members that tell a shard from another archive
LABEL_BYTES = 2**20
MOST = 2**30  # bytes that a compressed archive may hold, because all of them are kept in memory
PIECE = 2**24  # bytes of one read
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "lzma"}  # modules, by the first bytes
UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError, ImportError, MemoryError)


@dataclass(frozen=True)
class Place:
    """Where the bytes of a member are: in a file, or in what a compressed one was unpacked to."""

    path: Path
    offset: int
    size: int
    unpacked: bytes | None = None

    def read(self) -> bytes:
        data = self.first(picture.MAX_BYTES)
        if len(data) != self.size:
            raise EOFError(f"{len(data)} bytes, not {self.size}")
        return data

    def first(self, most: int) -> bytes:
        """No more than so many bytes."""
        count = min(self.size, most)
        if self.unpacked is not None:
            return self.unpacked[self.offset : self.offset + count]
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(count)


@dataclass(frozen=True)
class Members:
    """The regular files in one or several archives, in order, by names of ours."""

    places: dict[str, Place] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)  # the same name without that of the archive
    unpacked: list[bytes] = field(default_factory=list)  # what the compressed archives hold
    links: list[str] = field(default_factory=list)  # that lead out of an archive, or to what is not there

    def load(self, name: str) -> bytes:
        return self.places[name].read()

    def open(self, name: str) -> io.BytesIO:
        """The beginning of a file."""
        return io.BytesIO(self.places[name].first(picture.HEAD))


class TarShards(Format):
    """A tar of pictures, compressed or not, a folder of such, or `name-{000..123}.tar`.

    A folder has splits where it holds `train` and `test` with tars, or tars named `a-train-0.tar` and `a-test-0.tar`;
    a single tar where it has these folders inside.
    """

    @staticmethod
    def match(spec: str) -> int:
        files = _files(spec, "train") or _files(spec, "test")
        if not files:
            return 0
        named = bool(RANGE.search(spec)) or Path(spec).is_dir()
        return 2 if named or any(is_picture(name) for name in first_members(files[0])) else 1

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        folder = Path(spec) if Path(spec).is_dir() else None
        parts = {word: _files(spec, word) for word in ("train", "test")}
        divided = folder is not None and parts["train"] != parts["test"]
        files = parts[split]
        if not files:
            raise no_split(spec, split)
        members = Members()
        short = len({path.name for path in files}) == len(files)
        for path in files:
            _index(path, path.name if short else path.as_posix(), members)
        near: tuple[Passed, ...] = ()
        if folder is not None:
            used = {path.relative_to(folder).as_posix() for part in parts.values() for path in part}
            near = beside(folder, used, split == "train")
        return _examples(spec, members, "train" if divided else split, reading, near)


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith((*PLAIN, *COMPRESSED)) and path.is_file()


def first_members(path: Path) -> list[str]:
    """The names of the first files of an archive; none of one that cannot be read."""
    try:
        with tarfile.open(path) as archive:
            return [member.name for _, member in zip(range(LOOKED_AT), archive, strict=False) if member.isreg()]
    except UNREADABLE:
        return []


def _files(spec: str, split: str) -> list[Path]:
    """The shards in order. DataError if one of a range is missing and the first is there."""
    if RANGE.search(spec):
        files = [Path(text) for text in _expand(spec)]
        if not files or not files[0].is_file():
            return []
        if missing := [path for path in files if not path.is_file()]:
            raise DataError(
                f"{spec} names {len(files)} files, and {missing[0]} is missing; give the range that is there"
            )
        return files
    path = Path(spec)
    if not path.is_dir():
        return [path] if is_tar(path) else []
    if files := _in_folder(path):
        return _of_split(files, split)
    named = splits(each.name for each in path.iterdir() if each.is_dir() and not is_hidden(each.name))
    return _in_folder(path / named[split]) if split in named else []


def _in_folder(path: Path) -> list[Path]:
    """The tar files of a folder, if they hold more pictures than lie beside them."""
    files = [each for each in sorted(path.iterdir()) if is_tar(each) and not is_hidden(each.name)]
    if not files:
        return []
    near = sum(is_picture(name) and not is_hidden(name) for name in walk(path))
    return files if near == 0 or _has_more(files, near) else []


def _has_more(files: list[Path], count: int) -> bool:
    for path in files:
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    count -= member.isreg() and is_picture(member.name)
                    if count < 0:
                        return True
        except UNREADABLE:  # whoever reads it says so
            continue
    return False


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Those that are named for the split, where both are there; else all."""
    words = [split_inside(path.name) for path in files]
    named = splits(words)
    return files if len(named) < 2 else [path for path, word in zip(files, words, strict=True) if word == named[split]]


def _expand(spec: str) -> Iterator[str]:
    """`a-{08..11}.tar` -> a-08.tar … a-11.tar."""
    found = RANGE.search(spec)
    if found is None:
        yield spec
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{spec[: found.start()]}{number:0{len(first)}d}{spec[found.end() :]}")


def _index(path: Path, shard: str, members: Members) -> None:
    """Adds the files of one archive, by `shard.tar/name.jpg`."""
    try:
        data = _unpacked(path, MOST - sum(map(len, members.unpacked)))
        with tarfile.open(path, "r:", None if data is None else io.BytesIO(data)) as archive:
            for member in archive:
                name, place = inner(member.name), None
                if member.isreg():
                    place = Place(path, member.offset_data, member.size, data)
                elif member.islnk() or member.issym():  # a symbolic one is relative to its folder
                    to = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(name), member.linkname)
                    place = members.places.get(f"{shard}/{inner(posixpath.normpath(to))}")
                    if place is None:
                        members.links.append(name)
                if place is not None:
                    members.places[f"{shard}/{name}"], members.inside[f"{shard}/{name}"] = place, name
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] — it would keep every header
            end = Place(path, archive.offset, tarfile.BLOCKSIZE, data).read()
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a tar archive: {error}") from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise DataError(f"{path} has no end mark after {archive.offset} bytes; it is cut or damaged")
    if data is not None:
        members.unpacked.append(data)


def _unpacked(path: Path, most: int) -> bytes | None:
    """All that a compressed file holds, None for one that is not; told by its first bytes, as its name may be wrong."""
    with path.open("rb") as file:
        start = file.read(6)
    module = next((name for mark, name in COMPRESSIONS.items() if start.startswith(mark)), None)
    if module is None:
        return None
    pieces, size = [], 0
    with importlib.import_module(module).open(path) as stream:
        while piece := stream.read(PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise DataError(
                    f"{path} unpacks to more than {MOST} bytes, which have to be in memory because it is compressed; "
                    "unpack it and give the folder"
                )
    return b"".join(pieces)


def _examples(spec: str, members: Members, split: Split, reading: Reading, near: tuple[Passed, ...]) -> Pictures:
    """A picture of each example; classes by the members beside it, or by a file of labels, or by folder."""
    inside = members.inside
    own, left = split_own([name for name in inside.values() if not is_hidden(name)], own_folders(inside.values()))
    known = set(left)
    visible = [name for name in members.places if inside[name] in known]
    found = [name for name in visible if is_picture(name)]
    others = [name for name in visible if not is_picture(name)]
    if not found:
        what = line((*own, *near, *kinds(others, members.open)))
        raise DataError(f"{spec} has no pictures in its tar files; expected members like 1.jpg{what and f': {what}'}")
    picked = webdataset.one_each(spec, found, reading.picture)
    found, unwanted = picked.names, picked.passed
    small = [n for n in others if ending(n) in webdataset.LABELS and members.places[n].size <= LABEL_BYTES]
    named = {each for name in found for each in webdataset.candidates(name, picked.keys[name])}
    stems = {name: stem for name, stem in webdataset.label_stems(small).items() if stem in named}
    own_labels = webdataset.labels_of(list(stems), members.load)
    insides, said = [inside[name] for name in found], labelfile.named(others)
    own_each = len(said) > 1  # a single file of labels may be of the pictures of all shards
    by_key = {name if own_each else inside[name]: name for name in said}
    given = None if own_labels else labelfile.find(list(by_key), lambda key: members.load(by_key[key]))
    arranged = arrange(spec, insides, split, by_folder=not own_labels and given is None)
    if given is not None:
        arranged = labelfile.relabelled(spec, found if own_each else insides, arranged, given)
    names = tuple(found[i] for i in arranged.chosen)
    labels, classes = arranged.labels, arranged.classes
    if own_labels:
        by_stem = {stems[name]: label for name, label in own_labels.items()}
        labels, classes = webdataset.labelled(spec, {name: picked.keys[name] for name in names}, by_stem)
    files = set() if given is None else {by_key[key] for key in given.files}
    unread = kinds([n for n in others if n not in own_labels and n not in files], members.open)
    if members.links:
        near = (*near, Passed(len(members.links), "that are links to files elsewhere"))
    return Pictures(names, members.load, labels, classes, reading, (*own, *near, *unread, *unwanted, *arranged.passed))
