"""What a photographer sets: strength or f-number, focal length and focus distance, and the shape of the aperture.

Units: millimetres for focal length and sensor, metres for the focus distance, 1/m for metric disparity, pixels for blur radii.
"""

import math
from dataclasses import dataclass, field

import torch

from ..errors import BokehError

STRENGTH_WIDTH = 1024  # px; strength is quoted at this image width
FULL_FRAME_DIAGONAL = 43.27  # mm; as rounded by BokehDepth


@dataclass(frozen=True)
class Aperture:
    """Shape of the bokeh ball. The default is a round, clean disk.

    blades                  number of straight blades, 0 or less than 3 = round
    rotation                degrees, counter-clockwise
    roundness               0 straight blade edges .. 1 full circle
    anamorphic              0.1 .. 10, height / width of the ball (2 = tall oval)
    cats_eye                0 .. 1, clipping of the ball that grows towards the corners
    spherical               -1 .. 1: > 0 soap-bubble rim behind the focus plane, < 0 creamy; the sign flips in front of it
    onion                   0 .. 1, strength of the rings
    chromatic_longitudinal  -1 .. 1, red and blue focus apart in depth
    chromatic_lateral       -1 .. 1, red and blue differ in magnification
    picture                 [h, w] >= 0, an arbitrary aperture seen from the scene; replaces blades and roundness
    """

    blades: int = 0
    rotation: float = 0.0
    roundness: float = 0.0
    anamorphic: float = 1.0
    cats_eye: float = 0.0
    spherical: float = 0.0
    onion: float = 0.0
    chromatic_longitudinal: float = 0.0
    chromatic_lateral: float = 0.0
    picture: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("roundness", "cats_eye", "onion"):
            _require_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("spherical", "chromatic_longitudinal", "chromatic_lateral"):
            _require_range(name, getattr(self, name), -1.0, 1.0)
        _require_range("anamorphic", self.anamorphic, 0.1, 10.0)
        if self.blades < 0 or self.blades != int(self.blades):
            raise BokehError(f"The aperture has {self.blades} blades; give a whole number, 0 for a round aperture or 3 and more.")
        if not math.isfinite(self.rotation):
            raise BokehError(f"The aperture rotation is {self.rotation}; give degrees as a finite number.")
        if self.picture is not None:
            picture = self.picture
            if picture.ndim != 2 or picture.numel() == 0:
                raise BokehError(f"The aperture picture has shape {list(picture.shape)}; expected one grey picture [height, width].")
            if not bool(torch.isfinite(picture).all()) or float(picture.min()) < 0 or float(picture.max()) <= 0:
                raise BokehError("The aperture picture must hold finite values of 0 and above, and light somewhere; it does not.")


