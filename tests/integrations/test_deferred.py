"""Registration waits for transformers, and is not lost by look-ups or failures."""

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


CHECK = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers import PreTrainedConfig
print("flash" in functions.valid_keys(), hasattr(PreTrainedConfig, "attn_params"))
"""


def test_looking_modules_up_does_not_lose_the_registration() -> None:
    probe = """
import hf_attn_plugin, importlib.util
for name in ("modeling_utils", "configuration_utils"):
    assert importlib.util.find_spec(f"transformers.{name}")
"""
    assert run(probe + CHECK) == "True True"


def test_a_failed_import_does_not_lose_the_registration() -> None:
    fail = """
import sys, hf_attn_plugin
class Fail:
    def find_spec(self, name, path, target=None):
        if name == "transformers.masking_utils":
            raise ImportError("as if interrupted")
blocker = Fail()
sys.meta_path.insert(0, blocker)
try:
    import transformers.modeling_utils
except Exception:
    pass
else:
    raise AssertionError("the import was to fail")
sys.meta_path.remove(blocker)
"""
    assert run(fail + CHECK) == "True True"


def test_nothing_is_left_in_the_import_system() -> None:
    code = """
import hf_attn_plugin, sys, transformers.modeling_utils as m
names = [type(finder).__module__ for finder in sys.meta_path]
print(any("hf_attn_plugin" in name for name in names), type(m.__spec__.loader).__name__)
"""
    assert run(code) == "False SourceFileLoader"
