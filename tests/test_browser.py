"""What a browser makes of the reports and of the site: on a phone's width, in light and in dark.

The pages lie in frames of a page that measures them, so they are the very files that users open; Chromium then prints
that page with the measurements in it, and a picture of what it shows.
"""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import undiffuse
from tests.cli.toy import evaluation, run_of_digits
from undiffuse.figure import grid, line_plot
from undiffuse.view.report import Figure, Section, Table, write_report

pytestmark = [pytest.mark.slow, pytest.mark.browser]

PHONE = (390, 800)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files --dump-dom"""
MEASURE = """<!doctype html><meta charset="utf-8">
<style>body { margin: 0 } iframe { display: block; border: 0; width: WIDTHpx; height: HEIGHTpx }</style>
FRAMES
<pre></pre>
<script>
const box = element => {
  const {left, right, height} = element.getBoundingClientRect()
  return {left, right, height, shown: element.localName != "img" || element.naturalWidth > 0}
}
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentWindow: window, contentDocument: page}) => ({
    width: page.documentElement.scrollWidth,
    dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
    ink: window.getComputedStyle(page.body).color,
    paper: window.getComputedStyle(page.body).backgroundColor,
    pictures: [...page.querySelectorAll("main img, figure > svg")].map(box),
    tables: [...page.querySelectorAll("table")].map(box),
    links: [...page.querySelectorAll(".md-sidebar--primary a.md-nav__link")].filter(link => box(link).height > 0)
      .map(link => link.innerText.trim()),
  }))
  document.querySelector("pre").textContent = JSON.stringify(found)
}
</script>"""


def browse(address: str, folder: Path, *flags: str) -> str:
    """The page as it is once it is loaded; no host but the disk can be reached."""
    command = ["chromium", *FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND", *flags, address]
    command.insert(1, f"--user-data-dir={folder / 'browser'}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0 and "<html" in done.stdout, done.stderr
    return done.stdout


def look(pages: list[Path], folder: Path, dark: bool, size=PHONE) -> tuple[list[dict], Image.Image]:
    """What was measured of each page, and a picture of the first."""
    width, height = size
    frames = "".join(f'<iframe src="{page.as_uri()}"></iframe>' for page in pages)
    text = MEASURE.replace("WIDTH", str(width)).replace("HEIGHT", str(height)).replace("FRAMES", frames)
    measure = folder / "measure.html"
    measure.write_text(text)
    window, scheme = f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    page = browse(measure.as_uri(), folder, window, scheme, f"--screenshot={folder / 'seen.png'}")
    found = re.search(r"<pre>(.+)</pre>", page)
    assert found, page
    with Image.open(folder / "seen.png") as picture:
        return json.loads(html.unescape(found[1])), picture.convert("RGB")


def luminance(colour: str | tuple[int, ...]) -> float:
    """WCAG's relative luminance of `rgb(r, g, b)`."""
    values = map(int, re.findall(r"\d+", str(colour))[:3])
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def complaints(page: dict, dark: bool, width: int = PHONE[0]) -> list[str]:
    """What is wrong with a page as it was measured."""
    said = []
    ink, paper = luminance(page["ink"]), luminance(page["paper"])
    if page["width"] > width:
        said.append(f"{page['width']} pixels wide")
    if (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) < 4.5:
        said.append(f"{page['ink']} on {page['paper']}")
    if page["dark"] != dark or (paper < ink) != dark:
        said.append("of the other scheme")
    said += ["a picture that is not shown" for it in page["pictures"] if not it["shown"] or it["height"] < 20]
    said += ["a picture that sticks out" for it in page["pictures"] if it["left"] < 0 or it["right"] > width]
    return said


