"""Hooks of MkDocs: pages that are made when the site is built, and links that differ between the site and the clone."""

from __future__ import annotations

import logging
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

log = logging.getLogger("mkdocs.hooks")  # a warning is an error with --strict
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
    title = Path(page.file.src_uri).stem  # of a page of the reference: the name that it describes

    def link(match: re.Match[str]) -> str:
        uri = f"{match['page']}.md" if match["page"] else _page_of(match["name"] or "", title.rpartition(".")[0])
        target = files.get_file_from_path(uri) if uri else None
        if match["page"] and target is None:
            log.warning(f"{page.file.src_uri} mentions {match[0]}, which does not exist")
        if target is None or target is page.file:
            return match[0]
        return f'<a href="{get_relative_url(target.url, page.url)}">{match[0]}</a>'

    skipped = r"<(?P<tag>a|h\d|pre|b)\b.*?</(?P=tag)>"  # links, headings, blocks of code and names of arguments stay
    return re.sub(rf"{skipped}|<code>(?P<name>[\w.]+)</code>|docs/(?P<page>[\w-]+)\.md", link, html, flags=re.S)


def _page_of(name: str, package: str) -> str:
    """The page of a public name; one that is no plain word may lack its package, as `perturb_` in `ulr.ops`."""
    plain = name.islower() and "_" not in name
    symbol = TITLES.get(name) or TITLES.get("" if plain else f"{package}.{name}")
    return symbol.page if symbol else ""
