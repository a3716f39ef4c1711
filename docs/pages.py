"""Write the notebooks as pages for Sphinx. No notebook is executed.

nbdev's directives are translated into tags of myst-nb, names of the library become links, and the committed
results are put in their places.
"""

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
GUIDES = (  # in the order of the contents; a guide that is not named here comes last
    "first_steps",
    "your_own_audio",
    "classify_your_own",
    "does_it_help",
    "multi_label",
    "probe_embeddings",
    "add_a_backbone",
    "scale_out",
    "full_costs",
    "read_the_geometry",
)
SHOWN_PROFILES = ("small",)  # whose results are committed
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


# --- the names of the library -------------------------------------------------------------------------------


def symbols(repo=REPO):
    """{name as prose writes it: full name}, for every public name; ambiguous short names are left out."""
    syms = runpy.run_path(str(repo / "act" / "_modidx.py"))["d"]["syms"]
    full = [name for names in syms.values() for name in names if _is_public(name)]
    short = [name.split(".", 2)[2] for name in full]
    unique = {name: whole for name, whole in zip(short, full) if short.count(name) == 1}
    return unique | {name: name for name in full} | {module: module for module in syms}


def _is_public(name):
    """Whether no part of a full name, such as ``act.tuning.Tuned.save``, begins with an underscore."""
    return not any(part.startswith("_") for part in name.split(".")[2:])


def _outside_fences(markdown, change):
    """Markdown with a change made to all text but fenced code."""
    parts = FENCE.split(markdown)  # text and fenced code take turns
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def with_references(markdown, names):
    """Inline code that names something public becomes a link to its reference entry."""

    def reference(found):
        name = found[1]
        return f"{{py:obj}}`{name} <{names[name]}>`" if name in names else found[0]

    return _outside_fences(markdown, lambda text: INLINE_CODE.sub(reference, text))


def with_links(markdown, place, target):
    """Relative links are rewritten by `target`, which gets a path from the repository's root.

    `place` is the folder of the notebook, from the root.
    """

    def rewritten(found):
        opening, link, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(place, link))
        return f"{opening}{target(path)}{anchor or ''})"

    return _outside_fences(markdown, lambda text: LINK.sub(rewritten, text))


def _page_target(place):
    """The `target` of links on a page: pages stay relative, other files lead to the published repository."""

    def target(path):
        if path.startswith("results/") and path.endswith(".svg"):
            return posixpath.relpath(f"nbs/paper/{picture_name(Path(path))}", place)
        if path.startswith("nbs/") and path.endswith((".ipynb", ".html")):
            return posixpath.relpath(path, place)
        return f"{settings()['git_url']}/blob/{settings()['branch']}/{path}"

    return target


# --- committed results --------------------------------------------------------------------------------------


def _committed(name, results):
    """The committed files of that name, one for each profile that has it."""
    paths = [results / profile / name for profile in SHOWN_PROFILES]
    return [path for path in paths if path.exists()]


def committed_table(name, results=RESULTS):
    """The Markdown of a committed table, or the command that makes it."""
    found = _committed(f"{name}.md", results)
    if not found:
        return f"*Not measured yet: `make reproduce PROFILE=small ONLY={name}` writes this table.*"
    return "\n\n".join(p.read_text(encoding="utf-8").strip() for p in found)


VERDICTS = dict(
    supported="are supported",
    refuted="are refuted",
    mixed="are mixed, with rows on both sides",
    undecided="are undecided",
)


def _verdict_clause(claims, words):
    """How many claims have a verdict, and which ones if they are few."""
    if len(claims) > 3:
        return f"{len(claims)} {words}"
    if len(claims) == 1:
        words = words.replace("are", "is")
    return f"{len(claims)} {words} (*{'*; *'.join(claims)}*)"


def claims_sentence(results=RESULTS):
    """What holds and what does not, from the committed verdicts; nothing where there are none."""
    files = _committed("claims.csv", results)
    if not files:
        return ""
    with files[0].open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["verdict"] != "not measured"]
    parts = []
    for verdict, words in VERDICTS.items():
        named = [row["claim"] for row in rows if row["verdict"] == verdict]
        if named:
            parts.append(_verdict_clause(named, words))
    profile = files[0].parent.name
    return (
        f"**What holds so far.** Of {len(rows)} claims that the profile `{profile}` tests, "
        f"{', '.join(parts)}. The [claims](paper/claims.ipynb) are listed with effects, intervals and the "
        "rule of the verdicts."
    )


