"""Depth from pictures: Depth Anything V2 and Video Depth Anything, on layers of our own. Start at `checkpoint` and `estimate`."""
