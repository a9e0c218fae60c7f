"""Judging pictures: scores against truth (image), clips (video), points of light (lights), and where to look (edges)."""
