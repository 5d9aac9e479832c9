"""A run is five choices: model, data, optimizer, mesh, and how to run."""

from typing import Literal

from t5x_like.checkpoints.policy import CheckpointConfig
from t5x_like.configurable import configurable, players_of
from t5x_like.data.config import DataConfig
from t5x_like.errors import UserError
from t5x_like.learning.loss import Loss, LossConfig
from t5x_like.models.heads.head import Head
from t5x_like.models.transformer import ModelConfig
from t5x_like.sharding.mesh import MeshConfig
from t5x_like.training.effects import EffectConfig
from t5x_like.training.guards import GuardConfig
from t5x_like.training.initialize import InitialCheckpointConfig
from t5x_like.training.optimizers import OptimizerConfig


@configurable
class EarlyStoppingConfig:
    """Ends a run that no longer improves on the validation split.

    Attributes:
      metric: the validation metric to watch.
      patience: evaluations in a row without improvement after which training stops.
      min_delta: smallest change that counts as an improvement.
    """

    metric: Literal["loss", "accuracy"] = "loss"
    patience: int = 5
    min_delta: float = 0.0

    def __post_init__(self):
        if self.patience < 1:
            raise UserError(f"EarlyStoppingConfig.patience is {self.patience}: it must be at least 1.")
        if self.min_delta < 0:
            raise UserError(f"EarlyStoppingConfig.min_delta is {self.min_delta}: it must not be negative.")

    def exhausted(self, history: list[float]) -> bool:
        """True when the last `patience` values of the metric, oldest first, brought no improvement."""
        values = history if self.metric == "loss" else [-value for value in history]
        best, since = float("inf"), 0
        for value in values:
            if value < best - self.min_delta:
                best, since = value, 0
            else:
                since += 1
        return since >= self.patience


