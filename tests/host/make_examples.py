"""Write the input files and the thumbnails of the shipped workflows, from the library's own demo scene.

python -m tests.host.make_examples
"""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import av
import numpy as np
import torch
from PIL import ExifTags, Image

from bokeh_core.depth.sweep import depth_from_sweep
from bokeh_core.depth.upsampling import guided_upsample
from bokeh_core.optics import focus as focusing
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.optics.stack import STACK_WIDTH, BokehStack, thin_lens_k
from bokeh_core.render import composite, render
from bokeh_core.render.light import to_display
from bokeh_core.render.scene import Scene
from bokeh_core.synthesis.demo import demo_clip, demo_scene
from bokeh_core.synthesis.scenes import flatten

from .comfy import WORKFLOWS

FRAMES, FPS = 25, 12
CAMERA, NEAREST = Lens(f_number=22, focal_length=85, sensor_width=36), 1.2  # of the photos; metres to the branch, which is in focus


def to_bytes(picture):
    """[..., H, W] 0..1 to uint8, channels last."""
    picture = (picture.clamp(0, 1) * 255).round().byte()
    return (picture.movedim(0, -1) if picture.ndim == 3 else picture).contiguous().numpy()


def write_video(path, frames, crf):
    with av.open(str(path), "w") as file:
        height, width = frames[0].shape[:2]
        stream = file.add_stream("libx264", rate=Fraction(FPS), width=width, height=height, pix_fmt="yuv420p", options={"crf": str(crf)})
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24" if frame.ndim == 3 else "gray")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


def thumbnail(name, image, disparity, focus, lens=None, metric=False, **more):
    """Left the input, right the result."""
    defocus = make_defocus(disparity[None], lens or Lens(), focus, width=image.shape[-1], metric=metric)
    result = render(image[None], defocus, **more)[0]
    middle = image.shape[-1] // 2
    picture = Image.fromarray(to_bytes(torch.cat([image[..., :middle], result[..., middle:]], -1)))
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    picture.save(WORKFLOWS / f"{name}.jpg", quality=88)


def photos(folder):
    """An aperture series of the demo scene's true layers with the camera's EXIF; writes its thumbnail too."""
    scene = demo_scene(width=768, height=512)
    pictures, k = {}, {}
    for f_number in (22, 5.6, 2.8, 1.4):
        k[f_number] = thin_lens_k(replace(CAMERA, f_number=f_number), NEAREST)
        picture = to_display(composite(scene["layers"], k[f_number] / NEAREST * 768 / STACK_WIDTH, 1.0))
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif).update({33437: f_number, 37386: CAMERA.focal_length, 41989: int(CAMERA.focal_length)})
        path = folder / f"bokeh_demo_f{f_number}.jpg"
        Image.fromarray(to_bytes(picture)).save(path, quality=92, exif=exif)
        pictures[f_number] = torch.from_numpy(np.asarray(Image.open(path)).copy()).movedim(-1, 0) / 255
    sharp, *others = pictures.values()
    stack = BokehStack(sharp, torch.stack(others), list(k.values())[1:], per_dioptre=True, source="photos")
    found = depth_from_sweep(stack, focus_distance=NEAREST, upsample=partial(guided_upsample, align_corners=False))
    lens = replace(CAMERA, f_number=1.4)
    focus = focusing.from_point(found.disparity[None], 0.485, 0.6)  # the queen
    thumbnail("depth_from_photo_stack", sharp, found.disparity, focus, lens, True)


def main():
    folder = WORKFLOWS / "input"
    folder.mkdir(exist_ok=True)
    scene = demo_scene(width=1024, height=684)
    Image.fromarray(to_bytes(scene["image"])).save(folder / "bokeh_demo_photo.png", optimize=True)
    # RGB, because ComfyUI 0.33 reads grey PNGs 0.4 % too dark.
    Image.fromarray(to_bytes(scene["disparity"])).convert("RGB").save(folder / "bokeh_demo_depth.png", optimize=True)
    thumbnail("photo_physical", scene["image"], scene["disparity"], focusing.auto(scene["disparity"][None], scene["image"][None]))
    # With a depth model the picture differs by the model's mistakes only; the scene's own depth shows what the workflow is for.
    thumbnail(
        "photo_depth_physical", scene["image"], scene["disparity"], focusing.from_point(scene["disparity"][None], 0.19, 0.66), Lens(36)
    )
    thumbnail("photo_subject_focus", scene["image"], scene["disparity"], focusing.from_point(scene["disparity"][None], 0.57, 0.5), Lens(36))
    branch = scene["layers"].layers[-1].alpha
    plate = to_display(flatten(Scene(scene["layers"].layers[:-1]))[0])
    Image.fromarray(to_bytes(branch)).convert("RGB").save(folder / "bokeh_demo_branch_matte.png", optimize=True)
    Image.fromarray(to_bytes(plate)).save(folder / "bokeh_demo_clean_plate.jpg", quality=92)
    lens = Lens(strength=40, aperture=Aperture(blades=7, roundness=0.4, cats_eye=0.5))
    focus = focusing.auto(scene["disparity"][None], scene["image"][None])
    more = {"matte": branch[None], "clean_plate": plate[None]}
    thumbnail("photo_matte_and_lens", scene["image"].clamp(0, 1), scene["disparity"], focus, lens, **more)
    images, depths = zip(*demo_clip(frames=FRAMES, width=480, height=320), strict=True)
    write_video(folder / "bokeh_demo_clip.mp4", [to_bytes(image) for image in images], crf=18)
    write_video(folder / "bokeh_demo_clip_depth.mp4", [to_bytes(depth) for depth in depths], crf=12)
    thumbnail("video_depth_physical", images[-1], depths[-1], focusing.from_point(depths[-1][None], 0.62, 0.45))
    photos(folder)
    thumbnail("video_focus_pull", images[0], depths[0], focusing.from_point(depths[0][None], 0.27, 0.72))


if __name__ == "__main__":
    main()
