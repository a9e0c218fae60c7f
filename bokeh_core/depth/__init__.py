"""Depth from pictures and from bokeh stacks, by networks on layers of our own and by measuring blur.

Start at `checkpoint` and `estimate`; stacks: `refine` (DSFA on Depth Anything V2 and UniDepthV2) and `sweep`, which needs no network.
"""