def main_tables(results=RESULTS):
    """The main table of the committed results, or the command that makes it."""
    tables = [main_table(results / profile) for profile in SHOWN_PROFILES]
    tables = [table for table in tables if table]
    if not tables:
        return "*Not measured yet: `make reproduce PROFILE=small` makes this table.*"
    return "\n\n".join(tables)


def with_tables(markdown, results=RESULTS):
    """Put committed results where the Markdown asks for them.

    `<!-- table: NAME -->` becomes the committed table of that name, `<!-- main table -->` the main table, and
    `<!-- claims -->` the sentence on the claims.
    """
    for marker, written in {"<!-- claims -->": claims_sentence, "<!-- main table -->": main_tables}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, written(results))
    return TABLE.sub(lambda found: committed_table(found[1], results), markdown)


def executed_paper_notebook(source, results=RESULTS):
    """The committed run of a paper notebook, or its source where there is none."""
    runs = _committed(f"notebooks/{source.name}", results)
    return runs[0] if runs else source


def committed_artefacts(stem, results=RESULTS):
    """The committed tables (Markdown) and figures (SVG) of a paper notebook; a figure before its table."""
    prefix = "_".join(stem.split("_")[:2])
    found = []
    for profile in SHOWN_PROFILES:
        files = (results / profile).glob(f"{prefix}[._]*")
        found += [path for path in files if path.suffix in (".md", ".svg")]
    return sorted(found, key=lambda path: (path.parent.name, path.stem, path.suffix == ".md"))


def picture_name(path):
    """The name of a committed figure among the pages."""
    return f"{path.parent.name}-{path.name}"


def _heading(path, notebook):
    """The heading of an artefact: which part of the page it is, and the profile of the run."""
    return f"## {artefact_heading(path.stem, notebook) or 'Results'} (profile `{path.parent.name}`)"


def _with_headings(paths, notebook):
    """Artefacts, each under its heading; a figure and the table of its numbers share one."""
    shown, above = [], None
    for path in paths:
        heading = _heading(path, notebook)
        if heading != above:
            shown.append(heading)
        shown.append(_artefact(path))
        above = heading
    return shown


def _artefact(path):
    """A committed figure or table as Markdown."""
    if path.suffix == ".svg":
        return f"![{alternative_text(path) or path.stem.replace('_', ' ')}]({picture_name(path)})"
    return for_readers(path.read_text(encoding="utf-8").strip())


# Blanks inside a number with its unit or interval, at which a line must not break.
NUMBER = re.compile(r"(?<=\d) (?=± \d|points|to [+−\d])|(?<=[±]) (?=\d)|(?<=to) (?=[+−\d])")


def _unbroken(row):
    """A row of a table in which no number and no name of a probe is broken over two lines."""
    return NUMBER.sub("\u00a0", row).replace("k-NN", "k\u2011NN")


def for_readers(markdown):
    """A committed table as a page shows it: numbers are not broken, and a wide table scrolls."""
    lines = [_unbroken(line) if line.startswith("|") else line for line in markdown.split("\n")]
    text = "\n".join(lines)
    text = text.replace("<table", '<div class="table-wrapper"><table')
    return text.replace("</table>", "</table></div>")


def paper_note(source, results=RESULTS):
    """The text below the title of a paper page: the run that it shows, or else the committed artefacts.

    If neither is committed, the command that makes them.
    """
    run = executed_paper_notebook(source, results)
    if run != source:
        return f"*Shown: the committed run of the profile `{run.parents[1].name}`.*"
    command = f"make reproduce PROFILE=small ONLY={source.stem}"
    found = committed_artefacts(source.stem, results)
    if not found:
        return f"*Shown without outputs: no run of it is committed yet. `{command}` makes one.*"
    code = ["## The code", f"`{command}` makes these files, by the cells that follow."]
    return "\n\n".join([*_with_headings(found, source.stem), *code])


# --- cells --------------------------------------------------------------------------------------------------


