"""The name under which fused kernels mark what they keep for their backward pass, so that remat can keep it too."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION_RESIDUALS = "attention_residuals"
"""For `jax.checkpoint_policies.save_only_these_names` and its like: then no forward kernel of a video's attention to
itself runs twice. About as large as the attention's output."""


def kept(results: Any) -> Any:
    """Marks a tree of arrays. A kernel's output must be marked before it is returned, as what is kept and as output."""
    return jax.tree.map(lambda array: checkpoint_name(array, ATTENTION_RESIDUALS), results)
