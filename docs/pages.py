"""Notebooks as Sphinx pages: what nbdev asks of authors, in terms that readers and myst-nb know. Nothing is executed."""
import ast
import csv
import html
import posixpath
import re
import runpy
import shutil
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

from act.report import alternative_text
from act.reproduce import artefact_heading
from gpu_page import gpu_page
from main_table import main_table

REPO = Path(__file__).parents[1]
NBS, RESULTS = REPO / "nbs", REPO / "results"
GUIDES = "first_steps your_own_audio classify_your_own does_it_help multi_label probe_embeddings add_a_backbone scale_out full_costs read_the_geometry".split()
SHOWN_PROFILES = "small",                                                           # whose results are committed
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?", re.M)
TABLE = re.compile(r"<!-- table: (\S+) -->")
FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.M | re.S)
INLINE_CODE = re.compile(r"(?<![\[`{}\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])")
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def settings():
    """The project's settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(REPO / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def directives(source):
    """The `#|` lines of a cell, as {name: value}."""
    return dict(DIRECTIVE.findall(source))


# --- the names of the library -------------------------------------------------------------------------------------------

def symbols(repo=REPO):
    """{name as prose writes it: full name}, for every public name; ambiguous short names are left out."""
    syms = runpy.run_path(str(repo / "act" / "_modidx.py"))["d"]["syms"]
    full = [s for names in syms.values() for s in names if not any(p.startswith("_") for p in s.split(".")[2:])]
    short = [s.split(".", 2)[2] for s in full]
    unique = {s: f for s, f in zip(short, full) if short.count(s) == 1}
    return unique | {f: f for f in full} | {m: m for m in syms}


def with_references(markdown, names):
    """Inline code that names something public, as a link to its reference entry; fenced code is left alone."""
    def reference(found): return f"{{py:obj}}`{found[1]} <{names[found[1]]}>`" if found[1] in names else found[0]
    parts = FENCE.split(markdown)
    return "".join(p if i % 2 else INLINE_CODE.sub(reference, p) for i, p in enumerate(parts))


def with_links(markdown, place, target):
    """Relative links rewritten by `target(path from the repository's root)`; `place` is the notebook's folder, from the root."""
    def rewritten(found): return f"{found[1]}{target(posixpath.normpath(posixpath.join(place, found[2])))}{found[3] or ''})"
    parts = FENCE.split(markdown)
    return "".join(p if i % 2 else LINK.sub(rewritten, p) for i, p in enumerate(parts))


def _page_target(place):
    """Links from a page in `place`: pages stay relative, other files of the repository lead to where it is published."""
    def target(path):
        if path.startswith("results/") and path.endswith(".svg"): return posixpath.relpath(f"nbs/paper/{picture_name(Path(path))}", place)
        if path.startswith("nbs/") and path.endswith((".ipynb", ".html")): return posixpath.relpath(path, place)
        return f"{settings()['git_url']}/blob/{settings()['branch']}/{path}"
    return target


# --- committed results --------------------------------------------------------------------------------------------------

def committed_table(name, results=RESULTS):
    """The Markdown of a committed table, or the command that makes it."""
    found = [results / p / f"{name}.md" for p in SHOWN_PROFILES if (results / p / f"{name}.md").exists()]
    if not found: return f"*Not measured yet: `make reproduce PROFILE=small ONLY={name}` writes this table.*"
    return "\n\n".join(p.read_text(encoding="utf-8").strip() for p in found)


VERDICTS = dict(supported="are supported", refuted="are refuted", mixed="are mixed, with rows on both sides", undecided="are undecided")


def claims_sentence(results=RESULTS):
    """What holds and what does not, from the committed verdicts; nothing where there are none."""
    files = [results / p / "claims.csv" for p in SHOWN_PROFILES if (results / p / "claims.csv").exists()]
    if not files: return ""
    with files[0].open(encoding="utf-8", newline="") as file: rows = list(csv.DictReader(file))
    parts = []
    for verdict, words in VERDICTS.items():
        named = [row["claim"] for row in rows if row["verdict"] == verdict]
        if len(named) > 3: parts.append(f"{len(named)} {words}")
        elif named: parts.append(f"{len(named)} {words.replace('are', 'is') if len(named) == 1 else words} (*{'*; *'.join(named)}*)")
    return (f"**What holds so far.** Of {len(rows)} claims that the profile `{files[0].parent.name}` tests, {', '.join(parts)}. "
            "The [claims](paper/claims.ipynb) are listed with effects, intervals and the rule of the verdicts.")


