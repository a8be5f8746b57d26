"""From text to batches: corpora, tokenizers, Megatron's .bin/.idx, sample order.

Nothing here imports torch when it is imported: tokenising workers start in a fraction of a second, and a corpus
can be prepared on a machine that will never train. Megatron-Core is loaded inside the functions that read tokens.
"""
