"""The far end of `scale`: stills of 16 Mpx and 8K, radii to 256 px, 10 000 frames. Half an hour; only run when named."""

from . import scale


def measure(quick, device):
    yield from scale.curves(((4992, 3328), (7680, 4320)), (256,), (10_000,), device)
