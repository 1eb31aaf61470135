"""A colour set from the emoji of four npm packages, which the user fetches: nothing is downloaded here.

`npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d openmoji`, then `build`. Skin-tone
variants are left out, images that are equal at the final size are kept once, and the split is by code point, so one
emoji in another style is never in the other split.
"""

import hashlib
import importlib.util
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from undiffuse.data import picture
from undiffuse.errors import DataError, StorageError, UsageError, unknown

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
SILENT = {"fe0f", "e007f"}  # variation selector and end of a tag, which some packages leave out
CATEGORIES = (
    *("activities", "animals-nature", "component", "extras-openmoji", "extras-unicode", "flags", "food-drink"),
    *("objects", "people-body", "smileys-emotion", "symbols", "travel-places"),
)
METADATA = {"emoji.json": ("unified", "category"), "data/openmoji.json": ("hexcode", "group")}
UNLISTED = CATEGORIES.index("extras-unicode")
OVERSAMPLE = 2  # an SVG is drawn this much larger, then resized as the other pictures are
LABELS = ("style", "category", "both")
HELD_OUT = 10  # one code point in ten is in the test split


@dataclass(frozen=True)
class Style:
    """One drawing of the emoji: where a package keeps its pictures, and on what terms."""

    name: str
    folder: str
    ending: str
    terms: str


STYLES = (
    Style("noto", "img/google/64", ".png", "Noto Emoji, Copyright Google Inc., Apache License 2.0"),
    Style("twemoji", "img/twitter/64", ".png", "Twemoji, Copyright Twitter, Inc and other contributors, CC BY 4.0"),
    Style("fluent", "assets", ".webp", "Fluent Emoji, Copyright Microsoft Corporation, MIT License"),
    Style("openmoji", "color/svg", ".svg", "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0"),
)


@dataclass(frozen=True)
class Built:
    """What `build` wrote: pictures found by style, how many were distinct, and the size of each split."""

    found: dict[str, int]
    distinct: int
    train: int
    test: int


@dataclass(frozen=True, eq=False)
class _Row:
    """One picture: its style by number, its category by number, its code points, its pixels."""

    style: int
    category: int
    key: str
    image: UInt8[np.ndarray, "h w 3"]


def build(packages: Sequence[Path], out: Path, size: int = 32, labels: str = "style") -> Built:
    """Writes train.npz, test.npz and ATTRIBUTION.txt to the new folder `out`, all or nothing.

    `packages` are the .tgz files or the folders they unpack to, any of the four. Each npz has `images` uint8
    [n, size, size, 3], `style`, `category`, and `key`, the code points. `labels`, named by `classes`, are the styles,
    the categories, or "both": one for each style and category. Raises DataError for a package that is none of the four,
    UsageError if `out` exists or for other labels.
    """
    if out.exists():
        raise UsageError(f"{out} exists; give the name of a new folder")
    if size < 1:
        raise UsageError(f"size {size} is not possible; give a side of at least 1 pixel")
    if labels not in LABELS:
        raise unknown("kind of labels", labels, LABELS)
    files = _files(packages)
    categories = _categories(files)
    found = {style.name: 0 for style in STYLES}
    rows: dict[bytes, _Row] = {}
    for number, style in enumerate(STYLES):
        pictures = _pictures(style, files)
        found[style.name] = len(pictures)
        if not pictures:
            continue
        render = _renderer(style, size)
        for key, path in pictures:
            row = _Row(number, categories.get(key, UNLISTED), key, render(path, files[path]))
            rows.setdefault(row.image.tobytes(), row)
    test = [row for row in rows.values() if held_out(row.key)]
    train = [row for row in rows.values() if not held_out(row.key)]
    if not train or not test:
        raise DataError(f"{len(rows)} emoji are too few to hold one in {HELD_OUT} out; give whole packages")
    _save(out, train, test, [style for style in STYLES if found[style.name]], labels)
    return Built(found, len(rows), len(train), len(test))


