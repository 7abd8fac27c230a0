"""A picture file as pixels, as a person would see it.

Upright, by its EXIF (transformers turns pictures so as well, qwen-vl-utils does not); what is transparent is white (as in both);
CMYK and palettes are RGB; of a grey of 16 bits the upper 8 are kept, where Pillow alone would make nearly all of it white. What a
file holds is told by its content, not by its name.

Refused, with the reason: what is cut off or damaged, animations and pages of which nobody said which is meant, floating-point
pixels, which have no white, and pictures so large that their pixels would fill the memory.
"""

import warnings
from pathlib import Path

import numpy as np

# Formats that are pixels: EPS and the like are programs, which Pillow would have Ghostscript run.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "TGA", "ICO")
MOST_PIXELS = 89_478_485  # where Pillow begins to warn: 1 GB as the floating-point numbers that are resized


def read_picture_file(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. ValueError or OSError for what cannot be read, which name the remedy but not the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.is_dir():
        raise ValueError("a folder is no picture; give a folder of frames as 'video', pictures as a list of their paths")
    if not path.exists():
        raise ValueError("no such file; check the path, and --video_root where there is one")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    Image.init()  # AVIF and JPEG 2000 are not in every build
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), Image.open(
                path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            refuse_what_is_no_one_picture(image)
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError("not a picture of a known kind, or its header is damaged; save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {2 * MOST_PIXELS:,} pixels; scale it down") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"truncated or damaged ({str(error).splitlines()[0][:100]}); download it again") from error


def refuse_what_is_no_one_picture(image) -> None:
    (width, height), count = image.size, getattr(image, "n_frames", 1)
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}; scale it down")
    if count > 1 and image.format != "MPO":  # phones add a preview or a depth map to a JPEG: the first is the photograph
        raise ValueError(f"it holds {count} pictures, an animation or pages; save the one that is meant (a GIF can be a 'video')")


def to_rgb(image) -> np.ndarray:
    """A Pillow image to (H, W, 3) uint8. ValueError for a kind of pixels that has no RGB."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows the range; save it with 8 bits")
    if image.mode.startswith("I"):  # "I;16" and its relatives, and "I" where Pillow has widened 16 bits to 32
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its grey has more than 16 bits; save it with 8")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
