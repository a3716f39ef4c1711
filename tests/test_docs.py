"""The site, the guides and the docstrings, as a reader meets them; the browser tests click through in
Debian's chromium."""

import ast
import functools
import http.server
import importlib
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import numpy as np
import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "docs"))
GUIDES = sorted((REPO / "nbs" / "guides").glob("*.ipynb"))


# --- the build ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site; every warning of Sphinx is an error."""
    out = tmp_path_factory.mktemp("site") / "html"
    run = subprocess.run(
        [sys.executable, "docs/build.py", "--out", str(out), "--jobs", "1"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def test_the_site_has_the_pages_of_its_navigation(site):
    for page in (
        "index.html",
        "paper/table_2_single_label.html",
        "guides/first_steps.html",
        "api/08_losses.html",
        "search.html",
    ):
        assert (site / page).stat().st_size > 2000


def test_readme_is_what_the_front_page_says():
    from readme import readme

    assert (REPO / "README.md").read_text(encoding="utf-8") == readme(write=False), "run `make sync`"


class Page(HTMLParser):
    """The ids of a page, what it links to, and what a browser loads with it."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev", "index", "search"):
            self.loaded.append(found.get("href"))
        if tag in ("script", "img", "iframe", "audio", "video", "source", "embed") and found.get("src"):
            self.loaded.append(found["src"])


@pytest.fixture(scope="session")
def pages(site):
    return {p: Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}


def test_no_internal_link_is_broken(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme:
                continue
            target = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, "\n".join(sorted(set(broken)))


def test_pages_load_nothing_from_another_host(site, pages):
    foreign = [
        f"{p.name}: {src}"
        for p, page in pages.items()
        for src in page.loaded
        if urlsplit(src).scheme in ("http", "https") or src.startswith("//")
    ]
    foreign += [
        f"{p.name}: {found}"
        for p in site.rglob("*.css")
        for found in re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", p.read_text(encoding="utf-8"))
    ]
    assert not foreign, foreign


def test_paper_pages_and_front_page_show_committed_tables(site):
    for table in (t for t in (REPO / "results").glob("small/*.md") if t.stem != "README"):
        cells = re.findall(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d to [+-]\d+\.\d", table.read_text(encoding="utf-8"))
        page = next(p for p in (site / "paper").glob("*.html") if table.stem.startswith(p.stem))
        text = page.read_text(encoding="utf-8").replace("\u00a0", " ")  # numbers are not broken
        assert all(cell in text for cell in cells), table.name
    for figure in (REPO / "results").glob("small/*.svg"):
        assert (site / "_images" / f"small-{figure.name}").exists(), figure.name


def test_pages_hold_no_path_of_a_machine(site):
    telling = [
        str(p.relative_to(site))
        for p in site.rglob("*.html")
        if re.search(r"/(?:home|root|work|tmp)/\w|C:\\Users", p.read_text(encoding="utf-8"))
    ]
    assert not telling, telling


# --- how notebooks become pages -----------------------------------------------------------------------------


def test_prose_becomes_references_but_code_does_not():
    from pages import with_references

    names = {"tune": "act.tuning.tune"}
    assert (
        with_references("call `tune`, not `tunes`", names)
        == "call {py:obj}`tune <act.tuning.tune>`, not `tunes`"
    )
    fenced = "```python\n`tune`\n```\n"
    assert with_references(fenced, names) == fenced


def test_links_are_seen_from_the_page():
    from pages import _page_target, with_links

    written = with_links(
        "[a](../api/02_audio.ipynb#x) [b](../../Makefile) [c](https://example.org)",
        "nbs/guides",
        _page_target("nbs/guides"),
    )
    assert (
        "(../api/02_audio.ipynb#x)" in written
        and "/blob/main/Makefile)" in written
        and "(https://example.org)" in written
    )


def test_tables_come_from_results_or_say_how_to_get_them(tmp_path):
    from pages import with_tables

    assert "make reproduce PROFILE=small ONLY=table_9" in with_tables("<!-- table: table_9 -->", tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "table_9.md").write_text("| a |\n")
    assert with_tables("<!-- table: table_9 -->", tmp_path) == "| a |"


def _main_table_results(folder):
    """Table 2 of two tasks, one of them without a tuned encoder, and its paired differences."""
    folder.mkdir()
    lines = ["task,backbone,method,probe,mean,ci95,classes"]
    for method, probe, mean, half in [
        ("frozen", "linear", 0.5, ""),
        ("frozen", "knn", 0.4, ""),
        ("vanilla", "head", 0.704, 0.01),
        ("vanilla", "linear", 0.70, 0.01),
        ("vanilla", "knn", 0.6, 0.02),
        ("contrastive", "linear", 0.65, 0.03),
        ("contrastive", "knn", 0.6004, 0.04),
    ]:
        lines.append(f"birds,enc,{method},{probe},{mean},{half},12.0")
        if method == "frozen":
            lines.append(f"drums,enc,{method},{probe},{mean},{half},12.0")
    (folder / "table_2_single_label.csv").write_text("\n".join(lines))
    paired = [
        "task,backbone,probe,method,other,difference,low,high",
        "birds,enc,linear,contrastive,vanilla,-.05,-.08,-.02",
        "birds,enc,knn,contrastive,vanilla,.0004,-.01,.01",
        "birds,enc,knn,contrastive,frozen,.2,.1,.3",
        "birds,enc,linear,contrastive,lp-ft,.03,.01,.05",
    ]
    (folder / "table_2_single_label_paired.csv").write_text("\n".join(paired))


def test_the_main_table_has_the_tuned_rows_and_says_who_wins(tmp_path):
    from pages import with_tables

    assert "make reproduce PROFILE=small" in with_tables("<!-- main table -->", tmp_path)
    _main_table_results(tmp_path / "small")
    table, fine_tuning, lp_ft = with_tables("<!-- main table -->", tmp_path).split("\n\n")
    table = table.splitlines()
    assert len(table) == 3
    cells = table[2].strip("| ").split(" | ")
    assert cells == [
        "birds",
        "12",
        "enc",
        "50.0",
        "40.0",
        "**70.4 ± 1.0**",
        "70.0 ± 1.0",
        "**60.0 ± 2.0**",
        "65.0 ± 3.0",
        "**60.0 ± 4.0**",
    ]
    assert fine_tuning == (
        "**Against fine-tuning.** Linear probe: fine-tuning is ahead on birds (−5.0). "
        "k-NN probe: no difference is detected on birds (0.0)."
    )
    assert lp_ft == "**Against LP-FT.** Linear probe: contrastive tuning is ahead on birds (+3.0)."


def test_tables_are_for_readers():
    from pages import for_readers

    page = for_readers("Mean ± half.\n\n| a k-NN |  95 % |\n| :-- | --: |\n| 2.0 ± 0.1 | −1.0 to +2.0 |")
    assert (
        "Mean ± half." in page
        and "2.0\u00a0±\u00a00.1" in page
        and "−1.0\u00a0to\u00a0+2.0" in page
        and "k\u2011NN" in page
    )
    assert for_readers("<table>\n</table>") == '<div class="table-wrapper"><table>\n</table></div>'
    assert for_readers("no table") == "no table"


def test_effects_of_claims_have_a_heading():
    from pages import _heading

    assert _heading(Path("small/claims_effects.svg"), "claims") == "## Effects (profile `small`)"
    assert _heading(Path("small/figure_3_geometry.md"), "figure_3_geometry") == "## Results (profile `small`)"


def test_paper_page_says_which_run_it_shows(tmp_path):
    from pages import executed_paper_notebook, paper_note

    source, run = Path("table_9.ipynb"), tmp_path / "small" / "notebooks" / "table_9.ipynb"
    assert "make reproduce PROFILE=small ONLY=table_9" in paper_note(source, tmp_path)
    run.parent.mkdir(parents=True)
    (tmp_path / "small" / "table_9.md").write_text("| a |\n")
    assert (
        paper_note(source, tmp_path).startswith("## Results (profile `small`)\n\n| a |")
        and executed_paper_notebook(source, tmp_path) == source
    )
    run.touch()
    assert "`small`" in paper_note(source, tmp_path) and executed_paper_notebook(source, tmp_path) == run


def test_progress_bars_and_dead_widgets_are_not_kept():
    from run_notebooks import lasting

    bar = {"output_type": "stream", "text": "decode:  1%\rdecode: 99%\rdecode: 100%\n"}
    widget = {
        "output_type": "display_data",
        "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "w"},
    }
    assert lasting([bar, widget]) == [{"output_type": "display_data", "data": {"text/plain": "w"}}]
    assert lasting([{"output_type": "stream", "text": "a\nb: 1%\rb: 2%\nc\n"}])[0]["text"] == ["a\n", "c\n"]


def notebook_that_printed_1(folder, source):
    """A notebook of one cell, whose output on disk is a 1."""
    cell = dict(
        cell_type="code",
        id="one",
        metadata={},
        execution_count=None,
        source=source,
        outputs=[dict(output_type="stream", name="stdout", text="1\n")],
    )
    path = folder / "n.ipynb"
    path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def test_changed_output_is_stale(tmp_path):
    from run_notebooks import stale

    path = notebook_that_printed_1(tmp_path, "print(1)")
    assert not stale(path, {"one": [dict(output_type="stream", name="stdout", text="1\n")]})
    assert "+2" in stale(path, {"one": [dict(output_type="stream", name="stdout", text="2\n")]})


def test_a_cell_that_prints_nothing_any_more_loses_its_output(tmp_path):
    from run_notebooks import execute

    path = notebook_that_printed_1(tmp_path, "a = 1")
    assert execute(path) == {"one": []}


def test_outputs_were_made_by_the_code_of_today():
    from run_notebooks import out_of_date

    assert not (old := out_of_date()), f"run `make notebooks`: {', '.join(old)}"


def test_a_stamp_passes_over_comments_docstrings_and_blank_lines():
    from run_notebooks import executed_code

    assert (
        executed_code(
            'def f(x):\n    """Été # no."""  # yes\n    y = f"{x} # kept"   # gone\n\n    return y\n'
        )
        == 'def f(x):\n    y = f"{x} # kept"\n    return y'
    )
    assert (
        executed_code('class A:\n    """One\n    two."""\n    b = """kept"""\n')
        == 'class A:\n    b = """kept"""'
    )


