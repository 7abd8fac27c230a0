"""What a checkpoint wants to be shown: the numbers in which Qwen2.5-VL and Qwen3-VL differ on the way from a video to a prompt.

                    Qwen2.5-VL                              Qwen3-VL
    a patch         14 x 14 pixels                          16 x 16
    time            in the positions of the video tokens    as text before each pair of frames
    boxes           fractions of width and height           whole numbers from 0 to 1000
    system line     "You are a helpful assistant."          none
    a picture       4 to 16,384 tokens                      64 to 16,384 tokens

They are read from the files beside the weights, not from the class: a checkpoint decides.
"""

from dataclasses import dataclass, replace

MERGE = 2  # a token is MERGE x MERGE patches of two frames, in both


@dataclass(frozen=True)
class Geometry:
    """The defaults are Qwen2.5-VL's, as published."""

    patch: int = 14  # pixels of its side
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    tokens_per_second: float = 2  # positions in time of a second of video, where positions tell time
    timestamps: bool = False  # "<0.2 seconds>" before each pair of frames; then positions tell no time
    box_units: int = 1  # what the width and the height of a frame are in the model's boxes
    system: str = "You are a helpful assistant."  # where the messages have no system line; "": none
    picture_pixels: tuple[int, int] = (56 * 56, 12_845_056)  # least and most of a picture, which is no frame of a video

    @property
    def factor(self) -> int:
        """Pixels of a token's side: what the sides of a frame are multiples of."""
        return self.patch * MERGE

    def with_times(self, timestamps: bool) -> "Geometry":
        """With the times as text where `timestamps` says so (--timestamps), or where they always are."""
        return replace(self, timestamps=self.timestamps or timestamps)

    def picture_limits(self, most: int) -> tuple[int, int]:
        """Least and most pixels of a picture, under --image_pixels `most`; 0: the checkpoint's own."""
        low, high = self.picture_pixels
        high = min(high, most or high)
        return min(low, high), high


QWEN2_5 = Geometry()
QWEN3 = Geometry(patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), timestamps=True, box_units=1000, system="",
                 picture_pixels=(65_536, 16_777_216))
GEOMETRIES = {"qwen2_5_vl": QWEN2_5, "qwen3_vl": QWEN3}  # by model_type; any other model is refused


def geometry_of(config: dict, preprocessor: dict | None = None) -> Geometry:
    """Of a checkpoint's config.json and preprocessor_config.json."""
    usual, vision, pixels = GEOMETRIES[config["model_type"]], config["vision_config"], preprocessor or {}
    size = pixels.get("size") or {}  # the newer form; older files have min_pixels and max_pixels, which the library prefers
    limits = (pixels.get("min_pixels") or size.get("shortest_edge") or usual.picture_pixels[0],
              pixels.get("max_pixels") or size.get("longest_edge") or usual.picture_pixels[1])
    return Geometry(vision.get("patch_size", usual.patch), tuple(pixels.get("image_mean", usual.mean)),
                    tuple(pixels.get("image_std", usual.std)), vision.get("tokens_per_second", usual.tokens_per_second),
                    usual.timestamps, usual.box_units, usual.system, limits)
