"""The GPU kernel of the scatter against its definition: run by Triton's interpreter on the CPU, and compiled for GPUs without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = """
import torch
from bokeh_core.optics.lens import Aperture
import importlib
s = importlib.import_module("bokeh_core.render.scatter")  # the package has a function of that name
from bokeh_core.render.scatter_triton import level

generator = torch.Generator().manual_seed(0)
def noise(*shape):
    return torch.rand(*shape, generator=generator)

for aperture, h, w, channels in ((None, 18, 21, 3), (Aperture(spherical=0.7), 9, 16, 1), (Aperture(blades=5, rotation=13), 16, 9, 2)):
    values, radius = noise(channels, h, w), (noise(h, w) - 0.4) * 4
    radius[:, :5], radius[3, 3] = 0, 3.7
    radius[radius.abs() < 2 * s.SHARP] = 0  # the torch form takes whole tiles for sharp, the kernel each pixel
    slope = noise(2, h, w) - 0.5
    blocks = torch.zeros(-(-h // s.BLOCK), -(-w // s.BLOCK), dtype=torch.bool)
    blocks[0, 0] = True
    lit = torch.zeros(h, w, dtype=torch.bool)
    lit[5, 7] = True

    def every():
        return (
            s.scatter(values, radius, slope, aperture=aperture),
            s.scatter(values[:1], 4.6 * radius, aperture=aperture),  # the pyramid
            s.scatter_moments(values, radius, blocks, aperture=aperture),
            s.scatter(values, radius, aperture=aperture, lit=lit),
        )

    flat, s.FLAT = s.FLAT, 0  # the torch form leaves small slopes out
    expected = every()
    none, s._fused = s._fused, lambda device: level
    found = every()
    s._fused, s.FLAT = none, flat
    # Asked for; the tiles of the two differ in how much more they do.
    asked = [None, None, blocks, s.reached(lit, radius)]
    for n, (a, b, where) in enumerate(zip(found, expected, asked)):
        if where is not None:
            where = where.repeat_interleave(s.BLOCK, 0).repeat_interleave(s.BLOCK, 1)[:h, :w]
            a, b = a * where, b * where
        error = float((a - b).abs().max())
        assert bool(b.any()) and error < 3e-6 * max(1, float(b.abs().max())), (aperture, n, error)
    dense = s.scatter_dense(values, radius, slope, aperture)
    assert float((found[0] - dense).abs().max()) < 3e-6 * max(1, float(dense.abs().max()))
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bokeh_core.render.scatter_triton import SIDE, collect

kinds = {"index": "*i32", "reaches": "*i32", "h": "i32", "w": "i32", "offsets": "i32", "entries": "i32", "first": "i32"}
for variant in ((5, 8, True, True, False), (4, 4, True, False, True), (1, 1, False, True, False)):
    constants = dict(zip(("C", "PLANES", "EVEN", "TILTED", "MOMENTS"), variant), SIDE=SIDE)
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in collect.arg_names}
    compiled = triton.compile(ASTSource(collect, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert "st.global" in compiled.asm["ptx"]
print("compiled")
"""


def run(code, **environment):
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_interpreted_kernel_is_the_scatter():
    assert "equal" in run(INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_a_gpu(tmp_path):
    assert "compiled" in run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
