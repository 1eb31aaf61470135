"""Files damaged at random: each is refused with one line of ours or read, in under 5 s and 1 GiB, and none is fatal.

Case n of a kind is a function of n alone. `make test-reliability` tries 100,000, `make test` one in a hundred of them.
"""

import gzip
import hashlib
import io
import mmap
import os
import resource
import signal
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.codec.plans import gaussian, gaussian_images, gaussian_plan
from tests.data.format.test_cifar import NAMES, PIXELS, binary, modern_pickle
from tests.data.format.test_parquet import written
from undiffuse.codec.stream import Codec
from undiffuse.data.pack import pack
from undiffuse.data.source import open_source
from undiffuse.errors import Corrupt, Error
from undiffuse.interop.torchfile import read_tensors
from undiffuse.machine.disk import to_json
from undiffuse.machine.store import Run, _seal
from undiffuse.machine.tensorfile import WEIGHTS, read_weights, write_weights

SECONDS, ROOM, CASES = 5, 1 << 30, 100_000
EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)


@dataclass
class Victim:
    """A file to damage, what reads it, and, of what has checksums of its own, how a forger would mend them."""

    path: Path
    read: Callable[[], object]
    forge: Callable[[bytearray], None] | None = None
    sealed: bool = False  # without a forger no damage may pass


def weights(folder: Path) -> Victim:
    path = folder / "a.safetensors"
    write_weights(path, {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}, {"name": "ü"})

    def forge(data: bytearray) -> None:
        if match := WEIGHTS.match(data, 8):
            data[match.start(1) : match.end(1)] = b"0" * 64
            data[match.start(1) : match.end(1)] = hashlib.sha256(data).hexdigest().encode()

    return Victim(path, lambda: read_weights(path), forge, sealed=True)


def checkpoint(folder: Path, name: str) -> Victim:
    run = Run(folder / "run")
    with run.lock():
        run.save(1, {"model": {"w": torch.ones(2, 3)}}, {"a": [1, {"b": None}]})
    names = [path.name for path in run.folder(1).iterdir() if path.name != "manifest.json"]

    def forge(data: bytearray) -> None:
        files = {n: data if n == name else (run.folder(1) / n).read_bytes() for n in names}
        entries = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
        text = to_json({"format": 1, "step": 1, "files": entries}).removesuffix(b"\n}\n")
        (run.folder(1) / "manifest.json").write_bytes(_seal(text))

    return Victim(run.folder(1) / name, lambda: run.load(1), None if name == "manifest.json" else forge, sealed=True)


def pickled(folder: Path) -> Victim:
    path = folder / "a.pt"
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(2).half()}, path)
    return Victim(path, lambda: read_tensors(path, allow_pickle=True))


def cifar(folder: Path, suffix: str, write: Callable[[str], bytes]) -> Victim:
    for name in NAMES:
        (folder / (name + suffix)).write_bytes(write(name))
    return Victim(folder / (NAMES[0] + suffix), lambda: open_source(folder))


def picture(kind: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def one_file(name: str, data: bytes) -> Callable[[Path], Victim]:
    def make(folder: Path) -> Victim:
        (folder / name).write_bytes(data)
        return Victim(folder / name, lambda: open_source(folder / name))

    return make


def in_folder(name: str, data: bytes) -> Callable[[Path], Victim]:
    def make(folder: Path) -> Victim:
        (folder / name).write_bytes(data)
        return Victim(folder / name, lambda: open_source(folder))

    return make


def labels(folder: Path, name: str, data: bytes) -> Victim:
    for i in (1, 2):
        (folder / f"{i}.png").write_bytes(picture("png", "RGB"))
    (folder / name).write_bytes(data)
    return Victim(folder / name, lambda: open_source(folder))


def archives() -> tuple[bytes, bytes]:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive, tarfile.open(fileobj=tarred, mode="w") as other:
        for name in ("a/1.png", "b/2.png"):
            data = picture("png", "RGB")
            archive.writestr(name, data)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            other.addfile(entry, io.BytesIO(data))
    return zipped.getvalue(), tarred.getvalue()


def arrays() -> tuple[bytes, bytes, bytes]:
    pixels, single, several = np.arange(96, dtype=np.uint8).reshape(6, 4, 4), io.BytesIO(), io.BytesIO()
    np.save(single, pixels)
    np.savez(several, images=pixels, labels=np.arange(6))
    return single.getvalue(), several.getvalue(), bytes([0, 0, 8, 3]) + b"".join(map(_big, (6, 4, 4))) + bytes(pixels)


def _big(number: int) -> bytes:
    return number.to_bytes(4, "big")


def packed(folder: Path, name: str) -> Victim:
    pack("digits", folder / "packed", size=8, split="test")
    return Victim(folder / "packed" / name, lambda: open_source(folder / "packed").gather(torch.arange(4)))


def coded(folder: Path) -> Victim:
    """Three images without loss in two groups, with the exact denoiser of Gaussian data."""
    model = gaussian((1, 6, 6))
    codec = Codec(model, gaussian_plan(model, 4, 10, (2, 2)))
    path = folder / "a.udf"
    path.write_bytes(codec.encode(gaussian_images(3, (1, 6, 6)), group=2, lossless=True))

    def read() -> object:
        found = codec.decode(path.read_bytes())
        if found.parsed.status != "complete":  # what is good of it was decoded; the command refuses it unless asked
            found.mean()
            raise Corrupt(found.parsed.why)
        return found.lossless()

    def forge(data: bytearray) -> None:
        data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "big")

    return Victim(path, read, forge, sealed=True)


