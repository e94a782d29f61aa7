"""What is published with a model: its card and its figures."""

from hf_attn_plugin.hub.card import CardContent, CardFigure, Measurement, write_model_card
from hf_attn_plugin.hub.figures import QualityPoint, needle_heatmaps, quality_against_reads

__all__ = [
    "CardContent",
    "CardFigure",
    "Measurement",
    "QualityPoint",
    "needle_heatmaps",
    "quality_against_reads",
    "write_model_card",
]