def main_tables(results=RESULTS):
    """The main table of the committed results, or the command that makes it."""
    tables = [main_table(results / profile) for profile in SHOWN_PROFILES]
    return "\n\n".join(filter(None, tables)) or "*Not measured yet: `make reproduce PROFILE=small` makes this table.*"


def with_tables(markdown, results=RESULTS):
    """`<!-- table: NAME -->` replaced by the committed table of that name, `<!-- main table -->` by the main table,
    `<!-- claims -->` by what holds."""
    for marker, written in {"<!-- claims -->": claims_sentence, "<!-- main table -->": main_tables}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, written(results))
    return TABLE.sub(lambda found: committed_table(found[1], results), markdown)


def executed_paper_notebook(source, results=RESULTS):
    """The committed run of a paper notebook, or its source where there is none."""
    runs = [results / p / "notebooks" / source.name for p in SHOWN_PROFILES]
    return next((r for r in runs if r.exists()), source)


def committed_artefacts(stem, results=RESULTS):
    """The committed tables (Markdown) and figures (SVG) of a paper notebook."""
    prefix = "_".join(stem.split("_")[:2])
    found = [p for profile in SHOWN_PROFILES for p in (results / profile).glob(f"{prefix}[._]*") if p.suffix in (".md", ".svg")]
    return sorted(found, key=lambda p: (p.parent.name, p.stem, p.suffix == ".md"))                  # a figure before its table


def picture_name(path): return f"{path.parent.name}-{path.name}"


def _heading(path, notebook):
    """What stands above an artefact: which part of the page it is, and the profile of the run."""
    return f"## {artefact_heading(path.stem, notebook) or 'Results'} (profile `{path.parent.name}`)"


def _with_headings(paths, notebook):
    """Artefacts, each under its heading; a figure and the table of its numbers share one."""
    shown, above = [], None
    for path in paths:
        heading = _heading(path, notebook)
        if heading != above: shown.append(heading)
        shown.append(_artefact(path))
        above = heading
    return shown


def _artefact(path):
    if path.suffix == ".svg": return f"![{alternative_text(path) or path.stem.replace('_', ' ')}]({picture_name(path)})"
    return for_readers(path.read_text(encoding="utf-8").strip())


NUMBER = re.compile(r"(?<=\d) (?=± \d|points|to [+−\d])|(?<=[±]) (?=\d)|(?<=to) (?=[+−\d])")             # blanks inside a number


def for_readers(markdown):
    """A committed table as a page shows it: numbers are not broken, and a table wider than the page scrolls."""
    lines = markdown.split("\n")
    unbroken = [NUMBER.sub("\u00a0", line).replace("k-NN", "k\u2011NN") if line.startswith("|") else line for line in lines]
    return "\n".join(unbroken).replace("<table", '<div class="table-wrapper"><table').replace("</table>", "</table></div>")


def paper_note(source, results=RESULTS):
    """What stands below the title of a paper page: which run it shows, or the artefacts without one, or how to get either."""
    run = executed_paper_notebook(source, results)
    if run != source: return f"*Shown: the committed run of the profile `{run.parents[1].name}`.*"
    command, found = f"make reproduce PROFILE=small ONLY={source.stem}", committed_artefacts(source.stem, results)
    if found: return "\n\n".join([*_with_headings(found, source.stem), "## The code", f"`{command}` makes these files; how, the notebook says, cell by cell:"])
    return f"*Shown without outputs: no run of it is committed yet. `{command}` makes one.*"


# --- cells --------------------------------------------------------------------------------------------------------------

def _only_imports(source):
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body)


def _code_tags(cell, found, source):
    tags = set(cell.metadata.get("tags", ()))
    if {"export", "exporti"} & found.keys(): tags.add("exported")
    if found.get("echo") == "false": tags.add("remove-input")
    if _only_imports(source) or "injected-parameters" in tags: tags.add("hide-input")
    return sorted(tags)


