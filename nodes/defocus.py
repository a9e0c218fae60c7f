"""The nodes of the camera: which lens, where it is focused, and what that does to a picture with depth."""

from dataclasses import replace

from comfy_api.latest import io

from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics import defocus as optics
from ..bokeh_core.optics import focus as focusing
from ..bokeh_core.optics.lens import STRENGTH_WIDTH, Aperture
from ..bokeh_core.optics.lens import Lens as CoreLens
from ..bokeh_core.optics.overlay import small_views
from . import host, inputs
from .schema import Defocus, Depth, FocusTrack, Lens, choice, known, number, switch, whole

STRENGTH, REAL_LENS = "strength", "real lens"

# Long and short side in mm.
SENSORS = {
    "full frame": (36.0, 24.0),
    "APS-C": (23.5, 15.6),
    "Canon APS-C": (22.3, 14.9),
    "Micro Four Thirds": (17.3, 13.0),
    "medium format 44 x 33": (43.8, 32.9),
    "Super 35 film": (24.9, 18.7),
    "1 inch": (13.2, 8.8),
    "phone 1/1.3 inch": (9.8, 7.3),
    "custom": None,
}

NEAR_BRIGHT, FAR_BRIGHT, METRES, DIOPTRES = "near is bright", "far is bright", "metres", "1 / metres"


def _strength(tooltip):
    return number("strength", 24.0, 0.0, 500.0, 0.5, tooltip)


