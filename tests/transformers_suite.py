"""transformers' own tests, made importable beside ours (both folders are called `tests`).

Their files lie in the package `transformers_tests` (see `fetch_transformers_tests.py`). Three modules that they
import are not in the source distribution; they get stand-ins here, which bring no tests along.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from fetch_transformers_tests import PACKAGE, folder, is_complete


class ExportTesterMixin:
    """Stands in for the tests of torch.export, which are not in the source distribution."""


class GenerationTesterMixin:
    """Stands in for the tests of generate, which are not in the source distribution."""


CONFIG_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["GKAForCausalLM"],
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
}

_STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_KWARGS},
}


def load(module: str) -> ModuleType:
    """Import a file of transformers' tests, such as "test_modeling_common".

    Raises:
        FileNotFoundError: they have not been fetched.
    """
    if not is_complete():
        raise FileNotFoundError(
            f"{folder() / PACKAGE} is missing or incomplete: `make test` fetches the tests of transformers, "
            "or run `python tests/fetch_transformers_tests.py`"
        )
    if PACKAGE not in sys.modules:
        sys.path.append(str(folder()))
        importlib.import_module(PACKAGE)
        for name, contents in _STAND_INS.items():
            parent = ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
            parent.__path__ = []
            child = ModuleType(f"{PACKAGE}.{name}")
            vars(child).update(contents)
            sys.modules[parent.__name__], sys.modules[child.__name__] = parent, child
    return importlib.import_module(f"{PACKAGE}.{module}")
