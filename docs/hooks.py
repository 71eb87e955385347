"""What mkdocs does beside its plugins, as mkdocs.yml says: pages from outside of docs/, and links that lead there.

On GitHub every document links to the others by their place in the repository. The site has only docs/, so README.md,
CHANGELOG.md and CONTRIBUTING.md are added as pages, links to pages are turned into links within the site, and links to
other files of the repository into their addresses. A link to what does not exist stays as it is, which mkdocs reports.

`setup.py` turns the links of README.md into addresses in the same way, for the page of the package index.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(`[^`\n]*`)|(\]\()([^()\s#]+)(#[^()\s]*)?(\))")


def map_links(text: str, change: Callable[[str], str]) -> str:
    """A document with `change(path)` in place of the path of every relative link and picture outside of code.

    Addresses, and links that are only an anchor, stay as they are; so does the anchor behind a path.
    """

    def one(match: re.Match[str]) -> str:
        code, opening, path, anchor, closing = match.groups()
        if code is not None or re.match(r"[a-z][a-z+.-]*:", path):
            return match[0]
        return f"{opening}{change(path)}{anchor or ''}{closing}"

    parts = _FENCE.split(text)  # every other part is a block of code
    return "".join(part if index % 2 else _LINK.sub(one, part) for index, part in enumerate(parts))


def link_from(page: str, path: str, pages: Mapping[str, str], repository: str) -> str:
    """A link of the site.

    page: the page that has the link, from the top of the site. path: of the file or folder, from the top of the
    repository. pages: files of the repository that are in the site, with their place there. repository: its address.
    """
    if path in pages:
        return posixpath.relpath(pages[path], posixpath.dirname(page) or ".")
    return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"


def on_files(files: Any, config: Any) -> Any:
    """Adds the documents at the top of the repository. Called by mkdocs."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links by place in the repository into links of the site. Called by mkdocs."""
    here, repository = page.file.src_uri, config["repo_url"].rstrip("/")
    source = next((name for name, place in PAGES.items() if place == here), f"docs/{here}")
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files if not file.inclusion.is_excluded()}
    pages = {name: place for name, place in pages.items() if place not in PAGES.values()} | PAGES

    def change(link: str) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        return link_from(here, path, pages, repository) if (ROOT / path).exists() else link

    return map_links(markdown, change)
