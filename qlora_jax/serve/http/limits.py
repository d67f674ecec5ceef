"""What one request may ask for. The lengths of texts are bounded by the engine's slots and by the body's size."""

from qlora_jax.io.bounded_json import Bounds

BODY_BYTES = 4 << 20
DISCARDED_BYTES = 16 * BODY_BYTES
BODY_SECONDS = 60.0  # to send a body in
# 1,024 messages of parts and calls, 128 tools, or as many token ids as the bytes can hold.
BODY = Bounds(depth=64, containers=50_000, names=50_000, values=1 << 20)
HEAD_SECONDS = 10.0  # to send a head in
CONNECTIONS = 1024
FIELDS = 64  # of a request, of a message, and for a template
CHOICES = 16  # `n`
PROMPTS = 64  # in one request for completions
MESSAGES = 1024
TOOLS = 128
STOPS = 16
STOP_CHARACTERS = 256
LOGPROBS = 20
NAME_CHARACTERS = 128
# Below, scores divided by the temperature leave float32.
COLDEST = 1e-4
SEEDS = 1 << 64
