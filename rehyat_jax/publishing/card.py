"""The model card of an export: README.md with the front matter that the Hugging Face Hub reads."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import ml_collections
from huggingface_hub import ModelCardData

from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.report import figure_tables
from rehyat_jax.evaluation.results import Evaluation, read_evaluation
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.publishing.history import runs_table, training_runs
from rehyat_jax.weights.load import checkpoint_files
from rehyat_jax.weights.model_checkpoint import read_model_description
from rehyat_jax.weights.models import spec_of
from rehyat_jax.weights.streamed import MODELS_PLACE, NOISE_LEVELS, SAMPLING
from rehyat_jax.weights.torch_folder import BRANCH_FILE

LIBRARY, PIPELINE = "diffusers", "text-to-video"
"""library_name and pipeline_tag of the front matter."""

LICENSE = "apache-2.0"
"""The licence of Wan2.1's published weights, in the Hub's spelling."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
"""A repository's name on the Hub."""


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
      config: the model's architecture.
      metadata: see `StreamedModel`.
      base_name: the base's name on the Hub; None if it is not known.
      license: the licence's name, in the Hub's spelling.
      has_base: False for a student without a copy of its base.
      runs: configurations of the training runs, the first one first.
      evaluation: the model's evaluation against its teacher, if there is one.
    """

    config: Any
    metadata: dict[str, Any]
    base_name: str | None
    license: str = LICENSE
    has_base: bool = True
    runs: tuple[ml_collections.ConfigDict, ...] = ()
    evaluation: Evaluation | None = None


def card_facts(
    source: Path, *, base_name: str | None, license: str, has_base: bool, evaluation: Path | None
) -> CardFacts:
    """The facts of a model checkpoint.

    Args:
      source: the model checkpoint. The records of its training runs are read next to it.
      base_name: see `CardFacts`; None for the pipeline that the checkpoint names, if that is a name on the Hub.
      license, has_base: see `CardFacts`.
      evaluation: `evaluation.json` of this model; None if it was not evaluated.

    Raises:
      InputError: a file is missing or damaged, or the evaluation is that of another model.
    """
    config, metadata = read_model_description(source)
    found = read_evaluation(evaluation) if evaluation else None
    if found and evaluation:
        folder, files = checkpoint_files(source)
        expected = fingerprint(files, folder, blocks=BLOCKS)
        if (other := found.about["models"]["student"].get("fingerprint")) != expected:
            raise InputError(
                f"{evaluation}: is the evaluation of another student (fingerprint {str(other)[-16:]}, expected "
                f"{expected[-16:]} of {source}); evaluate this one"
            )
    models = str(metadata.get(MODELS_PLACE, ""))
    base_name = base_name or (models if HUB_NAME.fullmatch(models) else None)
    return CardFacts(config, metadata, base_name, license, has_base, tuple(training_runs(source)), found)


def model_card(facts: CardFacts) -> str:
    """The text of README.md."""
    data = ModelCardData(
        license=facts.license,
        base_model=facts.base_name,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=["rehyat", "wan", "linear-attention"] if facts.config.hybrid_blocks else ["wan"],
    )
    sections = (_summary, _use, _training, _evaluation, _limits)
    text = "\n\n".join("\n".join(section(facts)) for section in sections)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def _summary(facts: CardFacts) -> list[str]:
    forms = [form.label for form in facts.config.block_forms.of_block]
    if not facts.config.hybrid_blocks:
        return ["# A softmax video transformer", "", "Text-to-video transformer of Wan2.1's architecture."]
    base = f"[{facts.base_name}](https://huggingface.co/{facts.base_name})" if facts.base_name else "a softmax model"
    counted = ", ".join(f"{forms.count(form)} x {form}" for form in dict.fromkeys(forms))
    lines = [
        f"# A ReHyAt student of {facts.base_name or 'a softmax video transformer'}",
        "",
        f"This text-to-video transformer was made from {base}. It has recurrent hybrid attention "
        "([ReHyAt](https://arxiv.org/abs/2601.04342)): softmax inside a window of frames, linear attention with "
        f"learned feature maps outside it. The attention of its {len(forms)} blocks, with chunk + overlap in latent "
        f"frames: {counted}.",
    ]
    if not facts.has_base:
        lines += [
            "",
            f"This folder has no copy of the base. `{BRANCH_FILE}` holds what the student adds to it. `load_student` "
            "reads the base's weights from its folder or from the Hub, and refuses another base.",
        ]
    return lines


def _use(facts: CardFacts) -> list[str]:
    spec, base = spec_of(facts.config), facts.base_name or "FOLDER OR HUB NAME OF THE BASE"
    has_pipeline = all(facts.metadata.get(name) == value for name, value in spec.metadata.items())
    classes = ["WanPipeline"] * has_pipeline
    if facts.config.hybrid_blocks:
        of_base = "" if facts.has_base else f', base="{base}"'
        start, loader = ["sys.path.insert(0, folder)", "from rehyat_torch import load_student"], "load_student"
    else:
        of_base, start, loader = "", [], "WanTransformer3DModel.from_pretrained"
        classes.append("WanTransformer3DModel")
    lines = [
        "## Use",
        "",
        "```python",
        *(["import sys", ""] if start else []),
        "import torch",
        *([f"from diffusers import {', '.join(classes)}"] if classes else []),
        "",
        'folder = "."  # this folder, or huggingface_hub.snapshot_download("its name on the Hub")',
        *start,
        "",
        f"transformer = {loader}(folder{of_base}, torch_dtype=torch.bfloat16)",
    ]
    if has_pipeline:
        return [
            *lines,
            f'pipeline = WanPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)',
            'video = pipeline.to("cuda")("a cat surfs at dusk").frames[0]',
            "```",
        ]
    names = " and ".join(f"{name.replace('_', ' ')} {facts.metadata.get(name)}" for name in spec.metadata)
    return [*lines, "```", "", f"Its {names} are rehyat_jax's own; diffusers has no pipeline for them."]


def _training(facts: CardFacts) -> list[str]:
    lines = ["## Training", ""]
    if not facts.runs:
        return [*lines, "The checkpoint came without records of its training."]
    first = facts.runs[0].init_from
    start = f"The first run started from `{'/'.join(Path(first).parts[-2:])}`." if first else ""
    return [
        *lines,
        f"These runs of rehyat_jax made it, one after another. {start}".rstrip(),
        "",
        *runs_table(list(facts.runs)),
    ]


def _evaluation(facts: CardFacts) -> list[str]:
    lines = ["## Evaluation", ""]
    if facts.evaluation is None:
        return [*lines, "No evaluation was given when this card was written."]
    about = facts.evaluation.about
    data, version = about["data"], about["versions"].get("rehyat_jax")
    samples = about["options"].get("samples")
    return [
        *lines,
        f"Compared with its softmax teacher on {data.get('examples')} {data.get('kind')} with latents "
        f"{data.get('latents_shape')}"
        + (f" and on {samples} samples of each model from the same noise" if samples else "")
        + ". Every figure has its 95% confidence interval.",
        "",
        *figure_tables(facts.evaluation.metrics),
        "",
        f"Measured by `rehyat evaluate` of rehyat_jax {version} on {about['device']}.",
    ]


def _limits(facts: CardFacts) -> list[str]:
    limits = ["The model has the limits and biases of its base and of its training data."]
    if facts.config.hybrid_blocks:
        limits.append(
            "Hybrid blocks read frames outside the window through features of a fixed size. This approximates the "
            "base's attention, and what it loses grows with the distance and the length of the video."
        )
    if facts.evaluation is None:
        limits.append("Its quality was not measured here.")
    elif not facts.evaluation.about["options"].get("samples"):
        limits.append("Velocities and attention were compared, but no videos.")
    else:
        limits.append("The figures hold for the data, lengths and sampling options with which they were measured.")
    if solver := facts.metadata.get(SAMPLING):
        limits.append(
            f'It was trained for {solver["steps"]} steps without guidance, with the sampler "{solver["sampler"]}" of '
            f"rehyat_jax and flow shift {solver['flow_shift']:g}. Use `guidance_scale=1`. Schedulers of diffusers are "
            "other samplers."
        )
    if facts.metadata.get(NOISE_LEVELS):
        limits.append(
            "Every chunk of frames had its own noise level in training, for sampling chunk by chunk "
            "(`rehyat sample --order chunks`). `WanPipeline` gives all frames one level."
        )
    return ["## Limits", "", *(f"- {limit}" for limit in limits)]