@dataclass(frozen=True)
class Lens:
    """How strongly depth blurs.

    Two ways to say it. Either `strength`: the blur radius, in px of a 1024 px wide image, of the whole depth range 0..1. Or a thin
    lens, chosen by giving `f_number` and `focal_length`; it needs metric disparity (1/m).

    strength        px >= 0, ignored by a thin lens
    f_number        e.g. 1.8
    focal_length    mm
    sensor_width    mm, the sensor's side along the image's width (36 x 24: 36 for landscape, 24 for portrait)
    focus_distance  m, `inf` allowed. None = the distance of the focus chosen in the picture
    highlights           >= 0, how much brighter than white the clipped lights of an 8-bit picture really were; 0 = leave them
    highlight_threshold  0 .. 1, display-encoded value above which light counts as clipped, more so the nearer to 1
    """

    strength: float = 24.0
    f_number: float | None = None
    focal_length: float | None = None
    sensor_width: float = 36.0
    focus_distance: float | None = None
    aperture: Aperture = field(default_factory=Aperture)
    highlights: float = 0.0
    highlight_threshold: float = 0.9

    def __post_init__(self):
        if not (math.isfinite(self.highlights) and self.highlights >= 0):
            raise BokehError(f"The highlight boost is {self.highlights}; expected 0 (none) or more.")
        if not 0 <= self.highlight_threshold < 1:
            raise BokehError(f"The highlight threshold is {self.highlight_threshold}; expected 0 or more and less than 1 (white).")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise BokehError(f"The blur strength is {self.strength}; expected 0 or more (px of radius at {STRENGTH_WIDTH} px width).")
        for name in ("f_number", "focal_length", "sensor_width"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if (self.f_number is None) != (self.focal_length is None):
            given, missing = ("f_number", "focal_length") if self.focal_length is None else ("focal_length", "f_number")
            raise BokehError(f"The lens has {_words(given)} but no {_words(missing)}; a real lens needs both. Or use strength alone.")
        if self.focus_distance is not None:
            if not self.is_physical:
                raise BokehError("The lens has a focus distance but no f-number and focal length; give both, or leave the distance out.")
            _require_positive("focus_distance", self.focus_distance, allow_inf=True)
            _require_beyond_focal_length(self.focus_distance, self.focal_length)

    @property
    def is_physical(self) -> bool:
        """True when f-number and focal length rule, False when `strength` does."""
        return self.f_number is not None and self.focal_length is not None

    def k(self, width: int, focus: torch.Tensor, *, metric: bool, disparity_range: float = 1.0) -> torch.Tensor:
        """Blur radius in px per unit of disparity difference.

        width            px of the whole image
        focus            [B] focus disparity, in the disparity's unit
        metric           the disparity is 1/m
        disparity_range  nearest minus farthest disparity of the clip, for `strength`: that whole range gets `strength`
        returns          [B] float32

        Thin lens (RENDERERS.md, Notation): K = f^2 S1 / (2 n (S1 - f)) * (width px / sensor width), S1 the focus distance, so that
        radius = K |1/S1 - 1/S|. Written as f^2 / (2 n (1 - f/S1)) it also holds for S1 = infinity.
        Raises BokehError for a thin lens without metric disparity, or focused closer than its focal length.
        """
        if not self.is_physical:
            if not disparity_range > 0:
                raise BokehError(f"The disparity range is {disparity_range}; expected more than 0.")
            k = self.strength * width / STRENGTH_WIDTH / disparity_range
            return torch.full_like(focus, k if k <= torch.finfo(torch.float32).max else math.inf, dtype=torch.float32)
        if not metric:
            raise BokehError(
                "This lens has an f-number and a focal length, which need depth in metres, but the depth map is relative (0..1). "
                "Use a metric depth (MoGe 2, a metric Depth Anything model, a depth file in metres), or set a strength instead."
            )
        # In Python floats: some devices lack float64, and there is one number a frame.
        f = self.focal_length / 1000.0
        dioptres = focus.tolist() if self.focus_distance is None else [1.0 / self.focus_distance] * len(focus)
        if dioptres and max(dioptres) * f >= 1:
            _require_beyond_focal_length(1.0 / max(dioptres), self.focal_length)
        pixels_per_metre = width / (self.sensor_width / 1000.0)
        k = [f * f / (2.0 * self.f_number * (1.0 - f * d)) * pixels_per_metre for d in dioptres]
        return torch.tensor(k, dtype=torch.float32, device=focus.device)

    def intrinsics(self, height: int, width: int) -> torch.Tensor:
        """[3, 3] pinhole matrix in px of a real lens on a picture of this size, its axis in the middle."""
        if not self.is_physical:
            raise BokehError("The camera of Refine Depth needs a real lens; set Choose Lens to 'real lens', or disconnect it.")
        focal = width * self.focal_length / self.sensor_width
        return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])

    @classmethod
    def from_exif(cls, source, *, aperture: Aperture | None = None) -> "Lens":
        """The thin lens a photo was taken with.

        source: path of a picture, PIL Image or PIL Exif. Reads FNumber, FocalLength and, for the sensor width, the focal-plane
        resolution tags, else FocalLengthIn35mmFilm; SubjectDistance when there is one. Sideways photos (Orientation 5..8) get the
        sensor's other side, because everyone shows them upright. Raises BokehError naming the tag that is missing.
        """
        tags, size = _read_exif(source)
        f_number, focal_length = _tag(tags, "FNumber"), _tag(tags, "FocalLength")
        for name, value in (("FNumber", f_number), ("FocalLength", focal_length)):
            if value is None:
                raise BokehError(f"The photo's EXIF has no {name}; give the lens by hand, or use strength.")
        width = _tag(tags, "ExifImageWidth") or size[0]
        height = _tag(tags, "ExifImageHeight") or size[1]
        sideways = tags.get("Orientation") in (5, 6, 7, 8)
        return cls(
            f_number=f_number,
            focal_length=focal_length,
            sensor_width=_sensor_width(tags, focal_length, width, height, sideways),
            focus_distance=_tag(tags, "SubjectDistance", allow_inf=True),
            aperture=aperture or Aperture(),
        )


