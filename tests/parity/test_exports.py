"""A golden checkpoint, imported and exported again, gives the reference's logits in transformers. Needs the extra `parity`."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import numpy as np
import pytest
from golden import LOGITS, golden_case

from maxllama4 import cli

reason = "needs torch and transformers: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)


@pytest.mark.parametrize(
  ("name", "source"),
  [
    ("p01_scout_gqa5", "."),
    ("p02_maverick", "."),
    ("p06_vlm", "."),
    ("p08_meta_text", "meta_mp2"),
    ("p10_dense_nochunk", "."),  # as it is, transformers would not run it
  ],
)
def test_transformers_gives_the_golden_logits_for_what_we_exported(name, source, tmp_path):
  case = golden_case(name)
  kind = "Llama4ForConditionalGeneration" if name == "p06_vlm" else "Llama4ForCausalLM"
  ours, exported = str(tmp_path / "ours"), str(tmp_path / "hf")
  assert cli.main(["convert", str(case.folder / source), ours, "to=maxllama4"]) == 0
  assert cli.main(["convert", ours, exported, "to=hf", "shard_bytes=300000"]) == 0
  model, report = getattr(transformers, kind).from_pretrained(
    exported, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
  )
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  inputs = {"input_ids": torch.tensor(case.arrays["input_ids"], dtype=torch.long)}
  if "pixel_values" in case.arrays:
    inputs["pixel_values"] = torch.tensor(case.arrays["pixel_values"])
  with torch.no_grad():
    logits = model.eval()(**inputs, use_cache=False).logits.numpy()
  np.testing.assert_allclose(logits, case.arrays["logits"], atol=LOGITS, rtol=0)
