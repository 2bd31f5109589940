"""Names of stored objects: who may read them, and which tokens they hold.

A *namespace* digests everything that decides the meaning of the bytes besides the tokens. A *key* is a hash chain over
chunks of tokens, so equal keys mean equal prefixes. Every field is length-prefixed and tagged, so that no two lists of
fields give the same input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..codec.layout import CODEBOOK_ID, LAYOUT_VERSION

CHUNK_TOKENS = 256
_DIGEST = 32


def namespace(**fields: str | int) -> bytes:
    """A 32-byte digest of named fields; the layout and codebook of pages are always among them."""
    h = hashlib.blake2b(digest_size=_DIGEST, person=b"tq-namespace")
    all_fields = {**fields, "layout": LAYOUT_VERSION, "codebook": CODEBOOK_ID, "chunk": CHUNK_TOKENS}
    for name, value in sorted(all_fields.items()):
        for part in (name.encode(), str(value).encode()):
            h.update(len(part).to_bytes(8, "little"))
            h.update(part)
    return h.digest()


def chunk_keys(root: bytes, tokens: Sequence[int]) -> list[bytes]:
    """The key of every full chunk of ``tokens``: key i covers tokens 0 to ``(i + 1) * CHUNK_TOKENS``."""
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(tokens) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        data = np.asarray(tokens[start : start + CHUNK_TOKENS], dtype="<u4").tobytes()
        parent = hashlib.blake2b(parent + data, digest_size=_DIGEST, person=b"tq-chunk").digest()
        keys.append(parent)
    return keys