PICTURES = [("png", "RGBA"), ("jpeg", "RGB"), ("gif", "P"), ("webp", "RGB"), ("tiff", "RGB"), ("bmp", "RGB")]
KINDS: dict[str, Callable[[Path], Victim]] = {
    "weights": weights,
    **{name: lambda folder, name=name: checkpoint(folder, name) for name in ("manifest.json", "meta.json")},
    "tensors": lambda folder: checkpoint(folder, "model.safetensors"),
    "torch.save": pickled,
    "cifar": lambda folder: cifar(folder, ".bin", binary),
    "cifar pickle": lambda folder: cifar(folder, "", lambda n: modern_pickle(PIXELS[n], np.arange(3))),
    **{kind: in_folder(f"a.{kind}", picture(kind, mode)) for kind, mode in PICTURES},
    "zip": one_file("a.zip", archives()[0]),
    "tar": one_file("a.tar", archives()[1]),
    "tar.gz": one_file("a.tar.gz", gzip.compress(archives()[1], mtime=0)),
    "parquet": lambda folder: Victim(
        written(folder / "a.parquet", [1, 2, 3], [0, 1, 2]), lambda: open_source(folder / "a.parquet")
    ),  # fmt: skip
    "labels": lambda folder: labels(folder, "dataset.json", b'{"labels": [["1.png", 3], ["2.png", 0]]}'),
    "table": lambda folder: labels(folder, "metadata.csv", b"file_name,label\n1.png,dog\n2.png,cat\n"),
    "npy": one_file("a.npy", arrays()[0]),
    "npz": one_file("a.npz", arrays()[1]),
    "idx": one_file("train-images-idx3-ubyte", arrays()[2]),
    "packed": lambda folder: packed(folder, "packed.json"),
    "coded": coded,
}
SHARES = {"coded": 1.0}  # of all cases; of the others one in as many as there are kinds


def damaged(data: bytes, chance: np.random.Generator) -> bytearray:
    """One to four of: a bit flipped, bytes overwritten, left out, put in, repeated, a number made extreme, a cut."""
    found = bytearray(data)
    for _ in range(chance.integers(1, 5)):
        place, length = int(chance.integers(len(found) + 1)), int(chance.integers(1, 9))
        match chance.integers(7):
            case 0 if place < len(found):
                found[place] ^= 1 << int(chance.integers(8))
            case 1:
                found[place : place + length] = chance.bytes(length)
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = chance.bytes(length)
            case 4:
                found[place:place] = found[place : place + 16 * length]
            case 5:
                number = EXTREMES[chance.integers(len(EXTREMES))].to_bytes(8, "little")
                size = int(chance.choice([2, 4, 8]))
                found[place : place + size] = number[:size][:: chance.choice([1, -1])]
            case _ if chance.random() < 0.2:
                del found[place:]
    return found


def attack(victim: Victim, honest: bytes, cases: range, told: mmap.mmap) -> None:
    """In a child of its own, which tells the number of the case it is at, and what went wrong with the last."""
    room = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    torch.set_num_threads(1)  # the threads of the parent are not here to share work with
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a handler of Python's would wait for a call that hangs to return
    for case in cases:
        data = damaged(honest, np.random.default_rng(case))
        forged = victim.forge is not None and case % 2 == 0
        if forged:
            victim.forge(data)
        victim.path.write_bytes(data)
        told[:] = f"case {case}: killed".encode().ljust(len(told))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, which others may use too
        try:
            victim.read()
            wrong = "read, and is not what was written" if victim.sealed and not forged and data != honest else None
        except Error as error:
            wrong = f"several lines: {error}" if "\n" in str(error) else None
        except BaseException as error:  # of whatever kind: it is told, and fails the test
            wrong = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        if wrong:
            told[:] = f"case {case}: {wrong}".encode()[: len(told)].ljust(len(told))
            os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    "share", [pytest.param(0.01, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.long)], ids=["few", "all"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(3600)
def test_damaged_files_are_refused_or_read(tmp_path, kind, share):
    """Row 17 of a kind of file; the honest one is read, or the test would not reach what it is about."""
    victim = KINDS[kind](tmp_path)
    honest = victim.path.read_bytes()
    victim.read()
    cases, told = int(share * CASES * SHARES.get(kind, 1 / len(KINDS))), mmap.mmap(-1, 300)
    child = os.fork()
    if child == 0:
        attack(victim, honest, range(cases), told)
    _, status = os.waitpid(child, 0)
    said = told[:].decode(errors="replace").rstrip("\0 ")
    assert status == 0, f"{kind}, {said} (status {status})"
    assert said.startswith(f"case {cases - 1}:")
