"""The documentation site is built as `make site` does it, and every link of every page is followed."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import undiffuse
from undiffuse import errors
from undiffuse.data.format.procedural import PROCEDURAL
from undiffuse.data.source import FORMATS
from undiffuse.diffusion.objective import OBJECTIVES
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS
from undiffuse.diffusion.process import PROCESSES
from undiffuse.diffusion.reverse import VARIANCES
from undiffuse.diffusion.sampler.base import SAMPLERS
from undiffuse.machine.sink import SINKS
from undiffuse.network.base import NETWORKS

ROOT = Path(__file__).parent.parent
NAV = [
    "Home", "Getting started", "Concepts", "Evaluation", "The paper", "The codec", "Format of coded images",
    "Command line", "Python", "API", "Extending", "Architecture", "Reliability", "Many processes", "Benchmarks",
    "Contributing", "Changelog",
]  # fmt: skip
TABLES = [PROCESSES, PARAMETERISATIONS, VARIANCES, NETWORKS, OBJECTIVES, SAMPLERS, FORMATS, PROCEDURAL, SINKS]


class Page(HTMLParser):
    """What a page links to, what it has a browser fetch, and where it can be jumped to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.nav: list[str] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        urls = [given[name] for name in ("href", "src", "data", "poster") if name in given]
        urls += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.links += urls
        if tag != "a" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched += urls
        if "md-nav__link" in given.get("class", ""):
            self.nav.append("")
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            self.nav[-1] += data.strip()


def pages(folder: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(folder.rglob("*.html"))}


def dead(folder: Path) -> list[str]:
    """`page -> link` for each link inside the folder whose file or anchor is not there."""
    found, read = [], pages(folder)
    for path, page in read.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            parent = folder if url.path.startswith("/") else path.parent
            target = Path(os.path.normpath(parent / unquote(url.path).lstrip("/"))) if url.path else path
            anchors = read[target].anchors if target in read else set()
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in anchors):
                found.append(f"{path.relative_to(folder)} -> {link}")
    return found


def foreign(folder: Path) -> list[str]:
    """What a browser would ask another host for, by the pages and by their style sheets."""
    asked = [(path, url) for path, page in pages(folder).items() for url in page.fetched]
    for path in sorted(folder.rglob("*.css")):
        asked += [(path, url) for url in re.findall(r"""(?:url\(|@import )\s*["']?([^"')\s]+)""", path.read_text())]
    return [f"{path.relative_to(folder)} -> {url}" for path, url in asked if urlsplit(url).netloc]


@pytest.mark.slow
def test_it_builds_without_a_warning(site):
    folder, done = site
    assert done.returncode == 0, done.stderr
    assert "Documentation built" in done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert Page(folder / "404.html").nav == NAV
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing", "changelog", "404"}
    assert {path.stem for path in folder.glob("*.html")} == names


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    folder, _ = site
    assert dead(folder) == []
    assert sum(len(page.links) for page in pages(folder).values()) > 1000


@pytest.mark.slow
def test_nothing_is_asked_of_another_host(site):
    folder, _ = site
    assert foreign(folder) == []
    assert [path.name for path, page in pages(folder).items() if "mermaid" in page.anchors] == []


@pytest.mark.slow
def test_files_of_the_repository_come_along(site):
    folder, _ = site
    assert "files/NOTICE.txt" in Page(folder / "index.html").links
    assert (folder / "files" / "NOTICE.txt").read_text("utf-8") == (ROOT / "NOTICE").read_text("utf-8")
    assert [path.name for path in folder.rglob("*.py*")] == []
    assert "contributing.html" in Page(folder / "extending.html").links


@pytest.mark.slow
def test_pictures_in_letters_stay_as_they_are(site):
    folder, _ = site
    (rows,) = re.findall(r"^```rows\n(.*?)^```$", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)
    assert rows in Page(folder / "architecture.html").text


@pytest.mark.slow
def test_the_api_page_has_the_public_names(site):
    page = Page(site[0] / "api.html")
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.Error)]
    kinds.remove(errors.Error)  # which is there as undiffuse.Error
    kinds += [table.base for table in TABLES]
    wanted = {f"{kind.__module__}.{kind.__name__}" for kind in kinds} | {
        f"undiffuse.{name}" for name in undiffuse._LAZY
    }
    wanted |= {f"{kind.__module__}.{kind.__name__}.{name}" for kind in kinds for name in vars(kind)
               if name in getattr(kind, "__abstractmethods__", ())}  # fmt: skip
    wanted |= {f"undiffuse.Model.{name}" for name in vars(undiffuse.Model) if not name.startswith("_")}
    assert wanted - page.anchors == set()
    assert 'x: Float[Tensor, "b *x"]' in page.text  # a shape, not a product


BROKEN = {
    "[a](nowhere.md)": "contains a link 'nowhere.md', but the target is not found",
    "[a](cli.md#no-such-command)": "does not contain an anchor '#no-such-command'",
    "[a](../no_such_file.py)": "contains a link '../no_such_file.py', but the target is not found",
}


@pytest.mark.slow
def test_mkdocs_refuses_what_leads_nowhere(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "undiffuse").symlink_to(ROOT / "undiffuse")
    (tmp_path / "docs" / "python.md").write_text("\n\n".join(["# Python", *BROKEN]))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert [said for said in BROKEN.values() if said not in done.stderr] == [], done.stderr


@pytest.fixture
def small(tmp_path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a b.html").write_text('<h1 id="top">A</h1><a href="inner/c.html#there">c</a><a href="#top">up</a>')
    (tmp_path / "inner" / "c.html").write_text(
        '<p id="there"><a href="../a%20b.html#top">a</a><a href="https://a.org/">far</a><img src="/x.png">'
    )
    (tmp_path / "x.png").touch()
    (tmp_path / "x.css").write_text("p { background: url(x.png) }")
    return tmp_path


def test_a_good_site_has_no_dead_link(small):
    assert (dead(small), foreign(small)) == ([], [])


@pytest.mark.parametrize(
    "text, link",
    [
        ('<a href="gone.html">', "gone.html"),
        ('<a href="inner/c.html#elsewhere">', "inner/c.html#elsewhere"),
        ('<a href="#elsewhere">', "#elsewhere"),
        ('<a href="inner/">', "inner/"),
        ('<img src="inner/x.png">', "inner/x.png"),
        ('<img srcset="x.png 1x, y.png 2x">', "y.png"),
        ('<script src="/gone.js"></script>', "/gone.js"),
    ],
)
def test_a_dead_link_is_found(small, text, link):
    (small / "new.html").write_text(text)
    assert dead(small) == [f"new.html -> {link}"]


@pytest.mark.parametrize(
    "name, text, url",
    [
        ("new.html", '<script src="https://a.org/x.js"></script>', "https://a.org/x.js"),
        ("new.html", '<link rel="stylesheet" href="//a.org/x.css">', "//a.org/x.css"),
        ("new.html", '<img src="http://a.org/x.png">', "http://a.org/x.png"),
        ("new.css", "@import 'https://a.org/x.css'", "https://a.org/x.css"),
        ("new.css", "p { background: url(https://a.org/x.png) }", "https://a.org/x.png"),
    ],
)
def test_a_request_to_another_host_is_found(small, name, text, url):
    (small / name).write_text(text)
    assert foreign(small) == [f"{name} -> {url}"]
