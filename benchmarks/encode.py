"""Speed of writing, gathering and extending packed pages on a CUDA GPU.

    python benchmarks/encode.py --out benchmarks/results        # about a minute, most of it compiling on the first run
    python benchmarks/encode.py --parts decode prefill --presets turboquant_3bit

    decode     one new token of each of 64 sequences into a pool by slot mapping (goal: at most 6 us)
    prefill    8,192 and 32,768 tokens: bytes read and written per second (goal: 60 % of a large copy)
    overhead   encoding an 8,192-token prompt in all layers of a Llama-8B shape, against the matrix products and the
               attention of these layers alone (goal: at most 3 %)
    gather     pages back to bf16 keys and values: bytes read and written per second
    extend     attention of many new queries over packed pages: 4 * heads * queries * tokens * head_dim operations, against
               torch's attention (the fastest back-end) over bf16 keys and values

Times are medians over replays of a CUDA graph that runs over distinct buffers, together larger than the L2 cache. Keys are
centred (rope_mean) and balanced except where a line says otherwise. ``wrong`` counts bytes (numbers, for decode) that are not
those of the codec in plain torch; ``error`` is relative to it. One JSON object per line.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from attention import MEMORY, copy_gbps, replay_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turboquant import PRESETS, Rotary, __version__
from turboquant.codec.center import KeyStatistics, KeyTransform
from turboquant.codec.layout import PAGE_TOKENS, PageLayout
from turboquant.codec.page import PageCodec
from turboquant.cuda.encode import encode_pages
from turboquant.cuda.extend import extend
from turboquant.cuda.gather import gather
from turboquant.cuda.pages import PackedPages

Line = dict[str, Any]


class Results:
    """Lines of results, written as they come, each with device, versions and date.

    Args:
        name: of the benchmark: the file is ``<name>_<gpu>.jsonl``.
        folder: where, or None to print only.
        device: that is measured.
    """

    def __init__(self, name: str, folder: Path | None, device: torch.device) -> None:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.about = {
            "device": gpu,
            "version": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "date": datetime.date.today().isoformat(),
        }
        self.device, self.start, self.failed = device, time.perf_counter(), 0
        self.path = None if folder is None else folder / f"{name}_{gpu.removeprefix('NVIDIA ').split()[0].lower()}.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")
        print(", ".join(f"{k} {v}" for k, v in self.about.items()), flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def add(self, line: Line) -> None:
        """Print a line and append it to the file."""
        print(f"[{self.seconds:5.0f} s]  " + "  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as f:
                finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
                f.write(json.dumps(finite | self.about) + "\n")

    def fail(self, about: Line, error: Exception) -> None:
        """Add a line with ``error``."""
        self.failed += 1
        traceback.print_exception(error)
        self.add(about | {"error": f"{type(error).__name__}: {error}"[:500]})

    def attempt(self, about: Line, work: Callable[[], Iterable[Line]]) -> None:
        """Add the lines of ``work``; an exception becomes a line with ``error``, and the benchmark goes on."""
        try:
            for line in work():
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # a fault of a kernel belongs to its own part
                self.add(about | line)
        except Exception as e:
            self.fail(about, e)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are a Llama-8B shape."""

    sequences: int = 64
    heads: int = 8
    group: int = 4
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    prefill: tuple[int, ...] = (8192, 32768)
    gather: int = 32768
    #: (new queries, packed tokens)
    extend: tuple[tuple[int, int], ...] = ((2048, 32768), (64, 131072))
    #: Bytes that the buffers of a measurement have together at least.
    memory: int = MEMORY


#: For trying the script out.
TINY = Sizes(5, 2, 2, 64, 64, 96, 2, (128, 256), 128, ((40, 128), (8, 192)), 0)


def milliseconds(runs: list[Callable[[], Any]], repeats: int = 30) -> float:
    """Of one run: :func:`attention.replay_ms`, or the clock without a GPU."""
    if torch.cuda.is_available():
        return replay_ms(runs, repeats)
    start = time.perf_counter()
    for r in runs:
        r()
    return (time.perf_counter() - start) / len(runs) * 1e3


