"""What is asked, and where the noise of an answer comes from."""

from lib.questions import sampling_seed, with_style


def test_style_decides_whether_a_thought_is_asked_for_and_scored():
    """Prompt and format reward must agree: else a model is punished for doing what it was told."""
    sample = {"id": "a", "task": "qa", "question": "?", "options": ["x", "y"], "answer": "A"}
    for style, think in (("think", True), ("answer", False), ("temporal_r1", True)):
        (styled,) = with_style([sample], style)
        assert styled["think"] is think and "think" not in sample
    assert with_style([{**sample, "think": False}], "think")[0]["think"] is False


def test_noise_is_a_function_of_seed_step_and_question():
    seeds = {sampling_seed(seed, step, name) for seed in (0, 1) for step in (-1, 0, 10) for name in ("a", "b", "0 a")}
    assert len(seeds) == 18 and sampling_seed(0, -1, "a") == sampling_seed(0, -1, "a")
