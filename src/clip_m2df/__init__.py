"""CLIP-M²DF: few-shot action recognition by multi-view distillation based on multi-modal fusion."""

__version__ = "0.1.0"
