"""What an optimised program does, read from the compiler's text."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes: what a device sends over the wire in one step."""

  kind: (
    str  # all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all, collective-permute
  )
  axes: tuple[str, ...]  # mesh axes that the groups run over
  count: int  # executions, loops multiplied out
  bytes: int  # on the wire, a step and a chip
  dtype: str  # of the elements, as HLO writes it
  asynchronous: bool  # whether started early and waited for later
  dcn: bool = False  # whether it leaves a slice
