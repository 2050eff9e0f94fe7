"""The one table of a configuration's fields: default, allowed values, effect on a resumed run, and meaning.

`default_config`, `check_config`, the check of a resumed run, `train --help` and docs/configuration.md are made from it.
After a change, `python -m rehyat_jax.training.fields_page` writes that page anew.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from rehyat_jax.attention.features.config import INPUTS
from rehyat_jax.attention.features.kinds import FEATURE_MAPS
from rehyat_jax.attention.features.mlp import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS
from rehyat_jax.attention.form import FORMS
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.hybrid.api import STABILIZERS
from rehyat_jax.attention.hybrid.backend import IMPLEMENTATIONS
from rehyat_jax.data.sources import SOURCES
from rehyat_jax.models.lora import LORA_TARGETS
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.modeling import REMAT_POLICIES
from rehyat_jax.training.distill import LOSSES
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.values import Blocks, Boolean, Choice, Entry, Integer, Real, Several, Text, Values

REFUSED = "refused"
CHANGED = "another run from here on"
ROUNDED = "the same run, to rounding"
SAME = "the same run"

EFFECTS = {
    SAME: "The result stays the same.",
    ROUNDED: "Results differ by rounding.",
    CHANGED: "The run resumes with the new value.",
    REFUSED: "The run does not start. The field decides what is trained, or on which examples. With another value, the "
    "saved state would be useless, or the position in the data would mean other examples.",
}
"""Effects of resuming a run with another value of a field, in the words that a run prints."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A change that is refused although the field may change.

    Attributes:
      words: which change it is, after "refused".
      applies: (saved value, new value, number of steps that were made) -> True if it is refused.
    """

    words: str
    applies: Callable[[Any, Any, int], bool]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
      path: its name with those of its groups, as "optimizer.name".
      default: its value if no file and no command line gives one. Its type is the field's type.
      allowed: the values that it may have.
      effect: effect of resuming a run with another value, a key of `EFFECTS`.
      help: its meaning in one or two sentences.
      refusal: changes that are refused although `effect` allows others.
    """

    path: str
    default: Any
    allowed: Values
    effect: str
    help: str
    refusal: Refusal | None = None


_FORM = HybridConfig()
_MAP = _FORM.feature_map
_DEVICES = Integer(1, 2**24, also=(-1,))
_FEWER_STEPS = Refusal("if fewer than were made", lambda saved, now, made: now < made)
_FROM_OR_TO_ZERO = Refusal("from or to 0", lambda saved, now, made: 0 in (saved, now))

