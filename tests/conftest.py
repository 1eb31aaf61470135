"""What every test runs under: checked shapes and types, two threads, reproducible property tests."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

# Before the first import of the package: each annotation of `undiffuse` is then checked at each call.
install_import_hook("undiffuse", "beartype.beartype")

import torch  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)

settings.register_profile("undiffuse", deadline=None, derandomize=True)
settings.load_profile("undiffuse")
