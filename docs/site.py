"""What mkdocs needs beside docs/: the pages that stand elsewhere, and links between the two."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# File of the repository -> its place in the site, which has docs/ at the top.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/NOTES.md": "benchmarks/NOTES.md",
}


def on_files(files: Files, config) -> Files:
    """Add the files that stand elsewhere."""
    for there, here in ELSEWHERE.items():
        files.append(File.generated(config, here, abs_src_path=str(ROOT / there)))
    files.remove(files.get_file_from_path("site.py"))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links as they are in the site; what has no page there becomes plain text."""
    source = next((there for there, here in ELSEWHERE.items() if here == page.file.src_uri), None)
    folder = (ROOT / source).parent if source else ROOT / "docs"

    def link(match: re.Match) -> str:
        mark, text, target, anchor = match.groups()
        if "://" in target or not target:
            return match[0]
        there = (folder / target).resolve().relative_to(ROOT).as_posix()
        here = ELSEWHERE.get(there, there.removeprefix("docs/"))
        if files.get_file_from_path(here) is None:
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"{mark}[{text}]({up}{here}{anchor or ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)", link, markdown)
