"""Everything that a run can set, as frozen dataclasses; load.py reads them from YAML and the command line.

A field's metadata tells what may become of it when a run is resumed (see `storage.run_folder.open_run`). Without it,
the setting changes what is computed: it stays as it is, unless the user forces another value. A section's metadata
holds for the fields in it that have none.

A number's range stands in its type (see `medllm_jax.ranges`); what holds between fields stands in `__post_init__`.
"""

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import BatchSize, Range, Ranged, Seed, Share, Steps

DType = Literal["float32", "bfloat16"]
Remat = Literal[
    "none", "elementwise", "attention_mlp", "attention_gate", "attention", "attention_offload", "dots", "full"
]
AxisSize = Annotated[int, Range(1, 2**20, also=-1)]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# It changes speed, place or what is written, not what is computed (sums may be taken in another order).
FREE = {"resume": "free"}
# The schedule depends on the number of steps unless it is constant.
FREE_IF_SCHEDULE_IS_CONSTANT = {"resume": "free if the schedule is constant"}
# The arrays of a checkpoint, or its position in the data, depend on it: force makes nothing else of them.
FIXED = {"resume": "fixed"}


def renamed(name: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a field that had another name, which files and overrides may still use."""
    return {**metadata, "formerly": name}


@dataclass(frozen=True)
class ModelConfig(Ranged, section="model"):
    """Shape of a Qwen2.5 model; the names are those of Hugging Face's config.json.

    Attributes:
        vocab_size: rows of the embedding (larger than the tokenizer's vocabulary: it is padded)
        hidden_size: width of the residual stream
        intermediate_size: width of the SwiGLU MLP
        num_hidden_layers: number of blocks
        num_attention_heads: query heads
        num_key_value_heads: key/value heads; divides num_attention_heads
        head_dim: width of one head; null is hidden_size / num_attention_heads
        rope_theta: base of the rotary frequencies
        rms_norm_eps: epsilon of RMSNorm
        tie_word_embeddings: the LM head is the embedding
        max_position_embeddings: longest sequence the model was made for
        initializer_range: standard deviation of random weights
    """

    vocab_size: Annotated[int, Range(1, 2**22)]
    hidden_size: Annotated[int, Range(1, 2**17)]
    intermediate_size: Annotated[int, Range(1, 2**20)]
    num_hidden_layers: Annotated[int, Range(1, 1000)]
    num_attention_heads: Annotated[int, Range(1, 4096)]
    num_key_value_heads: Annotated[int, Range(1, 4096)]
    head_dim: Annotated[int, Range(2, 4096)] | None = None
    rope_theta: Annotated[float, Range(1, 1e12)] = 1_000_000.0
    # What float32 rounds to 0 divides by 0 where a row of activations is all 0.
    rms_norm_eps: Annotated[float, Range(1e-30, 1)] = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: Annotated[int, Range(1, 2**27)] = 32768
    initializer_range: Annotated[float, Range(above=0, most=10)] = 0.02

    def __post_init__(self):
        super().__post_init__()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % kv_heads == 0,
            f"model.num_attention_heads {heads} is not a multiple of model.num_key_value_heads {kv_heads}",
        )
        _require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads {heads}: "
            "set model.head_dim",
        )
        _require(self.dim_of_head % 2 == 0, f"a head of {self.dim_of_head} can't be rotated: head_dim must be even")

    @property
    def dim_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class MeshConfig(Ranged, section="mesh"):
    """Devices along each axis; one axis may be -1: what the others leave.

    Attributes:
        data: replicas of the weights, batch split
        fsdp: weights, gradients and optimizer state split; batch split too
        tensor: heads and MLP split
    """

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1

    def __post_init__(self):
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor)
        _require(
            sizes.count(-1) <= 1,
            f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: of the sizes at most one is -1",
        )


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Norms, softmax, losses and reductions are float32 whatever is set here.

    Attributes:
        params: stored weights, or adapters, that are trained; bfloat16 loses steps below 1/512 of a weight in
            rounding, so that it needs a learning rate of at least 8e-5
        compute: matrix products
    """

    params: DType = field(default="float32", metadata=FIXED)
    compute: DType = "bfloat16"


@dataclass(frozen=True)
class InitConfig:
    """Where the weights come from.

    Attributes:
        checkpoint: run folder (or converted Hugging Face model) whose last checkpoint the weights are taken from;
            null draws random weights from the run's seed
    """

    # Only the first start reads it.
    checkpoint: str | None = field(default=None, metadata=FREE)


@dataclass(frozen=True)
class AdapterConfig(Ranged, section="adapter"):
    """LoRA: low-rank adapters are trained and the weights that they stand on, the base, are frozen (docs/adapters.md).

    Attributes:
        rank: of an adapter's two matrices
        alpha: an adapter's output is scaled by alpha / rank
        dropout: share of an adapter's inputs that training drops
        rslora: the scale is alpha / sqrt(rank) instead
        projections: the linear layers that get an adapter
        base: number format of the base; of int8, int4 and nf4 only the projections are so, the rest is in
            precision.compute
        double_quantization: the scales of a quantised base are quantised to 8 bits too
    """

    rank: Annotated[int, Range(1, 2**14)] = 16
    alpha: Annotated[float, Range(above=0, most=1e6)] = 32.0
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    rslora: bool = False
    projections: tuple[Projection, ...] = typing.get_args(Projection)
    base: Literal["float32", "bfloat16", "int8", "int4", "nf4"] = "bfloat16"
    double_quantization: bool = False

    def __post_init__(self):
        super().__post_init__()
        _require(
            len(set(self.projections)) == len(self.projections) > 0,
            f"adapter.projections is {', '.join(self.projections) or 'empty'}: name at least one, and each once",
        )
        _require(
            not self.double_quantization or self.base in ("int8", "int4", "nf4"),
            f"adapter.double_quantization is set and adapter.base is {self.base}, which has no scales: "
            "choose int8, int4 or nf4",
        )

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by; rsLoRA is arXiv 2312.03732."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class DataConfig(Ranged, section="data"):
    """The rows a run reads.

    Attributes:
        store: token store (cpt) or pair store (rpo), local or gs://; or a list of stores, whose corpora differ in name
        mix: corpus -> weight, its share of the rows that are read; each corpus then has epochs of its own, every one is
            named, and 0 leaves it out; null shuffles all rows together and reads each once an epoch
        batch_size: rows of one optimizer step, over all hosts
        accumulate: micro-batches that one optimizer step is computed in
        threads: reading threads
        prefetch: batches held ready ahead of the device; at least as many as threads
        epochs: the run ends when all rows were read so many times, if `steps` does not end it before; null has `steps`
            alone end it
    """

    # Rows are told apart by their digest, not by where they lie.
    store: str | tuple[str, ...] = field(metadata=FREE)
    mix: dict[str, Annotated[float, Range(0, 1e15)]] | None = None
    batch_size: BatchSize = field(default=8, metadata=FIXED)
    accumulate: BatchSize = field(default=1, metadata=FREE)
    threads: Annotated[int, Range(1, 1024)] = field(default=4, metadata=FREE)
    prefetch: Annotated[int, Range(1, 65_536)] = field(default=8, metadata=FREE)
    # What comes of it are steps, which have their own rule.
    epochs: Annotated[float, Range(above=0, most=1e6)] | None = field(default=None, metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        _require(bool(self.stores), "data.store is an empty list: name at least one store")
        _require(
            self.prefetch >= self.threads,
            f"data.prefetch {self.prefetch} is less than data.threads {self.threads}: some threads would never read",
        )
        _require(
            self.epochs is None or self.mix is None,
            "data.epochs and data.mix are both set: with a mix each corpus has epochs of its own; give steps instead",
        )
        _require(
            self.batch_size % self.accumulate == 0,
            f"data.batch_size {self.batch_size} is not a multiple of data.accumulate {self.accumulate}",
        )

    @property
    def stores(self) -> tuple[str, ...]:
        return (self.store,) if isinstance(self.store, str) else self.store


@dataclass(frozen=True)
class HeldOutConfig(Ranged, section="held_out"):
    """What is measured and not trained on.

    Attributes:
        store: store or list of stores, as data.store; an RPO run needs their reference log-probabilities too
        exam: exam (see docs/exams.md) whose likeliest letters are looked at, as a cheap monitor
        template: its prompts: a name or a YAML file
        every: steps between measurements; the last step is always measured
    """

    store: str | tuple[str, ...] | None = None
    exam: str | None = None
    template: str = "igakuqa"
    every: Steps = 100

    def __post_init__(self):
        super().__post_init__()
        _require(bool(self.stores or self.exam), "held_out has neither store nor exam: name what is to be measured")

    @property
    def stores(self) -> tuple[str, ...]:
        return (self.store,) if isinstance(self.store, str) else self.store or ()


@dataclass(frozen=True)
class ObjectiveConfig(Ranged, section="objective"):
    """What is minimised.

    Attributes:
        name: cpt is next-token prediction; sft is that of responses alone; rpo is a loss of preferences plus the NLL of
            the chosen response
        pair_loss: RPO: of preferences; dpo is the paper's
        beta: RPO: strength of the preferences' tie to the reference model
        label_smoothing: RPO with dpo: share of preferences taken to be wrong
        alpha: RPO: weight of the NLL term; 0 leaves preferences alone
        nll_reduction: RPO: `sequence` divides each chosen response's NLL by its own length, as the paper; `token` has
            all chosen tokens of a batch count alike
        reference: RPO: `cached` reads what `medllm reference` computed; `adapters_off` computes it in each step as the
            model without its adapters, which must have begun on a whole model
        vocab_chunks: parts of the vocabulary, which they divide, that the LM head is computed in; 1 holds the logits of
            a whole micro-batch
    """

    name: Literal["cpt", "sft", "rpo"] = field(default="cpt", metadata=FIXED)
    pair_loss: Literal["dpo", "ipo", "hinge"] = "dpo"
    beta: Annotated[float, Range(1e-6, 1000)] = 0.1
    label_smoothing: Annotated[float, Range(0, below=0.5)] = 0.0
    alpha: Annotated[float, Range(0, 1000)] = 1.0
    nll_reduction: Literal["sequence", "token"] = "sequence"
    reference: Literal["cached", "adapters_off"] = "cached"
    vocab_chunks: Annotated[int, Range(1, 65_536)] = field(default=1, metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.label_smoothing == 0 or self.pair_loss == "dpo",
            f"objective.label_smoothing is set and objective.pair_loss is {self.pair_loss}: only dpo has it",
        )


@dataclass(frozen=True)
class OptimizerConfig(Ranged, section="optimizer"):
    """AdamW with linear warm-up, then decay.

    Attributes:
        learning_rate: peak learning rate
        schedule: shape after the warm-up
        warmup_steps: steps from 0 to the peak
        final_fraction: the schedule ends at this share of the peak
        b1: decay of the first moment
        b2: decay of the second moment
        eps: added to the root of the second moment
        weight_decay: decoupled decay of matrices; norms and biases have none
        clip_norm: gradients are scaled down to this global norm; 0 never clips
        state_dtype: what both moments are kept in; bfloat16 saves four bytes a parameter, and rounds moments to three
            digits: changes of the second below 0.4 % are lost, so it needs a b2 of at most 0.98
    """

    # What a smaller one changes, float32 rounds away.
    learning_rate: Annotated[float, Range(1e-12, 1)] = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    final_fraction: Share = 0.1
    # The bias correction divides by 1 - b, which float32 must not round to 0.
    b1: Annotated[float, Range(0, 0.99999)] = 0.9
    b2: Annotated[float, Range(0, 0.99999)] = 0.95
    # Squares of gradients below 1e-19 are 0 in float32, and such gradients are divided by eps alone.
    eps: Annotated[float, Range(1e-16, 1)] = 1e-8
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    clip_norm: Annotated[float, Range(0, 1e9)] = 1.0
    state_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=FIXED)

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.state_dtype == "float32" or self.b2 <= 0.98,
            f"optimizer.state_dtype is bfloat16 and optimizer.b2 is {self.b2}: steps of the second moment would be "
            "lost in rounding; set b2 to at most 0.98, or state_dtype to float32",
        )


@dataclass(frozen=True)
class CheckpointConfig(Ranged, section="checkpoint"):
    """When the run is saved.

    Attributes:
        every: steps between checkpoints; the last step is always saved
        keep: newest checkpoints kept
    """

    every: Steps = 500
    keep: Annotated[int, Range(1, 1_000_000)] = 2


@dataclass(frozen=True)
class GuardConfig(Ranged, section="guard"):
    """Steps that must not change the model: those whose loss or gradient is no finite number, and spikes if asked for.

    Such a step updates nothing. It is recorded in skipped.jsonl of the run folder, with its rows.

    Attributes:
        action: what then: `stop` ends the run, `skip` goes on with the next batch
        max_skipped: a run that skips more steps stops all the same; to skip none, set `action: stop`
        grad_norm: a gradient of a larger norm is a spike; 0 takes none for one
        loss: a larger loss is a spike; 0 takes none for one
    """

    action: Literal["stop", "skip"] = field(default="stop", metadata=FREE)
    max_skipped: Steps = field(default=10, metadata=renamed("limit", FREE))
    grad_norm: Annotated[float, Range(0, 1e9)] = 0.0
    loss: Annotated[float, Range(0, 1e9)] = 0.0


@dataclass(frozen=True)
class WatchdogConfig(Ranged, section="watchdog"):
    """When a run that does not move is ended, with code 1, so that it can be started again.

    Attributes:
        seconds: that one stage may last: starting, a step (and compiling the first), a save; 0 lets it last for ever
        heartbeat_seconds: a process of several that is silent for so long is taken for dead, and all end
    """

    seconds: Annotated[float, Range(0, 31_536_000)] = 1800.0
    heartbeat_seconds: Annotated[int, Range(1, 604_800)] = 100


@dataclass(frozen=True)
class LoggingConfig(Ranged, section="logging"):
    """What is written while the run goes on.

    Attributes:
        every: steps between fetches of the metrics, each with a line of progress; metrics.jsonl, TensorBoard and W&B
            have every step
        wandb: project of Weights & Biases to write to as well, with the package that the extra `wandb` installs
    """

    every: Steps = 10
    wandb: str | None = None


@dataclass(frozen=True)
class RunConfig(Ranged):
    """One training run, CPT or RPO.

    Attributes:
        run: run folder, local or gs://; everything the run writes is in it
        steps: optimizer steps; null leaves their number to data.epochs
        seed: of random weights, of the data order and of the step's random numbers
        model: shape, or the path of a model file beside the config; null takes it from init.checkpoint
        adapter: trains adapters on the frozen weights of init.checkpoint; null trains all weights
        attention: of whole rows: `splash` is TPU's kernel; `xla` runs anywhere and holds float32 scores of an eighth of
            the queries; `cudnn` is Nvidia's kernel, with a mask of 2 S S bytes a row; `auto` is splash on TPU, else xla
        remat: what the backward pass recomputes of a block. From the most memory to the least: `none` nothing;
            `elementwise` all but matrix products and attention; `attention_mlp` the output projection too;
            `attention_gate` the up projection too; `attention` the gate too, so it keeps q, k, v and attention;
            `attention_offload` the same, kept in the host's memory; `full` all. `dots` keeps all products with weights,
            adapters' too, and recomputes attention
        distributed: one process a host; JAX finds the others by itself on TPU pods, GKE and Slurm
        profile: steps to trace for xprof, like steps=10:13; the trace is in profile/ of the run folder
    """

    # What settings are called by TRL, transformers, LLaMA-Factory and MaxText -> here: to say which one was meant.
    NAMES_ELSEWHERE: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "adam_beta1": "optimizer.b1",
            "adam_beta2": "optimizer.b2",
            "adam_epsilon": "optimizer.eps",
            "base_output_directory": "run",
            "bf16": "precision.compute",
            "dataset": "data.store",
            "eval_steps": "held_out.every",
            "gradient_accumulation_steps": "data.accumulate",
            "gradient_checkpointing": "remat",
            "gradient_clipping_threshold": "optimizer.clip_norm",
            "learning_rate_schedule": "optimizer.schedule",
            "logging_steps": "logging.every",
            "lora_alpha": "adapter.alpha",
            "lora_rank": "adapter.rank",
            "lr": "optimizer.learning_rate",
            "lr_scheduler_type": "optimizer.schedule",
            "max_grad_norm": "optimizer.clip_norm",
            "max_steps": "steps",
            "num_train_epochs": "data.epochs",
            "model_name_or_path": "init.checkpoint",
            "output_dir": "run",
            "per_device_batch_size": "data.batch_size",
            "per_device_train_batch_size": "data.batch_size",
            "rpo_alpha": "objective.alpha",
            "save_steps": "checkpoint.every",
            "save_total_limit": "checkpoint.keep",
        }
    )

    run: str = field(metadata=FREE)
    data: DataConfig
    steps: Steps | None = field(default=None, metadata=FREE_IF_SCHEDULE_IS_CONSTANT)
    seed: Seed = 0
    model: ModelConfig | None = field(default=None, metadata=FIXED)
    init: InitConfig = field(default_factory=InitConfig)
    adapter: AdapterConfig | None = field(default=None, metadata=FIXED)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=FREE)
    held_out: HeldOutConfig | None = field(default=None, metadata=FREE)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig, metadata=FREE)
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata=FREE)
    attention: Literal["auto", "splash", "xla", "cudnn"] = field(default="auto", metadata=FREE)
    remat: Remat = field(default="none", metadata=FREE)
    distributed: bool = field(default=False, metadata=FREE)
    profile: str | None = field(default=None, metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.steps is not None or self.data.epochs is not None,
            "neither steps nor data.epochs is set: say how long to train",
        )
        _require(
            self.model is not None or self.init.checkpoint is not None,
            "neither model nor init.checkpoint is set: give the shape of a new model, or a checkpoint to start from",
        )
        _require(
            self.objective.reference == "cached" or self.adapter is not None,
            f"objective.reference is {self.objective.reference} and adapter is not set: without adapters to turn off, "
            "choose cached",
        )
        _require(
            self.adapter is None or self.init.checkpoint is not None,
            "adapter is set and init.checkpoint is not: adapters need a base, give the checkpoint that holds it",
        )
        _require(
            self.model is None or self.model.vocab_size % self.objective.vocab_chunks == 0,
            f"objective.vocab_chunks {self.objective.vocab_chunks} does not divide the vocabulary of "
            f"{self.model and self.model.vocab_size}",
        )
        _require(
            self.profile is None or self.profiled[0] in range(1, self.profiled[1] + 1),
            f"profile {quoted(self.profile)}: steps=FIRST:LAST is expected, like steps=10:13",
        )

    @property
    def profiled(self) -> tuple[int, int]:
        """First and last step to trace; (0, 0), which are none, for what `profile` should not be."""
        found = re.fullmatch(r"(?:steps=)?(\d{1,10}):(\d{1,10})", self.profile or "")
        return (int(found[1]), int(found[2])) if found else (0, 0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
