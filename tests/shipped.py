"""The model that ships with the runtime, for tests that need some whole contract and no PyTorch."""

from __future__ import annotations

from pathlib import Path

import tinygiant.runtime
from tinygiant.runtime.bundle import Bundle

# Not the default path, which the environment may change.
NANO = Bundle.open(
    Path(tinygiant.runtime.__file__).parent / "bundles" / "nano", verify=False
).config
PROMPT, FORM = NANO.prompt, NANO.answer
