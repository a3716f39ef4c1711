"""Build the site into docs/_build/html: `python docs/build.py`.

Notebooks are shown with the outputs that they carry; none is executed.
"""

import argparse
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

from pages import write_pages

DOCS = Path(__file__).parent


def build(html, jobs="auto"):
    """Write the pages and run Sphinx, every warning an error; returns Sphinx's exit status."""
    pages = html.parent / "pages"
    write_pages(pages)
    options = ["-b", "html", "-c", str(DOCS), "-d", str(html.parent / "doctrees")]
    options += ["-W", "--keep-going", "-q", "-j", str(jobs)]
    return build_main([*options, str(pages), str(html)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS / "_build" / "html")
    parser.add_argument("--jobs", default="auto")
    options = parser.parse_args()
    status = build(options.out.resolve(), options.jobs)
    print(f"{'built' if status == 0 else 'FAILED'}: {options.out / 'index.html'}")
    sys.exit(status)
