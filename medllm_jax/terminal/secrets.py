"""Secrets in text: what they look like, so that none is shown or written where others read it."""

import os
import re
from collections.abc import Mapping

_HIDDEN = "[hidden]"
# What secrets look like by themselves.
_TOKENS = (
    r"ya29\.[\w.-]+|AIza[\w-]{20,}|GOCSPX-[\w-]{16,}|1//0[\w-]{20,}",  # Google
    r"(?:hf|api_org)_\w{16,}|wandb_v1_\w{16,}|[0-9a-f]{40}\b|nvapi-[\w-]{16,}",  # Hugging Face, W&B, NVIDIA
    r"gh[a-z]_\w{16,}|github_pat_\w{16,}|gl[a-z]{2,6}-[\w-]{16,}",  # GitHub, GitLab
    r"(?:sk|rk|gsk|xai|pplx)[-_][\w-]{16,}",  # OpenAI, Anthropic, Stripe, Groq and others
    r"(?:AKIA|ASIA)\w{12,}|xox[a-z]-[\w-]{10,}|xapp-[\w-]{10,}|dop_v1_\w{16,}",  # AWS, Slack, DigitalOcean
    r"npm_\w{16,}|pypi-[\w-]{16,}|dckr_(?:pat|oat)_[\w-]{16,}",  # registries
    r"eyJ[\w-]{8,200}\.[\w-]{8,}\.[\w-]*",  # JSON web tokens
)
# What stands before the secret is kept, as the first group. Gaps are bounded: two that adjoin take quadratic time.
_SECRETS = (
    re.compile(
        r"()-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]{0,40}-----|\Z)", re.DOTALL
    ),
    re.compile(
        r"(?i)((?:authorization|bearer|token|api[_-]?key|account[_-]?key|password|passwd|secret|credential)s?\b['\"]?"
        r"\s{0,8}[:=]?\s{0,8}['\"]?(?:(?:bearer|basic|digest|token)\s{1,8})?)([\w.~+/=-]{8,})"
    ),
    re.compile(r"\b([Bb]asic\s+)(?=[a-z]*[A-Z0-9+/=])[\w+/-]{8,}={0,2}"),
    re.compile(rf"()\b(?:{'|'.join(_TOKENS)})"),
    re.compile(r"((?:X-Goog-Signature|X-Amz-Signature|Signature|\bsig|access_token|upload_id)=)([^&\s]+)"),
    re.compile(r"(://)([^/\s:@]*:[^/\s@]+)(?=@)"),
)
_NAMES = re.compile(r"(?i)key|token(?!iz)|secret|passw|credential")


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without secrets: what looks like one, and what the environment holds under a name that says so."""
    for name, value in environment.items():
        if is_secret_name(name) and len(value) >= 8:
            text = text.replace(value, _HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\1{_HIDDEN}", text)
    return text


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, by what it is called."""
    return bool(_NAMES.search(name))


def holds_secret(text: str) -> bool:
    """Whether something in a text looks like a secret."""
    return any(pattern.search(text) for pattern in _SECRETS)
