"""Values as readers want them, and text that cannot become markup."""

import html
import math
import re
from typing import Any

# What XML and HTML cannot hold: control characters and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
UNKNOWN = "–"
_SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def escape(value: Any) -> str:
  """`value` as text for an element or a quoted attribute."""
  return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def plain(value: float | None, digits: int = 4) -> str:
  """A number with `digits` significant digits, 1,234 and 3e-05 included."""
  if value is None:
    return UNKNOWN
  if not math.isfinite(value):
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
  if value != 0 and not 1e-4 <= abs(value) < 1e15:
    return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
  decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
  return f"{value:,.{max(0, min(8, decimals))}f}"


def short(value: float | None) -> str:
  """A number for an axis or a headline: 1.5k, 34M, 0.25."""
  if value is None or not math.isfinite(value):
    return plain(value)
  for size, suffix in _SUFFIXES:
    if abs(value) >= size * 0.99995:
      return f"{value / size:.4g}{suffix}" if abs(value) < 1000 * 1e15 else f"{value:.2e}"
  if value != 0 and abs(value) < 1e-3:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
  return f"{value:.4g}"


def count(value: float | None) -> str:
  """Whole numbers in full up to five digits: 6,359, 658.1k."""
  if value is None or not 10 <= abs(value) < 1e5:
    return short(value)
  return f"{value:,.0f}"


def percent(value: float | None) -> str:
  """A share as a percentage."""
  return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
  """12 s, 3 min 20 s, 4 h 5 min, 3 d 2 h."""
  if seconds is None or not 0 <= seconds < 1e12:
    return UNKNOWN
  if seconds < 10:
    return f"{seconds:.1f} s"
  seconds = round(seconds)
  for (size, name), (part, part_name) in (
    ((86400, "d"), (3600, "h")),
    ((3600, "h"), (60, "min")),
    ((60, "min"), (1, "s")),
  ):
    if seconds >= size:
      rest = seconds % size // part
      return f"{seconds // size:,} {name}" + (f" {rest} {part_name}" if rest else "")
  return f"{seconds} s"
