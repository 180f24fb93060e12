"""The section `model.rope_scaling`: which settings each type of RoPE scaling has, and their checks."""

import dataclasses

from maxllama4.settings import one_of, positive, require

# The settings of each way to scale RoPE: those it needs, and those it can do without.
ROPE_TYPES = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "dynamic": (("factor",), ()),
  "llama3": (
    ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    (),
  ),
  "yarn": (
    ("original_max_position_embeddings",),
    (
      *("factor", "attention_factor", "beta_fast", "beta_slow"),
      *("mscale", "mscale_all_dim", "truncate"),
    ),
  ),
  "longrope": (
    ("short_factor", "long_factor", "original_max_position_embeddings"),
    ("factor", "attention_factor"),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Frequency scaling of long-context models, in Hugging Face's names (`rope_scaling`).

  `ROPE_TYPES` says which settings each type has; the others are null. `model/rope.py` says what they do.
  """

  rope_type: str
  factor: float | None = None  # yarn, longrope: null is max / original_max_position_embeddings
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  original_max_position_embeddings: int | None = None  # positions
  attention_factor: float | None = None  # null: by the type's formula
  beta_fast: float | None = None  # turns within the original length; null: 32
  beta_slow: float | None = None  # turns within the original length; null: 1
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool | None = None  # null: true
  short_factor: tuple[float, ...] | None = None  # one a frequency
  long_factor: tuple[float, ...] | None = None  # one a frequency

  def __post_init__(self):
    section = "model.rope_scaling"
    one_of(f"{section}.rope_type", self.rope_type, tuple(ROPE_TYPES))
    needed, optional = ROPE_TYPES[self.rope_type]
    for field in dataclasses.fields(self)[1:]:
      name, value = field.name, getattr(self, field.name)
      require(
        value is not None or name not in needed,
        f"{section}.{name} is missing; {section}.rope_type={self.rope_type} needs it.",
      )
      require(
        value is None or name in (*needed, *optional),
        f"{section}.{name}={value} is no setting of {section}.rope_type={self.rope_type}; leave it out.",
      )
      if isinstance(value, tuple):
        require(min(value, default=1) > 0, f"{section}.{name} must hold numbers greater than 0.")
      elif value is not None and name not in ("truncate", "mscale", "mscale_all_dim"):
        positive(section, self, name)
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
      smaller, larger = getattr(self, low), getattr(self, high)
      require(
        smaller is None or larger is None or smaller <= larger,
        f"{section}.{low}={smaller} exceeds {section}.{high}={larger}; swap them.",
      )
