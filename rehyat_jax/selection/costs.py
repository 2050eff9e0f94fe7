"""The cost of one block's self-attention in a form: FLOPs, or cycles and memory of its program for a TPU."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from rehyat_jax.attention.forms.base import Form, Sizes
from rehyat_jax.attention.forms.softmax import SOFTMAX
from rehyat_jax.benchmarks.tpu_static import Case, costs
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.cost import check_topology
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.selection.candidates import Candidate
from rehyat_jax.training.continuation import code_version

COSTS = {
    "flops": "FLOPs",
    "cycles": "static TPU cycles",
    "memory": "temporary bytes on a TPU",
}
"""The costs by name, in words. docs/surgery.md explains them."""

COMPILED = "costs.json"
"""The file of the costs of compiled programs: minutes of work."""


def attention_sizes(config: WanConfig, latents: tuple[int, int, int]) -> Sizes:
    """The sizes of a model's self-attention to latents of (frames, height, width).

    Raises:
      InputError: a patch of the model does not divide a length.
    """
    for name, length, patch in zip(("frames", "height", "width"), latents, config.patch_size, strict=True):
        if length % patch or length < 1:
            raise InputError(f"--latents: expected {name} in multiples of {patch}, the model's patch, found {length}")
    frames, height, width = (length // patch for length, patch in zip(latents, config.patch_size, strict=True))
    return Sizes(frames, height * width, config.num_heads, config.head_dim)


def check_cost(cost: str, topology: str) -> None:
    """Raises InputError if a cost needs the TPU compiler, and that is missing or does not know the topology."""
    if cost != "flops":
        check_topology(topology)


def form_costs(
    candidates: Sequence[Candidate], sizes: Sizes, cost: str, topology: str, workdir: Path
) -> tuple[dict[Candidate, int], dict[str, str]]:
    """The cost of each candidate in one block, forward.

    Args:
      candidates: the candidates, softmax first.
      sizes: of the attention.
      cost: a key of `COSTS`.
      topology: whose first chip the programs are compiled for, unless the cost is FLOPs.
      workdir: place of the file `COMPILED`, from which compiled programs are not compiled again.

    Returns:
      (candidate -> its cost, label of each form that cannot be compiled or does not fit -> the reason).

    Raises:
      InputError: softmax has no cost to compare with; or the file is damaged.
    """
    if cost == "flops":
        return {candidate: candidate.form.flops(sizes).total for candidate in candidates}, {}
    found, skipped = {}, {}
    for candidate in tqdm(candidates, desc=f"compiling for {topology}", unit="form"):
        try:
            value = _compiled(candidate.form, sizes, topology, workdir / COMPILED)[cost]
        except RuntimeError as error:
            skipped[candidate.label] = f"the compiler refuses it: {shown(str(error).rpartition(f'{topology}: ')[2])}"
            continue
        if value is not None:
            found[candidate] = value
        else:
            skipped[candidate.label] = f"it needs more memory than one chip of {topology} has"
    if not found.get(candidates[0]):
        what = skipped.get(SOFTMAX.label, "it needs no temporary memory, so there is nothing to save")
        raise InputError(f"--cost {cost}: softmax cannot be compared, because {what}; give another --cost or --latents")
    return found, skipped


def _compiled(form: Form, sizes: Sizes, topology: str, file: Path) -> dict[str, int | None]:
    """The costs of a form's program; None for one that does not fit. Raises RuntimeError if the compiler fails."""
    fields = Candidate("", form).fields
    versions = f"libtpu {importlib.metadata.version('libtpu')}, rehyat_jax {code_version()}"
    key = json.dumps([topology, versions, sizes._asdict(), fields])
    known = read_json_object(file) if file.exists() else {}
    names = {"cycles", "memory"}
    if key not in known:
        arguments = {
            "heads": sizes.num_heads,
            "head_dim": sizes.head_dim,
            "frames": sizes.frames,
            "tokens_per_frame": sizes.tokens_per_frame,
            "kind": fields.pop("kind"),
            "fields": fields,
            "direction": "forward",
        }
        # The first result assumes scores that models with normalised queries and keys have.
        result = costs(Case(topology, "", form.label, "form_of", arguments))[0]
        known[key] = {
            "cycles": result.cost and result.cost.cycles,
            "memory": result.program and result.program.temporary_bytes,
        }
        with reported_write_errors(file), written_whole(file) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n")
    if not isinstance(known[key], dict) or known[key].keys() != names:
        raise InputError(f"{file}: expected cycles and memory of {form.label}, found others; delete the file")
    return known[key]