@pytest.mark.slow
def test_changed_code_puts_outputs_out_of_date(tmp_path, monkeypatch):
    import run_notebooks

    for part in ("act", "nbs", "docs"):
        shutil.copytree(REPO / part, tmp_path / part, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    monkeypatch.setattr(run_notebooks, "REPO", tmp_path)
    monkeypatch.setattr(run_notebooks, "STAMPS", tmp_path / "docs" / "outputs.json")
    before, losses = set(run_notebooks.out_of_date()), tmp_path / "act" / "losses.py"
    losses.write_text("# a remark\n" + losses.read_text(encoding="utf-8"), encoding="utf-8")
    assert set(run_notebooks.out_of_date()) == before
    losses.write_text(losses.read_text(encoding="utf-8") + "\nCHANGED = 1\n", encoding="utf-8")
    changed = set(run_notebooks.out_of_date())
    assert {"nbs/api/09_tuning.ipynb", "nbs/guides/first_steps.ipynb", "nbs/index.ipynb"} <= changed and (
        "nbs/api/02_audio.ipynb" in changed
    ) == ("nbs/api/02_audio.ipynb" in before)


# --- the guides ---------------------------------------------------------------------------------------------

# More than ten seconds of computing. Nearly all pages of the library run in every test run, see
# test_notebooks.
LONG = (
    "full_costs",
    "multi_label",
    "read_the_geometry",
    "classify_your_own",
    "does_it_help",
    "index",
    "add_a_backbone",
    "scale_out",
    "your_own_audio",
    "hear_the_embedding",
)


@pytest.mark.parametrize(
    "guide",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else [])
        for p in [*GUIDES, REPO / "nbs" / "index.ipynb"]
    ],
)
def test_guide_runs(guide, monkeypatch):
    from run_notebooks import execute

    monkeypatch.setenv("IN_TEST", "1")
    started = time.process_time()
    execute(guide)
    assert time.process_time() - started < 120  # both cores busy for a minute