def crop_factor(f: float, f35: float | None) -> float:
    """f35 / f; 1 when the 35 mm equivalent is unknown. BokehDepth, calc_crop_factor."""
    return 1.0 if f35 is None else f35 / f


def sensor_width_from_crop(f: float, f35: float | None, width: int, height: int) -> float:
    """Sensor width in mm from focal length and its 35 mm equivalent (both mm) and the image size in px.

    (f / f35) * 43.27 / sqrt(1 + (height / width)^2): the equivalence is one of diagonals. BokehDepth, calc_sensor_width (section 7).
    """
    f35 = f if f35 is None else f35
    return (f / f35) * FULL_FRAME_DIAGONAL / math.sqrt(1.0 + (height / width) ** 2)


_FOCAL_PLANE_UNITS = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # EXIF FocalPlaneResolutionUnit -> mm
_EXIF_POINTER = 0x8769


def _read_exif(source):
    """(tags by name, (width, height) or (None, None)) of a path, PIL Image or PIL Exif."""
    from PIL import ExifTags, Image, UnidentifiedImageError

    size = (None, None)
    if isinstance(source, Image.Exif):
        exif = source
    elif isinstance(source, Image.Image):
        exif, size = source.getexif(), source.size
    else:
        try:
            with Image.open(source) as picture:
                exif, size = picture.getexif(), picture.size
        except (OSError, UnidentifiedImageError) as error:
            raise BokehError(f"The photo {source} can not be read for its EXIF: {error}.") from error
    merged = {**exif, **exif.get_ifd(_EXIF_POINTER)}
    return {ExifTags.TAGS.get(number, number): value for number, value in merged.items()}, size


def _tag(tags, name, *, allow_inf=False):
    """A positive number, or None when the tag is absent or holds the 0 or 0/0 that cameras write for 'unknown'."""
    value = tags.get(name)
    if value is None:
        return None
    if allow_inf and getattr(value, "numerator", None) == 0xFFFFFFFF:  # EXIF 2.3: the subject is at infinity
        return math.inf
    try:
        value = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return value if value > 0 and (allow_inf or math.isfinite(value)) else None


def _sensor_width(tags, focal_length, width, height, sideways):
    x, y = _tag(tags, "FocalPlaneXResolution"), _tag(tags, "FocalPlaneYResolution")
    unit = _FOCAL_PLANE_UNITS.get(tags.get("FocalPlaneResolutionUnit", 2))
    along, resolution = (height, y or x) if sideways else (width, x)
    if resolution and unit and along:
        return along / resolution * unit
    f35 = _tag(tags, "FocalLengthIn35mmFilm")
    if f35 is None:
        raise BokehError(
            "The photo's EXIF has neither FocalLengthIn35mmFilm nor FocalPlaneXResolution, so the sensor width is unknown; "
            "give the sensor width by hand."
        )
    if not (width and height):
        raise BokehError("The EXIF has no ExifImageWidth and ExifImageHeight, so the sensor width is unknown; give the photo itself.")
    return sensor_width_from_crop(focal_length, f35, height if sideways else width, width if sideways else height)


def _words(name):
    return name.replace("_", "-" if name == "f_number" else " ")


def _require_range(name, value, low, high):
    if not low <= value <= high:
        raise BokehError(f"The aperture's {name} is {value}; expected a number from {low:g} to {high:g}.")


def _require_positive(name, value, *, allow_inf=False):
    if not (value > 0 and (allow_inf or math.isfinite(value))):
        raise BokehError(f"The {_words(name)} is {value}; expected a number above 0.")


def _require_beyond_focal_length(distance, focal_length):
    if not distance * 1000.0 > focal_length:
        raise BokehError(
            f"The focus distance is {distance:g} m, but a {focal_length:g} mm lens focuses only beyond its focal length; "
            "check the units (focus distance in metres, focal length in millimetres, depth in metres)."
        )
