"""Speed and memory of generation with a Llama-8B-shaped random model in transformers: exact cache against packed pages.

    python benchmarks/generate.py --out benchmarks/results                  # decoding only; about a minute on an H100
    python benchmarks/generate.py --out benchmarks/results --fill prompt    # prompts too; some minutes

For every length and cache: ``--fill random`` puts random keys and values into the cache, then times single-token steps.
``--fill prompt`` feeds a prompt of random ids in blocks instead and times that as well; where that would overrun ``--budget``,
the line says so and the steps are timed over random content. Caches: ``exact`` is transformers' DynamicCache with
``attn_implementation="sdpa"`` (its layers are copied whenever they grow, which is part of a step), presets are
``TurboQuantCache.for_model`` with ``attn_implementation="turboquant"``.

``ms`` is the median step, host code included, with a wait for the GPU after each; ``gpu_ms`` is the time in which a kernel
runs, from torch's profiler: where it is much lower, the host is what limits. A page is packed every 64 steps, so ``mean_ms``
over 64 steps contains one. ``peak_bytes`` is what torch had allocated at most, weights included; ``prefill_peak_bytes`` while
the prompt was fed. ``logits_error`` is the first step's difference to the exact cache's at the same content (random weights
and random keys: it shows that nothing is broken, not quality). One JSON object per line.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from encode import Line, Results
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from turboquant import PRESETS, TurboQuantCache, prefill
from turboquant.cache.kernels import kernels_run_on

EXACT = "exact"
#: Tokens of random content that are made at once.
FILL_BLOCK = 8192
#: Seconds that every case after the present one is left at least.
RESERVE = 12.0

LLAMA_8B = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336
)
TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96
)


class OverBudgetError(Exception):
    """Feeding the rest of a prompt would take too long; says how long."""


def make_model(shape: dict[str, int], vocabulary: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama with random weights, made on the device within seconds."""
    config = LlamaConfig(
        **shape,
        vocab_size=vocabulary,
        max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    with device:  # its frequencies were made on the meta device, too
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() == 1:
            p.fill_(1.0)  # norms
        else:
            p.normal_(std=0.02)
    return model.eval()


@dataclass
class Bench:
    """What all cases share.

    Attributes:
        model: of transformers.
        batch, block, steps: rows, tokens of a block of a prompt, single-token steps.
        deadline: as of time.perf_counter(): prompts that would go on after it are not fed.
    """

    model: Any
    batch: int
    block: int
    steps: int
    deadline: float

    def __post_init__(self) -> None:
        self.device, self.dtype = self.model.device, self.model.dtype
        self.logits: dict[tuple[int, str], Tensor] = {}

    def sync(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def cache(self, name: str) -> Any:
        """An empty cache; the model's attention is set to match."""
        self.model.set_attn_implementation("sdpa" if name == EXACT else "turboquant")
        return DynamicCache(config=self.model.config) if name == EXACT else TurboQuantCache.for_model(self.model, name)

    def ids(self, tokens: int) -> Tensor:
        """Random, the same for every cache: (batch, tokens)."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(0, self.model.config.vocab_size, (self.batch, tokens), generator=generator).to(self.device)

    # -- filling --------------------------------------------------------------------------------------------------

    def fill_random(self, cache: Any, length: int) -> None:
        """Random keys and values, the same in all layers and for every cache."""
        c = self.model.config
        torch.manual_seed(length)
        for start in range(0, length, FILL_BLOCK):
            n = min(FILL_BLOCK, length - start)
            shape = (self.batch, c.num_key_value_heads, n, c.head_dim)
            key, value = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            query = torch.randn(self.batch, c.num_attention_heads, n, c.head_dim, device=self.device, dtype=self.dtype)
            for i in range(c.num_hidden_layers):
                held, _ = cache.update(key, value, i)
                if isinstance(cache, TurboQuantCache):
                    # What the attention function does: queries count for the balance, then pages are packed.
                    held.layer.observe_queries(query)
                    held.layer.commit()

    def fill_prompt(self, cache: Any, length: int) -> None:
        """Feed a prompt in blocks.

        Raises:
            OverBudgetError: the time of the blocks so far says that the deadline would be missed.
        """
        ids, seconds = self.ids(length + 1), [time.perf_counter()]
        total = length // self.block

        def watch(_: int) -> None:
            self.sync()
            seconds.append(time.perf_counter())
            each = [b - a for a, b in itertools.pairwise(seconds)]
            done, expected = len(each), 0.0
            if total // 4 <= done < total and done > 3:
                # A block's time grows linearly with what the cache holds; the first block has other kernels.
                slope, first = statistics.linear_regression(range(1, done), each[1:])
                expected = sum(first + slope * i for i in range(done, total))
            if done < total and seconds[-1] + expected > self.deadline:
                raise OverBudgetError(
                    f"stopped after {done} of {total} blocks: {seconds[-1] - seconds[0]:.1f} s, about {expected:.0f} s to go"
                )

        done = prefill(self.model, ids, cache, self.block, watch)
        if done < length:
            self.model(ids[:, done:length], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.sync()

    def warm_up(self, name: str) -> None:
        """Two blocks and two steps, so that kernels are compiled and libraries loaded."""
        cache = self.cache(name)
        self.fill_prompt(cache, 2 * self.block)
        self.decode(cache, 2)

    # -- measuring ------------------------------------------------------------------------------------------------

    def decode(self, cache: Any, steps: int) -> tuple[list[float], Tensor]:
        """(milliseconds of each step, the first step's logits in float32)."""
        ids = self.ids(1)
        times, first = [], None
        for _ in range(steps):
            self.sync()
            start = time.perf_counter()
            logits = self.model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
            self.sync()
            times.append((time.perf_counter() - start) * 1e3)
            first = logits.float() if first is None else first
        assert first is not None
        return times, first

    def gpu_ms(self, cache: Any, steps: int = 4) -> float | None:
        """Milliseconds of kernels and copies per step, or None where the profiler does not tell."""
        if self.device.type != "cuda":
            return None
        try:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
                self.decode(cache, steps)
            work = [e for e in p.events() if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
            total = sum(e.time_range.elapsed_us() for e in work) / 1e3 / steps
        except Exception as e:  # a number besides; the machine may not allow it
            print(f"the profiler fails: {type(e).__name__}: {str(e)[:200]}", flush=True)
            return None
        return round(total, 3) or None

    def peak(self, reset: bool = False) -> int | None:
        """Bytes allocated at most since the last reset."""
        if self.device.type != "cuda":
            return None
        found = int(torch.cuda.max_memory_allocated())
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return found

    def case(self, name: str, length: int, fill: str, reserve: float) -> Iterator[Line]:
        """Fill a cache and decode from it."""
        line: Line = {"fill": fill, "batch": self.batch, "block": self.block}
        self.peak(reset=True)
        cache = self.cache(name)
        self.sync()
        start = time.perf_counter()
        if fill == "prompt":
            deadline = self.deadline
            self.deadline -= reserve
            try:
                self.fill_prompt(cache, length)
                line["prefill_s"] = round(time.perf_counter() - start, 3)
                line["prefill_tokens_per_s"] = round(self.batch * length / (time.perf_counter() - start), 1)
            except OverBudgetError as e:
                line |= {"prefill": f"skipped: {e}", "fill": "random"}
                cache = None
            finally:
                self.deadline = deadline
            line["prefill_peak_bytes"] = self.peak(reset=True)
            if cache is None:
                free()
                cache = self.cache(name)
        if line["fill"] == "random":
            self.fill_random(cache, length)
        free()
        self.peak(reset=True)
        _, logits = self.decode(cache, 2)
        times, _ = self.decode(cache, self.steps)
        line |= {
            "steps": self.steps,
            "ms": round(statistics.median(times), 3),
            "mean_ms": round(statistics.mean(times), 3),
            "tokens_per_s": round(self.batch * 1e3 / statistics.median(times), 2),
            "peak_bytes": self.peak(),
            "cache_bytes": cache_bytes(cache),
            "finite": bool(logits.isfinite().all()),
        }
        key = length, line["fill"]
        if name == EXACT:
            self.logits[key] = logits
        elif key in self.logits:
            exact = self.logits[key]
            line["logits_error"] = float(f"{float((logits - exact).norm() / exact.norm()):.2e}")
        line["gpu_ms"] = self.gpu_ms(cache)
        yield line


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds, in whatever form."""
    if isinstance(cache, TurboQuantCache):
        return cache.nbytes
    return sum(int(x.keys.nbytes + x.values.nbytes) for x in cache.layers)


def free() -> None:
    """Give memory of dropped caches back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def run(args: argparse.Namespace, results: Results, device: torch.device) -> None:
    """All cases, the short ones first."""
    shape = dict(TINY if args.tiny else LLAMA_8B)
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    model = make_model(shape, args.vocabulary, device, getattr(torch, args.dtype))
    weights = sum(p.nbytes for p in model.parameters())
    print(f"[{results.seconds:5.0f} s]  model made, {weights / 1e9:.2f} GB of weights", flush=True)
    deadline = results.start + args.budget
    bench = Bench(model, args.batch, args.block, args.steps, float("inf"))
    names = [EXACT, *args.presets]
    unready = []
    for name in names:
        try:
            bench.warm_up(name)
        except Exception as e:
            unready.append(name)
            results.fail({"cache": name, "part": "warm-up"}, e)
        else:
            print(f"[{results.seconds:5.0f} s]  {name}: warm", flush=True)
        free()
    bench.deadline = deadline
    cases = [(n, name) for n in sorted(args.lengths) for name in names if name not in unready]
    for at, (length, name) in enumerate(cases):
        about = {
            "cache": name,
            "bits": list(PRESETS[name]) if name in PRESETS else [16, 16],
            "seq_len": length,
            "layers": shape["num_hidden_layers"],
            "heads": shape["num_attention_heads"],
            "kv_heads": shape["num_key_value_heads"],
            "head_dim": shape["head_dim"],
            "weight_bytes": weights,
            "dtype": args.dtype,
            "kernels": name != EXACT and kernels_run_on(device),
            "transformers": transformers.__version__,
        }
        reserve = RESERVE * (len(cases) - at - 1)
        if time.perf_counter() > deadline:
            results.add(about | {"skipped": f"the budget of {args.budget} s is spent"})
            continue
        results.attempt(about, functools.partial(bench.case, name, length, args.fill, reserve))
        free()


def main() -> None:
    """Run and write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for generate_<gpu>.jsonl; without it lines are printed only")
    parser.add_argument("--lengths", nargs="*", type=int, default=[32768, 131072])
    parser.add_argument("--presets", nargs="*", default=["turboquant_3bit"], choices=list(PRESETS))
    parser.add_argument("--fill", choices=["random", "prompt"], default="random")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick try")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=4096, help="tokens of a block of a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="single-token steps (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    results = Results("generate", args.out, device)
    run(args, results, device)
    print(f"{results.seconds:.0f} s, {results.failed} cases failed", flush=True)
    if results.path is not None:
        print(f"written: {results.path}")
    raise SystemExit(1 if results.failed else 0)


if __name__ == "__main__":
    main()