def test_every_guide_is_named_by_the_front_page_of_the_site():
    from pages import contents

    listed = "\n".join(contents())
    assert GUIDES and all(f"guides/{g.stem}" in listed for g in GUIDES)


# --- the docstrings -----------------------------------------------------------------------------------------


def public_names():
    """(full name, object) of every exported function and class, and of the public methods of the classes."""
    from pages import exported_modules

    for _, module, _ in exported_modules():
        if module == "act.cli":
            continue  # its docstrings are the terminal's help
        space = vars(importlib.import_module(module))
        for name in space["__all__"]:
            if not inspect.isclass(space[name]) and not inspect.isfunction(space[name]):
                continue
            yield f"{module}.{name}", space[name]
            if inspect.isclass(space[name]):
                yield from _public_methods(f"{module}.{name}", space[name])


def _public_methods(name, cls):
    for method, member in vars(cls).items():
        if not method.startswith("_") and inspect.isfunction(member) and not _inherited_doc(cls, method):
            yield f"{name}.{method}", member


def _inherited_doc(cls, method):
    return any(
        inspect.getdoc(vars(base)[method])
        for base in cls.__mro__[1:]
        if method in vars(base) and inspect.isfunction(vars(base)[method])
    )


def _sections(doc):
    parts = re.split(r"^(\w[\w ]+)\n-{3,}\n", doc, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def _documented_parameters(section):
    """{name: type and description} of a NumPy section."""
    entries = re.split(r"^(?=\S)", section, flags=re.M)
    return {
        name.strip(" *"): entry
        for entry in entries
        if entry.strip()
        for name in entry.split("\n")[0].split(" : ")[0].split(",")
    }


def _raises(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def docstring_problems(name, member):
    """What a reader of this docstring would miss."""
    doc = inspect.getdoc(member) or ""
    if not doc or (inspect.isclass(member) and member.__doc__ is None):
        return [f"{name}: no docstring"]
    sections, found = _sections(doc), []
    documented = _documented_parameters(sections.get("Parameters", ""))
    signature = (
        []
        if inspect.isclass(member)
        else [p for p in inspect.signature(member).parameters if p not in ("self", "cls")]
    )
    if not inspect.isclass(member) and len(signature) > 2 and not documented and "(" not in doc:
        found.append("more than two parameters and no section on them")
    found += [f"parameter {p} is not described" for p in signature if documented and p not in documented]
    found += [f"no such parameter: {p}" for p in documented if signature and p not in signature]
    found += [
        f"{p}: an array without its shape"
        for p, text in documented.items()
        if re.search(r" : (Long|Bool)?(Tensor|ndarray|array)\b", text.split("\n")[0]) and "(" not in text
    ]
    found += [
        f"{p}: no unit"
        for p, text in documented.items()
        if p in ("rate", "sample_rate") and not re.search(r"\bHz\b|per minute|learning rate", text)
    ]
    if (
        not inspect.isclass(member)
        and documented
        and "Returns" not in sections
        and "Yields" not in sections
        and _returns(member)
    ):
        found.append("no section Returns")
    if not inspect.isclass(member) and documented and _raises(member) and "Raises" not in sections:
        found.append("raises, and does not say so")
    return [f"{name}: {problem}" for problem in found]


def _returns(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree))


def test_every_public_name_is_documented():
    problems = [p for name, member in public_names() for p in docstring_problems(name, member)]
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems)