def _only_imports(source):
    """Whether a cell consists of imports."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body)


def _code_tags(cell, found, source):
    """The tags of myst-nb for a code cell with the directives `found`."""
    tags = set(cell.metadata.get("tags", ()))
    if {"export", "exporti"} & found.keys():
        tags.add("exported")
    if found.get("echo") == "false":
        tags.add("remove-input")
    if _only_imports(source) or "injected-parameters" in tags:
        tags.add("hide-input")
    return sorted(tags)


def _shown_output(output):
    """An output as a page shows it: no widget models, and of a progress bar its last state."""
    output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return output


def page_code(cell, title):
    """A code cell for readers, or None for one that only the build needs."""
    found = directives(cell.source)
    source = DIRECTIVE.sub("", cell.source).strip()
    if "hide" in found or "default_exp" in found or found.get("include") == "false" or not source:
        return None
    tags = _code_tags(cell, found, source)
    cell.source = source
    cell.outputs = [_shown_output(output) for output in cell.outputs]
    cell.metadata = nbformat.from_dict({"tags": tags, "mystnb": {"image": {"alt": title}}})
    return cell


def caption(markdown):
    """The first sentence of a text's last paragraph, as the alternative text of the figure below it."""
    markdown = re.sub(r"<!--.*?-->", "", markdown, flags=re.S)
    plain = re.sub(r"\$\$.*?\$\$|[#>*`$|\\]|\]\([^)]*\)|\[", "", markdown, flags=re.S)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    if not lines:
        return "Figure"
    sentences = re.split(r"[.:;] ", lines[-1].rstrip(".:;"))
    return f"Figure. {sentences[0]}"


def without_headings(cell):
    """A cell of text without its headings, or None if nothing else is in it; the page's title stays.

    On a page without outputs a heading would stand above folded code only.
    """
    if cell.source.startswith("# "):
        return cell
    cell.source = re.sub(r"^#+ .*\n*", "", cell.source, flags=re.M).strip()
    return cell if cell.source else None


def page_cells(cells, place, names, without_outputs=False):
    """The cells of a notebook as a page shows them.

    `without_outputs` is for a notebook that was not run: its code is folded, and its cell of parameters is
    left out, as those are not the ones of the committed results.
    """
    title = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            if without_outputs:
                cell = without_headings(cell)
            if cell is None:
                continue
            title = caption(cell.source)
            linked = with_links(with_tables(cell.source), place, _page_target(place))
            cell.source = with_references(linked, names)
            yield cell
        elif cell.cell_type == "code":
            shown = _shown_code(cell, title, without_outputs)
            if shown is not None:
                yield shown


def _shown_code(cell, title, without_outputs):
    """A code cell as a page shows it, or None."""
    if without_outputs and "parameters" in cell.metadata.get("tags", ()):
        return None
    shown = page_code(cell, title)
    if shown is not None and without_outputs:
        shown.metadata.tags = sorted({*shown.metadata.tags, "hide-input"})
    return shown


def _with_note(cell, note, links=""):
    """A page's first cell with links below its title, and a note after its introduction."""
    title, _, rest = cell.source.partition("\n")
    return [new_markdown_cell(part.strip()) for part in (title, links, rest, note) if part.strip()]


NOTEBOOKS = "_notebooks"  # where copies to download lie


def notebook_links(source, pages):
    """A line with links to a copy of a notebook among the pages, which is made, and to the published one."""
    path = source.relative_to(NBS)
    copy = pages / NOTEBOOKS / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, copy)
    name = path.as_posix()
    published = f"{settings()['git_url']}/blob/{settings()['branch']}/nbs/{name}"
    return f"{{download}}`Download this notebook </{NOTEBOOKS}/{name}>` or [see it on GitHub]({published})."


def write_page(source, page, place, names, below_title="", after=(), links=""):
    """One notebook as one page."""
    notebook = nbformat.read(source, 4)
    not_run = bool(below_title) and not any(c.get("outputs") for c in notebook.cells)
    first, *others = page_cells(notebook.cells, place, names, not_run)
    notebook.cells = [*_with_note(first, below_title, links), *others, *map(new_markdown_cell, after)]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, page)


# --- the pages that no notebook has -------------------------------------------------------------------------


