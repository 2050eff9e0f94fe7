"""What should feature maps read? Queries and keys after RoPE, before it, or before their norm too.

    python -m rehyat_jax.study configs/studies/inputs.py

Stage 1 alone, all six blocks of the digits teacher, causal; 15 runs. ReHyAt's map reads each of the three inputs. The
map of VDN-H3 reads ReHyAt's input and its own. `feature_maps.py` compares the other properties of maps.

Hardware: two CPU cores, 2 GB of memory. About 14 minutes, estimated from the processor time of a run.

Given up: finetuning, and VDN-H3's convolution of keys and values.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    feature_map = lambda **fields: Variant({f"hybrid.feature_map.{name}": value for name, value in fields.items()})
    return Study(
        title="Feature maps: inputs",
        question="How does the attention error depend on the input of the feature maps?",
        published="The equations of ReHyAt (arXiv 2601.04342) use the queries and keys of the softmax branch, after "
        "RoPE; it does not say so in words. VDN-H3 takes them before their norm and RoPE, through SiLU and an L2 norm. "
        "No comparison of inputs is known.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "mlp, rotated": Variant(),
            "mlp, unrotated": feature_map(input="unrotated"),
            "mlp, unnormed": feature_map(input="unnormed"),
            "silu_l2, rotated": feature_map(kind="silu_l2"),
            "silu_l2, unnormed": feature_map(kind="silu_l2", input="unnormed"),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
