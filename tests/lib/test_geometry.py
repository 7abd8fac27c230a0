"""What a checkpoint's files say of how it is to be shown a video, and what happens where they do not say it."""

import json

import pytest

from lib import hf_folder, toy
from lib.geometry import GEOMETRIES, QWEN2_5, QWEN3, geometry_of


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_a_folder_in_published_form_gives_the_published_geometry(model_folder, qwen3_folder, family):
    """A field that is read under a wrong name falls back in silence, and pixels are normalised by another model's mean."""
    folder = {"qwen2_5": model_folder, "qwen3": qwen3_folder}[family]
    assert hf_folder.geometry_in(str(folder)) == toy.FAMILIES[family].geometry


def test_the_files_decide_and_not_the_name_of_the_model():
    changed = geometry_of({"model_type": "qwen2_5_vl", "vision_config": {"patch_size": 8, "tokens_per_second": 4}},
                          {"image_mean": [0.1, 0.2, 0.3]})
    assert (changed.patch, changed.factor, changed.tokens_per_second, changed.mean) == (8, 16, 4, (0.1, 0.2, 0.3))
    assert changed.std == QWEN2_5.std and not changed.timestamps
    assert geometry_of({"model_type": "qwen3_vl", "vision_config": {}}) == QWEN3


def test_times_as_text_can_be_added_and_never_taken_away():
    """--no-timestamps with a Qwen3-VL would leave it without any clock."""
    assert QWEN2_5.with_times(True).timestamps and not QWEN2_5.with_times(False).timestamps
    assert QWEN3.with_times(False) == QWEN3


def test_a_folder_of_another_model_is_refused_before_anything_is_decoded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    with pytest.raises(ValueError, match="qwen3_vl_moe"):
        hf_folder.geometry_in(str(tmp_path))
    assert set(GEOMETRIES) == {"qwen2_5_vl", "qwen3_vl"}
