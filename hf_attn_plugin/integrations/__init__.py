"""The only code that touches transformers' registries, configs and caches."""
