"""``python -m hf_attn_plugin.cli`` is ``hf-attn``."""

import sys

from hf_attn_plugin.cli.main import main

sys.exit(main())
