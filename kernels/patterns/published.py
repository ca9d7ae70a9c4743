"""The patterns of published models, by name, with the numbers that they were published with.

longformer: allenai/longformer-base-4096 (Beltagy et al. 2020): attention_window 512, which is 256
    on either side, and the first token global, as for classification.
bigbird: google/bigbird-roberta-base (Zaheer et al. 2020): block_size 64, 3 random blocks, a window
    of 3 blocks and 2 global ones. Theirs are the first and the last block, and the window is one of
    whole blocks; here the first 128 tokens are global, and the window slides by the token.
sparse-transformer-strided, sparse-transformer-fixed: Child et al. 2019: for images stride and local
    context 128; for text blocks of 128, of which the last 32 are seen from later ones. Their heads
    attend to one part each, or to both: here to both.
mistral: mistralai/Mistral-7B-v0.1 (Jiang et al. 2023): sliding_window 4096.
streaming: Xiao et al. 2023, "StreamingLLM": 4 sinks and the last 1020 keys.
"""

from __future__ import annotations

from types import MappingProxyType

SPECS = MappingProxyType(
    {
        "longformer": "global:1+window:512@bidirectional",
        "bigbird": "global:128+window:192+random:3,0@bidirectional",
        "sparse-transformer-strided": "window:128+strided:128",
        "sparse-transformer-fixed": "fixed:128,32",
        "mistral": "window:4096",
        "streaming": "sinks:4+window:1020",
    }
)
