"""``python -m hf_attn_plugin.lm_eval run …``, also under ``accelerate launch -m``."""

import sys

from hf_attn_plugin.cli.eval import run_and_report

if __name__ == "__main__":
    sys.exit(run_and_report(sys.argv[1:]))
