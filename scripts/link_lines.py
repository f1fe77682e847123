#!/usr/bin/env python
"""Brings the line numbers of links into the code up to date, in README.md and docs/*.md.

python scripts/link_lines.py            # write
python scripts/link_lines.py --check    # only say which are out of date; exit status 1 if any is

A link names the line that it means in its title: `[text](path#L12 "def apply_lrpe(")` is the one line of the file that
begins with these words, whatever its indentation.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'\((?P<path>[^()\s#]+)#L(?P<line>\d+) "(?P<title>[^"]+)"\)')


def relink(page: Path) -> tuple[str, list[str]]:
    """The text of a page with the right line numbers, and what had to change.

    Raises ValueError where a file has no such line, or more than one.
    """
    changes = []

    def number(link: re.Match) -> str:
        path, line, title = link.group("path", "line", "title")
        lines = (page.parent / path).read_text(encoding="utf-8").splitlines()
        found = [at for at, text in enumerate(lines, 1) if text.strip().startswith(title)]
        if len(found) != 1:
            raise ValueError(f'{page.name} links to "{title}", with which {len(found)} lines of {path} begin, not one.')
        if found[0] != int(line):
            changes.append(f'{page.name}: "{title}" is in line {found[0]} of {path}, not {line}')
        return f'({path}#L{found[0]} "{title}")'

    return LINK.sub(number, page.read_text(encoding="utf-8")), changes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Update the line numbers of links into the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text, changes = relink(page)
        stale += changes
        if changes and not check:
            page.write_text(text, encoding="utf-8")
    print("\n".join(stale) or "All links point at their lines.")
    if check and stale:
        sys.exit("Run scripts/link_lines.py and commit what it writes.")


if __name__ == "__main__":
    main()
