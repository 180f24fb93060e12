"""What a folder's safetensors files hold, read by the library of that name."""

from safetensors import safe_open


def tensors_in(folder):
  """(dtype, shape, bytes) of every tensor in a folder's safetensors files, by name."""
  tensors = {}
  for path in folder.glob("*.safetensors"):
    with safe_open(path, framework="numpy") as file:
      for name in file.keys():  # noqa: SIM118
        value = file.get_tensor(name)
        tensors[name] = (str(value.dtype), value.shape, value.tobytes())
  return tensors