def _shown_output(output):
    """An output as a page shows it: no widget models, and of a progress bar its last state."""
    output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    if output.output_type == "stream": output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return output


def page_code(cell, title):
    """A code cell for readers, or None for one that only the build needs."""
    found = directives(cell.source)
    source = DIRECTIVE.sub("", cell.source).strip()
    if "hide" in found or "default_exp" in found or found.get("include") == "false" or not source: return None
    tags, cell.source = _code_tags(cell, found, source), source
    cell.outputs = [_shown_output(o) for o in cell.outputs]
    cell.metadata = nbformat.from_dict({"tags": tags, "mystnb": {"image": {"alt": title}}})
    return cell


def caption(markdown):
    """The first sentence of a text's last paragraph: the best description of a figure that there is."""
    markdown = re.sub(r"<!--.*?-->", "", markdown, flags=re.S)
    plain = re.sub(r"\$\$.*?\$\$|[#>*`$|\\]|\]\([^)]*\)|\[", "", markdown, flags=re.S)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return "Figure. " + re.split(r"[.:;] ", lines[-1].rstrip(".:;"))[0] if lines else "Figure"


def without_headings(cell):
    """The text below the headings of a cell, or None if there is none: a section that only code stands in promises too much."""
    if cell.source.startswith("# "): return cell                                                     # the page's own title
    cell.source = re.sub(r"^#+ .*\n*", "", cell.source, flags=re.M).strip()
    return cell if cell.source else None


def page_cells(cells, place, names, without_outputs=False):
    """The cells of a notebook as a page of the site shows them; of one that was not run, code is folded and its parameters stay away."""
    title = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            if without_outputs and (cell := without_headings(cell)) is None: continue
            title = caption(cell.source)
            cell.source = with_references(with_links(with_tables(cell.source), place, _page_target(place)), names)
            yield cell
        elif without_outputs and "parameters" in cell.metadata.get("tags", ()): continue            # not those of the results above
        elif cell.cell_type == "code" and (shown := page_code(cell, title)):
            if without_outputs: shown.metadata.tags = sorted({*shown.metadata.tags, "hide-input"})
            yield shown


def _with_note(cell, note, links=""):
    """A page's first cell with links below its title, and a note after its introduction."""
    title, _, rest = cell.source.partition("\n")
    return [new_markdown_cell(part.strip()) for part in (title, links, rest, note) if part.strip()]


NOTEBOOKS = "_notebooks"                                                            # where copies to download lie


def notebook_links(source, pages):
    """A line that leads to a notebook as it is, here and where it is published; the copy is made."""
    path = source.relative_to(NBS)
    copy = pages / NOTEBOOKS / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, copy)
    published = f"{settings()['git_url']}/blob/{settings()['branch']}/nbs/{path.as_posix()}"
    return f"{{download}}`Download this notebook </{NOTEBOOKS}/{path.as_posix()}>` or [see it on GitHub]({published})."


def write_page(source, page, place, names, below_title="", after=(), links=""):
    """One notebook as one page."""
    notebook = nbformat.read(source, 4)
    not_run = bool(below_title) and not any(c.get("outputs") for c in notebook.cells)
    first, *others = page_cells(notebook.cells, place, names, not_run)
    notebook.cells = [*_with_note(first, below_title, links), *others, *map(new_markdown_cell, after)]
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                                            "language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    page.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, page)


# --- the pages that no notebook has -------------------------------------------------------------------------------------

