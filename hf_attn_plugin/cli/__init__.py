"""The `hf-attn` command."""
