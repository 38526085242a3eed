"""Settings of the whole suite."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "gka", deadline=None, max_examples=15, derandomize=True, print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("gka")
