"""BokehDepth stage 1: a stack of pictures with growing blur from one sharp picture, by FLUX.1-Kontext and a small adapter.

recipe       numbers around the network: K lists, prompts, sizes, noise, schedule
adapter      the adapter file and its network: the embedding of K, one constant vector a block, low-rank corrections of q and k
hooks        the adapter on a FLUX network in its original layout (as ComfyUI runs it), whatever format its weights have
checkpoint   FLUX.1-Kontext's networks from the files on disk, for use without ComfyUI
transformer  the adapter on diffusers' FluxTransformer2DModel, written as published
sampler      picture and K list in, stack out, with diffusers' networks
colour       the colour transfer from the reference to the frames
"""