def test_docstring_problems_are_found():
    def bad(z, labels, rate, k):
        """Nothing.

        Parameters
        ----------
        z : Tensor
            Embeddings.
        sample_rate : int
            How fast.
        j : int
            Not there.
        """
        raise ValueError("never said")

    found = "\n".join(docstring_problems("bad", bad))
    for problem in (
        "labels is not described",
        "no such parameter: j",
        "z: an array without its shape",
        "rate: no unit",
        "raises",
    ):
        assert problem in found, problem


# --- in a browser -------------------------------------------------------------------------------------------

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --autoplay-policy=no-user-gesture-required --window-size=1400,1100"
).split()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless chromium, or a skip that says what is missing."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="the site is not clicked through: pip install selenium"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("the site is not clicked through: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_script_timeout(30)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="session")
def address(site):
    """Where the site is served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def until(condition, seconds=20):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def complaints(browser, home):
    """Console errors since the last call, and requests that went neither to `home` nor to the server of these
    tests."""
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    sent = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    urls = [
        a["request"]["url"] for a in asked if not a["documentURL"].startswith("chrome")
    ]  # the browser's own start page is not ours
    return errors + [
        f"request to {u[:120]}"
        for u in urls
        if not u.startswith((home, "http://127.0.0.1", "data:", "blob:", "about:", "chrome:"))
    ]


MAIN_PAGES = "index.html", "paper/table_2_single_label.html", "guides/hear_the_embedding.html"


@pytest.mark.browser
@pytest.mark.parametrize(
    "named",
    [pytest.param(MAIN_PAGES, id="main pages"), pytest.param(None, id="every page", marks=pytest.mark.slow)],
)
def test_pages_fit_a_phone_load_their_images_and_ask_no_other_host(browser, address, site, pages, named):
    complaints(browser, address)
    be_window(browser, 390, "light")
    broken = []
    chosen = [site / name for name in named] if named else [p for p in pages if "_modules" not in p.parts]
    for path in sorted(chosen):
        browser.get(f"{address}/{path.relative_to(site).as_posix()}")
        lost = browser.execute_async_script("""const done = arguments[0], images = [...document.images];
            images.forEach(image => { image.loading = "eager"; });
            Promise.allSettled(images.map(image => image.decode())).then(() => done(images.filter(i => !i.naturalWidth).map(i => i.src)));""")
        broken += [f"{path.name}: image {src[:100]}" for src in lost]
        broken += [f"{path.name}: scrolls sideways: {part}" for part in scrolls_sideways(browser)]
        broken += [f"{path.name}: {c}" for c in complaints(browser, address)]
    be_usual(browser)
    assert not broken, "\n".join(broken)


@pytest.mark.browser
def test_search_finds_jaccard(browser, address):
    browser.get(f"{address}/search.html?q=jaccard")
    results = lambda: browser.execute_script(
        "return [...document.querySelectorAll('#search-results li')].map(e => e.textContent)"
    )  # noqa: E731
    until(lambda: any("act.losses" in r or "Losses" in r for r in results()))  # they come one by one
    assert not complaints(browser, address)


@pytest.mark.browser
def test_formulas_render(browser, address):
    browser.get(f"{address}/api/08_losses.html")
    count = lambda selector: browser.execute_script(
        "return document.querySelectorAll(arguments[0]).length", selector
    )  # noqa: E731
    assert count(".math") > 20
    until(lambda: count(".math mjx-container svg") >= count(".math"))
    assert count("mjx-merror, [data-mjx-error]") == 0


@pytest.mark.browser
def test_dark_mode_changes_the_background(browser, address):
    browser.get(f"{address}/index.html")
    colours = set()
    for theme in ("light", "dark"):
        browser.execute_script("document.body.dataset.theme = arguments[0]", theme)
        colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    assert browser.find_elements("css selector", "button.theme-toggle")


# --- clicking through, in wide and narrow windows, light and dark -------------------------------------------

WINDOWS = [(width, theme) for width in (1440, 390) for theme in ("light", "dark")]


def named(window):
    return f"{window[0]}-{window[1]}"


def be_window(browser, width, theme):
    """Make the window so many pixels wide, a phone's if narrow, on a system of that theme."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600),
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )


def be_usual(browser):
    """Undo `be_window`."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def window(browser, address, request):
    """The home page in such a window, as who comes for the first time sees it."""
    be_window(browser, *request.param)
    browser.get(f"{address}/index.html")
    browser.execute_script("localStorage.clear()")
    complaints(browser, address)
    browser.refresh()
    yield browser
    browser.execute_script("localStorage.clear()")
    be_usual(browser)


def heading(browser):
    return shown(browser, "document.querySelector('h1')?.firstChild.textContent ?? ''")


def click(browser, element):
    """Click what a reader sees, after the drawer that holds it has slid in."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    inside = "const b = arguments[0].getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth"
    until(lambda: element.is_displayed() and browser.execute_script(inside, element))
    element.click()


def open_contents(browser):
    """Show the contents and the search, which a narrow window folds away."""
    menu = browser.find_element("css selector", ".mobile-header label.nav-overlay-icon")
    if menu.is_displayed():
        menu.click()


def follow(browser, title):
    """Go to a page by its name in the contents."""
    open_contents(browser)
    click(browser, browser.find_element("xpath", f"//div[@class='sidebar-tree']//a[.='{title}']"))
    until(lambda: heading(browser) == title)


def is_dark(browser):
    """Whether the page's background is darker than grey."""
    colour = shown(browser, "getComputedStyle(document.body).backgroundColor")
    return max(int(part) for part in re.findall(r"\d+", colour)[:3]) < 128


def press_theme(browser):
    """Press the button for the theme: the first press shows the other one."""
    click(
        browser,
        next(b for b in browser.find_elements("css selector", "button.theme-toggle") if b.is_displayed()),
    )


def scrolls_sideways(browser):
    """What scrolls sideways and is no table, code or formula: the page itself, or a part of it."""
    return browser.execute_script("""const found = [], may = ".table-wrapper, .math-wrapper, .cell_output, pre";
        const page = document.documentElement;
        if (page.scrollWidth > page.clientWidth) found.push(`the page, ${page.scrollWidth} px in ${page.clientWidth}`);
        for (const part of document.querySelectorAll("article, article *")) {
            const moves = ["auto", "scroll"].includes(getComputedStyle(part).overflowX);
            if (moves && part.scrollWidth > part.clientWidth + 1 && !part.matches(may)) found.push(part.outerHTML.slice(0, 100));
        }
        return found;""")


TABLE, EXPLORER = "Table 2. Single-label tasks", "Hear the embedding"


@pytest.mark.browser
@pytest.mark.parametrize("window", WINDOWS, ids=named, indirect=True)
def test_a_reader_clicks_through(window, address, request):
    theme = request.node.callspec.params["window"][1]
    home = heading(window)
    assert is_dark(window) == (theme == "dark")
    assert not scrolls_sideways(window)
    for title in ("First steps", TABLE, EXPLORER):
        follow(window, title)
        assert not scrolls_sideways(window), title
    frame = "document.querySelector('iframe.explorer').contentDocument"
    until(lambda: shown(window, f"{frame}.querySelectorAll('.after circle').length"))
    for title in (TABLE, "First steps", home):
        window.back()
        until(lambda: heading(window) == title)  # noqa: B023
    press_theme(window)
    assert is_dark(window) == (theme == "light")
    follow(window, TABLE)
    assert is_dark(window) == (theme == "light")  # the choice goes along
    assert not complaints(window, address)


