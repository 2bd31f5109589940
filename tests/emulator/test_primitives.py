"""Each primitive of the emulator against numpy or torch."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from .kernels import aligned, run
from .runner import CSRC, HERE, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")
RNG = np.random.default_rng(7)


def words(*shape: int) -> np.ndarray:
    return RNG.integers(0, 1 << 32, shape, dtype=np.uint32)


def test_every_primitive_of_the_gpu_is_emulated() -> None:
    def named(text: str) -> set[str]:
        return set(re.findall(r"TQ_DEVICE\s+\w+\s+(\w+)\(", text))

    gpu = named((CSRC / "common.cuh").read_text())
    assert len(gpu) > 30
    assert gpu - named("".join(file.read_text() for file in HERE.glob("*.h"))) == set()


def test_prmt_and_rotate_left(tmp_path: Path) -> None:
    a = words(3, 4096)
    code = """auto in = (const uint32_t*)p.in; auto out = (uint32_t*)p.out;
    for (int i = t; i < p.n; i += 32) {
      out[i] = prmt(in[i], in[p.n + i], in[2 * p.n + i]);
      out[p.n + i] = rotate_left(in[i], i % 67);
    }"""
    found = run(tmp_path, code, a, np.zeros((2, 4096), np.uint32), n=4096)
    source = np.ascontiguousarray(np.stack([a[0], a[1]], 1)).view(np.uint8)  # (4096, 8)
    for i in range(4):
        nibble = a[2] >> (4 * i)
        byte = source[np.arange(4096), nibble & 7]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        np.testing.assert_array_equal(found[0] >> (8 * i) & 0xFF, byte)
    turn = np.arange(4096) % 67 % 32
    wide = a[0].astype(np.uint64) << turn.astype(np.uint64)
    np.testing.assert_array_equal(found[1], (wide | wide >> np.uint64(32)) & np.uint64(0xFFFFFFFF))


def test_all_half_numbers_to_float(tmp_path: Path) -> None:
    half = np.arange(1 << 16, dtype=np.uint16)
    code = """auto in = (const uint16_t*)p.in; auto out = (float*)p.out;
    for (int i = t; i < 65536; i += 32) { out[i] = f16_to_f32(in[i]); out[65536 + i] = bf16_to_f32(in[i]); }"""
    found = run(tmp_path, code, half, np.zeros((2, 1 << 16), np.float32))
    np.testing.assert_array_equal(found[0], half.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found[1], torch.from_numpy(half.view(np.int16)).view(torch.bfloat16).float().numpy())


def test_float_to_half_rounds_to_nearest_even(tmp_path: Path) -> None:
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (half[1:] + half[:-1]) / 2  # all ties of fp16, subnormal ones as well
    tops = np.arange(0x7F80, dtype=np.uint32) << 16 | 0x8000  # all ties of bf16
    edges = np.array(
        [65504, 65519.996, 65520, 65536, 3.4e38, np.inf, np.nan, 0, 1e-45, 2**-25, 2**-24, 1.5 * 2**-25], np.float32
    )
    x = np.concatenate([half, ties, np.nextafter(ties, 1e9), np.nextafter(ties, 0), tops.view(np.float32), np.float32(edges)])
    x = np.concatenate([x, words(1 << 16).view(np.float32)])
    x = np.concatenate([x, -x]).astype(np.float32)
    code = """auto in = (const float*)p.in; auto out = (uint16_t*)p.out; auto pairs = (uint32_t*)(out + 2 * p.n);
    for (int i = t; i < p.n; i += 32) {
      out[i] = f32_to_f16(in[i]); out[p.n + i] = f32_to_bf16(in[i]);
      pairs[i] = f32_to_f16x2(in[i], -in[i]); pairs[p.n + i] = f32_to_bf16x2(in[i], -in[i]);
    }"""
    found = run(tmp_path, code, x, np.zeros((6, len(x)), np.uint16), n=len(x))
    number = ~np.isnan(x)
    with np.errstate(over="ignore"):
        f16 = np.where(number, x.astype(np.float16).view(np.uint16), 0x7FFF)
    bf16 = np.where(number, torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16), 0x7FFF)
    np.testing.assert_array_equal(found[0], f16)
    np.testing.assert_array_equal(found[1], bf16)
    flip = np.where(number, 0x8000, 0).astype(np.uint16)
    np.testing.assert_array_equal(found[2:4].reshape(-1, 2), np.stack([f16, f16 ^ flip], 1))
    np.testing.assert_array_equal(found[4:6].reshape(-1, 2), np.stack([bf16, bf16 ^ flip], 1))


def nearest_half(x: Fraction) -> np.float16:
    """Rounds once, ties to even."""
    near = np.float16(float(x))
    around = [np.nextafter(near, np.float16(-np.inf)), near, np.nextafter(near, np.float16(np.inf))]
    return min(around, key=lambda h: (abs(Fraction(float(h)) - x), int(h.view(np.uint16)) & 1))


def test_half_multiply_add_rounds_once(tmp_path: Path) -> None:
    a, b, c = RNG.standard_normal((3, 2048)).astype(np.float16)
    c[::2] *= np.float16(2**-9)  # sums with long tails
    # 1 + 2^-11 is a tie; the product of the smallest numbers decides it, and is lost in float32 and in float64.
    a[:2], b[:2], c[:2] = np.float16(2**-24), np.array([2**-24, -(2**-24)], np.float16), np.float16(1)
    a[2:4], b[2:4], c[2:4] = np.float16(1 + 2**-10), np.float16(0.5 + 2**-11), np.array([2**-24, -(2**-24)], np.float16)
    code = """auto in = (const uint32_t*)p.in; auto out = (uint32_t*)p.out;
    for (int i = t; i < 1024; i += 32) {
      out[i] = fma_f16x2(in[i], in[1024 + i], in[2048 + i]); out[1024 + i] = mul_f16x2(in[i], in[1024 + i]);
    }"""
    found = run(tmp_path, code, np.stack([a, b, c]), np.zeros((2, 2048), np.float16))
    exact = [[Fraction(float(x)) for x in row] for row in (a, b, c)]
    np.testing.assert_array_equal(found[0], [nearest_half(x * y + z) for x, y, z in zip(*exact, strict=True)])
    np.testing.assert_array_equal(found[1], a * b)


def test_functions_and_rounding_to_integers(tmp_path: Path) -> None:
    x = np.array(
        [-np.inf, -200, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 100.25, 3e9, -3e9, np.nan, 1e-40, 2**126.5, -(2**127)], np.float32
    )
    code = """auto in = (const float*)p.in; auto out = (float*)p.out;
    for (int i = t; i < p.n; i += 32) {
      out[i] = ex2(in[i]); out[p.n + i] = lg2(in[i]); out[2 * p.n + i] = rcp(in[i]);
      ((int*)out)[3 * p.n + i] = round_to_int(in[i]);
      out[4 * p.n + i] = sub_rn(mul_rn(in[i], in[i]), sqrt_rn(add_rn(in[i], div_rn(1.f, in[i]))));
    }"""
    found = run(tmp_path, code, x, np.zeros((5, len(x)), np.float32), n=len(x))
    normal = np.where(np.abs(x) < 2**-126, np.float32(0), x)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(found[0], np.exp2(normal), rtol=2**-22)
        np.testing.assert_allclose(found[1], np.log2(normal), rtol=2**-22)
        inverse = 1 / normal
        np.testing.assert_array_equal(found[2], np.where(np.abs(inverse) < 2**-126, 0, inverse))
        np.testing.assert_array_equal(found[4], x * x - np.sqrt(x + np.float32(1) / x))
    top, low = 2**31 - 1, -(2**31)
    np.testing.assert_array_equal(found[3].view(np.int32), [low, -200, -2, 0, 0, 0, 2, 2, 100, top, low, 0, 0, top, low])


def test_exchange_between_lanes(tmp_path: Path) -> None:
    x = words(64)
    code = """auto in = (const uint32_t*)p.in; auto out = (uint32_t*)p.out;
    const uint32_t x = in[t];
    out[t] = shfl_xor(x, 5); out[64 + t] = as_uint(shfl_xor(as_float(x), 16)); out[128 + t] = (uint32_t)shfl_xor((int)x, 1);
    out[192 + t] = shfl(x, (lane * 7 + 3) & 31); out[256 + t] = as_uint(shfl(as_float(x), t < 32 ? 4 : 9));
    out[320 + t] = ballot(x & 1); out[384 + t] = any_lane(t == 40); out[448 + t] = max_of_lanes(x);"""
    # 0x7F800001 and the like keep their bits through a float.
    found = run(tmp_path, code, x, np.zeros((8, 64), np.uint32), block=64).reshape(8, 2, 32)
    warps, lanes = x.reshape(2, 32), np.arange(32)
    np.testing.assert_array_equal(found[0], warps[:, lanes ^ 5])
    np.testing.assert_array_equal(found[1], warps[:, lanes ^ 16])
    np.testing.assert_array_equal(found[2], warps[:, lanes ^ 1])
    np.testing.assert_array_equal(found[3], warps[:, (lanes * 7 + 3) & 31])
    np.testing.assert_array_equal(found[4], np.stack([np.full(32, warps[0, 4]), np.full(32, warps[1, 9])]))
    odd = [sum(int(v & 1) << i for i, v in enumerate(row)) for row in warps]
    np.testing.assert_array_equal(found[5], np.repeat(odd, 32).reshape(2, 32))
    np.testing.assert_array_equal(found[6], np.repeat([0, 1], 32).reshape(2, 32))
    np.testing.assert_array_equal(found[7], np.repeat(warps.max(1), 32).reshape(2, 32))


def test_mma_f16(tmp_path: Path) -> None:
    a, b = RNG.standard_normal((2, 16, 16)).astype(np.float16), RNG.standard_normal((2, 16, 8)).astype(np.float16)
    a[0, 0, 0], a[0, 1, 1], a[1, 2, 3] = 2**-24, -65504, np.inf  # subnormal, largest, infinite
    c = RNG.standard_normal((2, 16, 8)).astype(np.float32)
    code = """const int warp = t >> 5, g = lane >> 2, c = lane & 3;
    auto a = (const uint32_t*)p.in + warp * 128;                      // rows of 8 words
    auto b = (const uint16_t*)(p.in + 1024) + warp * 128;             // rows of 8 halves
    auto d = (float*)p.out + warp * 128;
    auto pair = [&](int k) { return b[k * 8 + g] | (uint32_t)b[(k + 1) * 8 + g] << 16; };
    float s[4] = {d[g * 8 + 2 * c], d[g * 8 + 2 * c + 1], d[g * 8 + 64 + 2 * c], d[g * 8 + 65 + 2 * c]};
    mma_f16(s, a[g * 8 + c], a[g * 8 + 64 + c], a[g * 8 + 4 + c], a[g * 8 + 68 + c], pair(2 * c), pair(2 * c + 8));
    d[g * 8 + 2 * c] = s[0]; d[g * 8 + 2 * c + 1] = s[1]; d[g * 8 + 64 + 2 * c] = s[2]; d[g * 8 + 65 + 2 * c] = s[3];"""
    found = run(tmp_path, code, np.frombuffer(a.tobytes() + b.tobytes(), np.uint8), c.copy(), block=64)
    wide = a.astype(np.float64) @ b.astype(np.float64) + c
    scale = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64) + np.abs(c)
    finite = np.isfinite(wide)
    assert (~finite).sum() == 8
    np.testing.assert_array_equal(found[~finite], wide[~finite])
    assert np.all(np.abs(found[finite] - wide[finite]) <= 2**-21 * scale[finite])


def test_mma_s8(tmp_path: Path) -> None:
    a, b = RNG.integers(-128, 128, (16, 32), np.int8), RNG.integers(-128, 128, (32, 8), np.int8)
    a[0], b[:, 0] = -128, -128  # the largest sum
    c = RNG.integers(-(2**31), 2**31, (16, 8), np.int32)
    c[0, 0] = 2**31 - 1  # the sum wraps round
    code = """const int g = lane >> 2, c = lane & 3;
    auto a = (const uint32_t*)p.in; auto b = p.in + 512; auto d = (int32_t*)p.out;
    auto four = [&](int k) {
      return b[k * 8 + g] | b[k * 8 + 8 + g] << 8 | b[k * 8 + 16 + g] << 16 | (uint32_t)b[k * 8 + 24 + g] << 24;
    };
    int32_t s[4] = {d[g * 8 + 2 * c], d[g * 8 + 2 * c + 1], d[g * 8 + 64 + 2 * c], d[g * 8 + 65 + 2 * c]};
    mma_s8(s, a[g * 8 + c], a[g * 8 + 64 + c], a[g * 8 + 4 + c], a[g * 8 + 68 + c], four(4 * c), four(16 + 4 * c));
    d[g * 8 + 2 * c] = s[0]; d[g * 8 + 2 * c + 1] = s[1]; d[g * 8 + 64 + 2 * c] = s[2]; d[g * 8 + 65 + 2 * c] = s[3];"""
    found = run(tmp_path, code, np.frombuffer(a.tobytes() + b.tobytes(), np.uint8), c.copy())
    wide = a.astype(np.int64) @ b.astype(np.int64) + c
    assert wide[0, 0] >= 2**31
    np.testing.assert_array_equal(found, wide.astype(np.int32))


def test_matrix_moves(tmp_path: Path) -> None:
    m = RNG.integers(0, 1 << 16, (4, 8, 8), np.uint16)
    code = """for (int i = lane; i < 32; i += 32) memcpy(smem + (31 - i) * 16, p.in + i * 16, 16);  // rows in another order
    sync_warp();
    auto out = (uint32_t*)p.out;
    uint32_t r[4];
    ldmatrix_x4(r, smem + (31 - lane) * 16);
    for (int i = 0; i < 4; i++) out[i * 32 + lane] = r[i];
    ldmatrix_x4_trans(r, smem + (31 - lane) * 16);
    for (int i = 0; i < 4; i++) out[128 + i * 32 + lane] = r[i];
    out[256 + lane] = movmatrix(((const uint32_t*)p.in)[lane]);"""
    found = run(tmp_path, code, m, np.zeros((9, 8, 8), np.uint16), shared=512)
    np.testing.assert_array_equal(found[:4], m)
    np.testing.assert_array_equal(found[4:8], m.transpose(0, 2, 1))
    np.testing.assert_array_equal(found[8], m[0].T)


RING = """  // two warps, each with its ring of 3 stages of 64 bytes; a barrier per stage behind the rings
  const int warp = t >> 5, stages = 3;
  uint8_t* ring = smem + warp * stages * 64;
  uint64_t* bars = (uint64_t*)(smem + 2 * stages * 64) + warp * stages;
  const uint8_t* from = p.in + warp * p.n * 64;
  auto load = [&](int i) { bulk_load(ring + i % stages * 64, from + i * 64, 64, bars + i % stages); };
  if (lane == 0) {
    for (int s = 0; s < stages; s++) mbar_init(bars + s);
    mbar_fence();
    for (int i = 0; i < stages - 1; i++) load(i);
  }
  sync_warp();
  uint32_t sum = 0;
  for (int i = 0; i < p.n; i++) {
    if (lane == 0 && i + stages - 1 < p.n) load(i + stages - 1);
    WAIT
    sum = sum * 3 + ((const uint16_t*)(ring + i % stages * 64))[lane];
    SYNC
  }
  ((uint32_t*)p.out)[t] = sum;"""


@pytest.mark.parametrize("reverse", ["0", "1"])
def test_bulk_loads_in_a_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reverse: str) -> None:
    monkeypatch.setenv("TQ_EMULATE_REVERSE", reverse)
    data = RNG.integers(0, 1 << 16, (2, 20, 32), np.uint16)
    wanted = np.zeros((2, 32), np.uint32)
    for i in range(20):
        wanted = wanted * 3 + data[:, i]

    def total(wait: str, sync: str) -> np.ndarray:
        code = RING.replace("WAIT", wait).replace("SYNC", sync)
        return run(tmp_path, code, aligned(data.tobytes()), block=64, shared=432, n=20).reshape(2, 32)

    wait, sync = "mbar_wait(bars + i % stages, i / stages & 1);", "sync_warp();"
    np.testing.assert_array_equal(total(wait, sync), wanted)
    # Overwriting a stage that other lanes still read: they see the poison of the next load.
    assert not np.array_equal(total(wait, ""), wanted)


def test_reading_before_the_wait_gives_poison(tmp_path: Path) -> None:
    data = aligned(bytes(range(128)))
    code = """uint64_t* bar = (uint64_t*)(smem + 64);
    if (lane == 0) { mbar_init(bar); mbar_fence(); LOAD; }
    sync_warp();
    auto out = (uint16_t*)p.out;
    out[lane] = ((uint16_t*)smem)[lane];
    mbar_wait(bar, 0);
    out[32 + lane] = ((uint16_t*)smem)[lane];"""
    for load in ("bulk_load(smem, p.in, 64, bar)", "bulk_load_2(smem + 16, p.in + 16, 48, smem, p.in, 16, bar)"):
        found = run(tmp_path, code.replace("LOAD", load), data, np.zeros((2, 32), np.uint16), shared=72)
        assert np.all(found[0] == 0xFFFF)
        np.testing.assert_array_equal(found[1], data[:64].view(np.uint16))


@pytest.mark.parametrize("reverse", ["0", "1"])
def test_waiting_for_a_load_that_another_warp_issues_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reverse: str
) -> None:
    monkeypatch.setenv("TQ_EMULATE_REVERSE", reverse)
    code = """uint64_t* bar = (uint64_t*)smem;
    if (t == 0) { mbar_init(bar); mbar_fence(); }
    sync_block();
    if (t == 63 - 31 * p.n) bulk_load(smem + 16, p.in, 128, bar);   // thread 63 or 32: the last or the first of its warp
    if (t < 32) mbar_wait(bar, 0);
    sync_block();
    ((uint16_t*)p.out)[t] = ((uint16_t*)(smem + 16))[t];"""
    data = aligned(bytes(range(128)))
    for n in (0, 1):
        found = run(tmp_path, code, data, np.zeros(64, np.uint16), block=64, shared=144, n=n)
        np.testing.assert_array_equal(found, data.view(np.uint16))


@pytest.mark.parametrize("defines", [{}, {"TQ_NO_BULK": 1}])
def test_copy_async_completes_group_by_group(tmp_path: Path, defines: dict[str, int]) -> None:
    code = """for (int i = lane; i < 96; i += 32) { copy_async_16(smem + i * 16, p.in + i * 16); copy_async_commit(); }
    auto out = (uint32_t*)p.out;
    auto read = [&](int at) { for (int i = lane; i < 96; i += 32) out[at + i] = ((uint32_t*)smem)[i * 4 + 3]; };
    copy_async_wait<3>(); read(0);
    copy_async_wait<1>(); read(96);
    copy_async_wait<0>(); read(192);
    copy_async_16(smem, p.in + 16);       // never committed, so never waited for
    copy_async_wait<0>(); out[288 + lane] = ((uint32_t*)smem)[0];
    sync_warp();
