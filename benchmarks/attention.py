"""Decode attention: packed pages against the best bf16 attention of the same run, on a CUDA GPU.

    python benchmarks/attention.py --out benchmarks/results        # everything; about 6 minutes on an H100
    python benchmarks/attention.py --shapes 8x32768 --presets turboquant_3bit

Every number is the median over replays of a CUDA graph that runs over distinct copies of cache and queries, together larger
than the L2 cache, so that reads come from memory. Rotations of query and output are part of the kernel. "bf16" is the fastest
of torch's SDPA back-ends and, if it is installed, FlashInfer. Errors are relative to float32 attention over the dequantized
cache. One JSON object per line: see the keys in :func:`measure`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turboquant import PRESETS, Rotary
from turboquant.codec.center import KeyStatistics, KeyTransform
from turboquant.codec.layout import PAGE_TOKENS, PageLayout
from turboquant.codec.page import PageCodec
from turboquant.cuda import decode
from turboquant.cuda.pages import PackedPages

DEVICE = torch.device("cuda")
#: Copies of cache together hold at least this much: four times the L2 cache of an H100.
MEMORY = 200 << 20
#: batch x seq_len, query heads, KV heads, head_dim
MAIN = [(8, 32768), (64, 8192), (128, 8192), (1, 131072), (1, 32768)]
#: Speed-ups over bf16 that were aimed at without window and centring, by (batch, seq_len): near 16 / bits.
GOALS = {
    "turboquant_4bit": (3.3, 3.5, 3.6, 3.2, 2.2),
    "turboquant_3.5bit": (3.7, 3.9, 4.0, 3.5, 2.4),
    "turboquant_3bit": (4.2, 4.5, 4.8, 4.0, 2.6),
    "turboquant_2.5bit": (4.8, 5.2, 5.6, 4.5, 2.8),
    "turboquant_2bit": (5.4, 6.0, 6.4, 5.0, 3.0),
    "turboquant_1.5bit": (6.0, 7.0, 8.0, 5.5, 3.0),
}
OTHERS = [
    (8, 32768, 32, 8, 64),
    (8, 32768, 16, 4, 256),
    (8, 32768, 8, 8, 128),  # multi-head attention
    (8, 32768, 28, 4, 128),  # groups of 7
    (8, 32768, 64, 8, 128),  # groups of 8
    (8, 32768, 128, 8, 128),  # groups of 16
]


def replay_ms(runs: list[Callable[[], Any]], repeats: int = 30) -> float:
    """Median milliseconds of one run, from a graph of all runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # inputs are made there
    with torch.cuda.stream(stream):
        for r in runs:
            r()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        loops = max(1, 8 // len(runs))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(loops):
                for r in runs:
                    r()
        times = []
        for i in range(repeats + 5):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            torch.cuda.synchronize()
            if i >= 5:
                times.append(a.elapsed_time(b) / len(runs) / loops)
    return sorted(times)[len(times) // 2]


def copy_gbps() -> float:
    """Bytes read and written per second by a large copy on the device."""
    a = torch.randn(1 << 28, device=DEVICE)
    b = torch.empty_like(a)
    times = []
    for _ in range(20):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * a.nbytes / sorted(times)[len(times) // 2] / 1e6


def bf16_times(batch: int, seq: int, hq: int, h: int, d: int) -> dict[str, float | str]:
    """Milliseconds of each bf16 back-end, with the queries of a group as rows (no repeat of keys and values)."""
    one = 2 * batch * h * seq * d * 2
    copies = max(1, math.ceil(MEMORY / one))
    kv = [torch.randn(2, batch, h, seq, d, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
    q = torch.randn(batch, h, hq // h, d, dtype=torch.bfloat16, device=DEVICE)
    out: dict[str, float | str] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                runs = [lambda x=x: F.scaled_dot_product_attention(q, x[0], x[1]) for x in kv]
                out[f"sdpa_{backend.name.lower()}"] = replay_ms(runs)
        except RuntimeError as e:
            out[f"sdpa_{backend.name.lower()}"] = str(e).split("\n")[0][:80]
    try:
        import flashinfer  # type: ignore[import-not-found]
    except ImportError:
        return out
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    pages = seq // 64
    index = torch.arange(batch * pages, dtype=torch.int32, device=DEVICE)
    pointer = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * pages
    last = torch.full((batch,), 64, dtype=torch.int32, device=DEVICE)
    wrapper.plan(pointer, index, last, hq, h, d, 64, data_type=torch.bfloat16)
    del kv
    caches = [torch.randn(batch * pages, 2, h, 64, d, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
    rows = q.view(batch, hq, d)
    out["flashinfer"] = replay_ms([lambda x=x: wrapper.run(rows, x) for x in caches])
    return out


class Packed:
    """Random pages of a batch with or without centring and exact window; copies of them; the launches."""

    def __init__(self, bits: tuple[int, int], batch: int, seq: int, hq: int, h: int, d: int, window: int, center: bool) -> None:
        self.codec = PageCodec(PageLayout(d, *bits))
        self.rotary = Rotary(5e5 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2)))
        stats = KeyStatistics(torch.randn(h, d), (torch.randn(h, d) * 0.2).exp()) if center else None
        self.transform = KeyTransform(stats, self.rotary if center else None)
        self.batch, self.seq, self.hq, self.h, self.d = batch, seq, hq, h, d
        self.packed = (seq - window) // PAGE_TOKENS * PAGE_TOKENS if window else seq
        pages, size = self.packed // PAGE_TOKENS, self.codec.layout.page_bytes
        self.page_bytes = batch * h * pages * size
        copies = max(1, math.ceil(MEMORY / self.page_bytes))
        table = torch.randperm(batch * pages, device=DEVICE).int().view(batch, pages)
        self.angles = self.rotary.page_angles(DEVICE).get(pages)
        self.pages, self.exact = [], []
        for _ in range(copies):
            pool = torch.randint(0, 256, (batch * pages, h, size), dtype=torch.uint8, device=DEVICE)
            scales = pool[..., self.codec.layout.key_scale_offset :].view(torch.float16)
            scales.copy_(torch.rand(scales.shape, device=DEVICE) * 0.4 + 0.8)
            self.pages.append(
                PackedPages(
                    self.codec,
                    self.transform,
                    h,
                    table,
                    self.packed,
                    pool,
                    pool.stride(0),
                    0,
                    pool.stride(1),
                    angles=self.angles,
                )
            )
            x = torch.randn(2, batch, h, seq - self.packed, d, device=DEVICE).bfloat16() if window else None
            s = torch.randn(2, batch, h, 4, d, device=DEVICE).bfloat16() if window else None
            self.exact.append(None if x is None or s is None else decode.ExactTokens(x[0], x[1], None, (s[0], s[1])))
        self.query = torch.randn(batch, hq, 1, d, dtype=torch.bfloat16, device=DEVICE)
        self.out, self.lse = torch.empty_like(self.query), torch.empty(batch, hq, 1, device=DEVICE)
        self.plan = decode.plan(self.pages[0], self.packed, hq // h, 1, seq - self.packed + 4 if window else 0, rows=batch)

    def launch(self, i: int) -> None:
        """One decode step over copy ``i``."""
        decode.run(self.query, self.pages[i], self.exact[i], self.seq, self.plan, self.out, self.lse, self.d**-0.5)

    def ms(self) -> float:
        """Milliseconds of a step."""
        return replay_ms([lambda i=i: self.launch(i) for i in range(len(self.pages))])

    def error(self) -> float:
        """Relative error of the last row's output against float32 attention over its dequantized cache."""
        self.out.fill_(float("nan"))
        self.launch(0)
        pages, exact, row = self.pages[0], self.exact[0], self.batch - 1
        assert pages.pool is not None
        found = torch.empty(self.hq, self.d, device=DEVICE)
        g = self.hq // self.h
        for head in range(self.h):
            keys, values = [], []
            for p in range(0, pages.table.shape[1], 64):
                blocks = pages.table[row, p : p + 64].long()
                k, v = self.codec.dequantize(pages.pool[blocks, head][None, None])
                at = torch.arange(p * PAGE_TOKENS, p * PAGE_TOKENS + k.shape[2], device=DEVICE)[None]
                keys.append(self._inverse(k, at, head))
                values.append(v[0, 0])
            key, value = torch.cat(keys), torch.cat(values)
            if exact is not None and exact.sinks is not None:
                key[:4], value[:4] = exact.sinks[0][row, head].float(), exact.sinks[1][row, head].float()
                key = torch.cat((key, exact.key[row, head].float()))
                value = torch.cat((value, exact.value[row, head].float()))
            q = self.query[row, head * g : (head + 1) * g, 0].float()
            found[head * g : (head + 1) * g] = ((q @ key.T) * self.d**-0.5).softmax(-1) @ value
        return float((self.out[row, :, 0].float() - found).norm() / found.norm())

    def _inverse(self, k: Tensor, positions: Tensor, head: int) -> Tensor:
        stats = self.transform.statistics
        if stats is None:
            return k[0, 0]
        assert stats.balance is not None
        one = KeyTransform(KeyStatistics(stats.mean[head : head + 1], stats.balance[head : head + 1]), self.rotary)
        return one.inverse(k, positions)[0, 0]


def measure(
    preset: str,
    batch: int,
    seq: int,
    hq: int,
    h: int,
    d: int,
    window: int,
    center: bool,
    bf16: dict[str, float | str],
    copy: float,
) -> dict[str, Any]:
    """One line of results."""
    p = Packed(PRESETS[preset], batch, seq, hq, h, d, window, center)
    ms = p.ms()
    best = min(t for t in bf16.values() if isinstance(t, float))
    return {
        "device": torch.cuda.get_device_name(),
        "preset": preset,
        "key_bits": PRESETS[preset][0],
        "value_bits": PRESETS[preset][1],
        "batch": batch,
        "seq_len": seq,
        "heads": hq,
        "kv_heads": h,
        "head_dim": d,
        "window": window,
        "key_center": "rope_mean" if center else "none",
        "ms": round(ms, 5),
        "bf16_ms": round(best, 5),
        "speedup": round(best / ms, 3),
        "gbps": round(p.page_bytes / ms / 1e6, 1),
        "copy_gbps": round(copy, 1),
        "error": float(f"{p.error():.2e}"),
    }


def judge(line: dict[str, Any]) -> dict[str, Any]:
    """Add the goal of a plain line of the main shapes, and the share of it that was reached.

    What bounds a line is in its own numbers: ``gbps / copy_gbps`` is the share of the bandwidth; the rest of a short launch is
    the latency of beginning and ending (docs/kernels.md).
    """
    shape = line["batch"], line["seq_len"]
    plain = line["window"] == 0 and line["key_center"] == "none"
    if plain and (line["heads"], line["kv_heads"], line["head_dim"]) == (32, 8, 128) and shape in MAIN:
        goal = GOALS[line["preset"]][MAIN.index(shape)]
        share = line["gbps"] / line["copy_gbps"]
        line |= {"goal": goal, "of_goal": round(line["speedup"] / goal, 3), "of_copy": round(share, 3)}
        # 16 / bits is what reading pages at the rate at which bf16 attention reads its cache would give.
        size = PageLayout(128, line["key_bits"], line["value_bits"]).bits_per_element
        line["limit"] = round(16 / size, 2)
    return line


def cases(args: argparse.Namespace) -> Iterator[tuple[int, int, int, int, int]]:
    """The shapes asked for: (batch, seq_len, query heads, KV heads, head_dim)."""
    if args.shapes:
        for s in args.shapes:
            n = [int(x) for x in s.split("x")]
            yield (n[0], n[1], *(n[2:] or (32, 8, 128)))  # type: ignore[misc]
        return
    for b, s in MAIN:
        yield b, s, 32, 8, 128
    yield from OTHERS


def main() -> None:
    """Run and write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for attention_<gpu>.jsonl; without it lines are printed only")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--shapes", nargs="*", help="batch x seq_len [x heads x kv_heads x head_dim], such as 8x32768")
    parser.add_argument("--plain", action="store_true", help="leave out the runs with window and centring")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    copy = copy_gbps()
    lines = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s")
    for shape in cases(args):
        bf16 = bf16_times(*shape)
        print("x".join(map(str, shape)), {k: round(v, 4) if isinstance(v, float) else v for k, v in bf16.items()}, flush=True)
        for preset in args.presets:
            for window, center in ((0, False),) if args.plain else ((0, False), (128, True)):
                line = measure(preset, *shape, window, center, bf16, copy)
                lines.append(judge(line) | {"bf16": bf16})
                print(
                    f"  {preset:20s} window {window:3d} {line['key_center']:9s} {line['ms']:.4f} ms  {line['speedup']:.2f}x  "
                    f"{line['gbps'] / copy:.0%} of copy  error {line['error']:.1e}",
                    flush=True,
                )
                torch.cuda.empty_cache()
    if args.out:
        about = {"torch": torch.__version__, "cuda": torch.version.cuda, "date": datetime.date.today().isoformat()}
        name = torch.cuda.get_device_name().split()[1].lower().removesuffix(",")
        path = args.out / f"attention_{name}.jsonl"
        path.write_text("".join(json.dumps(line | about) + "\n" for line in lines))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
