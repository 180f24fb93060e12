"""A plan as text for people."""

from collections.abc import Sequence

from maxllama4.planning.plan import PARTS, Plan, mesh_words

GB = 1e9


def plan_text(plan: Plan) -> str:
  """The plan on a screen; numbers are per chip and step where they say nothing else."""
  topology = plan.topology
  slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
  lines = [
    ("machine", f"{slices}{topology.name}, {topology.chips} chips; mesh {mesh_words(plan.mesh)}"),
    ("memory", memory_words(plan)),
  ]
  meanings = {"activations": "caches"} if plan.target == "decode" else {}
  parts = [
    f"{meanings.get(name, name)} {plan.hbm_bytes[name] / GB:.2f}"
    for name in PARTS
    if plan.hbm_bytes[name] or plan.target == "train"
  ]
  lines.append(("", f"at the peak: {', '.join(parts)}"))
  if plan.host_bytes:
    lines.append(("", f"and {plan.host_bytes / GB:.2f} GB of the host's"))
  lines += [("work", work_words(plan)), *wire_lines(plan), *time_lines(plan)]
  return "\n".join(f"{name:<12}{text}" for name, text in lines)


def memory_words(plan: Plan) -> str:
  limit, peak = plan.topology.chip.hbm_bytes, plan.peak_hbm_bytes
  if plan.fits:
    verdict = f"fits: {(limit - peak) / GB:.1f} GB free"
  else:
    verdict = f"DOES NOT FIT: {(peak - limit) / GB:.1f} GB too much"
  return f"{verdict}; {peak / GB:.2f} of {limit / GB:.1f} GB a chip"


def work_words(plan: Plan) -> str:
  executed = plan.executed_flops
  text = f"{executed / 1e12:,.4g} TFLOP executed, {plan.useful_flops / 1e12:,.4g} useful"
  if executed and plan.target == "train":
    text += f" ({plan.useful_flops / executed:.0%})"
  if plan.estimated_cycles is not None:
    text += f"; {plan.estimated_cycles / 1e6:,.0f} million cycles outside kernels, by the compiler"
  return text


def wire_lines(plan: Plan) -> list[tuple[str, str]]:
  """The largest collectives; what is left is added up."""
  total = sum(collective.bytes for collective in plan.collectives)
  lines = [("wire", f"{total / GB:,.4g} GB sent")]
  shown = [c for c in plan.collectives if c.bytes >= 0.005 * total][:12]
  for c in shown:
    axes = "+".join(c.axes) + (" between slices" if c.dcn else "")
    when = "started early" if c.asynchronous else "waited for"
    lines.append(
      ("", f"{c.bytes / GB:9.4g} GB  {c.kind:<18} {axes:<20} {c.dtype:<5} {c.count:>6} x  {when}")
    )
  rest = total - sum(c.bytes for c in shown)
  if len(shown) < len(plan.collectives):
    lines.append(
      ("", f"{rest / GB:9.4g} GB  in {len(plan.collectives) - len(shown)} smaller kinds")
    )
  return lines


def time_lines(plan: Plan) -> list[tuple[str, str]]:
  time, seconds = plan.time, plan.seconds
  source = "predicted" if plan.estimated_cycles is not None else "predicted by arithmetic alone"
  parts = ", ".join(f"{name} {duration_words(part)}" for name, part in time.parts.items() if part)
  exposed = ", ".join(
    f"{name} {duration_words(part)}" for name, part in time.exposed.items() if part
  )
  per_chip = plan.tokens_per_second / plan.topology.chips
  words = f"{duration_words(seconds)} a step, {source}; bound by {time.bound_by}"
  lines = [
    ("time", words),
    ("", f"if each were alone: {parts}"),
    ("", f"what nothing hides: {exposed}"),
  ]
  speed = f"{plan.tokens_per_second:,.0f} tokens/s ({per_chip:,.4g} a chip)"
  if plan.target == "train":
    speed += f", MFU {plan.mfu:.1%}"
  elif plan.extra.get("prefill_seconds"):
    speed += f"; prefill in {duration_words(plan.extra['prefill_seconds'])}"
  price = (
    f"${plan.dollars(1e9):,.2f} a billion tokens at ${plan.dollars_per_hour:g} a chip and hour"
  )
  lines += [("speed", speed), ("cost", price)]
  if "training_days" in plan.extra:
    days, dollars = plan.extra["training_days"], plan.extra["training_dollars"]
    lines.append(("", f"{plan.extra['tokens']:,.4g} tokens: {days:,.1f} days, ${dollars:,.0f}"))
  lines.append(("compiled", f"in {plan.compile_seconds:.0f} s"))
  return lines


def duration_words(seconds: float) -> str:
  return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def ranking(plans: Sequence[Plan], descriptions: Sequence[str]) -> str:
  """The compiled candidates of a search, a line each."""
  lines = ["", "compiled candidates, fastest first:"]
  for plan, description in zip(plans, descriptions):
    verdict = "" if plan.fits else "  DOES NOT FIT"
    lines.append(
      f"  {duration_words(plan.seconds):>9}  MFU {plan.mfu:.1%}  {plan.peak_hbm_bytes / GB:6.1f} GB"
      f"  {description}{verdict}"
    )
  return "\n".join(lines)