class BokehLens(io.ComfyNode):
    """A lens by strength or by its real data."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLens",
            display_name="Choose Lens",
            category="bokeh/optics",
            description="A lens for Set Focus and Blur: a plain blur strength, or a real one with f-number, focal length and sensor, "
            "and the look of its bokeh: blades, cat's eye, soap bubbles, colour fringes, bright lights. "
            "A real lens needs depth in metres (MoGe, a metric depth model, or a depth file in metres).",
            search_aliases=[
                *("aperture", "f-number", "f-stop", "focal length", "camera", "sensor size", "bokeh", "depth of field"),
                *("blades", "hexagon", "anamorphic", "cat's eye", "swirly bokeh", "soap bubble", "chromatic aberration", "highlights"),
            ],
            inputs=[
                choice(
                    "mode",
                    [STRENGTH, REAL_LENS],
                    "strength: works with every depth map. real lens: uses the numbers below and needs depth in metres.",
                ),
                _strength("Mode 'strength': the blur radius in pixels, for a picture 1024 pixels wide, that the whole depth range makes."),
                number(
                    "f_number", 1.8, 0.5, 64.0, 0.1, "Real lens: the aperture. Small numbers blur more; twice the number, half the blur."
                ),
                number(
                    "focal_length",
                    50.0,
                    1.0,
                    2000.0,
                    1.0,
                    "Real lens: focal length in millimetres, the real one, not the 35 mm equivalent (phones: 6 to 7 mm).",
                ),
                choice("sensor", SENSORS, "Real lens: size of the sensor the picture was taken with. custom: uses sensor_width."),
                switch(
                    "upright",
                    "upright photo",
                    "landscape photo",
                    "Real lens: for a photo taken upright the short side of the sensor lies along the picture's width.",
                ),
                number(
                    "sensor_width", 36.0, 0.5, 500.0, 0.1, "Used by sensor 'custom'. Millimetres of the sensor along the picture's width."
                ),
                number(
                    "focus_distance",
                    0.0,
                    0.0,
                    100000.0,
                    0.1,
                    "Real lens: metres from the camera to the plane of focus, used when focus is 'auto' and neither a focus track "
                    "nor a mask is connected. 0: focus on the subject found in the picture.",
                ),
                *_looks(),
                known(
                    io.Mask.Input,
                    "aperture_picture",
                    optional=True,
                    tooltip="The shape of the aperture as a picture, white lets light through: hearts, stars, dirt on the glass. "
                    "The circle that fits into it is used. Replaces blades and roundness. Load Image (as Mask) reads one from a file.",
                ),
            ],
            outputs=[Lens.Output(display_name="lens", tooltip="Connect to Set Focus and Blur. It replaces that node's strength.")],
        )

    @classmethod
    def execute(
        cls,
        mode,
        strength,
        f_number,
        focal_length,
        sensor,
        upright,
        sensor_width,
        focus_distance,
        highlights=0.0,
        highlight_threshold=0.9,
        blade_rotation=0.0,
        aperture_picture=None,
        **looks,
    ) -> io.NodeOutput:
        if aperture_picture is not None:
            aperture_picture = inputs.mask(aperture_picture, "aperture_picture")
            if len(aperture_picture) != 1:
                raise BokehError(
                    f"The aperture picture has shape {list(aperture_picture.shape)}; expected one picture. Connect a single mask."
                )
            aperture_picture = aperture_picture[0].float()
        aperture = Aperture(rotation=blade_rotation, picture=aperture_picture, **looks)
        shared = {"aperture": aperture, "highlights": highlights, "highlight_threshold": highlight_threshold}
        if mode == STRENGTH:
            return io.NodeOutput(CoreLens(strength=strength, **shared))
        width = sensor_width if SENSORS[sensor] is None else SENSORS[sensor][1 if upright else 0]
        distance = focus_distance or None
        return io.NodeOutput(CoreLens(f_number=f_number, focal_length=focal_length, sensor_width=width, focus_distance=distance, **shared))


def _looks():
    """Widgets of the bokeh's look. All but blade_rotation and the highlights are named as their fields of Aperture."""
    rare = {"optional": True, "advanced": True}
    return [
        whole("blades", 0, 0, 24, 1, "Blades of the aperture: 5 to 9 give the polygons of stopped-down lenses. 0: round.", optional=True),
        number(
            "cats_eye",
            0.0,
            0.0,
            1.0,
            0.05,
            "Bokeh balls narrow to lemons towards the corners, as in fast lenses wide open; they seem to swirl around the middle. "
            "1: a corner keeps about two fifths of its ball.",
            optional=True,
        ),
        number(
            "highlights",
            0.0,
            0.0,
            100.0,
            0.5,
            "Gives clipped lights their power back where they blur, so that lamps become bright balls, not grey ones. "
            "How much brighter than white they were: 0 leaves them, 2 to 10 suits lamps at night. For photos; EXR has its own light.",
            optional=True,
        ),
        number("blade_rotation", 0.0, -360.0, 360.0, 1.0, "Turns the polygon of the blades counter-clockwise, in degrees.", **rare),
        number("roundness", 0.0, 0.0, 1.0, 0.05, "Curves the blades: 0 straight edges, 1 a full circle.", **rare),
        number(
            "anamorphic",
            1.0,
            0.25,
            4.0,
            0.05,
            "Height over width of the bokeh balls. 1: round. 1.33 to 2: the tall ovals of anamorphic film lenses.",
            **rare,
        ),
        number(
            "spherical",
            0.0,
            -1.0,
            1.0,
            0.05,
            "Spherical aberration. Above 0: soap bubbles with a bright rim behind the focus, soft balls in front of it. "
            "Below 0: creamy behind the focus, rims in front.",
            **rare,
        ),
        number("onion", 0.0, 0.0, 1.0, 0.05, "Onion rings inside the bokeh balls, as moulded aspherical glass makes them.", **rare),
        number(
            "chromatic_longitudinal",
            0.0,
            -1.0,
            1.0,
            0.05,
            "Colour fringes of blurred edges that change sides at the focus: above 0 red rims in front of it, blue ones behind. "
            "Below 0: the reverse.",
            **rare,
        ),
        number(
            "chromatic_lateral",
            0.0,
            -1.0,
            1.0,
            0.05,
            "Colour fringes that grow towards the corners, sharp parts included: red is magnified, blue shrunk, by up to half a percent. "
            "Below 0: the reverse.",
            **rare,
        ),
        number(
            "highlight_threshold",
            0.9,
            0.0,
            0.99,
            0.01,
            "Brightness of the picture, 0 to 1, from which highlights counts a light as clipped.",
            **rare,
        ),
    ]


