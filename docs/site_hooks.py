"""For mkdocs: the pages that stand at the root, and links to files that are no page, such as ../NOTICE."""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
AT_THE_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, name in AT_THE_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Each link from where the page is in the repository to where its target is on the site."""
    name = AT_THE_ROOT.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(name), link[1]))
        if not (ROOT / target).is_file():
            return link[1]  # mkdocs says that it is dead
        return os.path.relpath(_place(target, config, files), page.file.src_uri + "/..").replace(os.sep, "/")

    return LINK.sub(moved, markdown)


def _place(target: str, config: MkDocsConfig, files: Files) -> str:
    """The path on the site of a file of the repository; what is not there yet comes along as text."""
    for page, name in AT_THE_ROOT.items():
        if target == name:
            return page
    if PurePosixPath(target).is_relative_to("docs"):
        return PurePosixPath(target).relative_to("docs").as_posix()
    copy = f"files/{target}.txt"
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / target)))
    return copy
