"""What `.ci/run` does before the tests: it fetches a browser where there is none, and never stops for want of
one."""

import os
import shutil
import subprocess

import pytest

TOOLS = ("bash", "dirname", "env", "id", "tail", "timeout", "cat", "chmod", "mktemp", "rm", "sleep")
FETCHES = 'case "$*" in *install*) for f in chromium chromedriver; do echo "#!/bin/sh" > "$BIN/$f"; chmod +x "$BIN/$f"; done;; esac'
APT_GET = {
    "works": FETCHES,
    "fails": 'echo "Reading lists"; echo "E: Unable to locate package chromium" >&2; exit 100',
    "hangs": "exec sleep 60",
    "is missing": None,
}


def program(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def run_ci(repo, bin, apt_get):
    """`.ci/run` where only a few tools, a stand-in `make` and perhaps a stand-in `apt-get` exist."""
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"there is no {tool} on this machine")
        (bin / tool).symlink_to(found)
    program(bin / "sudo", 'shift; exec "$@"')
    program(bin / "make", 'echo "make $*"')
    if apt_get is not None:
        program(bin / "apt-get", f'echo "$*" >> "$BIN/asked"\n{apt_get}')
    environment = {
        "PATH": str(bin),
        "BIN": str(bin),
        "HOME": os.environ.get("HOME", "/"),
        "BROWSER_SECONDS": "1",
    }
    return subprocess.run(
        [bin / "bash", repo / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("state", APT_GET)
def test_ci_fetches_a_browser_or_says_why_not(state, repo, tmp_path):
    ran = run_ci(repo, tmp_path, APT_GET[state])
    assert ran.returncode == 0 and ran.stdout == "make env\nmake test\n", (
        ran.stderr
    )  # the tests run in any case
    reason = {
        "works": "",
        "fails": "Unable to locate package",
        "hangs": "apt-get was stopped",
        "is missing": "no apt-get",
    }
    assert reason[state] in ran.stderr
    assert len(ran.stderr.splitlines()) == (state != "works")


def test_ci_asks_for_nothing_where_a_browser_is(repo, tmp_path):
    for name in ("chromium", "chromedriver"):
        program(tmp_path / name, "")
    assert run_ci(repo, tmp_path, APT_GET["fails"]).stderr == ""
    assert not (tmp_path / "asked").exists()
