"""Inputs that cannot be honoured, and what is said to each: `python -m tests.bad_inputs`."""