FIELDS = (
    Field(
        "stage",
        "finetune",
        Choice(STAGES),
        REFUSED,
        '"pretrain" trains a softmax model from scratch. "distill" (stage 1) trains feature maps only, each block by '
        'itself. "velocity" trains feature maps through the complete model. "finetune" (stage 2) trains everything, or '
        'adapters (`lora.rank`). "guidance", "consistency" and "dmd" make a student of few steps (docs/few_steps.md).',
    ),
    Field(
        "preset",
        "tiny",
        Choice(WAN_PRESETS),
        REFUSED,
        "Size of a model that is trained from scratch. `plan` assumes it if `init_from` does not exist.",
    ),
    Field(
        "init_from",
        "",
        Text(),
        REFUSED,
        "Model that the run starts from: a PyTorch folder in either layout, or a model checkpoint.",
    ),
    Field("seed", 0, Integer(0), REFUSED, "Seed of initial values, noise and the order of the examples."),
    Field(
        "hybrid.blocks",
        None,
        Blocks(may_be_unset=True),
        REFUSED,
        "The blocks that become hybrid. If unset, the model keeps its attention. For a hybrid model, some of its "
        "hybrid blocks may be given; the others become softmax.",
    ),
    Field(
        "hybrid.chunk_frames", _FORM.chunk_frames, Integer(1, 10**6), REFUSED, "Latent frames of a chunk of the window."
    ),
    Field(
        "hybrid.overlap_frames",
        _FORM.overlap_frames,
        Integer(0, 10**6),
        REFUSED,
        "Latent frames before a chunk that its softmax attention reads, too; at most chunk_frames.",
    ),
    Field(
        "hybrid.causal",
        _FORM.causal,
        Boolean(),
        REFUSED,
        "True: linear attention reads only the past. False: it reads the future, too.",
    ),
    Field(
        "hybrid.stabilizer",
        _FORM.stabilizer,
        Choice(STABILIZERS),
        REFUSED,
        "Constant that is subtracted from the scores; see `hybrid_attention`.",
    ),
    Field(
        "hybrid.anchor_frames",
        _FORM.anchor_frames,
        Integer(0, 10**6),
        REFUSED,
        "First latent frames of a video that the softmax attention of every chunk reads, too; at most chunk_frames.",
    ),
    Field(
        "hybrid.decay",
        _FORM.decay,
        Boolean(),
        REFUSED,
        "True: learn, for every head, how linear attention decays with the distance from the window.",
    ),
    Field(
        "hybrid.linear_window",
        _FORM.linear_window,
        Boolean(),
        REFUSED,
        "True: linear attention reads the frames of the window too. Not with decay.",
    ),
    Field("hybrid.feature_map.kind", _MAP.kind, Choice(FEATURE_MAPS), REFUSED, "Kind of the feature maps."),
    Field("hybrid.feature_map.features", _MAP.features, Integer(1, 2**16), REFUSED, "Features of each head."),
    Field("hybrid.feature_map.num_layers", _MAP.num_layers, Integer(1, 100), REFUSED, 'Linear layers of kind "mlp".'),
    Field(
        "hybrid.feature_map.degree",
        _MAP.degree,
        Integer(1, 100),
        REFUSED,
        'Highest power of an output of kind "mlp"; it divides the features.',
    ),
    Field(
        "hybrid.feature_map.hidden_activation",
        _MAP.hidden_activation,
        Choice(HIDDEN_ACTIVATIONS),
        REFUSED,
        'Activation after every layer but the last of kind "mlp".',
    ),
    Field(
        "hybrid.feature_map.output_activation",
        _MAP.output_activation,
        Choice(OUTPUT_ACTIVATIONS),
        REFUSED,
        'Activation after the last layer of kind "mlp".',
    ),
    Field(
        "hybrid.feature_map.input",
        _MAP.input,
        Choice(INPUTS),
        REFUSED,
        'Queries and keys that feature maps read: after RoPE ("rotated"), before it ("unrotated"), or before their '
        'norm too ("unnormed").',
    ),
    Field(
        "hybrid.feature_map.gate",
        _MAP.gate,
        Boolean(),
        REFUSED,
        "True: learn to multiply the features of each token by a gate between 0 and 2.",
    ),
    Field(
        "forms",
        (),
        Several(Entry()),
        REFUSED,
        'Other forms in other blocks, such as ({"blocks": (0, 1), "chunk_frames": 6}, {"blocks": (29,), "kind": '
        '"softmax"}). An entry has the fields that differ from config.hybrid. It overrides blocks = "all".',
    ),
    Field(
        "data.source",
        "digits",
        Choice(SOURCES),
        REFUSED,
        'Training examples: "digits", or "prepared" for a folder that `rehyat_jax.prepare` wrote.',
    ),
    Field("data.path", "", Text(), CHANGED, 'Folder of source "prepared".'),
    Field(
        "data.workers",
        0,
        Integer(0, 1000),
        SAME,
        "Processes that read examples ahead of time. With 0, the training process reads them.",
    ),
    Field(
        "data.corrupt",
        "error",
        Choice(("error", "skip")),
        CHANGED,
        'A record that cannot be read: "error" stops the run, "skip" takes the next one in its place.',
    ),
    Field(
        "data.weights",
        (),
        Several(Real(0)),
        REFUSED,
        "Relative number of batches of each shape in the folder, in the order of dataset.json. () follows the number "
        "of examples.",
    ),
    Field("steps", 1000, Integer(1), CHANGED, "Updates of the run.", _FEWER_STEPS),
    Field("batch_size", 16, Integer(1, 2**24), REFUSED, "Examples of an update."),
    Field(
        "accumulation_steps",
        1,
        Integer(1, 2**24),
        CHANGED,
        "Equal parts of a batch that run one after another; it divides batch_size.",
    ),
    Field(
        "dtype",
        "bfloat16",
        Choice(("float32", "bfloat16")),
        CHANGED,
        "Compute dtype. Parameters, optimizer state and average are always float32.",
    ),
    Field(
        "remat",
        "none",
        Choice(REMAT_POLICIES),
        ROUNDED,
        '"none" keeps all arrays for the backward pass. The others recompute some, or keep some in the host\'s memory.',
    ),
    Field(
        "attention_implementation",
        "",
        Choice(("", *IMPLEMENTATIONS)),
        ROUNDED,
        'Implementation of hybrid attention. "" picks the best for the platform.',
    ),
    Field(
        "optimizer.name",
        "adamw",
        Choice(("adamw", "muon")),
        REFUSED,
        '"muon" updates the blocks\' matrices by Muon and the rest by AdamW.',
    ),
    Field("optimizer.learning_rate", 1e-5, Real(0), CHANGED, "Highest learning rate of AdamW."),
    Field("optimizer.muon_learning_rate", 0.02, Real(0), CHANGED, "Highest learning rate of Muon."),
    Field(
        "optimizer.warmup_steps",
        100,
        Integer(0),
        CHANGED,
        "Steps in which the learning rate rises to its highest value; fewer than steps.",
    ),
    Field(
        "optimizer.decay",
        "cosine",
        Choice(("cosine", "linear", "constant")),
        CHANGED,
        'Learning rate after the warmup: "cosine" or "linear" to 0, or "constant".',
    ),
    Field("optimizer.weight_decay", 0.01, Real(0), CHANGED, "Decoupled weight decay."),
    Field("optimizer.clip_norm", 1.0, Real(0), CHANGED, "Highest global norm of a gradient. 0 does not clip."),
    Field(
        "distill.loss",
        "l1",
        Choice(LOSSES),
        CHANGED,
        'Loss of a block in stage "distill": "l1", the mean absolute difference from softmax attention; "l2", the mean '
        'squared difference; or "energy_l2", "l2" divided by the mean square of softmax attention.',
    ),
    Field(
        "distill.clip_norm",
        0.0,
        Real(0),
        CHANGED,
        'Highest norm of one block\'s gradient in stage "distill"; the other blocks keep theirs. 0 does not clip.',
    ),
    Field(
        "distill.updates_per_batch",
        1,
        Integer(1, 10**4),
        REFUSED,
        'Updates of a step in stage "distill", all on the same inputs of attention. The teacher runs once for them. '
        "More than 1 needs AdamW, accumulation_steps = 1 and optimizer.clip_norm = 0.",
    ),
    Field(
        "velocity.teacher",
        "",
        Text(),
        CHANGED,
        'Softmax model whose velocity is learned, or both scores of stage "dmd". Without it, the teacher is '
        'init_from with softmax attention in all blocks, for which stage "finetune" needs `lora.rank`; in stages '
        '"guidance", "consistency" and "dmd" it is init_from in its own forms.',
    ),
    Field(
        "velocity.teacher_weight",
        0.0,
        Real(0, 1),
        CHANGED,
        'Weight of the teacher\'s velocity in the loss of stage "finetune"; the rest is that of the videos. With 1, it '
        "needs no videos.",
    ),
    Field(
        "velocity.guidance_scale",
        1.0,
        Real(0),
        CHANGED,
        "Guidance scale of the teacher's velocity. Above 1, the student learns the velocity after guidance.",
    ),
    Field(
        "few_step.steps",
        4,
        Integer(1, 1000),
        CHANGED,
        'Number of steps in which the student of stage "guidance", "consistency" or "dmd" samples a video. Stage "dmd" '
        "trains only at the noise levels of these steps. The result stores the number, and `sample` uses it.",
    ),
    Field(
        "dmd.score_updates",
        5,
        Integer(1, 100),
        REFUSED,
        "Updates of the fake score for one of the student.",
    ),
    Field(
        "dmd.score_rate",
        1.0,
        Real(1e-6, 1e6),
        CHANGED,
        "Learning rate of the fake score, as a multiple of the student's.",
    ),
    Field(
        "consistency.warmup_steps",
        1000,
        Integer(0),
        CHANGED,
        "Steps in which the weight of the velocity's derivative along the teacher's path grows from 0 to 1.",
    ),
    Field(
        "lora.rank",
        0,
        Integer(0, 2**16),
        REFUSED,
        'Rank of low-rank adapters (LoRA). Above 0, adapters are trained, in stages "velocity" and "finetune" also '
        "feature maps, and all else is frozen. 0 trains no adapters.",
    ),
    Field(
        "lora.alpha",
        0.0,
        Real(0, 1e6),
        REFUSED,
        "The adapters' product is multiplied by alpha / rank. 0 stands for alpha = rank.",
    ),
    Field(
        "lora.targets",
        ("query", "key", "value", "output"),
        Several(Choice(LORA_TARGETS)),
        REFUSED,
        "Linear layers with adapters, in every block: those of self-attention and of cross-attention with these names, "
        'and "up" and "down" of the feed-forward.',
    ),
    Field(
        "ema_decay",
        0.99,
        Real(0, 1, below=True),
        CHANGED,
        "Decay of the parameters' moving average. 0 keeps no average.",
        _FROM_OR_TO_ZERO,
    ),
    Field(
        "flow_shift",
        5.0,
        Real(0, 1e6, above=True),
        CHANGED,
        "Shift of the noise levels; values above 1 give more noise.",
    ),
    Field(
        "timestep_sampling",
        "logit_normal",
        Choice(("logit_normal", "uniform")),
        CHANGED,
        "Distribution of the noise levels before the shift.",
    ),
    Field(
        "noise_by_chunk",
        False,
        Boolean(),
        REFUSED,
        "True: every chunk of a video has its own noise level, as `sample --order chunks` needs. It is for stages "
        '"pretrain" and "finetune" without a teacher, "guidance" and "dmd", and for causal hybrid attention in every '
        'block. In stage "dmd", the student makes its videos in that order.',
    ),
    Field(
        "teacher_forcing",
        False,
        Boolean(),
        REFUSED,
        "With noise_by_chunk. True: every chunk learns after clean chunks of the real video, as it is sampled later. "
        'False: after noisy ones (diffusion forcing). Stage "dmd" has neither: its chunks follow the student\'s own.',
    ),
    Field("caption_dropout", 0.1, Real(0, 1), CHANGED, "Share of the captions that are replaced by the empty caption."),
    Field("mesh.data", 1, _DEVICES, ROUNDED, "Devices along the batch, each with all parameters. -1 takes the rest."),
    Field(
        "mesh.fsdp",
        -1,
        _DEVICES,
        ROUNDED,
        "Devices along the batch that share parameters and optimizer state. -1 takes the rest.",
    ),
    Field("mesh.context", 1, _DEVICES, ROUNDED, "Devices along a video's frames. -1 takes the rest."),
    Field("mesh.tensor", 1, _DEVICES, ROUNDED, "Devices along heads and feed-forward columns. -1 takes the rest."),
    Field(
        "spike_factor",
        10.0,
        Real(0),
        CHANGED,
        "An update is skipped if its gradient norm is not finite, or more than this factor times the norm's running "
        "mean. 0 skips only what is not finite.",
    ),
    Field("max_skipped", 10, Integer(1), SAME, "The run ends after this number of skipped updates in a row."),
    Field("log_every", 10, Integer(1), SAME, "Steps from one line of metrics to the next."),
    Field(
        "evals",
        (),
        Several(Entry()),
        SAME,
        'Evaluators, such as ({"type": "attention_error", "every": 500},); see docs/forms.md.',
    ),
    Field(
        "profile",
        (),
        Several(Integer(1)),
        SAME,
        "First and last step of a trace by JAX's profiler, as (10, 12); written into profile/ of the workdir, for "
        "XProf (docs/profiles.md).",
    ),
    Field("checkpoint_every", 500, Integer(1), SAME, "Steps from one checkpoint to the next."),
    Field("keep_checkpoints", 2, Integer(1), SAME, "Number of the newest checkpoints that are kept."),
    Field(
        "keep_every",
        0,
        Integer(0),
        SAME,
        "Checkpoints of steps that are multiples of this number are kept, too. 0 keeps none for that.",
    ),
    Field(
        "keep_best",
        0,
        Integer(0),
        SAME,
        "Number of further checkpoints that are kept: those with the lowest mean of the losses logged before them.",
    ),
    Field(
        "checkpoint_dir",
        "",
        Text(),
        SAME,
        "Folder of the checkpoints instead of `checkpoints` in the workdir. It may be in an object store, as gs://...",
    ),
)

