"""How the physical renderer grows: with pixels, with the radius, and with the frames of a clip (up to 8K and 10 000 frames: `large`).

Every point runs in a process of its own, whose resident peak is what a user's machine must hold. Frames come and go one at a time.
"""

import json
import os
import subprocess
import sys
import time

import torch

from .measure import Curve, begin_peak, resident_peak

SIZES, RADII, FRAMES = ((1248, 832), (2496, 1664)), (4, 64), (100, 500)


def still(width, height, radius, device):
    from bokeh_core.render import render

    from .physical import photo

    render(*photo(64, 64, 8, device))
    given = photo(width, height, radius, device)
    begin_peak()
    before = resident_peak()
    start, cpu = time.perf_counter(), time.process_time()
    render(*given)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    pixels = width * height
    found = {"Mpx": round(pixels / 1e6, 2), "radii to": radius, "CPU s": round(cpu, 2), "wall s": round(wall, 2)}
    if device == "cuda":
        return found | {"peak MiB": round(torch.cuda.max_memory_allocated() / 2**20)}
    peak = resident_peak()
    found |= {"CPU s/Mpx": round(cpu / pixels * 1e6, 2), "peak MiB": round(peak)}
    return found | {"planes beside the input": round((peak - before) * 2**20 / pixels / 4)}


def clip(frames, device):
    """Tiny frames, made when they are asked for."""
    from bokeh_core.optics.lens import Lens
    from bokeh_core.video.streaming import render_frames
    from tests.stand_ins.endless import Clip, Depth

    source, depth = Clip(frames, (16, 24)), Depth(frames, (16, 24))
    begin_peak()
    start = time.process_time()
    focus, k = torch.full((frames,), 0.5), torch.full((frames,), 4.0)
    done = sum(len(pictures) for pictures in render_frames(source, depth, focus, k, Lens(), linear=False))
    assert done == frames
    spent = time.process_time() - start
    return {"frames": frames, "CPU s": round(spent, 1), "CPU ms/frame": round(1000 * spent / frames, 2), "peak MiB": round(resident_peak())}


def in_fresh_process(what, *arguments):
    # glibc would keep freed planes, and hide the peak; tiles may stay, they would be slow otherwise.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
    code = f"import json; from benchmarks.scale import *; print(json.dumps({what}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def curves(sizes, radii, frames, device):
    if sizes:
        yield Curve("pixels, radii to 16 px at every size", [in_fresh_process("still", *size, 16, device) for size in sizes])
    if radii:
        yield Curve("radii", [in_fresh_process("still", *SIZES[0], radius, device) for radius in radii])
    if frames:
        yield Curve("frames of 24 x 16 px", [in_fresh_process("clip", n, device) for n in frames])


def measure(quick, device):
    yield from curves(SIZES[:1], RADII[:2], FRAMES[:1], device) if quick else curves(SIZES, RADII, FRAMES, device)