def exported_modules():
    """(notebook, module, its one sentence) in the order of the flow."""
    for path in sorted((NBS / "api").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        modules = [directives(cell.source).get("default_exp") for cell in cells]
        quoted = [line[2:] for line in cells[0].source.splitlines() if line.startswith("> ")]
        for module in filter(None, modules):
            yield path, f"act.{module}", quoted[0] if quoted else ""


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
    public = [name for name in short if "." not in name and not name.startswith("_")]
    return " ".join(f"{{py:obj}}`{name} <{module}.{name}>`" for name in public)


REFERENCE_INDEX = """# Reference

Every public name, module by module, in the order in which a clip meets them.

| module | |
| --- | --- |
{rows}
```{{toctree}}
:hidden:

{modules}
```
"""

BIBLIOGRAPHY = """# Bibliography

What the code, the data manifest and the pages cite.

```{bibliography}
:all:
:style: plain
```
"""


def write_reference(folder, names):
    """One page for each module, and one that lists them."""
    folder.mkdir(parents=True)
    modules, rows = [], ""
    for notebook, module, sentence in exported_modules():
        page = REFERENCE.format(module=module, notebook=notebook.name)
        (folder / f"{module}.md").write_text(page, encoding="utf-8")
        described = f"{with_references(sentence, names)} {_public_names(module)}"
        rows += f"| [{module}]({module}.md) | {described} |\n"
        modules.append(module)
    index = REFERENCE_INDEX.format(rows=rows, modules="\n".join(modules))
    (folder / "index.md").write_text(index, encoding="utf-8")


def write_bibliography(pages):
    """Every entry of references.bib."""
    (pages / "bibliography.md").write_text(BIBLIOGRAPHY, encoding="utf-8")


def toctree(caption, entries):
    """A part of the contents, which is shown beside the pages only."""
    listed = "\n".join(entries)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```"


def _ordered(folder, first=()):
    """The pages of a folder by name, those in `first` before the others."""

    def place(stem):
        return first.index(stem) if stem in first else len(first), stem

    stems = [path.stem for path in (NBS / folder).glob("*.ipynb")]
    return [f"{folder}/{stem}" for stem in sorted(stems, key=place)]


def contents(extra=()):
    """The site's table of contents, as hidden toctrees of the front page."""
    parts = {
        "Guides": _ordered("guides", GUIDES),
        "Paper": _ordered("paper"),
        "Library": _ordered("api"),
        "Look up": [
            "reference/index",
            *extra,
            f"Source code <{settings()['git_url']}>",
            f"Questions <{settings()['git_url']}/issues>",
        ],
    }
    return [toctree(caption, entries) for caption, entries in parts.items() if entries]


EXPLORER = "explorer.html"
EXPLORER_FRAME = (
    '<iframe class="explorer" title="Embedding explorer" src="_static/explorer.html" loading="lazy" '
    'style="width: 100%; height: 50rem; border: 0"></iframe>'
)


SHOWN_EXPLORER = re.compile(r'<iframe class="explorer".*?srcdoc="([^"]*)"', re.S)


def _html_outputs(path):
    """The outputs of a notebook that are HTML."""
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", {}):
                yield "".join(output["data"]["text/html"])


def write_explorer(folder):
    """Write the explorer of the guide as a page of its own; returns its frame, or "" if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for text in _html_outputs(NBS / "guides" / "hear_the_embedding.ipynb"):
        found = SHOWN_EXPLORER.search(text)
        if found:
            (folder / EXPLORER).write_text(html.unescape(found[1]), encoding="utf-8")
            return EXPLORER_FRAME
    return ""


def _page_sources():
    """The notebooks that become pages, but for the front page."""
    for path in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts and path != NBS / "index.ipynb":
            yield path


def _write_notebook_page(path, pages, names):
    """The page of a notebook; a paper notebook shows its committed run or artefacts."""
    paper = path.parent.name == "paper"
    write_page(
        executed_paper_notebook(path) if paper else path,
        pages / path.relative_to(NBS),
        path.parent.relative_to(REPO).as_posix(),
        names,
        paper_note(path) if paper else "",
        links=notebook_links(path, pages),
    )


def _write_front_page(pages, names, more):
    """The front page, with the contents of the site and the explorer."""
    page = pages / "index.ipynb"
    write_page(NBS / "index.ipynb", page, "nbs", names, after=contents(more))
    front = nbformat.read(page, 4)
    frame = write_explorer(pages / "_static")
    for cell in front.cells:
        cell.source = cell.source.replace("<!-- explorer -->", frame)
    nbformat.write(front, page)


def write_pages(pages):
    """The whole source of the site, from the notebooks and the committed results."""
    shutil.rmtree(pages, ignore_errors=True)
    names = symbols()
    for path in _page_sources():
        _write_notebook_page(path, pages, names)
    for profile in SHOWN_PROFILES:
        for path in (RESULTS / profile).glob("*.svg"):
            shutil.copy(path, pages / "paper" / picture_name(path))
    write_reference(pages / "reference", names)
    (pages / "gpu.md").write_text(gpu_page(), encoding="utf-8")
    more = ["gpu"]
    if (REPO / "references.bib").exists():
        write_bibliography(pages)
        more.append("bibliography")
    _write_front_page(pages, names, more)
