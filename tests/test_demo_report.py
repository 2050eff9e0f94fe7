"""The verdicts of the demo's report."""

import numpy as np

from rehyat_jax.demo.digits import DigitVideos
from rehyat_jax.demo.judge import Judge
from rehyat_jax.demo.long_video import SEGMENTS, Segment, by_position
from rehyat_jax.demo.report import expectations, markdown

GOOD = dict(
    attention_error_initial=0.5,
    attention_error_distilled=0.26,
    attention_error_window_only=0.45,
    attention_error_exact_causal=0.25,
    attention_error_initial_bidirectional=0.5,
    attention_error_distilled_bidirectional=0.1,
    velocity_error_distilled=0.3,
    velocity_error_finetuned=0.2,
    digit_accuracy_teacher=1.0,
    digit_accuracy_student=0.96,
    frame_accuracy_teacher=0.98,
    frame_accuracy_student=0.92,
    motion_accuracy_teacher=1.0,
    motion_accuracy_student=1.0,
    export_max_abs_diff=1e-5,
    **{f"long_{field}_{index}": 0.5 for field in Segment._fields for index in range(SEGMENTS)},
)

BAD = dict(
    attention_error_distilled=0.27,
    attention_error_distilled_bidirectional=0.13,
    digit_accuracy_student=0.94,
    digit_accuracy_teacher=0.94,
    frame_accuracy_student=0.89,
    motion_accuracy_student=0.94,
    motion_accuracy_teacher=0.94,
    export_max_abs_diff=6e-5,
)


def verdicts(metrics):
    return [holds for *_, holds in expectations(metrics)]


def test_good_figures_hold():
    assert all(verdicts(GOOD))
    assert "**no**" not in markdown(GOOD)


def test_every_bad_figure_misses_an_expectation_of_its_own():
    for name, value in BAD.items():
        assert verdicts(GOOD | {name: value}).count(False) == 1, name
        assert "**no**" in markdown(GOOD | {name: value})
    assert len(BAD) == len(verdicts(GOOD))


def test_quality_by_position_finds_the_segment_and_the_boundaries_that_are_wrong():
    digits = DigitVideos("judge")
    draws = [digits.draw(index) for index in range(20)]
    right = np.stack([draw.video for draw in draws])[..., None].repeat(3, -1)
    captions = [draw.caption for draw in draws]
    back, still = right[:, ::-1].copy(), right[:, :1] + np.linspace(0, 0.01, 21)[:, None, None, None]
    back[:, 15:] += 0.1  # from frame 36 on, where the fourth part begins
    videos = np.concatenate([right, back, still], axis=1).clip(0, 1)
    first, second, third = by_position(Judge.fit(), videos, captions, chunk_frames=3)
    assert first.frame_accuracy > 0.9 and first.motion_accuracy == second.motion_accuracy == 1
    assert third.motion_accuracy == 0
    # Digits move evenly; the factor allows for the sampling of their pixels.
    assert all(0.8 < jump < 1.25 for jump in (first.chunk_jump, first.part_jump))
    assert second.chunk_jump < 1.25 and second.part_jump > 1.5
