"""A toy run, alone in the registry, and a function that configures it."""

import enum
import types
from typing import Literal

import pytest

from t5x_like.config import parse_config
from t5x_like.configurable import REGISTRY, configurable
from t5x_like.errors import UserError


class Speed(enum.Enum):
    SLOW = 1
    FAST = 2


@configurable
class Norm:
    """A normalization.

    Attributes:
      kind: what is normalized.
      epsilon: added to the variance; it keeps
        the division finite.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6


@configurable
class Mlp:
    """A feed-forward layer.

    Attributes:
      width: inner width.
      bias: whether it has biases.
    """

    width: int
    bias: bool = False


@configurable
class Experts:
    """A mixture of experts.

    Attributes:
      width: inner width of each.
    """

    width: int


@configurable
class Net:
    """A network.

    Attributes:
      num_layers: layers.
      feedforward: what each layer computes.
      norm: before each layer.
      last_norm: after the last layer.
    """

    num_layers: int
    feedforward: Mlp | Experts
    norm: Norm = Norm()
    last_norm: Norm = Norm(epsilon=0.5)

    def __post_init__(self):
        if self.num_layers < 1:
            raise UserError(f"Net.num_layers is {self.num_layers}: it must be at least 1.")


@configurable
class Source:
    """A source of text.

    Attributes:
      files: globs.
      weights: of the files.
    """

    files: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


@configurable
class Job:
    """A run.

    Attributes:
      net: what is trained.
      steps: how long.
      model_dir: where.
      train: what it is trained on.
      test: what it is tested on.
      rate: learning rate.
      speed: how fast.
      note: a remark.
    """

    net: Net
    steps: int
    model_dir: str = "runs/default"
    train: Source = Source()
    test: Source | None = None
    rate: float = 0.1
    speed: Speed = Speed.SLOW
    note: str | int | None = None


TOYS = {cls.__name__: REGISTRY.pop(cls.__name__) for cls in (Norm, Mlp, Experts, Net, Source, Job)}

BASE = """
LAYERS = 2
STEPS = 100
NET = @Net()
Net.num_layers = %LAYERS
Net.feedforward = @Mlp()
Mlp.width = 8
Job.net = %NET
Job.steps = %STEPS
"""


@pytest.fixture
def toys(monkeypatch):
    """The toy classes by name; only they are registered."""
    for name in list(REGISTRY):
        monkeypatch.delitem(REGISTRY, name)
    for name, cls in TOYS.items():
        monkeypatch.setitem(REGISTRY, name, cls)
    return types.SimpleNamespace(**TOYS, Speed=Speed)


@pytest.fixture
def configure(toys, tmp_path, monkeypatch):
    """Returns configure(*overrides, **files): BASE as base.gin, then the other files, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def configure(*overrides: str, base: str = BASE, **files: str):
        for name, text in {"base": base, **files}.items():
            (tmp_path / f"{name}.gin").write_text(text)
        return parse_config(["base.gin", *(f"{name}.gin" for name in files)], overrides)

    return configure
