"""Recorded reference numbers of the published systems, and the runner that holds our code to them.

    python -m tests.parity DIR

A case is NAME.json (shapes, constants, tolerances, notes) with NAME.safetensors (inputs, weights, expected outputs) beside it where it
has tensors. The start of NAME picks the check. To add a unit, write a module in this folder; it is found by itself:

    from .runner import Case, unit, worst

    @unit("pisa_")
    def check(case: Case) -> tuple[float, float]:
        out = our_function(case.tensors["in.x"], case.meta["k"])
        error = float((out - case.tensors["out.y"]).abs().max())
        return error, case.meta["tolerance"]

A check returns (error, tolerance) and passes when error <= tolerance; `worst` picks from several pairs the one nearest to failing.
Every shape, constant and weight must come from the case: unseen cases of the same unit are run too. Where two systems share a prefix,
one check serves both and tells them apart by what the case holds. Two modules can not claim the same prefix; the longest match wins.

`cases` holds a few small cases (300 KB each, 6 MB in all, at most) that test_cases.py runs everywhere.
"""
