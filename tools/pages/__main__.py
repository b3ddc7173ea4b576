"""``tools/docs``: write the pages that are named, or all."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import completions, dbus, man

MAKERS = {"dbus": dbus.pages, "man": man.pages, "completions": completions.pages}
ROOT = Path(__file__).parents[2]


def main() -> None:
    """Write what has changed, and say what that is."""
    parser = argparse.ArgumentParser(prog="tools/docs", description="Write the pages that are made from the sources.")
    parser.add_argument("pages", nargs="*", metavar="PAGES", help=f"{', '.join(MAKERS)}; all of them by default")
    wanted = parser.parse_args().pages or list(MAKERS)
    if unknown := set(wanted) - MAKERS.keys():
        parser.error(f"there are no {', '.join(sorted(unknown))}; there are {', '.join(MAKERS)}")
    for name in wanted:
        for path, text in MAKERS[name](ROOT).items():
            page = ROOT / path
            if page.exists() and page.read_text(encoding="utf-8") == text:
                continue
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
