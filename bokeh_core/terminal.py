"""What the command says while it works: notes and a progress bar, both on stderr."""

import sys
from contextlib import contextmanager


def say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


@contextmanager
def bar(total: int, what: str, unit: str = "frame"):
    """Yield progress(done, total), drawn on stderr when that is a terminal."""
    from tqdm import tqdm

    shape = "{desc}: {percentage:3.0f} % of {total_fmt} {unit}s |{bar}| {elapsed}, {remaining} left"
    with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=None, bar_format=shape) as drawn:

        def progress(done: float, total: int) -> None:  # parts of a frame count too
            drawn.total = total
            drawn.update(done - drawn.n)

        yield progress