class Bench:
    """The parts; each yields lines.

    Args:
        sizes: what to measure.
        presets: names.
        device: of all tensors.
    """

    def __init__(self, sizes: Sizes, presets: list[str], device: torch.device) -> None:
        self.sizes, self.presets, self.device = sizes, presets, device
        self.copy = copy_gbps() if device.type == "cuda" else 1.0
        d = sizes.dim
        self.rotary = Rotary(5e5 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2)))
        stats = KeyStatistics(torch.randn(sizes.heads, d), (torch.randn(sizes.heads, d) * 0.2).exp())
        self.centred, self.plain = KeyTransform(stats, self.rotary), KeyTransform(None, None)

    def codec(self, preset: str) -> PageCodec:
        """Of a preset, at the head_dim of the sizes."""
        return PageCodec(PageLayout(self.sizes.dim, *PRESETS[preset]))

    def copies(self, size: int) -> range:
        """Indices of so many buffers of ``size`` bytes that they do not fit the L2 cache together."""
        return range(max(1, math.ceil(self.sizes.memory / size)))

    def tokens(self, *shape: int) -> Tensor:
        """Random bf16."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def rate(self, size: int, ms: float) -> Line:
        """Bytes read and written in ``ms``, and the share of what a large copy reaches."""
        gbps = size / ms / 1e6
        return {
            "ms": round(ms, 5),
            "gbps": round(gbps, 1),
            "copy_gbps": round(self.copy, 1),
            "share_of_copy": round(gbps / self.copy, 3),
        }

    # -- encode ---------------------------------------------------------------------------------------------------

    def decode(self) -> Iterator[Line]:
        """One token of each sequence, at random places of sequences of up to 8,192 tokens."""
        n, h, d = self.sizes.sequences, self.sizes.heads, self.sizes.dim
        index = torch.randint(0, 128 * PAGE_TOKENS, (n,), device=self.device)
        slots = torch.randperm(n, device=self.device) * PAGE_TOKENS + index % PAGE_TOKENS
        angles = self.rotary.page_angles(self.device).get(128)
        for preset in self.presets:
            codec = self.codec(preset)
            size = codec.layout.page_bytes
            count = self.copies(n * h * size)
            pools = [torch.zeros(n, h, size, dtype=torch.uint8, device=self.device) for _ in count]
            # (tokens, heads, head_dim), as a serving engine has them
            new = [[self.tokens(n, h, d).transpose(0, 1)[None] for _ in range(2)] for _ in count]

            call = functools.partial(
                encode_pages, slot_mapping=slots, codec=codec, transform=self.centred, token_index=index.int(), angles=angles
            )
            ms = milliseconds([functools.partial(call, *new[i], pools[i]) for i in count])
            wrong = 0
            for row in (0, n - 1):
                # The token in every slot of its page; the slot in question then holds what it should.
                page = int(index[row]) // PAGE_TOKENS * PAGE_TOKENS
                key, value = (x[:, :, row : row + 1].expand(-1, -1, PAGE_TOKENS, -1) for x in new[0])
                at = torch.arange(page, page + PAGE_TOKENS, device=self.device)[None]
                expected = codec.dequantize(codec.encode(self.centred.forward(key, at), value))
                found = codec.dequantize(pools[0][slots[row] // PAGE_TOKENS][None, :, None])
                slot = int(index[row]) % PAGE_TOKENS
                wrong += sum(int((a[:, :, slot] != b[:, :, slot]).sum()) for a, b in zip(expected, found, strict=True))
            yield {"preset": preset, "sequences": n, "kv_heads": h, "head_dim": d, "us": round(ms * 1e3, 3), "wrong": wrong}

    def prefill(self) -> Iterator[Line]:
        """Whole prompts of one layer."""
        for preset in self.presets:
            for tokens in self.sizes.prefill:
                yield {"preset": preset, "tokens": tokens} | self._prefill(preset, tokens)

    def _prefill(self, preset: str, tokens: int) -> Line:
        codec, h, d = self.codec(preset), self.sizes.heads, self.sizes.dim
        pages, page_bytes = tokens // PAGE_TOKENS, codec.layout.page_bytes
        size = 2 * tokens * h * d * 2 + pages * h * page_bytes
        count = self.copies(size)
        # (1, tokens, heads, head_dim) in memory, as projections give them
        new = [[self.tokens(1, tokens, h, d).transpose(1, 2) for _ in range(2)] for _ in count]
        pools = [torch.zeros(pages, 1, h, page_bytes, dtype=torch.uint8, device=self.device) for _ in count]
        call = functools.partial(encode_pages, codec=codec, transform=self.centred)
        ms = milliseconds([functools.partial(call, *new[i], pools[i]) for i in count])
        at = torch.arange(tokens - PAGE_TOKENS, tokens, device=self.device)[None]
        key, value = (x[:, :, -PAGE_TOKENS:] for x in new[0])
        expected = codec.encode(self.centred.forward(key, at), value)[:, :, 0]
        return self.rate(size, ms) | {"wrong": int((expected != pools[0][-1]).sum())}

    def overhead(self) -> Iterator[Line]:
        """Encoding in all layers against what the model itself must do at least."""
        s, tokens = self.sizes, self.sizes.prefill[0]
        width = s.heads * s.group * s.dim
        # queries, keys and values; output; gate and up; down
        shapes = (s.hidden, width + 2 * s.heads * s.dim), (width, s.hidden), (s.hidden, 2 * s.inner), (s.inner, s.hidden)
        operands = [(self.tokens(tokens, n), self.tokens(m, n) * 0.02) for n, m in shapes]
        gemm = milliseconds([lambda: [F.linear(x, w) for x, w in operands]], 10)
        query = self.tokens(1, s.heads * s.group, tokens, s.dim)
        key, value = (self.tokens(1, s.heads, tokens, s.dim) for _ in range(2))
        attention = milliseconds(
            [lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)], 10
        )
        model = s.layers * (gemm + attention)
        for preset in self.presets:
            encode = s.layers * self._prefill(preset, tokens)["ms"]
            yield {
                "preset": preset,
                "tokens": tokens,
                "layers": s.layers,
                "encode_ms": round(encode, 4),
                "model_ms": round(model, 3),
                "products_ms": round(s.layers * gemm, 3),
                "attention_ms": round(s.layers * attention, 3),
                "ratio": round(encode / model, 5),
            }

    # -- gather and extend ----------------------------------------------------------------------------------------

    def pages(self, codec: PageCodec, transform: KeyTransform, tokens: int) -> list[PackedPages]:
        """Random pages of one sequence, in blocks in any order; one per copy."""
        h, count, size = self.sizes.heads, tokens // PAGE_TOKENS, codec.layout.page_bytes
        table = torch.randperm(count, device=self.device).int()[None]
        angles = self.rotary.page_angles(self.device).get(count)
        out = []
        for _ in self.copies(count * h * size):
            pool = torch.randint(0, 256, (count, h, size), dtype=torch.uint8, device=self.device)
            scales = pool[..., codec.layout.key_scale_offset :].view(torch.float16)
            scales.copy_(torch.rand(scales.shape, device=self.device) * 0.4 + 0.8)
            out.append(PackedPages(codec, transform, h, table, tokens, pool, pool.stride(0), 0, pool.stride(1), angles=angles))
        return out

    def dequantized(self, pages: PackedPages, head: int) -> tuple[Tensor, Tensor]:
        """Float32 (tokens, head_dim) keys and values of one head, by the codec in plain torch."""
        stats, transform = pages.transform.statistics, pages.transform
        if stats is not None:
            assert stats.balance is not None
            one = KeyStatistics(stats.mean[head : head + 1], stats.balance[head : head + 1])
            transform = KeyTransform(one, pages.transform.rotary)
        assert pages.pool is not None
        keys, values = [], []
        for p in range(0, pages.max_pages, 64):
            k, v = pages.codec.dequantize(pages.pool[pages.table[0, p : p + 64].long(), head][None, None])
            at = torch.arange(p * PAGE_TOKENS, p * PAGE_TOKENS + k.shape[2], device=self.device)[None]
            keys.append(transform.inverse(k, at)[0, 0])
            values.append(v[0, 0])
        return torch.cat(keys), torch.cat(values)

    def gather(self) -> Iterator[Line]:
        """Pages back to bf16."""
        h, tokens, d = self.sizes.heads, self.sizes.gather, self.sizes.dim
        for preset in self.presets:
            codec = self.codec(preset)
            pages = self.pages(codec, self.centred, tokens)
            out = self.tokens(1, h, tokens, d), self.tokens(1, h, tokens, d)
            ms = milliseconds([functools.partial(gather, p, dtype=torch.bfloat16, out=out) for p in pages])
            size = tokens // PAGE_TOKENS * h * codec.layout.page_bytes + 2 * out[0].nbytes
            for x in out:
                x.fill_(float("nan"))
            gather(pages[0], dtype=torch.bfloat16, out=out)
            expected = torch.stack(self.dequantized(pages[0], h - 1))
            found = torch.stack((out[0][0, h - 1], out[1][0, h - 1])).float()
            yield {"preset": preset, "tokens": tokens} | self.rate(size, ms) | {"error": relative(found, expected)}

    def extend(self) -> Iterator[Line]:
        """Many queries over pages, all of which they see."""
        h, d = self.sizes.heads, self.sizes.dim
        hq, scale = h * self.sizes.group, d**-0.5
        for new, tokens in self.sizes.extend:
            query = self.tokens(1, hq, new, d)
            work = 4 * hq * new * tokens * d
            bf16, backend = self._bf16(query, tokens)
            for preset in self.presets:
                for center in (False, True):
                    pages = self.pages(self.codec(preset), self.centred if center else self.plain, tokens)
                    ms = milliseconds([functools.partial(extend, query, p, scaling=scale) for p in pages], 10)
                    found = extend(query, pages[0], scaling=scale)[0][0, hq - 1].float()
                    key, value = self.dequantized(pages[0], h - 1)
                    expected = ((query[0, hq - 1].float() @ key.T) * scale).softmax(-1) @ value
                    yield {
                        "preset": preset,
                        "key_center": "rope_mean" if center else "none",
                        "queries": new,
                        "tokens": tokens,
                        "heads": hq,
                        "kv_heads": h,
                        "head_dim": d,
                        "ms": round(ms, 5),
                        "tflops": round(work / ms / 1e9, 1),
                        "bf16_ms": round(bf16, 5),
                        "bf16_tflops": round(work / bf16 / 1e9, 1),
                        "bf16_backend": backend,
                        "error": relative(found, expected),
                    }

    def _bf16(self, query: Tensor, tokens: int) -> tuple[float, str]:
        """Milliseconds of torch's fastest attention over as many bf16 tokens, and its name."""
        key, value = (self.tokens(1, self.sizes.heads, tokens, self.sizes.dim) for _ in range(2))
        found: list[tuple[float, str]] = []
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if query.is_cuda else [SDPBackend.MATH]
        for backend in backends:
            try:
                with sdpa_kernel(backend):
                    run = [lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)]
                    found.append((milliseconds(run, 10), backend.name.lower()))
            except RuntimeError as e:
                print(f"{backend.name}: {str(e).splitlines()[0][:100]}", flush=True)
        return min(found) if found else (float("nan"), "none")


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error; not a number if anything was not written."""
    return float(f"{float((found - expected).norm() / expected.norm()):.2e}")


def run(part: str, sizes: Sizes, presets: list[str], device: torch.device) -> Iterator[Line]:
    """The lines of a part."""
    yield from getattr(Bench(sizes, presets, device), part)()


PARTS = ("decode", "prefill", "overhead", "gather", "extend")


def main() -> None:
    """Run and write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for encode_<gpu>.jsonl; without it lines are printed only")
    parser.add_argument("--presets", nargs="*", default=["turboquant_4bit", "turboquant_3bit", "turboquant_2bit"])
    parser.add_argument("--extend-presets", nargs="*", default=["turboquant_3bit"], help="presets of the extend part")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    results = Results("encode", args.out, device)
    sizes = TINY if args.tiny else Sizes()
    for part in args.parts:
        presets = args.extend_presets if part == "extend" else args.presets
        results.attempt({"part": part}, functools.partial(run, part, sizes, presets, device))
    print(f"{results.seconds:.0f} s, {results.failed} parts failed", flush=True)
    if results.path is not None:
        print(f"written: {results.path}")
    raise SystemExit(1 if results.failed else 0)


if __name__ == "__main__":
    main()
