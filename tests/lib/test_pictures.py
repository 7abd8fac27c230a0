"""A picture is shown as a person would see it, or refused with its name, the reason and a remedy."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data import VideoSettings, patchify, picture_arguments, read_picture
from lib.geometry import QWEN2_5, QWEN3, geometry_of
from lib.loader import VideoLoader
from lib.pictures import read_picture_file
from lib.readers import VideoError

RED, WHITE = [255, 0, 0], [255, 255, 255]
SMALL = {"min_pixels": 784, "max_pixels": 10**6, "factor": 28}


def corners(file) -> list[list[int]]:
    """The upper left and the lower right pixel."""
    pixels = read_picture_file(file)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return [pixels[0, 0].tolist(), pixels[-1, -1].tolist()]


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_phone_held_upright_gives_an_upright_picture(tmp_path):
    """Pillow gives the pixels as the sensor has them: text lies on its side, left is above."""
    image, exif = Image.new("RGB", (64, 32), "white"), Image.Exif()
    image.paste("red", (0, 0, 8, 8))  # upper left of the sensor
    exif[0x0112] = 6  # to be turned to the right by a quarter
    image.save(tmp_path / "phone.png", exif=exif)
    pixels = read_picture_file(tmp_path / "phone.png")
    assert pixels.shape == (64, 32, 3) and pixels[0, -1].tolist() == RED and pixels[0, 0].tolist() == WHITE


def test_kinds_of_pixels_become_rgb(tmp_path):
    """16 bits of grey came out white, transparent pixels in whatever colour lay under them, CMYK as its negative."""
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.array(corners(tmp_path / "cmyk.jpg")) - RED).max() < 4
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert corners(tmp_path / name) == [[0, 0, 0], WHITE]
        assert read_picture_file(tmp_path / name)[4, 0].tolist() == [int(grey[4, 0]) >> 8] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)  # black, and not to be seen
    assert corners(tmp_path / "palette.png") == [WHITE, RED]
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "la.png")
    assert corners(tmp_path / "la.png") == [WHITE, WHITE]
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    assert corners(tmp_path / "bits.png") == [WHITE, WHITE]


def test_the_content_tells_what_a_file_is(tmp_path):
    """A JPEG that is called .png, or has no suffix at all, is common in collections from the web."""
    noise().save(tmp_path / "x.png", format="JPEG")
    noise().save(tmp_path / "x", format="WEBP", lossless=True)
    assert read_picture_file(tmp_path / "x.png").shape == (48, 64, 3)
    assert np.array_equal(read_picture_file(tmp_path / "x"), np.array(noise()))


def with_size(file, width: int, height: int) -> bytes:
    """A PNG whose header claims another size."""
    data = file.read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for format in ("JPEG", "PNG", "WEBP"):
        data = io.BytesIO()
        noise(200, 200).save(data, format)
        (folder / f"cut.{format.lower()}").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    Image.new("F", (8, 8), 0.5).save(folder / "float.tif")
    for name, width, height in (("large", 30_000, 4_000), ("bomb", 20_000, 20_000)):
        (folder / f"{name}.png").write_bytes(with_size(folder / "cut.png", width, height))
    Image.new("RGB", (2010, 10)).save(folder / "long.png")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "vector.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize("name, words", [
    ("cut.jpeg", "truncated or damaged .*download it again"), ("cut.png", "truncated or damaged"), ("cut.webp", "truncated|damaged"),
    ("moves.gif", "holds 3 pictures, an animation or pages; save the one that is meant"), ("pages.tif", "holds 3 pictures"),
    ("float.tif", "floating-point"), ("large.png", "30000 x 4000 pixels.*scale it down"), ("bomb.png", "pixels.*scale it down"),
    ("long.png", "2010 x 10 pixels has an aspect ratio over 200"), ("empty.png", "empty"), ("text.jpg", "not a picture"),
    ("vector.png", "not a picture"), ("folder", "folder of frames as 'video'"), ("none.png", "no such file.*--video_root"),
])
def test_what_cannot_be_shown_is_refused_by_name(bad, name, words, monkeypatch):
    """A grey lower half, the first of many frames, or pixels that fill the memory: nobody would have noticed. An EPS is a
    program that Pillow has Ghostscript run."""
    def never(*arguments, **more):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", never)
    with pytest.raises(VideoError, match=words) as error:
        read_picture(str(bad / name), **SMALL)
    assert error.value.path == str(bad / name) and "\n" not in str(error.value)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_photograph_of_a_phones_jpeg_is_its_first_picture(tmp_path):
    """MPO: behind the photograph stands a preview, a depth map or the other eye."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "x.jpg", format="MPO", save_all=True,
                                           append_images=[Image.new("RGB", (64, 48))])
    assert np.abs(np.array(corners(tmp_path / "x.jpg")) - RED).max() < 4