ENTRIES = {
    "forms": (
        Field("blocks", "required", Blocks(), REFUSED, "The blocks of this form."),
        Field(
            "kind",
            HybridConfig.kind,
            Choice(FORMS),
            REFUSED,
            "The form's kind; docs/forms.md lists them. An entry may have the fields of its kind. Those that it lacks "
            "are taken from config.hybrid.",
        ),
    ),
    "evals": (
        Field("type", "required", Text(), SAME, "The evaluator; docs/forms.md lists them."),
        Field("every", "required", Integer(1), SAME, "Steps from one evaluation to the next."),
        Field("name", "its type", Text(), SAME, "Prefix of the logged figures."),
        Field("batches", 1, Integer(1, 10**4), SAME, "Batches of an evaluation."),
    ),
}
"""The fields of an entry of config.forms and config.evals. A kind or a type may have others. A default that is text
describes itself."""

BY_PATH = {field.path: field for field in FIELDS}

GROUPS = {path.rpartition(".")[0] for path in BY_PATH} - {""}
"""Paths of the groups of fields."""


def effect_of_change(path: str, saved: Any, now: Any, made: int) -> str:
    """The effect, a key of `EFFECTS`, of resuming a run with another value of a field after `made` steps."""
    field = BY_PATH.get(path)
    if field is None or (field.refusal and field.refusal.applies(saved, now, made)):
        return REFUSED
    return field.effect