@pytest.mark.browser
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[-1]], ids=named, indirect=True)
def test_a_reader_searches(window, address):
    open_contents(window)
    field = window.find_element("css selector", "input.sidebar-search")
    click(window, field)
    field.send_keys("jaccard\n")
    found = until(lambda: window.find_elements("css selector", "#search-results li a"))
    assert not scrolls_sideways(window)
    target = found[0].get_attribute("href")
    click(window, found[0])
    until(lambda: urldefrag(window.current_url)[0] == urldefrag(target.split("?")[0])[0])
    assert "jaccard" in shown(window, "document.querySelector('article').textContent.toLowerCase()")
    assert not complaints(window, address)


# --- for readers who do not see, or do not point ------------------------------------------------------------


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core, from a wheel, or a skip that says what is missing."""
    package = pytest.importorskip(
        "axe_core_python", reason="accessibility is not tested: pip install axe-core-python"
    )
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


GRAVE = ("serious", "critical")
ALSO_GRAVE = (
    "scrollable-region-focusable",
    "label-content-name-mismatch",
)  # serious in later versions of axe-core


def violations(browser, axe):
    """What axe-core finds grave in a page, one line for each part of it."""
    browser.execute_script(axe)
    found = browser.execute_async_script(
        "axe.run(document, {resultTypes: ['violations']}).then(r => arguments[0](r.violations))"
    )
    grave = [rule for rule in found if rule["impact"] in GRAVE or rule["id"] in ALSO_GRAVE]
    return [f"{rule['id']}: {node['html'][:150]}" for rule in grave for node in rule["nodes"]]


@pytest.mark.browser
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[-1]], ids=named, indirect=True)
def test_axe_finds_nothing_serious_on_the_site(window, address, axe):
    found = {}
    for page in ("index", "paper/table_2_single_label", "guides/hear_the_embedding"):
        window.get(f"{address}/{page}.html")
        found[page] = violations(window, axe)
    assert not any(found.values()), "\n".join(
        f"{page}: {line}" for page, lines in found.items() for line in lines
    )


# --- the explorer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def explorer():
    """Four words before and after something that helps, without tuning anything."""
    from act.explorer import Explorer, explorer_data
    from act.tasks import load_task

    task = load_task("words-4")
    task = task.subset(task.indices("test"))
    draw, means = np.random.default_rng(0), np.eye(4, 16)[task.labels]
    states = {
        name: share * means + 0.3 * draw.standard_normal(means.shape)
        for name, share in (("frozen", 0.2), ("epoch 1", 0.6), ("epoch 2", 2.0))
    }
    return Explorer(data=explorer_data(task, states))


@pytest.fixture
def maps(browser, explorer, tmp_path):
    """The saved page, opened from the disk."""
    path = explorer.save(tmp_path / "maps.html")
    complaints(browser, "http")
    browser.get(path.as_uri())
    until(lambda: browser.find_elements("css selector", ".after circle"))
    return browser


def shown(browser, script):
    return browser.execute_script(f"return {script}")


@pytest.mark.browser
def test_explorer_plays_a_clip_and_shows_its_spectrogram(maps):
    dot = maps.find_elements("css selector", ".before circle")[5]
    maps.execute_script(
        "window.heard = 0; document.querySelector('audio').addEventListener('timeupdate', e => { heard = Math.max(heard, e.target.currentTime); })"
    )
    maps.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", dot)
    until(lambda: shown(maps, "heard") > 0.05)
    assert shown(maps, "document.querySelector('audio').error") is None
    until(lambda: shown(maps, "document.querySelector('.detail img').naturalHeight") == 64)
    assert shown(maps, "document.querySelector('.detail .name').textContent").startswith(
        dot.get_attribute("aria-label")
    )
    assert not complaints(maps, "file:")


@pytest.mark.browser
def test_explorer_hover_shows_class_and_neighbours_in_both_maps(maps, explorer):
    from selenium.webdriver import ActionChains

    dots = maps.find_elements("css selector", ".after circle")
    ActionChains(maps).move_to_element(dots[9]).perform()
    until(lambda: shown(maps, "document.querySelectorAll('.after line').length") == 5)
    assert shown(maps, "document.querySelectorAll('.before line').length") == 5
    chosen = int(shown(maps, "document.querySelector('.after circle.chosen').dataset.clip"))
    names = [
        explorer.data["classes"][explorer.data["labels"][j][0]]
        for j in explorer.data["neighbours"][2][chosen]
    ]
    assert (
        shown(
            maps,
            "[...document.querySelectorAll('.near')[1].querySelectorAll('span')].map(e => e.textContent)",
        )
        == names
    )


@pytest.mark.browser
def test_explorer_filters_by_class(maps):
    away = "document.querySelectorAll('.after circle.away').length"
    maps.find_elements("css selector", ".classes button")[2].click()
    assert shown(maps, away) == 24
    maps.find_elements("css selector", ".classes button")[0].click()
    assert shown(maps, away) == 0


@pytest.mark.browser
def test_explorer_slider_moves_the_right_map_only(maps, explorer):
    places = "[...document.querySelectorAll('.{} circle')].map(e => e.style.transform)"
    before, after = (shown(maps, places.format(side)) for side in ("before", "after"))
    maps.find_element("css selector", "input[type=range]").send_keys("\ue012")  # arrow left
    assert shown(maps, "document.querySelector('output').textContent") == "epoch 1"
    assert shown(maps, places.format("before")) == before and shown(maps, places.format("after")) != after
    assert f"{100 * explorer.data['purity'][1]:.1f} %" in shown(
        maps, "document.querySelector('.after figcaption').textContent"
    )


@pytest.mark.browser
def test_explorer_works_by_keyboard_alone(maps):
    from selenium.webdriver.common.keys import Keys

    name = "document.querySelector('.detail .name').textContent"
    for _ in range(12):
        maps.switch_to.active_element.send_keys(Keys.TAB)
        if shown(maps, "document.activeElement.getAttribute('role')") == "listbox":
            break
    else:
        pytest.fail("Tab does not reach a map")
    visited = set()
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_UP):
        maps.switch_to.active_element.send_keys(key)
        visited.add(shown(maps, "document.querySelector('circle.chosen').dataset.clip"))
    assert len(visited) > 2
    assert shown(maps, "document.activeElement.getAttribute('aria-activedescendant')") == shown(
        maps, "document.querySelector('.before circle.chosen').id"
    )
    maps.switch_to.active_element.send_keys(Keys.ENTER)
    until(lambda: shown(maps, "document.querySelector('audio').currentTime") > 0)
    assert shown(maps, name)


def centre_of(browser, dot):
    """The middle of a clip in the window, in pixels."""
    return browser.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]", dot
    )


def pointer(browser, kind, dot, away=0):
    """A pointer event at so many pixels from a clip, as the map sees it."""
    x, y = centre_of(browser, dot)
    script = "arguments[0].closest('svg').dispatchEvent(new PointerEvent(arguments[1], {bubbles: true, clientX: arguments[2], clientY: arguments[3]}))"
    browser.execute_script(script, dot, kind, x + away, y)


@pytest.mark.browser
def test_explorer_shows_the_clip_that_it_plays(maps):
    clip = "document.querySelector('audio').dataset.clip"
    dots = maps.find_elements("css selector", ".before circle")
    pointer(maps, "click", dots[5])
    pinned = shown(maps, clip)
    other = next(d for d in dots if d.get_attribute("data-clip") != pinned)
    pointer(maps, "pointermove", other)
    pointer(maps, "pointerleave", other)
    assert shown(maps, clip) == pinned  # the panel stays with its sound
    assert shown(maps, "document.querySelector('circle.pinned').dataset.clip") == pinned
    label = maps.find_element("css selector", f".before circle[data-clip='{pinned}']").get_attribute(
        "aria-label"
    )
    assert shown(maps, "document.querySelector('.detail .name').textContent").startswith(label)
    chip = next(c for c in maps.find_elements("css selector", ".classes button")[1:] if c.text != label)
    chip.click()  # a filter that hides it
    assert not maps.find_element("css selector", ".detail img").is_displayed()
    assert not maps.find_element("css selector", "audio").is_displayed()


@pytest.mark.browser
def test_explorer_takes_the_nearest_clip(maps):
    dot = maps.find_elements("css selector", ".before circle")[3]
    pointer(maps, "pointermove", dot, away=2)
    assert maps.find_elements("css selector", ".before circle.chosen")
    pointer(maps, "pointermove", dot, away=5000)
    assert not maps.find_elements("css selector", ".before circle.chosen")


@pytest.mark.browser
def test_explorer_in_a_frame_follows_the_outer_theme_and_its_own_height(browser, explorer, tmp_path):
    import html

    page = explorer.save(tmp_path / "maps.html").read_text(encoding="utf-8")
    frame = explorer._repr_mimebundle_()[0]["text/html"]
    assert html.escape(page) in frame
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><body data-theme='light'>{frame}</body>", encoding="utf-8")
    browser.get(outer.as_uri())
    inner = "document.querySelector('iframe').contentDocument"
    until(lambda: shown(browser, f"{inner}.querySelectorAll('.after circle').length"))
    colours = []
    for theme in ("light", "dark"):
        browser.execute_script("document.body.dataset.theme = arguments[0]", theme)
        colours.append(
            until(
                lambda: shown(
                    browser,
                    f"{inner}.documentElement.style.colorScheme === '{theme}' && "  # noqa: B023
                    f"getComputedStyle({inner}.documentElement).backgroundColor",
                )
            )
        )
    assert colours[0] != colours[1]
    slack = "document.querySelector('iframe').clientHeight - document.querySelector('iframe').contentDocument.documentElement.offsetHeight"
    until(lambda: 0 <= shown(browser, slack) <= 8)


@pytest.mark.browser
@pytest.mark.parametrize("width, theme", [WINDOWS[0], WINDOWS[-1]])
def test_axe_finds_nothing_serious_in_the_explorer(maps, axe, width, theme):
    try:
        be_window(maps, width, theme)
        pointer(maps, "click", maps.find_elements("css selector", ".before circle")[5])  # the panel is full
        found = violations(maps, axe)
    finally:
        be_usual(maps)
    assert not found, "\n".join(found)


WIDTHS = (390, 768, 1024, 1180, 1366, 1440, 1920)


@pytest.mark.browser
def test_no_page_is_wider_than_the_window(browser, address):
    too_wide = []
    try:
        for page in (*MAIN_PAGES, "api/08_losses.html"):
            browser.get(f"{address}/{page}")
            for width in WIDTHS:
                be_window(browser, width, "light")
                cut = browser.execute_script("""const w = document.documentElement.clientWidth;
                    const parts = [...document.querySelectorAll('article, .toc-drawer')].filter(e => getComputedStyle(e).position !== 'fixed');
                    return parts.map(e => e.getBoundingClientRect().right - w).filter(x => x > 1);""")
                too_wide += [f"{page} at {width}: {over:.0f} px" for over in cut]
    finally:
        be_usual(browser)
    assert not too_wide, "\n".join(too_wide)


# --- in JupyterLab ------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a notebook that shows the explorer of four words, without tuning
    anything."""
    import nbformat

    cells = [
        "import numpy as np\nfrom act.tasks import load_task\nfrom act.explorer import Explorer, explorer_data",
        "task = load_task('words-4')\ntask = task.subset(task.indices('test'))\nmeans, draw = np.eye(4, 16)[task.labels], np.random.default_rng(0)\n"
        "Explorer(data=explorer_data(task, dict(frozen=draw.standard_normal(means.shape), tuned=means + .1 * draw.standard_normal(means.shape))))",
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=kernel),
        tmp_path / "maps.ipynb",
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")} | {
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log) as server,
    ):
        try:
            until(lambda: _listens(port) or server.poll() is not None, 60)
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            yield f"http://127.0.0.1:{port}/lab/tree/maps.ipynb"
        finally:
            server.terminate()


