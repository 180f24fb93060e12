"""Which kernels layers use, where there are several: a setting of the run, which layers do not see.

What is traced inside `use_kernels`, gradients included, goes by its choice.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Choice:
  """`auto` leaves it to the platform and the shapes."""

  attention: str = "auto"  # one of those in kernels/attention.py
  grouped_matmul: str = "auto"  # one of those in kernels/grouped_matmul.py
  experts_dispatch: str = (
    "auto"  # how rows get to the devices of their experts; see model/dispatch.py
  )
  expert_capacity_factor: float = 0.0  # 0: no row is dropped


_AUTO = Choice()
_CHOICE: contextvars.ContextVar[Choice] = contextvars.ContextVar("kernels", default=_AUTO)


@contextlib.contextmanager
def use_kernels(choice: Choice) -> Iterator[None]:
  """Layers traced inside go by `choice`. Also a decorator of what traces them."""
  token = _CHOICE.set(choice)
  try:
    yield
  finally:
    _CHOICE.reset(token)


def current_choice() -> Choice:
  """The choice of the innermost `use_kernels`; all `auto` outside."""
  return _CHOICE.get()