def held_out(key: str) -> bool:
    """Whether the emoji of these code points is in the test split, in whatever style."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT == 0


def code_points(name: str) -> str:
    """`0039-FE0F-20E3`, `39-20e3` … to one spelling: lower case, four digits or more, nothing that draws nothing."""
    parts = name.lower().replace("_", "-").split("-")
    return "-".join(part.zfill(4) for part in parts if part not in SILENT)


def attribution(styles: Iterable[Style]) -> str:
    """The text that must go with the images."""
    listed = [f"* {style.name}: {style.terms}" for style in styles]
    share = any("BY-SA" in line for line in listed)
    licence = "Because of OpenMoji the set as a whole is under CC BY-SA 4.0.\n" if share else ""
    return "Emoji resized and placed on white. The drawings are by\n" + "\n".join(listed) + "\n" + licence


def _files(packages: Sequence[Path]) -> dict[str, bytes]:
    """What is needed of the packages, by path within the package."""
    files: dict[str, bytes] = {}
    for package in packages:
        new = _from_folder(package) if package.is_dir() else _from_archive(package)
        if not any(_pictures(style, new) for style in STYLES):
            raise DataError(
                f"{package} holds no emoji that are known here; expected emoji-datasource-google, "
                "emoji-datasource-twitter, @lobehub/fluent-emoji-3d or openmoji, packed or unpacked"
            )
        files |= new
    if not any(path in METADATA for path in files):
        raise DataError("no package says which category an emoji is in; add emoji-datasource-google or openmoji")
    return files


def _needed(path: str) -> bool:
    folder, ending = str(PurePosixPath(path).parent), PurePosixPath(path).suffix
    return path in METADATA or any((folder, ending) == (style.folder, style.ending) for style in STYLES)


def _from_folder(package: Path) -> dict[str, bytes]:
    root = package / "package" if (package / "package").is_dir() else package
    parents = [root / "emoji.json", root / "data" / "openmoji.json"]
    for style in STYLES:
        parents += sorted((root / style.folder).glob(f"*{style.ending}"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in parents if path.is_file()}


def _from_archive(package: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(package) as archive:
            for member in archive:
                path = member.name.removeprefix("package/")
                stream = archive.extractfile(member) if member.isfile() and _needed(path) else None
                if stream is not None:
                    files[path] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{package} cannot be read as an npm package: {why}") from error
    return files


def _pictures(style: Style, files: dict[str, bytes]) -> list[tuple[str, str]]:
    """(code points, path) of a style's pictures, sorted, without skin tones."""
    found = []
    for path in files:
        name = PurePosixPath(path)
        if (str(name.parent), name.suffix) == (style.folder, style.ending):
            if SKIN_TONES.isdisjoint(name.stem.lower().split("-")):
                found.append((code_points(name.stem), path))
    return sorted(found)


def _categories(files: dict[str, bytes]) -> dict[str, int]:
    """The number of the category of each emoji, by code points."""
    numbers = {}
    for path, (key, group) in METADATA.items():
        try:
            for entry in json.loads(files.get(path, b"[]")):
                name = entry[group].lower().replace(" & ", "-")
                numbers.setdefault(code_points(entry[key]), CATEGORIES.index(name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not the list of emoji that was expected: {error}") from error
    return numbers


def _renderer(style: Style, size: int) -> Callable[[str, bytes], UInt8[np.ndarray, "h w 3"]]:
    """Bytes of a picture of that style to pixels on white."""
    to_png = _svg_to_png if style.ending == ".svg" else None
    if to_png is not None and importlib.util.find_spec("resvg_py") is None:
        raise UsageError('drawing openmoji needs resvg-py; install the extra: pip install "undiffuse[emoji]"')

    def render(path: str, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
        try:
            pixels = picture.decode(data if to_png is None else to_png(data, OVERSAMPLE * size))
        except (DataError, ValueError) as error:
            raise DataError(f"{path} cannot be drawn: {error}") from error
        return picture.fit(pixels, (size, size), 3)

    return render


def _svg_to_png(data: bytes, size: int) -> bytes:
    import resvg_py  # the extra `emoji`

    return resvg_py.svg_to_bytes(svg_string=data.decode(), width=size, height=size, skip_system_fonts=True)


def _save(out: Path, train: list[_Row], test: list[_Row], styles: list[Style], labels: str) -> None:
    try:
        _save_folder(out, train, test, styles, labels)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from error


def _save_folder(out: Path, train: list[_Row], test: list[_Row], styles: list[Style], labels: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "set"
        folder.mkdir()
        for name, rows in (("train", train), ("test", test)):
            _save_split(folder / f"{name}.npz", rows, labels)
        (folder / "ATTRIBUTION.txt").write_text(attribution(styles), "utf-8")
        folder.rename(out)


def _save_split(path: Path, rows: list[_Row], labels: str) -> None:
    style, category = np.array([row.style for row in rows]), np.array([row.category for row in rows])
    styles = [style.name for style in STYLES]
    label, names = {
        "style": (style, styles),
        "category": (category, CATEGORIES),
        "both": (style * len(CATEGORIES) + category, [f"{one} {other}" for one in styles for other in CATEGORIES]),
    }[labels]
    np.savez_compressed(
        path,
        images=np.stack([row.image for row in rows]),
        labels=label,
        classes=np.array(names),
        style=style,
        category=category,
        key=np.array([row.key for row in rows]),
    )
