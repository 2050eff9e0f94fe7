"""Which feature maps learn softmax attention best? Degree, activation, input, and Hedgehog's map.

    python -m rehyat_jax.study configs/studies/feature_maps.py

Stage 1 alone, all six blocks of the digits teacher, causal; 21 runs. Each variant changes one property of ReHyAt's map:
two layers, degree 2, relu, rotated input. `feature_map_sizes.py` changes the number of features.

Hardware: two CPU cores, 2 GB of memory. About 20 minutes, estimated from the processor time of a run.

Given up to fit half an hour: combinations of properties, and finetuning.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    feature_map = lambda **fields: Variant({f"hybrid.feature_map.{name}": value for name, value in fields.items()})
    return Study(
        title="Feature maps: degree, activation, input and kind",
        question="Which property of the feature maps matters for the attention error?",
        published="ReHyAt (arXiv 2601.04342) uses two layers and degree 2, and reports that three layers of degree 6 "
        "are no better. It states neither the activations nor whether the input is rotated. LinVideo uses Hedgehog's "
        "map.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "degree 2, relu, rotated": Variant(),
            "degree 1": feature_map(degree=1),
            "degree 3": feature_map(degree=3, features=126),  # 128 is no multiple of 3
            "softplus": feature_map(output_activation="softplus"),
            "elu_plus_one": feature_map(output_activation="elu_plus_one"),
            "unrotated": feature_map(input="unrotated"),
            "hedgehog": feature_map(kind="hedgehog"),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
