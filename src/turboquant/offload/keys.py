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
from ..errors import ConfigError

CHUNK_TOKENS = 256
_DIGEST = 32


def namespace(**fields: str | int) -> bytes:
    """Digest named fields to 32 bytes; the layout and codebook of pages are always among them."""
    h = hashlib.blake2b(digest_size=_DIGEST, person=b"tq-namespace")
    all_fields = {**fields, "layout": LAYOUT_VERSION, "codebook": CODEBOOK_ID, "chunk": CHUNK_TOKENS}
    for name, value in sorted(all_fields.items()):
        for part in (name.encode(), str(value).encode(errors="surrogatepass")):
            h.update(len(part).to_bytes(8, "little"))
            h.update(part)
    return h.digest()


def chunk_keys(root: bytes, tokens: Sequence[int]) -> list[bytes]:
    """Name every full chunk of ``tokens``: key i covers tokens 0 to ``(i + 1) * CHUNK_TOKENS``.

    Raises:
        ConfigError: a token id is outside 0 to 2**32 - 1.
    """
    try:
        ids = np.asarray(tokens, dtype=np.int64)
    except OverflowError:
        ids = np.asarray([-1])
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
        raise ConfigError("token ids must be from 0 to 2**32 - 1")
    data = ids.astype("<u4").tobytes()
    keys: list[bytes] = []
    parent = root
    for i in range(len(tokens) // CHUNK_TOKENS):
        chunk = data[4 * CHUNK_TOKENS * i : 4 * CHUNK_TOKENS * (i + 1)]
        parent = hashlib.blake2b(parent + chunk, digest_size=_DIGEST, person=b"tq-chunk").digest()
        keys.append(parent)
    return keys