@configurable
class LoggingConfig:
    """What a run shows and writes beside `metrics.jsonl`.

    Attributes:
      every_steps: steps between records of training metrics.
      tensorboard: also writes TensorBoard events to MODEL_DIR/tensorboard.
      wandb_project: also logs to this Weights & Biases project (extra: wandb); None: off.
      progress: shows a progress bar, or plain lines where the output is no terminal.
      sample_tokens: length of a sample, in tokens; 0: none.
      sample_prompt: text that samples continue; empty: starts at a document's beginning.
      sample_every_steps: steps between samples of text in MODEL_DIR/samples.jsonl and the log; 0: only one that ends
        the run.
      profile_steps: the first and the last step of a trace in MODEL_DIR/profile, which xprof shows; None: no trace.
      norms_every_steps: steps between records of the norms of activations, gradients and updates, layer by layer, as
        split `norms` of the metrics. Activations are those of the updated parameters on the batch of the step; it
        compiles one program more. 0: none.
    """

    every_steps: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None
    progress: bool = True
    sample_tokens: int = 200
    sample_prompt: str = ""
    sample_every_steps: int = 0
    profile_steps: tuple[int, int] | None = None
    norms_every_steps: int = 0

    def __post_init__(self):
        if self.every_steps < 1:
            raise UserError(f"LoggingConfig.every_steps is {self.every_steps}: it must be at least 1.")
        for name in ("sample_tokens", "sample_every_steps", "norms_every_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"LoggingConfig.{name} is {getattr(self, name)}: it must not be negative.")
        if self.sample_every_steps and not self.sample_tokens:
            raise UserError("LoggingConfig.sample_every_steps is set, but sample_tokens is 0: give samples a length.")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise UserError(
                f"LoggingConfig.profile_steps is {self.profile_steps}: give the first and the last step, from 1 on."
            )


@configurable
class RunConfig:
    """How long to train, what to minimise, when to evaluate and save.

    Attributes:
      model_dir: directory of the run: checkpoints, metrics, plots. The same command with the same directory resumes it.
      steps: optimizer steps in all, those before a resume included.
      seed: of initial parameters and dropout; the order of the data has its own, DataConfig.seed.
      gradient_accumulation: parts of the batch whose gradients are added up in turn, to save memory; divides
        the batch size.
      loss: what to minimise.
      evaluate_every_steps: steps between evaluations on the validation split; the last step is always evaluated.
      evaluate_num_batches: validation batches per evaluation; None: the whole split.
      ema_decay: decay of an exponential moving average of the parameters, kept beside them and used for evaluation and
        generation; None: off.
      early_stopping: ends the run early; None: never.
      checkpoints: when to save and what to keep.
      guard: what is done about bad steps, corrupt devices and hanging processes.
      initialize_from: parameters of another run to begin with; None: random ones.
      logging: what to show and write.
      effects: what else happens after every step, in this order: parts of your own.
    """

    model_dir: str
    steps: int
    seed: int = 0
    gradient_accumulation: int = 1
    loss: Loss = LossConfig()
    evaluate_every_steps: int = 250
    evaluate_num_batches: int | None = None
    ema_decay: float | None = None
    early_stopping: EarlyStoppingConfig | None = None
    checkpoints: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    initialize_from: InitialCheckpointConfig | None = None
    logging: LoggingConfig = LoggingConfig()
    effects: tuple[EffectConfig, ...] = ()

    def __post_init__(self):
        for name in ("steps", "gradient_accumulation", "evaluate_every_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"RunConfig.{name} is {getattr(self, name)}: it must be at least 1.")
        if not self.model_dir:
            raise UserError("RunConfig.model_dir is empty: name a directory, e.g. --gin.MODEL_DIR=runs/a.")
        if self.evaluate_num_batches is not None and self.evaluate_num_batches < 1:
            raise UserError(f"RunConfig.evaluate_num_batches is {self.evaluate_num_batches}: at least 1, or None.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"RunConfig.ema_decay is {self.ema_decay}: it must lie between 0 and 1, or be None.")


@configurable
class Experiment:
    """Everything a run is made of: the root of its configuration.

    Attributes:
      model: what is trained.
      data: what it is trained on.
      optimizer: how parameters are updated.
      mesh: how devices share the work.
      run: how long, and what to write down.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    run: RunConfig

    def __post_init__(self):
        self._check_features()
        if self.model.positions is not None:
            self.model.positions.check_length(self.data.sequence_length)
        if self.data.batch_size % self.run.gradient_accumulation:
            raise UserError(
                f"DataConfig.batch_size ({self.data.batch_size}) is not a multiple of RunConfig.gradient_accumulation "
                f"({self.run.gradient_accumulation})."
            )

    def _check_features(self):
        """The objective must give the model what it reads, and the head what it is scored by."""
        model, objective = type(self.model).__name__, type(self.data.objective).__name__
        features, suffix = self.data.features, "_input_tokens"
        reads = {"encoder", "decoder"} if self.model.reads_inputs else {self.model.features}
        given = {name.removesuffix(suffix) for name in features if name.endswith(suffix)}
        if reads != given:
            raise UserError(
                f"Experiment.model is {model}, which reads {' and '.join(sorted(reads))} tokens, but "
                f"DataConfig.objective = @{objective}() gives {' and '.join(sorted(given))} tokens: choose a model and "
                "an objective that fit."
            )
        self._check_head(objective)
        biases = (stack.position_bias for stack in self.model.stacks.values())
        if "decoder_order" in features and any(bias is not None for bias in biases):
            raise UserError(
                f"DataConfig.objective = @{objective}() orders tokens otherwise than they stand, and "
                "StackConfig.position_bias goes by where they stand: use rotary or learned positions."
            )

    def _check_head(self, objective: str):
        """The head must be scored by what the objective gives, and keep the rows together that it compares."""
        head, side, features = self.model.head, self.model.features, self.data.features
        if head.target(side) not in features:
            fitting = [cls.__name__ for cls in players_of(Head) if cls.target(side) in features]
            raise UserError(
                f"{type(self.model).__name__}.head is {type(head).__name__}, but DataConfig.objective = @{objective}() "
                f"has other things to predict: use {' or '.join(fitting) or 'another objective'}."
            )
        head.check(objective, features, self.data.tasks)
        if head.compares_rows:
            self._check_pairs(type(head).__name__)

    def _check_pairs(self, head: str):
        """What would part the rows that a head compares."""
        values = {
            "RunConfig.gradient_accumulation": (self.run.gradient_accumulation, 1),
            "DataConfig.batch_size": (self.data.batch_size, self.data.batch_size // 2 * 2),
            "The number of Mixture.sources": (len(self.data.tasks), 1),
        }
        for name, (value, fitting) in values.items():
            if value != fitting:
                raise UserError(
                    f"{name} is {value}, which would part the pairs of rows that {head} compares: use {fitting or 2}."
                )
