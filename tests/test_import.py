"""What `import llama32` loads in a fresh process."""

import subprocess
import sys

import pytest

# Slow to import, and needed for downloads, compiled layers and grammars only.
LAZY = "huggingface_hub", "torch._dynamo", "llguidance"


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    code = "import sys, llama32; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return set(process.stdout.decode().split())


@pytest.mark.parametrize("module", LAZY)
def test_import_loads_no_module_that_few_callers_need(module, loaded):
    assert "llama32.engine.engine" in loaded
    assert module not in loaded