def _listens(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.browser
def test_explorer_is_a_widget_in_jupyterlab(browser, lab):
    complaints(browser, lab)
    browser.get(lab)
    session = "[...window.jupyterapp?.shell.widgets('main') ?? []][0]?.sessionContext"
    until(
        lambda: shown(browser, f"{session}?.isReady && {session}.session?.kernel?.status === 'idle'"), 60
    )  # else it asks for a kernel
    browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: browser.find_elements("css selector", ".jp-OutputArea .act-explorer .after circle"), 120)
    assert not browser.find_elements(
        "css selector", ".jp-OutputArea iframe.explorer"
    )  # the widget, not the static page
    assert_player_follows_clicks(browser)
    assert not [c for c in complaints(browser, lab) if not c.startswith("request to")]


def assert_player_follows_clicks(browser):
    """Filter by the second class, click one of its clips, and hear it."""
    dots, away = (
        browser.find_elements("css selector", ".before circle"),
        "document.querySelectorAll('.after circle.away').length",
    )
    chip = browser.find_elements("css selector", ".classes button")[2]
    chip.click()
    assert (
        shown(browser, away) == len(dots) - sum(d.get_attribute("aria-label") == chip.text for d in dots) > 0
    )
    assert not browser.find_element("css selector", ".detail img").is_displayed()
    dot = next(d for d in dots if "away" not in (d.get_attribute("class") or ""))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    dot.click()
    until(lambda: shown(browser, "document.querySelector('.act-explorer audio').currentTime > 0"))
    assert all(
        browser.find_element("css selector", f".detail {part}").is_displayed() for part in ("audio", "img")
    )
    assert shown(browser, "document.querySelector('.detail .name').textContent").startswith(chip.text)
