"""Write the input files and the thumbnails of the shipped workflows, from the library's own demo scene.

python -m tests.host.make_examples
"""

from fractions import Fraction

import av
import torch
from PIL import Image

from bokeh_core.optics import focus as focusing
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import render
from bokeh_core.render.light import to_display
from bokeh_core.render.scene import Scene
from bokeh_core.synthesis.demo import demo_clip, demo_scene
from bokeh_core.synthesis.scenes import flatten

from .comfy import WORKFLOWS

FRAMES, FPS = 25, 12


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


def thumbnail(name, image, disparity, focus, lens=None, **more):
    """Left the input, right the result."""
    result = render(image[None], make_defocus(disparity[None], lens or Lens(), focus, width=image.shape[-1]), **more)[0]
    middle = image.shape[-1] // 2
    picture = Image.fromarray(to_bytes(torch.cat([image[..., :middle], result[..., middle:]], -1)))
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    picture.save(WORKFLOWS / f"{name}.jpg", quality=88)


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
    thumbnail("video_focus_pull", images[0], depths[0], focusing.from_point(depths[0][None], 0.27, 0.72))


if __name__ == "__main__":
    main()
