"""Hooks of MkDocs: pages that are made when the site is built, and links that differ between the site and the clone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from bench import figures  # noqa: E402

OUTSIDE = {"README.md": "index.md", "bench/README.md": "benchmarks.md"}  # files outside docs/ that are pages
SYMBOLS = reference.symbols()
TITLES = {symbol.title: symbol for group in SYMBOLS.values() for symbol in group}


def on_config(config: MkDocsConfig) -> None:
    """Enter the reference's pages in the navigation."""
    section = next(entry for entry in config.nav or [] if "Reference" in entry)
    section["Reference"] += reference.navigation(SYMBOLS)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are no files in docs/."""
    made = {page: (ROOT / path).read_text() for path, page in OUTSIDE.items()}
    made |= {"rivals.md": figures.rivals_page(), "history.md": figures.history_page()}
    made |= {"reference/index.md": reference.overview(SYMBOLS)}
    made |= {symbol.page: symbol.markdown() for symbol in TITLES.values()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page that are relative to the clone to the site."""
    folder = next((Path(path).parent for path, uri in OUTSIDE.items() if uri == page.file.src_uri), Path("docs"))

    def link(match: re.Match[str]) -> str:
        target = (ROOT / folder / match[1]).resolve().relative_to(ROOT).as_posix()
        return f"]({OUTSIDE.get(target, target.removeprefix('docs/'))}"

    return markdown if page.file.src_uri.startswith("reference/") else re.sub(r"\]\(([\w./-]+)(?=[#)])", link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the public names that a page mentions, and the pages that a docstring mentions."""

    def link(match: re.Match[str]) -> str:
        title, mentioned = match["title"], match["page"]
        uri = TITLES[title].page if title in TITLES else f"{mentioned}.md"
        target = files.get_file_from_path(uri)
        if target is None or target is page.file:
            return match[0]
        return f'<a href="{get_relative_url(target.url, page.url)}">{match[0]}</a>'

    skipped = r"<(?P<tag>a|h\d|pre)\b.*?</(?P=tag)>"  # links, headings and blocks of code stay
    return re.sub(rf"{skipped}|<code>(?P<title>ulr\.[\w.]+)</code>|docs/(?P<page>[\w-]+)\.md", link, html, flags=re.S)
