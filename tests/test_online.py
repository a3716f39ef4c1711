"""`act doctor --online`: servers that have moved, lost, changed or hidden a file, or are slow."""

import http.server
import json
import sys
import threading
import time

import pytest
import yaml

from act import cli, manifest
from act.manifest import check_online, load_manifest

SIZE = 1000
STATUSES = {"moved.zip": 301, "elsewhere.zip": 302, "branch.zip": 302, "missing.zip": 404, "busy.zip": 503}
TARGETS = {"moved.zip": "/right.zip", "elsewhere.zip": "/other.zip", "branch.zip": "/branch"}
STATES = {
    "right.zip": "ok",
    "branch.zip": "ok",  # as GitHub serves archives of a revision
    "named.zip": "ok",  # the last address has another name, but the file is saved under the right one
    "headless.zip": "ok",  # HEAD is refused
    "hidden.zip": "ok",  # HEAD does not tell the size
    "round.zip": "ok",  # 1000 bytes, about 1050
    "moved.zip": "moved",
    "elsewhere.zip": "moved",
    "missing.zip": "gone",
    "page.zip": "gone",
    "resized.zip": "resized",
    "busy.zip": "refused",
    "chunked.zip": "no size",
    "slow.zip": "slow",
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        name = self.path.lstrip("/")
        if name == "headless.zip":
            return self.send_error(405)
        if name == "slow.zip":
            time.sleep(1)
        self.head(name, hidden=name in ("hidden.zip", "chunked.zip"))

    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.got.append((name, self.headers["Range"]))
        if name.startswith("release"):
            return self.release(name)
        if name == "chunked.zip":
            self.head(name, hidden=True)
            return self.wfile.write(b"1\r\na\r\n0\r\n\r\n")
        if name in ("headless.zip", "hidden.zip"):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-0/{SIZE}")
            self.send_header("Content-Length", "1")
            self.end_headers()
            return self.wfile.write(b"a")
        self.head(name)

    def head(self, name, hidden=False):
        status = STATUSES.get(name, 302 if name == "named.zip" else 200)
        self.send_response(status)
        target = TARGETS.get(name, "/123" if name == "named.zip" else None)
        if target:
            self.send_header("Location", target)
        if name == "123":
            self.send_header("Content-Disposition", 'attachment; filename="named.zip"')
        if name == "page.zip":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        length = SIZE + 1 if name == "resized.zip" else SIZE
        if status != 200:
            length = 0
        if hidden:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def release(self, name):
        """The page of a release on PyPI."""
        page = json.dumps(dict(urls=[dict(filename="a-1.whl", size=SIZE)])).encode()
        self.send_response(404 if name == "release-lost-1" else 200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.got = True, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a manifest with an entry for each list of archives."""
    monkeypatch.setenv("ACT_MANIFEST", str(tmp_path / "data_manifest.yaml"))
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACT_MIRROR", raising=False)

    def write(**archives):
        common = dict(kind="data", title="A toy", licence="CC0-1.0", content=dict(match=["*"]))
        entries = {
            name: dict(
                common, profiles=["full" if name == "large" else "small"], sources=[dict(archives=listed)]
            )
            for name, listed in archives.items()
        }
        (tmp_path / "data_manifest.yaml").write_text(yaml.safe_dump(entries))

    return write


def archive(server, name, **size):
    return dict(file=name, urls=[f"{server.address}/{name}"], **(size or dict(bytes=SIZE)))


def everything(server):
    return [archive(server, name, **(dict(about=1050) if name == "round.zip" else {})) for name in STATES]


def test_every_state(server, written):
    written(toy=[*everything(server), dict(file="mirror-only.tar", urls=[])])
    started = time.monotonic()
    checks = check_online(timeout=0.3)
    assert {check.file: check.state for check in checks} == STATES and time.monotonic() - started < 4
    details = {check.file: check.detail for check in checks}
    assert details["moved.zip"] == f"to {server.address}/right.zip" and "404" in details["missing.zip"]
    assert details["resized.zip"] == "1001 bytes, the manifest says 1000" and "0.3 s" in details["slow.zip"]
    assert ("hidden.zip", "bytes=0-0") in server.got and not any(
        name == "right.zip" for name, _ in server.got
    )


def test_no_connection_is_named(written):
    written(
        toy=[
            dict(file="a.zip", urls=["http://127.0.0.1:9/a.zip"]),
            dict(file="b.zip", urls=["http://a..b/b.zip"]),
        ]
    )
    assert [check.state for check in check_online(timeout=1)] == ["unreachable", "unreachable"]


def test_wheels_are_looked_up_by_release(server, written, monkeypatch):
    monkeypatch.setattr(manifest, "PYPI", server.address + "/release-{name}-{version}")
    written(
        toy=[
            dict(file="a-1.whl", pip="a==1", bytes=SIZE),
            dict(file="a-2.whl", pip="a==1"),
            dict(file="lost-1.whl", pip="lost==1"),
            dict(file="a-1.whl", pip="a==1", bytes=7),
        ]
    )
    assert [(c.file, c.state) for c in check_online(timeout=5)] == [
        ("a-1.whl", "ok"),
        ("a-2.whl", "gone"),
        ("lost-1.whl", "gone"),
        ("a-1.whl", "resized"),
    ]


def test_every_address_of_the_manifest_is_asked(monkeypatch):
    monkeypatch.delenv("ACT_MANIFEST", raising=False)
    monkeypatch.setattr(manifest, "_state_online", lambda archive, url, timeout: ("ok", ""))
    asked = {check.url for check in check_online()}
    archives = [
        a for entry in load_manifest().values() for source in entry["sources"] for a in source["archives"]
    ]
    assert {url for a in archives for url in a.get("urls", [])} <= asked
    assert all("==" in a["pip"] for a in archives if "pip" in a) and all(
        url.startswith("http") for url in asked
    )


@pytest.fixture
def doctor(monkeypatch, capsys):
    """A function that runs `act doctor` without the checks of this machine."""
    monkeypatch.setattr(cli, "DOCTOR_CHECKS", {"runs": lambda: (True, "2", "")})

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["act", "doctor", *words])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run


def test_the_doctor_lists_what_is_wrong(server, written, doctor):
    written(
        small=[archive(server, "right.zip"), archive(server, "moved.zip")],
        large=[archive(server, "missing.zip")],
    )
    status, out, err = doctor("--online", "--profile", "small")
    assert status == 0 and not err
    assert out.splitlines() == [
        "ok   runs: 2",
        f"note small, {server.address}/moved.zip: moved: to {server.address}/right.zip",
        "ok   addresses: 2 asked: 1 moved, 1 ok",
    ]
    status, out, err = doctor("--online")
    assert (
        status == 1
        and f"FAIL large, {server.address}/missing.zip: gone" in out
        and "1 of 3 addresses fail" in err
    )
    assert err.count("\n") == 1
    rows = json.loads(doctor("--online", "--json")[1])
    assert [row["ok"] for row in rows] == [True, False, True, False]  # in the order of the manifest
    assert (
        doctor("--profile", "small")[2]
        == "act: --profile chooses the addresses that --online asks: give both\n"
    )
    assert "choose quick, small, full" in doctor("--online", "--profile", "all")[2]
