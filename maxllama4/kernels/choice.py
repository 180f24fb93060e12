"""Which kernels the layers that are traced inside a block of code use: a setting of the run that layers do not see."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Choice:
  """`auto` leaves it to the platform and the shapes."""

  attention: str = "auto"
  grouped_matmul: str = "auto"  # one of grouped_matmul.KINDS
  dispatch: str = "auto"  # how rows get to the devices of their experts: ring, ragged_all_to_all
  expert_capacity_factor: float = 0.0  # 0: no row is dropped


_CHOICE: contextvars.ContextVar[Choice] = contextvars.ContextVar("kernels", default=Choice())


@contextlib.contextmanager
def use_kernels(choice: Choice) -> Iterator[None]:
  """Layers traced inside go by `choice`."""
  token = _CHOICE.set(choice)
  try:
    yield
  finally:
    _CHOICE.reset(token)


def current_choice() -> Choice:
  """The choice of the innermost `use_kernels`; all `auto` outside."""
  return _CHOICE.get()
