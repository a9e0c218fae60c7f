"""Any-to-Bokeh: one-step video bokeh on a video diffusion network, from the released weights, in bounded memory.

Published as "Any-to-Bokeh: One-Step Video Bokeh via Multi-Plane Image Guided Diffusion". SPEC below means the facts recorded from it.

preparation.py    pictures, disparity, focus and K as the networks want them
mpi.py            multi-plane-image regions and masks
fuser.py          what the paper adds to the spatial transformers; E(K)
network.py        the UNet
vae.py            encoder and decoder with skip connections between them
image_encoder.py  the CLIP embedding of every frame
checkpoint.py     the released files
sampler.py        a clip in, a clip out
"""
