"""Diffusion samplers: each a published system that renders bokeh from released weights."""
