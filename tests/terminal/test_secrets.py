"""Secrets are known by their shape, and what is none is left alone."""

import time

import pytest

from medllm_jax.terminal.secrets import holds_secret, redact

SECRETS = [
    "Authorization: Bearer ya29.a0AfH6SMBx-abcdefgh",
    "Authorization: Basic dXNlcjpzM2NyM3Q=",
    "curl -H 'authorization: token s3cr3ts3cr3ts3cr3t'",
    "sent Basic dXNlcjpzM2NyM3Q= to the proxy",
    "token=hf_abcdefghijklmnopqrst",
    "401 for https://storage.googleapis.com/b/o?X-Goog-Signature=0123456789abcdef&x=1",
    "https://a.blob.core.windows.net/b?sv=1&sig=s3cr3t%2Bs3cr3t",
    "DefaultEndpointsProtocol=https;AccountKey=s3cr3ts3cr3ts3cr3t==",
    "cloning https://user:s3cr3tpassword@example.org/repo failed",
    "redis://:s3cr3tpassword@example.org",
    '{"api_key": "0123456789abcdefghij"}',
    "AIzaSyA0123456789abcdefghijklmnopqrstu is not valid",
    "GOCSPX-s3cr3ts3cr3ts3cr3t_x",
    "wandb: ERROR api_key 0123456789abcdef0123456789abcdef01234567 is not configured",
    "wandb_v1_s3cr3ts3cr3ts3cr3t",
    "password: correct-horse-battery",
    "ghp_s3cr3ts3cr3ts3cr3ts3cr3ts3cr3ts3cr3t",
    "ghs_s3cr3ts3cr3ts3cr3ts3cr3ts3cr3ts3cr3t",
    "github_pat_11ABCDEFG0s3cr3t_s3cr3ts3cr3t",
    "glpat-s3cr3ts3cr3ts3cr3t",
    "sk-s3cr3ts3cr3ts3cr3t",
    "sk-proj-s3cr3t_s3cr3t-s3cr3t",
    "sk-ant-api03-s3cr3ts3cr3t",
    "sk_live_s3cr3ts3cr3ts3cr3t",
    "gsk_s3cr3ts3cr3ts3cr3t",
    "nvapi-s3cr3ts3cr3ts3cr3t",
    "ASIAS3CR3TS3CR3T and xoxb-s3cr3t-s3cr3t",
    "npm_s3cr3ts3cr3ts3cr3t",
    "pypi-s3cr3ts3cr3ts3cr3t",
    "dckr_pat_s3cr3ts3cr3ts3cr3t",
    "eyJhbGciOiJIUzI1NiJ9.eyJzM2NyM3QiOjF9.s3cr3ts3cr3t",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIs3cr3t\ns3cr3t\n-----END RSA PRIVATE KEY-----",
    '{"private_key": "-----BEGIN PRIVATE KEY-----\\nMIIs3cr3t\\ns3cr3t\\n-----END PRIVATE KEY-----\\n"}',
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEs3cr3t",
]
PARTS = ("ya29.a0", "hf_abc", "0123456789abc", "s3cr3t", "S3CR3T", "AIzaSy", "correct-horse", "dXNlcjpzM2", "eyJzM2")


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden(text):
    found = redact(text, {})
    assert holds_secret(text) and "[hidden]" in found and not any(part in found for part in PARTS)


@pytest.mark.parametrize(
    "text",
    [
        "layers/self_attn/q_proj/weight: 4096 tokens of 8192, token 17 of 20",
        "gs://bucket/runs/cpt-72b at step 120, see https://example.org/a:b/c@d",
        "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_scoped_vmem_limit_kib=98304",
        "registry.example/medllm@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "basic block 12 of task-0123456789abcdef0123",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, {}) == text and not holds_secret(text)


def test_what_the_environment_keeps_secret_is_hidden():
    environment = {"WANDB_API_KEY": "open sesame", "MY_TOKEN": "short", "HOME": "/home/somebody"}
    text = "open sesame: a short way to /home/somebody, step 12 of 100, layers/self_attn/q_proj/weight, tokens 4096"
    assert redact(text, environment) == text.replace("open sesame", "[hidden]")


@pytest.mark.parametrize(
    "piece",
    ["token ", "token" + " " * 99, " ", "basic ", "sk-", "eyJ-", "://a", ":", "-----BEGIN PRIVATE KEY", "a" * 9],
)
def test_any_text_takes_little_time(piece):
    start = time.thread_time()
    redact(piece * (20_000 // len(piece)), {})
    assert time.thread_time() - start < 2  # far less, but not on a busy machine