class BokehFocusTrack(io.ComfyNode):
    """Keyframes of the focus."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehFocusTrack",
            display_name="Pull Focus Over Time",
            category="bokeh/optics",
            description="Moves the focus during a clip (rack focus). Over a single photo it makes a clip that ends at the last keyframe.",
            search_aliases=["rack focus", "focus pull", "keyframes", "focus animation", "refocus"],
            inputs=[
                known(
                    io.String.Input,
                    "keyframes",
                    default="0: (0.5, 0.75)\n23: (0.5, 0.4) ease",
                    multiline=True,
                    tooltip="One keyframe a line or parted by commas: frame: where, then how the focus gets there. Frames count from 0. "
                    "Where is a point (x, y) of the picture, 0 to 1 from its left top corner, or a depth such as 0.9 (0 far, 1 near). "
                    "How is linear, ease, ease-in, ease-out or hold.",
                ),
            ],
            outputs=[FocusTrack.Output(display_name="focus track", tooltip="Connect to Set Focus and Blur, with focus on 'auto'.")],
        )

    @classmethod
    def execute(cls, keyframes) -> io.NodeOutput:
        return io.NodeOutput(focusing.FocusTrack.parse(keyframes))


class BokehDefocus(io.ComfyNode):
    """Depth, focus and lens become the defocus that every renderer takes."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehDefocus",
            display_name="Set Focus and Blur",
            category="bokeh/optics",
            description="Puts the focus plane into a picture with depth and says how strongly the rest blurs. "
            "The picture on the node shows it: natural colours are sharp, warm ones lie in front of the focus, cool ones behind.",
            search_aliases=["bokeh", "dof", "depth of field", "lens blur", "defocus", "refocus", "focus", "circle of confusion"],
            has_intermediate_output=True,
            inputs=[
                known(io.Image.Input, "image", tooltip="The sharp photo or the frames of a clip."),
                known(
                    io.MultiType.Input,
                    "depth",
                    Depth,
                    tooltip="Depth of the same picture, any size: a depth map as image or mask, or the geometry of Estimate Depth, MoGe "
                    "or Depth Anything 3. One map for all frames, or one for each.",
                ),
                _strength(
                    "How much blur: the radius in pixels, for a picture 1024 pixels wide, that the whole depth range makes. "
                    "0 leaves the picture untouched. A connected lens replaces this."
                ),
                choice(
                    "focus",
                    ["auto", "point", "mask", "value"],
                    "auto: the connected focus track, else the connected mask, else the lens's focus distance, else the likely "
                    "subject. point: what lies under focus_x, focus_y. mask: the masked subject. value: the depth focus_value.",
                ),
                number("focus_x", 0.5, 0.0, 1.0, 0.001, "Used by focus 'point'. 0 is the left edge of the picture, 1 the right one."),
                number("focus_y", 0.5, 0.0, 1.0, 0.001, "Used by focus 'point'. 0 is the top edge of the picture, 1 the bottom one."),
                number(
                    "focus_value",
                    0.5,
                    -1000.0,
                    1000.0,
                    0.01,
                    "Used by focus 'value'. Depth maps: 0 is the farthest, 1 the nearest. "
                    "Depth in metres and geometry: 1 / metres, so 0.5 is 2 m and 0 infinity.",
                ),
                choice(
                    "depth_values",
                    [NEAR_BRIGHT, FAR_BRIGHT, METRES, DIOPTRES],
                    "What the numbers of a depth image mean. near is bright: as most depth nodes make them. "
                    "metres: distance, as in an EXR from a 3D program. 1 / metres: metric disparity. Geometry says by itself whether it "
                    "is metric; metres overrules it, for models that give metres without saying so.",
                ),
                switch(
                    "follow",
                    "follow the subject",
                    "hold the focus",
                    "Clips only. hold: focus as found in the first frame. follow: found in every frame, then smoothed. "
                    "A mask with one picture per frame is always followed.",
                ),
                known(io.Mask.Input, "mask", optional=True, tooltip="The subject to focus on, one mask or one per frame, any size."),
                known(Lens.Input, "lens", optional=True, tooltip="From Choose Lens. Replaces strength."),
                known(FocusTrack.Input, "focus_track", optional=True, tooltip="From Pull Focus Over Time: keyframes of the focus."),
            ],
            outputs=[
                Defocus.Output(display_name="defocus", tooltip="Depth, focus and blur for a renderer."),
                io.Image.Output(display_name="overlay", tooltip="The picture with its focus zone outlined; near blur warm, far blur cool."),
                io.Mask.Output(display_name="in focus", tooltip="White where the result stays sharp, black where it blurs."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image,
        depth,
        strength,
        focus,
        focus_x,
        focus_y,
        focus_value,
        depth_values,
        follow,
        mask=None,
        lens=None,
        focus_track=None,
    ) -> io.NodeOutput:
        if focus == "auto":
            focus = "track" if focus_track is not None else "mask" if mask is not None else "auto"
        if focus == "mask" and mask is None:
            raise BokehError("The focus is set to 'mask' but no mask is connected; connect one, or set the focus to 'auto' or 'point'.")
        inputs.image(image)
        depth = inputs.depth(depth)
        if mask is not None:
            mask = inputs.mask(mask)
        if focus == "track":
            inputs.require(focus_track, focusing.FocusTrack, "focus_track", "Pull Focus Over Time")
        lens = CoreLens(strength=strength) if lens is None else inputs.require(lens, CoreLens, "lens", "Choose Lens")
        pictures = image[..., :3].movedim(-1, 1)
        disparity, metric = disparity_of(depth, depth_values)
        disparity = _fitted(disparity.to(image.device), pictures)

        if focus == "track":
            if len(pictures) == 1:  # a still becomes a clip
                length = focus_track.keys[-1].frame + 1
                if length > LONGEST:
                    raise BokehError(f"The focus track ends at frame {length - 1}; a still becomes a clip of at most {LONGEST} frames.")
                pictures, disparity = pictures.expand(length, -1, -1, -1), disparity.expand(length, -1, -1)
            planes = focus_track.values(len(pictures), disparity)
        elif focus == "auto" and lens.focus_distance is not None:
            planes = None  # make_defocus takes the lens's own
        else:
            every = slice(None) if follow or (focus == "mask" and len(mask) > 1) else slice(1)
            planes = _planes(focus, disparity[every], pictures[every].float(), focus_x, focus_y, focus_value, mask)
        if planes is not None:
            lens = replace(lens, focus_distance=None)  # the plane found in the picture is where the lens is focused
        defocus = optics.make_defocus(disparity, lens, planes, width=pictures.shape[3], metric=metric)

        overlay = image.new_empty((len(pictures), *pictures.shape[2:], 3))
        in_focus = image.new_empty((len(pictures), *pictures.shape[2:]))
        step = host.progress()
        for i, picture in enumerate(pictures):  # frame by frame: clips are long
            one = defocus.frame(i)
            overlay[i] = one.overlay(picture[None].float())[0].movedim(0, -1)
            in_focus[i] = one.in_focus_mask()[0]
            step(i + 1, len(pictures))
        return io.NodeOutput(defocus, overlay, in_focus, ui={"bokeh_focus": _views(pictures, defocus, cls)})


LONGEST = 10_000  # frames of a clip made from a still; more is a slip of the keyboard
VIEW = 512  # px, the longer side of the pictures for web/focus_picker.js


def _views(pictures, defocus, node):
    """What web/focus_picker.js shows: up to four frames, each with its depth in 16 bit (red and green) and the numbers of its blur."""
    shown = host.spread(len(defocus.focus))
    photos, depths, low, high = small_views(pictures[shown], defocus.disparity[shown], VIEW)
    return [
        {
            "frame": frame,
            "photo": photo,
            "depth": depth,
            "low": low,
            "high": high,
            "focus": float(defocus.focus[frame]),
            "k": float(defocus.k[frame]),
            "blur_from": defocus.disparity.shape[-1] / STRENGTH_WIDTH,  # px of the image, as Defocus.in_focus_mask
            "strength": 0.0 if defocus.lens.is_physical else defocus.lens.strength,
        }
        for frame, photo, depth in zip(shown, host.temporary(photos, node), host.temporary(depths, node), strict=True)
    ]


def disparity_of(depth, values=NEAR_BRIGHT):
    """(disparity [B, H, W], is it metric?) of whatever is connected to the depth input."""
    if isinstance(depth, dict):
        return optics.disparity_from_geometry(depth, metres=values == METRES)
    if depth.ndim == 4 and values in (METRES, DIOPTRES):
        depth = depth[..., 0]
    if values == METRES:
        return optics.disparity_from_distance(depth), True
    read = optics.disparity_from_image if depth.ndim == 4 else optics.disparity_from_mask
    return read(depth, inverted=values == FAR_BRIGHT), values == DIOPTRES


def _fitted(disparity, pictures):
    """Disparity [B, h, w] at the size of the pictures; much smaller maps, one per picture, get the pictures' edges."""
    (h, w), (height, width) = disparity.shape[1:], pictures.shape[2:]
    if len(disparity) != len(pictures) or min(height / h, width / w) < 1.5:
        return optics.fit_disparity(disparity, len(pictures), height, width)
    from ..bokeh_core.depth.upsampling import guided_upsample

    fitted = disparity.new_empty(pictures.shape[0], height, width)
    step = host.progress()
    for i, picture in enumerate(pictures):
        step(i, len(pictures))
        fitted[i] = guided_upsample(disparity[i : i + 1], picture[None], align_corners=False)[0]
    return fitted


def _planes(focus, disparity, pictures, x, y, value, mask):
    """[B] disparity in focus, found in each of the given frames."""
    if focus == "point":
        found = focusing.from_point(disparity, x, y)
    elif focus == "mask":
        found = focusing.from_mask(disparity, mask)
    elif focus == "value":
        found = focusing.from_value(value, len(disparity))
    else:
        found = focusing.auto(disparity, pictures)
    return focusing.smooth(found) if len(found) > 1 else found
