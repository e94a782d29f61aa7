"""Speed and memory of attention, measured beside its peers: what ``hf-attn bench`` runs.

Modules import each other relatively: in a checkout this folder is ``eval/speed``, in an installed
wheel it lies inside the package.
"""
