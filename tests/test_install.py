"""What an installation without extras needs: little to import, and nothing that an extra brings."""

import ast
import configparser
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

EXTRAS_ONLY = (
    "IPython",
    "anywidget",
    "av",
    "espeakng_loader",
    "ipywidgets",
    "jupyterlab",
    "nbconvert",
    "nbformat",
    "onnx",
    "papermill",
    "peft",
    "statsmodels",
    "tensorboard",
    "traitlets",
    "transformers",
)
HEAVY = ("lightning_fabric", "matplotlib", "pandas", "scipy", "sklearn", "soundfile", "soxr", "torchaudio")
BASE = (
    "manifest audio tasks words encoders backbones embeddings losses tuning metrics solver probes geometry classifier "
    "study cli"
).split()
BLOCKER = '''
import sys
class Without:
    """A finder that does not find some libraries, as if they were not installed."""
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *_: ())(*context)
        return [d for d in found if (d.metadata["Name"] or "").replace("-", "_") not in {blocked!r}]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
'''


def run(code, **environment):
    """The output of a script in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def imports(path):
    """The top packages that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def settings(repo):
    config = configparser.ConfigParser(delimiters=["="])
    config.read(repo / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_a_loss_needs_torch_and_little_else():
    code = (
        "import sys; from act.losses import contrastive_loss\n"
        f"print([name for name in {HEAVY + EXTRAS_ONLY!r} if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


RECORDINGS = """
import numpy as np, soundfile
for name, hz in dict(cat=900, dog=300).items():
    (folder / "data" / name).mkdir(parents=True)
    for i in range(8):
        soundfile.write(folder / "data" / name / f"{i}.wav", .3 * np.sin(2 * np.pi * (hz + 5 * i) * np.arange(8000) / 8000), 8000)
"""
COMMANDS = """
import sys
from act import cli
tune = ["tune", folder / "data", "--backbone", "random:speech-embedding", "--passes", "1", "--out", folder / "tuned"]
for words in (tune, ["predict", folder / "tuned", folder / "data" / "cat" / "0.wav"], ["doctor"]):
    sys.argv = ["act", *map(str, words)]
    try: cli.main()
    except SystemExit as end: print(words[0], "ended with", end.code or 0)
"""


def test_the_library_works_without_extras():
    """Losses, tuning, probes and the command line import, and an encoder embeds, where no extra is
    installed."""
    code = BLOCKER.format(blocked=EXTRAS_ONLY) + (
        f"import importlib\nfor name in {BASE!r}: importlib.import_module('act.' + name)\n"
        "import torch\nfrom act.backbones import load_backbone\nfrom act.tasks import list_tasks\n"
        "print(load_backbone('log-mel')(torch.randn(2, 16000)).shape, len(list_tasks()) > 5)"
    )
    assert run(code).strip() == "torch.Size([2, 128]) True"


COMPARING = """
from act.comparison import compare_on
from act.tasks import folder_task
if __name__ == "__main__":
    compare_on(folder_task(folder / "data"), "random:speech-embedding", ["frozen", "vanilla"], seeds=1, passes=1,
               out=folder / "report", jobs=1, progress=False)
    print(sorted(path.suffix for path in (folder / "report").iterdir()))
"""


def test_a_comparison_works_without_extras(tmp_path):
    """Its report, too, with figures and tables."""
    code = (
        BLOCKER.format(blocked=EXTRAS_ONLY)
        + f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n{RECORDINGS}{COMPARING}"
    )
    output = run(code, ACT_CACHE=str(tmp_path / "cache"))
    for suffix in (".html", ".md", ".svg", ".tex"):
        assert repr(suffix) in output
    assert (tmp_path / "report" / "model" / "README.md").is_file()


@pytest.mark.slow
def test_the_command_line_works_without_extras(tmp_path):
    """Tuning on a folder, prediction with the result, and the doctor."""
    code = (
        BLOCKER.format(blocked=EXTRAS_ONLY)
        + f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n{RECORDINGS}{COMMANDS}"
    )
    output = run(code, ACT_CACHE=str(tmp_path / "cache"))
    for command in ("tune", "predict"):
        assert f"{command} ended with 0\n" in output, output
    assert "manifest: " in output


@pytest.mark.parametrize(
    "code, extra",
    [
        ("from act.tasks import load_task; load_task('words-4').clips[0].load(16000)", "words"),
        (
            "from act.backbones import load_backbone; load_backbone('random:speech-embedding'); load_backbone('speech-embedding')",
            "wheels",
        ),
        ("import act.explorer", "explorer"),
        (
            "import sys; from act import cli; sys.argv = ['act', 'reproduce', '--only', 'figure_1']; cli.app(standalone_mode=False)",
            "paper",
        ),
    ],
)
def test_a_missing_extra_is_named(code, extra, tmp_path):
    wrapped = (
        BLOCKER.format(blocked=EXTRAS_ONLY)
        + f"""
from act.core import ActError
try: exec({code!r})
except ActError as error: print(error)
"""
    )
    message = run(wrapped, ACT_CACHE=str(tmp_path)).strip().splitlines()[-1]
    assert f"pip install 'act[{extra}]'" in message


def test_every_requirement_has_a_lower_bound(repo):
    bare = []
    for key, value in settings(repo).items():
        if not key.endswith("requirements"):
            continue
        for requirement in map(Requirement, value.split()):
            if not any(specifier.operator in (">=", "==", "~=") for specifier in requirement.specifier):
                bare.append(f"{key}: {requirement}")
    assert set(bare) <= {
        "dev_requirements: fastcore<2",
        "dev_requirements: execnb<0.2",
        "dev_requirements: ghapi<2",
    }


def test_every_import_is_declared(repo):
    """Whatever act imports is a requirement of the base or of an extra."""
    declared = {
        re.sub(r"\W", "", Requirement(r).name.lower())
        for key, value in settings(repo).items()
        if key.endswith("requirements") and not key.startswith(("dev", "docs"))
        for r in value.split()
    }
    called = dict(
        PIL="pillow",
        yaml="pyyaml",
        sklearn="scikitlearn",
        espeakng_loader="espeakngloader",
        av="av",
        jupyter_client="jupyterlab",
        IPython="ipython",
    )
    imported = set()
    for path in (repo / "act").glob("*.py"):
        imported |= imports(path)
    imported -= set(sys.stdlib_module_names) | {
        "act",
        "umap",
    }  # umap: a choice of the user, named in the error
    undeclared = {
        name for name in imported if called.get(name, name).lower().replace("_", "") not in declared
    }
    assert not undeclared


@pytest.mark.parametrize("broken", ["exit 1", "exec /bin/false"])
def test_make_chooses_a_tested_python(repo, tmp_path, broken):
    """`python3` may be a version that is not tested."""
    fake = tmp_path / "python3"
    fake.write_text(f"#!/bin/sh\n{broken}\n")
    fake.chmod(0o755)
    good = tmp_path / "python3.12"
    good.symlink_to(sys.executable)
    path = f"{tmp_path}:{os.environ['PATH']}"
    plan = subprocess.run(
        ["make", "-n", "-B", "env"],
        cwd=repo,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert "python3.12 -m venv .venv" in plan.stdout
    refused = subprocess.run(
        ["make", "-B", "env", f"PYTHON={fake}"], cwd=repo, capture_output=True, text=True
    )
    assert (
        refused.returncode
        and "act needs Python 3.10 to 3.14" in refused.stderr
        and "Setting up" not in refused.stdout
    )


@pytest.mark.slow
def test_the_wheel_works_alone(repo, tmp_path):
    """A wheel out of the source distribution, in a new environment without extras: the loss, the command
    line."""
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(repo), str(source)], check=True)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("act-*.tar.gz")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(sdist),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("act-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"act/data_manifest.yaml", "act/references.bib", "act/style.html"} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"act"}
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", str(repo / "constraints.txt"), str(wheel)],
        check=True,
        cwd=tmp_path,
    )
    code = (
        "import torch; from act.losses import contrastive_loss; z = torch.randn(8, 4)\n"
        "print(contrastive_loss(z, torch.arange(8) % 2).isfinite().item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "ACT_CACHE": str(tmp_path / "cache")
    }
    checked = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert checked.stdout.strip() == "True", checked.stderr
    for command in (["--version"], ["--help"], ["backbones"], ["tasks"], ["doctor"]):
        done = subprocess.run(
            [python.with_name("act"), *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
    missing = subprocess.run([python, "-c", "import papermill"], capture_output=True)
    assert missing.returncode and not Path(environment["ACT_CACHE"], "waves").exists()


def test_what_pages_include_is_packaged(repo):
    """Templates and the file of styles that they include are data of the package, so that a wheel has
    them."""
    names = {path.name for path in (repo / "act").glob("*.html")}
    included = {
        name
        for page in names
        for name in re.findall(r'{% include "(.+?)" %}', (repo / "act" / page).read_text())
    }
    assert included == {"style.html"} and included <= names
    assert '"*.html"' in (repo / "setup.py").read_text()