#ifdef TQ_BULK_COPY
    out[320 + lane] = 1;
#else
    out[320 + lane] = 0;
#endif"""
    x = words(3, 32, 4)
    found = run(tmp_path, code, aligned(x.tobytes()), np.zeros((11, 32), np.uint32), shared=1536, **defines)
    poison = np.full(32, 0xFFFFFFFF)
    np.testing.assert_array_equal(found[:3], [poison] * 3)
    np.testing.assert_array_equal(found[3:6], [x[0, :, 3], x[1, :, 3], poison])
    np.testing.assert_array_equal(found[6:9], x[:, :, 3])
    assert np.all(found[9] == 0xFFFFFFFF)
    assert np.all(found[10] == (0 if defines else 1))


def test_atomics_indices_and_the_last_block(tmp_path: Path) -> None:
    code = """auto out = (int*)p.out;
    const int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[8 + b * blockDim.x + t] = b * 1000 + t;
    fence_device();
    int* last = (int*)smem;
    if (t == 0) *last = atomic_add(out, 1) == (int)(gridDim.x * gridDim.y * gridDim.z) - 1;
    sync_block();
    if (*last && t == 0) { int sum = 0; for (int i = 0; i < 24 * 64; i++) sum += out[8 + i]; out[1] = sum; }"""
    found = run(tmp_path, code, None, np.zeros(8 + 24 * 64, np.int32), grid=(2, 3, 4), block=64, shared=4)
    wanted = np.add.outer(np.arange(24) * 1000, np.arange(64))
    np.testing.assert_array_equal(found[8:].reshape(24, 64), wanted)
    assert found[0] == 24 and found[1] == wanted.sum()
