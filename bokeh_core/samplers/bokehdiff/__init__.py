"""BokehDiff (ICCV 2025): lens blur in one step of SDXL, with physics-inspired self-attention."""
