"""Fetch the tests of the installed transformers from its source distribution; its wheel has none.

    python tests/fetch_transformers_tests.py

They go to .cache/transformers-<version>/transformers_tests, where `transformers_suite.py` finds them. Nothing is
done if they are there already. Needs pip and setuptools.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
PACKAGE = "transformers_tests"
NEEDED = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")


def folder() -> Path:
    """The folder for the tests of the installed transformers; the package lies in it."""
    return CACHE / f"transformers-{importlib.metadata.version('transformers')}"


def is_complete() -> bool:
    """Whether the tests are there."""
    return all((folder() / PACKAGE / name).is_file() for name in (*NEEDED, "__init__.py"))


def download(version: str, target: Path) -> Path:
    """Download the source distribution with pip, which also checks its hash.

    Raises:
        SystemExit: pip fails; its message is shown.
    """
    wish = f"transformers=={version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only_source = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
    done = subprocess.run([*pip, *only_source, "--dest", str(target), wish])
    archives = sorted(target.glob("transformers-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise SystemExit(f"cannot download the source distribution of {wish} (pip exit code {done.returncode})")
    return archives[0]


def extract(archive: Path, version: str, target: Path) -> None:
    """Write the Python files of the archive's tests/ folder, and no other, as a package into target.

    Raises:
        SystemExit: the archive does not hold the tests of this version.
    """
    prefix = f"transformers-{version}/tests/"
    target.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = member.name.removeprefix(prefix)
            if not (member.isfile() and member.name.startswith(prefix) and name.endswith(".py")) or "/" in name:
                continue
            file = tar.extractfile(member)
            assert file is not None  # it is a regular file
            (target / name).write_bytes(file.read())
    missing = [name for name in NEEDED if not (target / name).is_file()]
    if missing:
        raise SystemExit(f"{archive.name} lacks {', '.join(prefix + name for name in missing)}")
    (target / "__init__.py").touch()


def main() -> None:
    """Fetch them if they are not there."""
    if is_complete():
        return
    version = importlib.metadata.version("transformers")
    print(f"Fetching the tests of transformers {version} ...", flush=True)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = download(version, Path(scratch))
        package = Path(scratch) / PACKAGE
        extract(archive, version, package)
        if folder().exists():  # an earlier try that did not end
            shutil.rmtree(folder())
        folder().mkdir()
        package.replace(folder() / PACKAGE)


if __name__ == "__main__":
    main()