def test_the_budget_is_the_checkpoints_and_a_cap_lowers_it(tmp_path):
    noise(64, 48).save(tmp_path / "small.png")
    Image.new("RGB", (4000, 1000)).save(tmp_path / "large.png", compress_level=1)

    def size(name: str, geometry, cap: int = 0) -> tuple[int, int]:
        settings = VideoSettings(factor=geometry.factor, picture_pixels=geometry.picture_limits(cap))
        clip = read_picture(str(tmp_path / name), **picture_arguments(settings))
        assert clip.frames.shape[:2] == (1, 3)
        return tuple(clip.frames.shape[2:])

    assert size("small.png", QWEN2_5) == (56, 56) and size("small.png", QWEN3) == (224, 320)
    assert size("large.png", QWEN2_5) == (1008, 4004)
    assert size("large.png", QWEN2_5, 100_000) == (140, 616) and size("small.png", QWEN3, 2048) == (32, 32)
    config = {"model_type": "qwen2_5_vl", "vision_config": {}}
    assert geometry_of(config, {"min_pixels": 784, "max_pixels": 7840}).picture_pixels == (784, 7840)
    assert geometry_of(config, {"size": {"shortest_edge": 1568, "longest_edge": 15680}}).picture_pixels == (1568, 15680)


@pytest.mark.parametrize("geometry", [QWEN2_5, QWEN3], ids=["qwen2.5", "qwen3"])
@pytest.mark.parametrize("width, height", [(64, 48), (500, 333), (1000, 20)])
def test_patches_are_those_of_the_librarys_image_processor(tmp_path, geometry, width, height):
    """Size, resize, order and normalisation, from the file on."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # smooth: Pillow rounds between the two directions, which edges would show
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    smooth = np.stack([128 + 90 * np.sin(x / 9 + y / 7 + k) for k in range(3)], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "x.png")
    least, most = geometry.picture_limits(60_000)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=geometry.patch, image_mean=geometry.mean, image_std=geometry.std,
        size={"shortest_edge": least, "longest_edge": most})(images=[Image.open(tmp_path / "x.png")], return_tensors="pt")
    patches, grid = patchify(read_picture(str(tmp_path / "x.png"), least, most, geometry.factor).frames, geometry)
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, torch.as_tensor(theirs["pixel_values"]), atol=0.034, rtol=0)  # two steps of 1/255


def test_the_loader_gives_the_pictures_of_a_sample_in_their_order(tmp_path, bad):
    """In their order; one that cannot be read costs its question, and is named, twice, and then without being read again.
    The pictures beside it wait for nobody."""
    for k, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (56, 56 + 28 * k), colour).save(tmp_path / f"{k}.png")
    names = [str(tmp_path / f"{k}.png") for k in (2, 0, 1, 0)]
    sample = {"id": "a", "task": "qa", "question": "?", "image": names}
    with VideoLoader(num_workers=0, frame_cache=tmp_path / "cache") as loader:
        for _ in range(2):
            loader.submit(sample)
            clips = loader.load(sample)
            assert [clip.frames[0, :, 0, 0].tolist() for clip in clips] == [[0, 0, 255], RED, [0, 255, 0], RED]
            assert [tuple(clip.frames.shape) for clip in clips][0] == (1, 3, 112, 56) and not loader.ahead
        assert len(loader.load({**sample, "image": names[0]})) == 1 and len(list((tmp_path / "cache").iterdir())) == 3
        for _ in range(3):
            with pytest.raises(VideoError, match="truncated") as error:
                loader.load({**sample, "image": [names[0], str(bad / "cut.jpeg"), names[1]]})
            assert error.value.path == str(bad / "cut.jpeg")
        assert [key[0] for key in loader.ahead] == [str(bad / "cut.jpeg")]
