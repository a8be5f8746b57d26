"""How the fused loss divides tokens into chunks, and what memory that takes; the model and the plan both go by it."""

from __future__ import annotations

# of a half-precision gradient of the head, which each chunk is added to: 4 make its error 1.6 times that of one product
# over all tokens, 16 made it 2.8 times. More chunks than that are summed in fp32
ROUNDINGS = 4
CPU_SCRATCH_BYTES = 4 * 2**20  # of softmax in fp32: rows that stay in the cache between one operator and the next

# of a part of the head's gradient in fp32 on its way into that sum; on CPU it stays in the cache
SUM_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


def loss_chunk_bytes(device_type: str, head_bytes: int) -> int:
    """Most bytes that a chunk's logits take.

    On CPU a quarter of the head on the rank, which makes H / 4 tokens: what larger chunks would save is little, and
    memory is what the fused loss is for. Products of so few tokens would not fill a GPU.
    """
    return max(16 * 2**20, head_bytes // 4) if device_type == "cpu" else 512 * 2**20


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
    most = loss_chunk_bytes("cpu" if on_cpu else "cuda", rows * width * element)
    size = chunk_tokens(tokens, rows, element, most)
    logits, head = size * rows * element, rows * width * element
    if element < 4 and -(-tokens // size) > ROUNDINGS:
        sums = min(SUM_BYTES["cpu" if on_cpu else "cuda"], 4 * rows * width)
        head += rows * width * (4 - element) + sums * (4 + element) // 4  # in fp32, and what is added to it
    scratch = min(2 * size * rows * 4, max(CPU_SCRATCH_BYTES, 2 * rows * 4)) if on_cpu else 0
    return logits + scratch + head
