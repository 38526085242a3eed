"""The distribution: what `python -m build` makes, and that it trains where nothing of the repository is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from tiny_run import SETTINGS, command, write_texts

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*arguments: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of sdist and wheel, the wheel made from the sdist; built from a copy, which has no old build."""
    place = tmp_path_factory.mktemp("build")
    for folder in ("gka", "experiments", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, place)
    run(sys.executable, "-m", "build", "--no-isolation", place, cwd=place)
    return place / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; other libraries are this one's, without its editable install."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    # A path in a .pth file is not searched for further .pth files, such as the editable install's.
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (own / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return place


def test_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (_sdist,) = dist.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gka").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {*modules, "gka/py.typed"}
    assert sum(name.endswith(".dist-info/licenses/LICENSE") for name in names) == 1


def test_trains_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "bin" / "python", "-c", "import gka; print(gka.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    texts = write_texts(tmp_path / "texts")
    settings = {**SETTINGS, "max_steps": 3, "save_every": 3, "eval_every": 3}
    run(installed / "bin" / "gka", *command("train", output="run", data=[texts], **settings), cwd=tmp_path)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
