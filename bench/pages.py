"""Makes the pictures of `undiffuse report` and `undiffuse compare` that the docs show, with a real Chromium.

    python bench/pages.py --runs runs/pages

Two models of the shipped digits are trained, unless they are in `--runs` already, and measured; what was made is in
`bench/pages.json`. The pictures are docs/images/report.png and docs/images/compare.png.
"""

import argparse
import io
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

from machine import machine
from PIL import Image

from undiffuse.figure import png
from undiffuse.machine import disk

HERE, IMAGES = Path(__file__).parent, Path(__file__).parent.parent / "docs" / "images"
RUNS = {"cosine": (), "linear": ("--set", "process.name=linear", "--set", "train.lr=5e-4")}
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars"
SIZE = {"report": (1080, 1480), "compare": (1080, 1300)}


def undiffuse(folder: Path, *words: object) -> str:
    """Runs a command in the folder; the command as text."""
    command = [sys.executable, "-m", "undiffuse", *map(str, words)]
    subprocess.run(command, check=True, cwd=folder)
    return shlex.join(["undiffuse", *map(str, words)])


def screenshot(page: Path, target: Path) -> None:
    """The top of a page, in few colours, so that the file is small."""
    width, height = SIZE[page.stem]
    shot = page.with_suffix(".png")
    flags = [*FLAGS.split(), f"--user-data-dir={page.parent / 'browser'}", f"--window-size={width},{height}"]
    subprocess.run(
        ["chromium", *flags, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=60
    )
    with Image.open(io.BytesIO(shot.read_bytes())) as picture:
        few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    disk.write_atomic(target, png(few))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/pages"), help="where the two runs are")
    folder = parser.parse_args().runs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, settings in RUNS.items():
        if not (folder / name).exists():
            undiffuse(folder, "train", "digits", "--preset", "digits", "--out", name, *settings)
        made.append(undiffuse(folder, "nll", name, "digits", "-n", 16, "--steps", 100, "--out", f"{name}/nll"))
        how = ["-n", 256, "--steps", 20, "--solver", "ddim", "--features", "efflite0", "--seeds", 2]
        made.append(undiffuse(folder, "eval", name, "digits", *how, "--out", f"{name}/eval"))
    made.append(undiffuse(folder, "report", "cosine", "digits", "--out", "report.html", "--overwrite"))
    made.append(undiffuse(folder, "compare", "cosine", "linear", "--out", "compare.html", "--overwrite"))
    for name in SIZE:
        screenshot(folder / f"{name}.html", IMAGES / f"{name}.png")
    trained = [shlex.join(["undiffuse", "train", "digits", "--preset", "digits", "--out", name, *settings])
               for name, settings in RUNS.items()]  # fmt: skip
    said = {"command": "python bench/pages.py", "date": date.today().isoformat(), "seed": 0, "machine": machine()}
    disk.write_json(HERE / "pages.json", said | {"commands": [*trained, *made]})


if __name__ == "__main__":
    main()
