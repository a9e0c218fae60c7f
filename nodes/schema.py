"""The words of the graph: custom socket types and the filter that lets one schema serve every supported ComfyUI.

Rules for all nodes: ids and widget order never change after a release (saved graphs store widget values by position);
new inputs are optional and go to the end; inputs and outputs of one node never share an id.
"""

import inspect

from comfy_api.latest import io

Defocus = io.Custom("BOKEH_DEFOCUS")
Lens = io.Custom("BOKEH_LENS")
FocusTrack = io.Custom("BOKEH_FOCUS_TRACK")

# Core's geometry packets; named here because ComfyUI older than 0.22 / 0.25 has no node that makes them.
Depth = [io.Image, io.Mask, io.Custom("MOGE_GEOMETRY"), io.Custom("DA3_GEOMETRY")]


def known(make, *args, **keywords):
    """make(*args, **keywords) without the keywords this ComfyUI does not know, such as search_aliases or advanced."""
    accepted = inspect.signature(make).parameters
    return make(*args, **{name: value for name, value in keywords.items() if name in accepted})


def number(id, default, low, high, step, tooltip, **more):
    """A FLOAT widget; typed values keep three decimals whatever the step of its arrows."""
    return known(io.Float.Input, id, default=default, min=low, max=high, step=step, round=0.001, tooltip=tooltip, **more)


def whole(id, default, low, high, step, tooltip, **more):
    """An INT widget."""
    return known(io.Int.Input, id, default=default, min=low, max=high, step=step, tooltip=tooltip, **more)


def choice(id, options, tooltip):
    """A COMBO widget; the first option is the default."""
    return known(io.Combo.Input, id, options=list(options), default=next(iter(options)), tooltip=tooltip)


def switch(id, on, off, tooltip, **more):
    """A BOOLEAN widget, off by default, with words for both states."""
    return known(io.Boolean.Input, id, default=False, label_on=on, label_off=off, tooltip=tooltip, **more)
