"""The documentation as a site, built strictly and without a network: links lead somewhere, nothing comes from elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# Servers that pages may link to; each was looked at. A new one is added here by whoever links to it.
SERVERS = {
    "activity-net.org",
    "arxiv.org",
    "cocodataset.org",
    "developer.qualcomm.com",  # Something-Something V2
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "openaccess.thecvf.com",
    "semver.org",
    "serre-lab.clps.brown.edu",  # HMDB51
    "sites.google.com",  # LSMDC
    "snakemake.github.io",
    "visualgenome.org",
    "www.contributor-covenant.org",
    "www.crcv.ucf.edu",  # UCF101
    "www.cs.rice.edu",  # SBU captions
    "www.cs.utexas.edu",  # MSVD
    "www.robots.ox.ac.uk",  # MSR-VTT's videos
    "www.svcl.ucsd.edu",  # Diving48
}


class Links(HTMLParser):
    """The links, anchors and loaded files of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if "src" in values:
            self.loaded.add(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.add(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def broken_links(pages: dict[Path, Links]) -> Iterator[str]:
    """The links within a site that lead to no file, or to no anchor of a page."""
    for page, found in pages.items():
        for link in found.links | found.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or page.name == "404.html":  # whose links are absolute
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchors = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                yield f"{page.name}: {link}"


def external(found: Links) -> set[str]:
    parts = {link: urlsplit(link) for link in found.links | found.loaded}
    return {link for link, part in parts.items() if (part.scheme or part.netloc) and part.scheme != "data"}


def test_links_of_the_site_lead_to_pages_and_anchors(pages):
    assert set(broken_links(pages)) == set()


def test_links_to_other_servers_are_well_formed_and_known(pages):
    links = {link for found in pages.values() for link in external(found)}
    assert len(links) > 20
    odd = {link for link in links if not re.fullmatch(r"https?://[\w.-]+(/[\w.~%/?&=#+:,@!-]*)?", link)}
    assert odd == set()
    assert {urlsplit(link).netloc for link in links} <= SERVERS


def test_pages_load_nothing_from_other_servers(site, pages):
    assert {
        f"{page.name}: {source}" for page, found in pages.items() for source in found.loaded & external(found)
    } == set()
    styles = [
        path for path in site.rglob("*.css") if re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", path.read_text())
    ]
    assert styles == []


def test_every_page_of_the_docs_is_in_the_navigation(site):
    navigation = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    names = {path.relative_to(docs).as_posix() for kind in ("*.md", "*.ipynb") for path in docs.rglob(kind)}
    assert {name for name in names if f": {name}\n" not in navigation} == set()
    assert len(list(site.rglob("*.html"))) >= len(names)


def test_examples_of_docstrings_are_shown_as_code(site):
    """A doctest outside of a section `Examples` would become three nested quotations."""
    text = (site / "api.html").read_text(encoding="utf-8")
    assert "<blockquote>" not in text and "doctest" not in text
    assert text.count("&gt;&gt;&gt;") >= 5


def test_linked_files_of_the_repository_become_pages(site):
    page = site / "repository/config/folder.yaml.html"
    shown = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
    first = (ROOT / "config/folder.yaml").read_text().splitlines()[0]
    assert first in shown
    assert "repository/config/folder.yaml.html" in Links((site / "index.html").read_text()).links


def test_the_picture_of_masks_is_small():
    """It is in the repository and in every visit of README; docs/images/draw_masks.py makes it."""
    assert (ROOT / "docs/images/masks.png").stat().st_size < 150_000


def test_the_checks_notice_broken_links(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<a href="gone.html">a</a><a href="#gone">b</a><a href="#here" id="here">c</a><img src="//cdn.org/x.js">'
    )
    pages = {page: Links(page.read_text())}
    assert set(broken_links(pages)) == {"page.html: gone.html", "page.html: #gone"}
    assert external(pages[page]) == {"//cdn.org/x.js"}


def test_the_catalog_finds_what_it_asks_for():
    """The files that the Snakemake workflow catalog's scripts/generate-catalog.py reads."""
    settings = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    assert set(settings["usage"]) <= {"mandatory-flags", "software-stack-deployment", "report"}
    assert (ROOT / "config/README.md").is_file()
    assert (ROOT / "workflow/Snakefile").is_file()  # with a folder workflow/, it looks for none beside it
    assert {"snakemake", "workflow"} <= set(re.findall(r"\w+", (ROOT / "README.md").read_text().lower()))
