"""How annotations of the package are checked while tests run; in production they cost nothing."""

from collections.abc import Callable

import beartype


def checked(function: Callable) -> Callable:
  """`function`, checked against its annotations at every call.

  Initialisers are let be: JAX builds dataclasses that are pytrees anew with anything in place of their arrays.
  """
  return function if function.__name__ == "__init__" else beartype.beartype(function)
