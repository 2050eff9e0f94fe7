"""The verdicts of the demo's report."""

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
