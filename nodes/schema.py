"""The words of the graph: custom socket types and the filter that lets one schema serve every supported ComfyUI.

Rules for all nodes: ids and widget order never change after a release (saved graphs store widget values by position);
new inputs are optional and go to the end; inputs and outputs of one node never share an id.
"""

import inspect

from comfy_api.latest import io

Defocus = io.Custom("BOKEH_DEFOCUS")
Lens = io.Custom("BOKEH_LENS")
FocusTrack = io.Custom("BOKEH_FOCUS_TRACK")
AnyToBokehModel = io.Custom("BOKEH_ANY_TO_BOKEH")
Stack = io.Custom("BOKEH_STACK")
SalientModel = io.Custom("BOKEH_SALIENT_MODEL")
DepthModel = io.Custom("BOKEH_DEPTH_MODEL")
MagicBokehModel = io.Custom("BOKEH_MAGICBOKEH_MODEL")
BokehDiffModel = io.Custom("BOKEH_BOKEHDIFF_MODEL")
# {"depth": [B,H,W] metres or "disparity": [B,H,W] larger = nearer, "metric": bool, "image": [B,H,W,3], perhaps "intrinsics": [B,3,3] px}
Geometry = io.Custom("BOKEH_GEOMETRY")

# Core's geometry packets; named here because ComfyUI older than 0.22 / 0.25 has no node that makes them.
Depth = [io.Image, io.Mask, Geometry, io.Custom("MOGE_GEOMETRY"), io.Custom("DA3_GEOMETRY")]


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


def choice(id, options, tooltip, **more):
    """A COMBO widget; the first option is the default."""
    return known(io.Combo.Input, id, options=list(options), default=next(iter(options)), tooltip=tooltip, **more)


FIDELITY = ("best", "as published")  # the names every published system's choices go by


def seed(tooltip):
    """An INT widget for noise that only some choices draw; not called `seed`, which would get a second widget from the front end."""
    return whole("random_seed", 0, 0, 2**32 - 1, 1, tooltip, optional=True, advanced=True)


def files(id, names, tooltip):
    """A COMBO widget of local files. Optional, because with an empty list no value is sent: the node then says what to do.

    The node's validate_inputs must name it, so that a file that is not there reaches the node's own message too.
    """
    return known(io.Combo.Input, id, options=list(names), default=next(iter(names), None), optional=True, tooltip=tooltip)


def switch(id, on, off, tooltip, **more):
    """A BOOLEAN widget, off by default, with words for both states."""
    return known(io.Boolean.Input, id, default=False, label_on=on, label_off=off, tooltip=tooltip, **more)
