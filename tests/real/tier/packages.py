"""A repository and one tiny package for each registry, as files that `registries/server.mjs` serves."""

import base64
import hashlib
import io
import json
import os
import pathlib
import subprocess
import tarfile
import zipfile

GIT_HOST = "git.example.test"
PYPI_HOST = "pypi.example.test"
NPM_HOST = "npm.example.test"
CRATES_HOST = "crates.example.test"
HOSTS = [GIT_HOST, PYPI_HOST, NPM_HOST, CRATES_HOST]

NAME = "teapot"
VERSION = "1.0.0"
# Published where a denial is of what a page names, not of the page.
FORBIDDEN = "secretive"
# Whoever has this has the package.
CONTENT = "short and stout"


def publish(root: pathlib.Path) -> None:
    """Lays out what each host serves, in a directory named after it."""
    for host, publish_there in zip(HOSTS, [repository, python_package, npm_package, crate], strict=True):
        (root / host).mkdir(parents=True)
        publish_there(root / host)


def repository(root: pathlib.Path) -> None:
    """`orders.git`, that accepts pushes."""
    work = root / "work"
    bare = root / "orders.git"
    git = ["git", "-c", "user.name=tier", "-c", "user.email=tier@example.test", "-c", "init.defaultBranch=main"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1"}
    run = lambda *arguments: subprocess.run([*git, *arguments], check=True, capture_output=True, env=environment)
    run("init", work)
    (work / NAME).write_text(CONTENT)
    run("-C", work, "add", NAME)
    run("-C", work, "commit", "--message", "Add it")
    run("clone", "--bare", work, bare)
    run("-C", bare, "config", "http.receivepack", "true")


def python_package(root: pathlib.Path) -> None:
    """A simple index (PEP 503), and a wheel (PEP 427) for each of its pages."""
    for name in (NAME, FORBIDDEN):
        python_wheel(root, name)


def python_wheel(root: pathlib.Path, name: str) -> None:
    information = f"{name}-{VERSION}.dist-info"
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"content = {CONTENT!r}\n")
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nGenerator: tier\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "".join(f"{file},,\n" for file in [*archive.namelist(), f"{information}/RECORD"]))
    file = f"{name}-{VERSION}-py3-none-any.whl"
    write(root / "files" / file, wheel.getvalue())
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    page = f'<!DOCTYPE html><a href="/files/{file}#sha256={digest}">{file}</a>\n'
    write(root / "simple" / name / "index.html", page.encode())


def npm_package(root: pathlib.Path) -> None:
    """A package's document and its tarball."""
    manifest = {"name": NAME, "version": VERSION, "main": "index.js"}
    archive = tarball("package", {"package.json": json.dumps(manifest), "index.js": f"module.exports = '{CONTENT}';\n"})
    file = f"{NAME}-{VERSION}.tgz"
    write(root / "files" / file, archive)
    integrity = f"sha512-{base64.b64encode(hashlib.sha512(archive).digest()).decode()}"
    distribution = {"tarball": f"https://{NPM_HOST}/files/{file}", "integrity": integrity}
    document = {"name": NAME, "dist-tags": {"latest": VERSION}, "versions": {VERSION: {**manifest, "dist": distribution}}}
    write(root / NAME, json.dumps(document).encode())


def crate(root: pathlib.Path) -> None:
    """A sparse index and a crate."""
    manifest = f'[package]\nname = "{NAME}"\nversion = "{VERSION}"\nedition = "2021"\n'
    archive = tarball(f"{NAME}-{VERSION}", {"Cargo.toml": manifest, "src/lib.rs": f"// {CONTENT}\n"})
    write(root / "crates" / f"{NAME}-{VERSION}.crate", archive)
    write(root / "index" / "config.json", json.dumps({"dl": f"https://{CRATES_HOST}/crates/{{crate}}-{{version}}.crate"}).encode())
    entry = {"name": NAME, "vers": VERSION, "deps": [], "cksum": hashlib.sha256(archive).hexdigest(), "features": {}, "yanked": False}
    write(root / "index" / NAME[:2] / NAME[2:4] / NAME, json.dumps(entry).encode())


def tarball(folder: str, files: dict[str, str]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return written.getvalue()


def write(file: pathlib.Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
