"""Write README.md from nbs/index.ipynb: `python docs/readme.py`.

With `--check` nothing is written; the exit status says whether README.md is up to date.
"""

import base64
import sys

import nbformat

from pages import DIRECTIVE, NBS, REPO, caption, directives, settings, with_links, with_tables

PICTURES = "docs/images"


def _root_target(path):
    """Links of the front page, seen from the root of the repository."""
    return path


def _picture(cell, output, title, write):
    """A figure as a file beside the site's sources, where a README can show it."""
    name = f"{PICTURES}/{cell.id}.png"
    if write:
        (REPO / PICTURES).mkdir(exist_ok=True)
        (REPO / name).write_bytes(base64.b64decode(output.data["image/png"]))
    return f"![{title}]({name})"


def _shown(cell, output, title, write):
    """An output as Markdown."""
    if output.output_type == "stream":
        return f"```\n{output.text.rstrip()}\n```"
    if "image/png" in output.get("data", {}):
        return _picture(cell, output, title, write)
    if "text/markdown" in output.get("data", {}):
        return output.data["text/markdown"]
    return f"```\n{output.data['text/plain']}\n```" if "data" in output else ""


def _code(cell, title, write):
    """A code cell and its outputs as Markdown."""
    found = directives(cell.source)
    source = DIRECTIVE.sub("", cell.source).strip()
    if "hide" in found or not source:
        return []
    parts = [] if found.get("echo") == "false" else [f"```python\n{source}\n```"]
    parts += [_shown(cell, output, title, write) for output in cell.outputs]
    return parts


def readme(write=True):
    """The text of README.md."""
    site = f"{settings()['doc_host']}{settings()['doc_baseurl']}"
    parts = [f"<!-- Generated from nbs/index.ipynb by docs/readme.py; edit that. The site: {site} -->"]
    title = ""
    for cell in nbformat.read(NBS / "index.ipynb", 4).cells:
        if cell.cell_type == "code":
            parts += _code(cell, title, write)
        elif cell.cell_type == "markdown":
            title = caption(cell.source)
            text = with_links(with_tables(cell.source), "nbs", _root_target)
            parts.append(text.replace("<!-- explorer -->", "").strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def main(check):
    """Write README.md, or check it; returns the exit status, or a message in its place."""
    path = REPO / "README.md"
    text = readme(write=not check)
    if not check:
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        return "README.md is not what nbs/index.ipynb says: run `make sync`"
    return None


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
