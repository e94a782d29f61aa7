"""Attention kernels in Triton. Importing a module of kernels imports Triton."""