def exported_modules():
    """(notebook, module, its one sentence) in the order of the flow."""
    for path in sorted((NBS / "api").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        module = next((directives(c.source)["default_exp"] for c in cells if "default_exp" in directives(c.source)), None)
        sentence = next((line[2:] for line in cells[0].source.splitlines() if line.startswith("> ")), "")
        if module: yield path, f"act.{module}", sentence


REFERENCE = """# {module}

Explained, drawn and tested in [its notebook](../api/{notebook}).

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :show-inheritance:
```
"""


def _public_names(module, repo=REPO):
    """References to the public functions and classes of a module, in one line."""
    listed = runpy.run_path(str(repo / "act" / "_modidx.py"))["d"]["syms"][module]
    short = sorted({name.removeprefix(f"{module}.") for name in listed}, key=str.lower)
    return " ".join(f"{{py:obj}}`{s} <{module}.{s}>`" for s in short if "." not in s and not s.startswith("_"))


def write_reference(folder, names):
    """One page for each module, and one that lists them."""
    folder.mkdir(parents=True)
    modules = list(exported_modules())
    for notebook, module, _ in modules:
        (folder / f"{module}.md").write_text(REFERENCE.format(module=module, notebook=notebook.name), encoding="utf-8")
    rows = "".join(f"| [{module}]({module}.md) | {with_references(sentence, names)} {_public_names(module)} |\n" for _, module, sentence in modules)
    listed = "\n".join(module for _, module, _ in modules)
    (folder / "index.md").write_text("# Reference\n\nEvery public name, module by module, in the order in which a clip meets them.\n\n| module | |\n| --- | --- |\n"
                                     f"{rows}\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n", encoding="utf-8")


def write_bibliography(pages):
    """Every entry of references.bib."""
    (pages / "bibliography.md").write_text("# Bibliography\n\nWhat the code, the data manifest and the pages cite.\n\n```{bibliography}\n:all:\n:style: plain\n```\n",
                                           encoding="utf-8")


def toctree(caption, entries):
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```"


def _ordered(folder, first=()):
    stems = [p.stem for p in (NBS / folder).glob("*.ipynb")]
    return [f"{folder}/{s}" for s in sorted(stems, key=lambda s: (first.index(s) if s in first else len(first), s))]


def contents(extra=()):
    """The site's table of contents, as hidden toctrees of the front page."""
    parts = {"Guides": _ordered("guides", GUIDES), "Paper": _ordered("paper"), "Library": _ordered("api"), "Look up": ["reference/index", *extra, f"Source code <{settings()['git_url']}>", f"Questions <{settings()['git_url']}/issues>"]}
    return [toctree(caption, entries) for caption, entries in parts.items() if entries]


EXPLORER = "explorer.html"
EXPLORER_FRAME = ('<iframe class="explorer" title="Embedding explorer" src="_static/explorer.html" loading="lazy" '
                  'style="width: 100%; height: 50rem; border: 0"></iframe>')


def write_explorer(folder):
    """The explorer that the guide shows, as a page of its own; its frame, or nothing where the guide holds none."""
    cells = nbformat.read(NBS / "guides" / "hear_the_embedding.ipynb", 4).cells
    shown = [o["data"]["text/html"] for c in cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})]
    page = next((found[1] for text in shown if (found := re.search(r'<iframe class="explorer".*?srcdoc="([^"]*)"', "".join(text), re.S))), None)
    folder.mkdir(parents=True, exist_ok=True)
    if page is None: return ""
    (folder / EXPLORER).write_text(html.unescape(page), encoding="utf-8")
    return EXPLORER_FRAME


def write_pages(pages):
    """The whole source of the site, from the notebooks."""
    shutil.rmtree(pages, ignore_errors=True)
    names = symbols()
    for path in sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p != NBS / "index.ipynb"):
        paper = path.parent.name == "paper"
        write_page(executed_paper_notebook(path) if paper else path, pages / path.relative_to(NBS), path.parent.relative_to(REPO).as_posix(), names,
                   paper_note(path) if paper else "", links=notebook_links(path, pages))
    for path in RESULTS.glob("*/*.svg"):
        if path.parent.name in SHOWN_PROFILES: shutil.copy(path, pages / "paper" / picture_name(path))
    write_reference(pages / "reference", names)
    cited = (REPO / "references.bib").exists()
    if cited: write_bibliography(pages)
    (pages / "gpu.md").write_text(gpu_page(), encoding="utf-8")
    more = ["gpu", "bibliography"] if cited else ["gpu"]
    write_page(NBS / "index.ipynb", pages / "index.ipynb", "nbs", names, after=contents(more))
    front = nbformat.read(pages / "index.ipynb", 4)
    frame = write_explorer(pages / "_static")
    for cell in front.cells: cell.source = cell.source.replace("<!-- explorer -->", frame)
    nbformat.write(front, pages / "index.ipynb")
