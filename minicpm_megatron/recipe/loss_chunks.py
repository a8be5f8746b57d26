"""How the fused loss divides tokens into chunks, and what memory that takes; the model and the plan both go by it."""

from __future__ import annotations

ROUNDINGS = 16  # of a half-precision gradient of the head; more chunks than that are summed in fp32
CPU_SCRATCH_BYTES = 4 * 2**20  # of softmax in fp32: rows that stay in the cache between one operator and the next


def loss_chunk_bytes(device_type: str) -> int:
    """Most bytes that a chunk's logits take. On a GPU products of few tokens do not fill the device; on CPU what more
    would save is little, and memory is what the fused loss is for."""
    return (96 if device_type == "cpu" else 512) * 2**20


def chunk_tokens(tokens: int, rows: int, element: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: as even as can be, in multiples of 32 where there are that many, which products like.

    Args:
        tokens: how many there are.
        rows: rows of the head on the rank.
        element: bytes of a logit.
        chunk_bytes: most bytes of the chunk's logits, unless one token has more.
    """
    most = max(1, chunk_bytes // (rows * element))
    if tokens <= most:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // most))
    rounded = -(-even // 32) * 32
    return rounded if rounded <= most else even


def loss_bytes(tokens: int, rows: int, width: int, element: int, *, on_cpu: bool) -> int:
    """What the fused loss holds at its fullest beside hidden states and their gradient: a chunk's logits, its softmax
    in fp32 (on CPU; Triton needs none), and the sum of the head's gradient.

    Args:
        tokens, rows, element: as for `chunk_tokens`.
        width: hidden_size.
    """
    size = chunk_tokens(tokens, rows, element, loss_chunk_bytes("cpu" if on_cpu else "cuda"))
    logits, head = size * rows * element, rows * width * element
    if element < 4 and -(-tokens // size) > ROUNDINGS:
        head += rows * width * (4 - element) + min(head, logits // 4)  # in fp32, and what is added to it
    scratch = min(2 * size * rows * 4, max(CPU_SCRATCH_BYTES, 2 * rows * 4)) if on_cpu else 0
    return logits + scratch + head
