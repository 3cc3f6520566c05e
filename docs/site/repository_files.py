"""A hook of MkDocs: files of the repository that a page links to become pages of the site.

On a forge, `[config/demo.yaml](../config/demo.yaml)` leads to the file. The site has no such file, and should not need to know
where the repository is hosted; so it gets a page with the file's text, and the link leads there.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

FOLDER = "repository"  # of the site
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")  # in the navigation
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")  # the path in [text](path#anchor)
# Not JSON: the schema of the config would be five times as large in colours.
LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".py": "python", ".toml": "toml", ".smk": "python"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each linked file outside docs/, and for those that these link to."""
    root = Path(config.config_file_path).parent
    texts = {f.src_uri: f.content_string for f in files if f.src_uri.endswith(".md") and f.inclusion.is_included()}
    waiting = {*ALWAYS, *(path for uri, text in texts.items() for path in _outside(f"docs/{uri}", text))}
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        if (root / path).is_file():
            text = (root / path).read_text(encoding="utf-8")
            uri = _page(path).removeprefix("docs/")
            files.append(File.generated(config, uri, content=_content(path, text), inclusion=InclusionLevel.NOT_IN_NAV))
            waiting |= (_outside(path, text) if path.endswith(".md") else set()) - done
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to the pages of the files."""
    root = Path(config.config_file_path).parent
    uri = f"docs/{page.file.src_uri}"
    source = uri.removeprefix(f"docs/{FOLDER}/") if uri.startswith(f"docs/{FOLDER}/") else uri
    folder = str(PurePosixPath(uri).parent)

    def lead(match: re.Match[str]) -> str:
        path = _target(source, match[1])
        if path.startswith("docs/"):
            return relpath(path, folder)
        return relpath(_page(path), folder) if (root / path).is_file() else match[1]

    return LINK.sub(lead, markdown)


def _outside(source: str, text: str) -> set[str]:
    """The linked paths outside docs/, relative to the repository."""
    return {path for link in LINK.findall(text) if not (path := _target(source, link)).startswith(("docs/", ".."))}


def _target(source: str, link: str) -> str:
    return normpath(PurePosixPath(source).parent / link)


def _page(path: str) -> str:
    return f"docs/{FOLDER}/{path if path.endswith('.md') else path + '.md'}"


def _content(path: str, text: str) -> str:
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "text")
    unsearched = (
        "---\nsearch: {exclude: true}\n---\n"  # searches should lead to the docs, not to every file that they link to
    )
    return f"{unsearched}# {path}\n\n````{language}\n{text}\n````\n"
