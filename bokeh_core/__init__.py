"""Depth of field for pictures and video: depth -> defocus -> render. Works without ComfyUI."""

__version__ = "0.1.0"