def colours(picture: Image.Image) -> list[tuple[int, tuple[int, ...]]]:
    """(how often, colour), the most frequent first."""
    return sorted(picture.getcolors(1 << 24), reverse=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with all that a report can have, each wider than a phone."""
    images = torch.arange(8 * 3 * 64 * 64).remainder(251).to(torch.uint8).reshape(8, 3, 64, 64)
    labels = tuple(f"0.{i}" for i in range(8))
    figures = (
        Figure(grid(images, columns=8), "Eight pictures", columns=labels, rows=("one row",)),
        Figure(line_plot([("first", [0, 1], [1, 0]), ("second", [0, 1], [0, 1])], "rate", "RMSE", "Curve"), "A curve"),
    )
    table = Table(tuple(f"column {i}" for i in range(9)), (("1,234.56",) * 9,) * 3, "A wide table")
    facts = (("images seen", "204,800"), ("bits/dim", "3.75"), ("minutes", "4.2"))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, [Section("All of it", f"`{'long' * 40}`", facts, figures, (table,))], "A report", "It leads.")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_fits_a_phone(report, tmp_path, dark):
    (page,), picture = look([report], tmp_path, dark)
    assert complaints(page, dark) == []
    assert len(page["pictures"]) == 2
    assert page["pictures"][1]["right"] - page["pictures"][1]["left"] > 300
    assert page["tables"][0]["right"] > PHONE[0]  # it scrolls by itself
    seen = colours(picture)
    assert len(seen) > 200 and picture.size == PHONE
    assert (luminance(seen[0][1]) < 0.1) == dark


DESK = (1280, 900)


def console(page: Path, folder: Path) -> list[str]:
    """What the browser has to say of a page."""
    flags = [*FLAGS.split(), "--enable-logging=stderr", f"--user-data-dir={folder / 'browser'}", page.as_uri()]
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=120, cwd=folder)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """The pages of `report` and of `compare`, of two runs that were measured."""
    root = tmp_path_factory.mktemp("made")
    for name in ("A", "B"):
        run = run_of_digits(
            root / f"{name}-with-a-name-that-is-rather-long", 4, f"train.lr={0.001 if name == 'A' else 0.002}"
        )
        evaluation(run / "eval", undiffuse.load(run).digest(), 100 if name == "A" else 200)
        undiffuse.nll(run, "digits", images=4, draws=None, out=run / "nll")
    runs, command = sorted(map(str, root.glob("*-*"))), [sys.executable, "-m", "undiffuse"]
    for words in (["report", runs[0], "digits"], ["compare", *runs]):
        subprocess.run([*command, *words, "-n", "16", "--steps", "4"], check=True, cwd=root, capture_output=True)
    return [root / "report.html", root / "compare.html"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_reports_of_runs_fit_every_screen(made, tmp_path, dark, size):
    found, picture = look(made, tmp_path, dark, size)
    assert [complaints(page, dark, size[0]) for page in found] == [[], []]
    assert [len(page["pictures"]) > 5 for page in found] == [True, True]
    assert len(colours(picture)) > 100


def test_a_browser_has_nothing_to_say_of_them(made, tmp_path):
    assert [console(page, tmp_path) for page in made] == [[], []]
    bad = tmp_path / "bad.html"
    bad.write_text(made[0].read_text().replace("<main>", '<main><img src="https://example.org/x.png">'))
    assert "Content Security Policy" in " ".join(console(bad, tmp_path))


def test_they_can_be_printed(made, tmp_path):
    for page in made:
        pdf = tmp_path / f"{page.stem}.pdf"
        browse(page.as_uri(), tmp_path, f"--print-to-pdf={pdf}", "--blink-settings=preferredColorScheme=0")
        sheets = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
        assert 3 < sheets < 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_site_fits_a_phone(site, tmp_path, dark):
    names = ["index"] if dark else ["index", "api", "architecture", "benchmarks"]
    found, picture = look([site[0] / f"{name}.html" for name in names], tmp_path, dark)
    assert [(name, complaints(page, dark)) for name, page in zip(names, found, strict=True)] == [(n, []) for n in names]
    assert found[0]["pictures"]
    seen = colours(picture)
    assert len(seen) > 200 and (luminance(seen[0][1]) < 0.1) == dark


def test_the_home_page_on_a_desk(site, tmp_path):
    (page,), _ = look([site[0] / "index.html"], tmp_path, False, (1280, 900))
    assert complaints(page, False, 1280) == []
    assert page["links"][:4] == ["Home", "Getting started", "Concepts", "Evaluation"]


def test_the_search_works_from_a_disk(site, tmp_path):
    page = browse(f"{(site[0] / 'index.html').as_uri()}?q=checkpoint", tmp_path, "--virtual-time-budget=6000")
    (count,) = re.findall(r'md-search-result__meta">\s*(\d+) matching documents', page)
    assert int(count) > 3


def test_what_is_wrong_is_seen(tmp_path):
    """Each fault alone, in a page that is good without it."""
    good = '<!doctype html><html><body style="color: #000; background: #fff"><main><p>Words</p></main></body></html>'
    faults = {
        "600 pixels wide": good.replace("<p>", '<p style="width: 600px; margin: 0; position: absolute; left: 0">'),
        "rgb(200, 200, 200) on rgb(255, 255, 255)": good.replace("#000", "#c8c8c8"),
        "of the other scheme": good.replace("#000", "#eee").replace("#fff", "#000"),
        "a picture that is not shown": good.replace("Words", '<img src="gone.png" width="50" height="50">'),
        "a picture that sticks out": good.replace(
            "Words", '<figure style="overflow: hidden"><svg width="800" height="90"></svg></figure>'
        ),
    }
    (tmp_path / "good.html").write_text(good)
    paths = [tmp_path / "good.html"]
    for i, text in enumerate(faults.values()):
        paths.append(tmp_path / f"{i}.html")
        paths[-1].write_text(text)
    found, picture = look(paths, tmp_path, False)
    assert [complaints(page, False) for page in found] == [[], *([name] for name in faults)]
    assert len(colours(picture)) < 200
