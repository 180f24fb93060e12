"""Text without what looks like a password, a key or a token: reports are mailed."""

import re

HIDDEN = "[hidden]"
# The last part of a setting's name; pad_token_id and num_key_value_heads are none.
_SECRET_NAME = re.compile(
  r"(^|_)(api_?key|access_?key|private_?key|secret|secret_key|password|passwd|credentials?|token|auth)$",
  re.IGNORECASE,
)
_PATTERNS = (
  re.compile(r"(?<=://)[^/@\s]+(?=@)"),  # scheme://user:password@host
  re.compile(
    r"(?<=[?&])((?:[\w-]*(?:signature|token|secret|credential|password|key)|sig)=)[^&\s\"']+",
    re.IGNORECASE,
  ),
  re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|ya29\.)[\w.-]{12,}"
  ),
  re.compile(
    r"(bearer\s+|(?:api[_-]?key|password|secret|token)\s*[:=]\s*)[\w.+/-]{16,}=*", re.IGNORECASE
  ),
  re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
  ),
)


def is_secret_name(name: str) -> bool:
  """Whether the last part of a dotted path names something that nobody else should read."""
  return _SECRET_NAME.search(name.rpartition(".")[2]) is not None


def hide_secrets(text: str) -> str:
  """`text` with `[hidden]` in place of what looks like a secret."""
  for pattern in _PATTERNS:
    text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + HIDDEN, text)
  return text
