"""Attention in plain PyTorch, on any device."""
