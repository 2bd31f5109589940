"""The prefix store with tiny models: restored output is that of a run without it, whatever happens to the files."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig

from turboquant import TurboQuantCache, TurboQuantConfig, TurboQuantStore
from turboquant.errors import ConfigError, ShapeError, TurboQuantError
from turboquant.offload import container, disk, store
from turboquant.offload.container import HEADER_BYTES, TEMPORARY, Damaged, Kind, read
from turboquant.offload.disk import STATISTICS, DiskTier

BIG = 1 << 30
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # large enough that outputs depend on all of the prompt
}


def make(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="turboquant").eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return make(LlamaConfig(num_hidden_layers=3, **SIZES))


def prompt(seed: int, tokens: int) -> Tensor:
    return torch.randint(1, 200, (1, tokens), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Tensor, cache: Any, new: int = 3, **options: Any) -> Tensor:
    """Logits of every new token; equal logits are more than equal tokens."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        prefill_chunk_size=256,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(out.logits)


def cold(model: Any, ids: Tensor, config: Any = "turboquant_3bit", new: int = 3, **options: Any) -> Tensor:
    return run(model, ids, TurboQuantCache.for_model(model, config, **options), new)


def warm(
    model: Any, ids: Tensor, folder: Path, config: Any = "turboquant_3bit", new: int = 3, size: int = BIG, **options: Any
) -> tuple[Tensor, int, Counter[str]]:
    """(logits, restored tokens, counters) of one run with a store opened for it, as in a new process."""
    opened = TurboQuantStore(folder, size, **options)
    cache = TurboQuantCache.for_model(model, config, store=opened)
    restored = opened.restore(cache, ids)
    return run(model, ids, cache, new), restored, opened.counters


def found(model: Any, ids: Tensor, folder: Path, config: Any = "turboquant_3bit", size: int = BIG, **options: Any) -> int:
    """How many tokens a new process would restore."""
    opened = TurboQuantStore(folder, size, **options)
    return opened.restore(TurboQuantCache.for_model(model, config, store=opened), ids)


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(p for p in folder.rglob(pattern) if p.is_file())


def used(folder: Path) -> int:
    return sum(p.stat().st_size for p in files(folder))


def events(counters: Counter[str], kind: str) -> int:
    return sum(n for name, n in counters.items() if name.startswith(kind))


IDS = prompt(40, 530)


@pytest.fixture(scope="module")
def template(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("template")
    want, _, _ = warm(model, IDS, folder, window_interval=1)
    assert torch.equal(want, cold(model, IDS))
    return folder, want


# -- the same output ---------------------------------------------------------------------------------------------------


def test_restored_output_is_bit_for_bit_that_without_a_store(model: Any, tmp_path: Path) -> None:
    ids = prompt(1, 900)
    want = cold(model, ids, new=6)
    got, restored, counters = warm(model, ids, tmp_path, new=6)
    assert restored == 0
    assert torch.equal(got, want)
    assert counters["miss_empty"] == 1
    got, restored, counters = warm(model, ids, tmp_path, new=6)
    assert restored == 768
    assert torch.equal(got, want)
    assert counters == Counter(hits=1, restored_tokens=768)
    assert not torch.equal(want, cold(model, prompt(2, 900), new=6))  # the comparison means something


SCRIPT = """
import json, sys, torch
import turboquant
from transformers import AutoModelForCausalLM
from turboquant import TurboQuantCache, TurboQuantStore
folder, store_folder, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="turboquant")
def no_pickle(*args, **kwargs): raise AssertionError("pickle")
torch.load = no_pickle
store = TurboQuantStore(store_folder, 1 << 30)
cache = TurboQuantCache.for_model(model, store=store)
restored = store.restore(cache, ids)
out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=8,
                     do_sample=False, prefill_chunk_size=256)
print(json.dumps([restored, out[0, ids.shape[1]:].tolist(), dict(store.counters)]))
"""


def test_a_new_process_restores_the_same_tokens(model: Any, tmp_path: Path) -> None:
    ids = prompt(3, 700)
    model.save_pretrained(tmp_path / "model")
    want = cold(model, ids, new=8).argmax(-1)[:, 0].tolist()
    assert warm(model, ids, tmp_path / "store")[1] == 0
    before = {p: p.read_bytes() for p in files(tmp_path / "store")}
    arguments = [str(tmp_path / "model"), str(tmp_path / "store"), json.dumps(ids[0].tolist())]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    restored, tokens, counters = json.loads(result.stdout.splitlines()[-1])
    assert (restored, tokens) == (512, want)
    assert counters["hits"] == 1
    assert all(p.read_bytes() == raw for p, raw in before.items())


@pytest.mark.parametrize(
    "config",
    [
        TurboQuantConfig(layers={0: "exact"}),
        TurboQuantConfig(layers={1: "exact", -1: (4, 2)}),
        TurboQuantConfig(n_bits=16),
        TurboQuantConfig(key_center="none"),
        TurboQuantConfig(recent_tokens=100),
        "turboquant_1.5bit",
    ],
    ids=["exact-first", "mixed", "exact", "uncentred", "window-of-100", "1.5bit"],
)
def test_configurations(model: Any, tmp_path: Path, config: Any) -> None:
    ids = prompt(4, 600)
    want = cold(model, ids, config)
    for expected in (0, 512):
        got, restored, _ = warm(model, ids, tmp_path, config)
        assert restored == expected
        assert torch.equal(got, want)


def test_compressed_sliding_layers(tmp_path: Path) -> None:
    sliding = make(MistralConfig(num_hidden_layers=2, sliding_window=1024, **SIZES))
    for tokens, expected in ((600, 512), (1700, 1536)):
        ids, folder = prompt(5, tokens), tmp_path / str(tokens)
        want = cold(sliding, ids)
        assert torch.equal(warm(sliding, ids, folder)[0], want)
        got, restored, counters = warm(sliding, ids, folder)
        assert restored == expected
        assert counters["hits"] == 1
        torch.testing.assert_close(got, want)
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        assert files(folder, "*-chunk.tqc") == []  # all that they keep is in the window object


def test_exact_sliding_and_compressed_full_layers(tmp_path: Path) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    mixed = make(Gemma3TextConfig(num_hidden_layers=3, sliding_window=64, layer_types=types, **SIZES))
    ids = prompt(6, 900)
    want = cold(mixed, ids)
    for expected in (0, 768):
        got, restored, _ = warm(mixed, ids, tmp_path)
        assert restored == expected
        assert torch.equal(got, want)


def test_layers_of_other_kinds_are_counted_and_not_stored(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "unstorable", lambda cache: True)  # as with linear attention
    got, restored, counters = warm(model, prompt(1, 600), tmp_path)
    assert (restored, files(tmp_path)) == (0, [])
    assert counters["refused_layers_that_cannot_be_stored"] == 1
    assert torch.equal(got, cold(model, prompt(1, 600)))


# -- which prefix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "expected"), [(2, 0), (256, 0), (257, 256), (512, 256), (513, 512), (530, 512)])
def test_at_least_one_token_is_left(model: Any, template: tuple[Path, Tensor], tokens: int, expected: int) -> None:
    ids = IDS[:, :tokens]
    opened = TurboQuantStore(template[0], BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    assert opened.restore(cache, ids) == expected
    assert cache.get_seq_length() == expected
    assert cache.token_ids == ids[0, :expected].tolist()
    assert opened.counters["miss_missing"] == (not expected)


def test_short_prompts_store_nothing(model: Any, tmp_path: Path) -> None:
    got, _, counters = warm(model, prompt(8, 200), tmp_path)
    assert torch.equal(got, cold(model, prompt(8, 200)))
    assert files(tmp_path) == []
    assert counters == Counter(miss_empty=1)


def test_the_longest_of_several_prefixes(model: Any, tmp_path: Path) -> None:
    long = prompt(9, 1100)
    short = torch.cat((long[:, :520], prompt(10, 80)), dim=1)
    for ids in (short, long):
        warm(model, ids, tmp_path)
    fork = torch.cat((long[:, :520], prompt(11, 400)), dim=1)
    for ids, expected in ((long, 1024), (short, 512), (fork, 512), (prompt(12, 600), 0)):
        opened = TurboQuantStore(tmp_path, BIG)
        cache = TurboQuantCache.for_model(model, store=opened)
        assert opened.restore(cache, ids) == expected
        frozen = cache.statistics if expected else None
        if ids is fork and frozen is not None:
            assert torch.equal(run(model, ids, cache), cold(model, ids, statistics=frozen))


def test_a_common_beginning_is_found_at_the_interval(model: Any, tmp_path: Path) -> None:
    stored = prompt(13, 1400)
    warm(model, stored, tmp_path, window_interval=2)
    borders = sorted(container.decode_header(p.read_bytes()[:HEADER_BYTES]).tokens for p in files(tmp_path, "*-window.tqc"))
    assert borders == [512, 1024, 1280]
    for shared, expected in ((1399, 1280), (1100, 1024), (800, 512), (520, 512), (511, 0)):
        ids = torch.cat((stored[:, :shared], prompt(14, 50)), dim=1)
        opened = TurboQuantStore(tmp_path, BIG, window_interval=2)
        assert opened.restore(TurboQuantCache.for_model(model, store=opened), ids) == expected


def test_the_end_of_another_prompt_is_kept(model: Any, tmp_path: Path) -> None:
    ids = prompt(15, 900)
    warm(model, ids[:, :300], tmp_path)
    opened = TurboQuantStore(tmp_path, BIG)
    run(model, ids, TurboQuantCache.for_model(model, store=opened))  # begins alike, is not restored, and goes on
    assert found(model, ids[:, :300], tmp_path) == 256
    assert found(model, ids, tmp_path) == 768


def test_answers_are_stored_while_they_are_generated(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    first = prompt(16, 740)
    out = model.generate(first, attention_mask=torch.ones_like(first), past_key_values=cache, max_new_tokens=40)
    again = torch.cat((out, prompt(17, 30)), dim=1)
    live = run(model, again, cache)
    got, restored, _ = warm(model, again, tmp_path)
    assert restored == 768
    # Not bit for bit: the conversation that went on fed the last 30 tokens in another block.
    assert torch.equal(got.argmax(-1), live.argmax(-1))
    assert found(model, first, tmp_path) == 512  # the end of the prompt itself is kept too


# -- edited histories --------------------------------------------------------------------------------------------------


def test_crop_within_the_exact_tail_stores_the_new_tokens(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    old = prompt(18, 760)
    run(model, old, cache, new=1)
    packed = max(s.packed_tokens for s in cache._stores)
    cache.crop(690)
    assert packed <= 690
    new = torch.cat((old[:, :690], prompt(19, 500)), dim=1)
    run(model, new, cache, new=1)
    assert not events(opened.counters, "refused")
    for ids, expected in ((new, 1024), (old, 512)):
        got, restored, _ = warm(model, ids, tmp_path)
        assert restored == expected
        want = cold(model, ids, statistics=cache.statistics)
        assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("length", [512, 600])
def test_crop_into_packed_pages_stores_nothing_from_there(model: Any, tmp_path: Path, length: int) -> None:
    # The cropped cache has decoded values where a fresh one has exact ones: fine to go on with, wrong to hand to others.
    opened = TurboQuantStore(tmp_path, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    old = prompt(20, 800)
    run(model, old, cache)
    before = files(tmp_path)
    cache.crop(length)
    new = torch.cat((old[:, :length], prompt(21, 250)), dim=1)
    run(model, new, cache)
    assert opened.counters["refused_cropped_into_packed_pages"] == 1
    assert files(tmp_path) == before
    for ids in (old, new):
        assert torch.equal(warm(model, ids, tmp_path)[0], cold(model, ids, statistics=cache.statistics))


def test_reset_and_crop_to_nothing_begin_anew(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    for i, forget in enumerate((cache.reset, lambda: cache.crop(-cache.get_seq_length()), lambda: None)):
        ids = prompt(30 + i, 600)
        run(model, ids, cache)
        assert torch.equal(warm(model, ids, tmp_path)[0], cold(model, ids, statistics=cache.statistics))
        forget()
    assert not events(opened.counters, "refused")
    assert len(files(tmp_path, STATISTICS)) == 1


def test_a_copied_cache_goes_on_with_the_store(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    run(model, prompt(33, 600), cache)
    copied = copy.deepcopy(cache)
    assert copied.store is opened
    longer = torch.cat((torch.tensor([copied.token_ids]), prompt(34, 300)), dim=1)
    run(model, longer, copied)
    assert found(model, longer, tmp_path) == 768


# -- damage ------------------------------------------------------------------------------------------------------------


def _flip(path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def _truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def _other(path: Path, other: Path) -> None:
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [_flip, _truncate, _empty, _delete, _folder, _other])
@pytest.mark.parametrize("kind", ["chunk", "window", "statistics"])
def test_damage_is_a_counted_miss_and_repaired(
    model: Any,
    template: tuple[Path, Tensor],
    tmp_path: Path,
    kind: str,
    damage: Callable[[Path, Path], None],
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    name = STATISTICS if kind == "statistics" else f"*-{kind}.tqc"
    # The last window written is the one that a restore reads; windows of full caches have equal sizes.
    path = max(files(folder, name), key=lambda p: p.stat().st_mtime_ns if kind == "window" else 0)
    good = path.read_bytes()
    damage(path, max(files(request.getfixturevalue("stranger"), name), key=lambda p: p.stat().st_size))
    got, restored, counters = warm(model, IDS, folder, window_interval=1)
    assert restored < 512
    if (kind, damage) != ("window", _delete):  # a deleted window object was never there; a shorter prefix is found
        assert events(counters, "miss") >= 1
    assert torch.equal(got, template[1])
    assert path.read_bytes() == good
    opened = TurboQuantStore(folder, BIG)
    assert opened.restore(TurboQuantCache.for_model(model, store=opened), IDS) == 512
    assert not events(opened.counters, "miss")
    assert not files(folder, f"*{TEMPORARY}*")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of another prompt and, with the same shapes, of another model: its statistics are valid, but not ours."""
    folder = tmp_path_factory.mktemp("stranger")
    warm(make(LlamaConfig(num_hidden_layers=3, **SIZES), seed=5), prompt(41, 600), folder, window_interval=1)
    return folder


def test_another_prompt_under_the_right_name_is_a_miss(model: Any, template: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    ours = set(files(folder, "*.tqc"))
    warm(model, prompt(42, 600), folder, window_interval=1)
    theirs = set(files(folder, "*.tqc")) - ours
    for kind in ("chunk", "window"):
        for path in (p for p in ours if kind in p.name):
            shutil.copy(next(p for p in theirs if kind in p.name), path)
    got, restored, counters = warm(model, IDS, folder, window_interval=1)
    assert restored == 0
    assert counters["miss_key"] == 2  # both windows; chunks are not even looked at
    assert torch.equal(got, template[1])


def test_a_valid_container_with_strange_content_is_a_miss(model: Any, template: tuple[Path, Tensor], tmp_path: Path) -> None:
    for content in (b"", b"\x08\0\0\0\0\0\0\0{}      "):
        for kind in (Kind.WINDOW, Kind.CHUNK):
            folder = tmp_path / f"{kind.name}{len(content)}"
            shutil.copytree(template[0], folder)
            for path in files(folder, f"*-{kind.name.lower()}.tqc"):
                header, _ = read(path, kind, None, None)
                container.write(path, kind, header.tokens, header.namespace, header.key, [content])
            got, restored, counters = warm(model, IDS, folder, window_interval=1)
            assert counters["miss_shape"] >= 1
            assert restored == (256 if kind == Kind.CHUNK else 0)  # the window at 256 needs no chunk
            assert torch.equal(got, template[1])
            assert found(model, IDS, folder, window_interval=1) == 512


# -- who may read ------------------------------------------------------------------------------------------------------


def test_nothing_is_shared_with_others(model: Any, template: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight *= 1.01
    cases: list[tuple[Any, Any, str]] = [
        (make(LlamaConfig(num_hidden_layers=3, **SIZES), seed=1), "turboquant_3bit", ""),
        (tuned, "turboquant_3bit", ""),
        (make(LlamaConfig(num_hidden_layers=3, rope_theta=5e5, **SIZES)), "turboquant_3bit", ""),
        (copy.deepcopy(model).bfloat16(), "turboquant_3bit", ""),
        (model, "turboquant_4bit", ""),
        (model, TurboQuantConfig.preset("turboquant_3bit", seed=1), ""),
        (model, TurboQuantConfig.preset("turboquant_3bit", sink_tokens=8), ""),
        (model, "turboquant_3bit", "tenant"),
    ]
    for other, config, salt in cases:
        got, restored, counters = warm(other, IDS, folder, config, salt=salt)
        assert restored == 0
        assert not counters["hits"]
        assert torch.equal(got, cold(other, IDS, config))
    assert found(model, IDS, folder) == 512
    for other, config, salt in cases:
        assert found(other, IDS, folder, config, salt=salt) == 512


def test_a_cache_with_its_own_statistics_does_not_mix(model: Any, template: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    measured = TurboQuantCache.for_model(model)
    run(model, prompt(43, 600), measured)
    before = files(folder)
    opened = TurboQuantStore(folder, BIG)
    cache = TurboQuantCache.for_model(model, statistics=measured.statistics, store=opened)
    assert opened.restore(cache, IDS) == 0
    assert torch.equal(run(model, IDS, cache), cold(model, IDS, statistics=measured.statistics))
    assert opened.counters["refused_other_statistics"] == 1
    assert files(folder) == before


def test_a_plain_cache_must_say_what_it_is(tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    key = torch.randn(1, 2, 600, 32, generator=torch.Generator().manual_seed(0))
    cache = TurboQuantCache(1, 2, 32, dtype=torch.float32)
    with pytest.raises(ConfigError, match="model_fingerprint"):
        opened.save(cache, list(range(600)))
    cache.model_fingerprint = "a"
    cache._dtype = None
    with pytest.raises(ConfigError, match="dtype"):
        opened.save(cache, list(range(600)))
    cache._dtype = torch.float32
    opened.attach(cache)
    cache.update(key, key, 0)
    opened.save(cache, torch.arange(600))
    other = TurboQuantCache(1, 2, 32, dtype=torch.float32)
    other.model_fingerprint = "a"
    assert opened.restore(other, torch.arange(600)) == 512
    # The tokens were fed at once, but values before the exact window are the stored ones in both.
    assert torch.equal(other.get(0)[0][:, :, :384], cache.get(0)[0][:, :, :384])
    assert torch.equal(other.get(0)[0][:, :, 384:], key[:, :, 384:512])


# -- what cannot be stored ---------------------------------------------------------------------------------------------


def test_batches_beams_and_embeddings_stop_saving(model: Any, tmp_path: Path) -> None:
    ids = prompt(50, 300)
    two = torch.cat((ids, prompt(51, 300)))
    embeddings = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    cases: list[dict[str, Any]] = [
        {"input_ids": two, "attention_mask": torch.ones_like(two)},
        {"input_ids": ids, "attention_mask": mask, "num_beams": 2},
        {"inputs_embeds": embeddings, "attention_mask": mask},
    ]
    for case in cases:
        opened = TurboQuantStore(tmp_path, BIG)
        cache = TurboQuantCache.for_model(model, store=opened)
        options = {"max_new_tokens": 3, "do_sample": False, **case}
        got = model.generate(past_key_values=cache, **options)
        assert torch.equal(got, model.generate(past_key_values=TurboQuantCache.for_model(model), **options))
        assert opened.counters == Counter(refused_only_single_sequences_of_token_ids_are_stored=1)
    assert files(tmp_path) == []


def test_padded_prompts_are_not_stored(model: Any, tmp_path: Path) -> None:
    # Their token ids do not say which of them are masked.
    ids = prompt(52, 600)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    opened = TurboQuantStore(tmp_path, BIG)
    got = run(model, ids, TurboQuantCache.for_model(model, store=opened), attention_mask=mask)
    assert torch.equal(got, run(model, ids, TurboQuantCache.for_model(model), attention_mask=mask))
    assert opened.counters == Counter(refused_masked_tokens_are_not_stored=1)
    assert files(tmp_path, "*.tqc") == []


def test_wrong_arguments_are_clear(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    for bad in (torch.ones(2, 300, dtype=torch.long), torch.ones(300), [[1, 2], [3, 4]]):
        with pytest.raises(ShapeError, match="one sequence"):
            opened.restore(cache, bad)  # type: ignore[arg-type]
    run(model, prompt(53, 20), cache)
    with pytest.raises(TurboQuantError, match="empty cache"):
        opened.restore(cache, prompt(53, 20))
    for options in ({"max_bytes": 0}, {"max_bytes": 1.5}, {"window_interval": 0}, {"salt": 5}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            TurboQuantStore(tmp_path, **{"max_bytes": BIG, **options})  # type: ignore[arg-type]


def test_any_error_while_saving_stops_saving_only(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(store, "export_chunk", fail)
    got, _, counters = warm(model, IDS, tmp_path)
    assert torch.equal(got, cold(model, IDS))
    assert counters["refused_runtimeerror"] == 1


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_the_bound_holds_at_every_write(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 700_000
    peaks = []
    real = os.replace

    def watch(source: Path, target: Path) -> None:
        peaks.append(used(tmp_path))
        real(source, target)
        peaks.append(used(tmp_path))

    monkeypatch.setattr(container.os, "replace", watch)
    evicted = 0
    for i in range(8):
        ids = prompt(60 + i, 600)
        opened = TurboQuantStore(tmp_path, bound)
        cache = TurboQuantCache.for_model(model, store=opened)
        assert opened.restore(cache, ids) == 0
        run(model, ids, cache)
        evicted += opened.counters["evicted"]
        assert opened.nbytes == used(tmp_path)
    assert max(peaks) <= bound
    assert evicted > 3
    assert found(model, prompt(67, 600), tmp_path, size=bound) == 512  # the last
    assert found(model, prompt(60, 600), tmp_path, size=bound) == 0  # the first
    assert len(files(tmp_path, STATISTICS)) == 1


def test_the_end_of_a_prompt_goes_first(model: Any, tmp_path: Path) -> None:
    warm(model, prompt(70, 1100), tmp_path)
    warm(model, prompt(71, 1100), tmp_path)  # used later
    opened = TurboQuantStore(tmp_path, BIG)
    order = []
    while opened.tier._index:
        path = min(opened.tier._index, key=lambda p: opened.tier._index[p].rank)
        order.append(opened.tier._index[path].tokens)
        opened.tier.remove(path)
    half = len(order) // 2
    assert order[-1] == -1  # the statistics
    for part in (order[:half], order[half:-1]):
        assert part == sorted(part, reverse=True)
        assert part[-1] == 256


def test_use_protects_a_prompt(model: Any, tmp_path: Path) -> None:
    a, b, c = (prompt(i, 600) for i in (72, 73, 74))
    warm(model, a, tmp_path)
    one = used(tmp_path)
    warm(model, b, tmp_path)
    bound = used(tmp_path) + one  # windows at two borders are there for a moment
    assert found(model, a, tmp_path, size=bound) == 512
    warm(model, c, tmp_path, size=bound)
    assert [found(model, ids, tmp_path) for ids in (a, b, c)] == [512, 0, 512]


def test_a_prompt_larger_than_the_store_keeps_its_beginning(model: Any, tmp_path: Path) -> None:
    ids = prompt(75, 1200)
    got, _, counters = warm(model, ids, tmp_path, size=500_000, window_interval=2)
    assert torch.equal(got, cold(model, ids))
    assert used(tmp_path) <= 500_000
    assert counters["refused_store_full"] >= 1
    got, restored, _ = warm(model, ids, tmp_path, size=500_000, window_interval=2)
    assert restored >= 512
    assert torch.equal(got, cold(model, ids))


@pytest.mark.parametrize("size", [1, 1000, 4000])
def test_a_store_smaller_than_one_object(model: Any, tmp_path: Path, size: int) -> None:
    got, _, counters = warm(model, IDS, tmp_path, size=size)
    assert torch.equal(got, cold(model, IDS))
    assert used(tmp_path) <= size
    assert counters["refused_larger_than_store"] >= 1


def test_an_almost_full_disk_is_left_alone(
    model: Any, template: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    before = files(folder)
    free = shutil.disk_usage(folder)._replace(free=disk.MIN_FREE_BYTES - BIG)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: free)
    _, _, counters = warm(model, prompt(76, 600), folder)
    assert counters["refused_disk_full"] >= 1
    assert files(folder) == before  # evicting everything would not have helped


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot use"):
            TurboQuantStore(path, BIG)
    monkeypatch.setattr(disk.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="no permission"):
        TurboQuantStore(tmp_path, BIG)


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "mkdir"])
def test_a_full_disk_is_counted(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    want, folder = cold(model, IDS), tmp_path / "store"
    warm(model, prompt(77, 300), folder)
    before = files(folder)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    opened = TurboQuantStore(folder, BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    assert opened.restore(cache, IDS) == 0
    if step == "write":
        monkeypatch.setattr(disk, "write", fail)
    elif step == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    else:
        monkeypatch.setattr(container.os, step, fail)
    got = run(model, IDS, cache)
    monkeypatch.undo()
    assert opened.counters["refused_no_space_left_on_device"] >= 1
    assert torch.equal(got, cold(model, IDS, statistics=cache.statistics))
    assert got.shape == want.shape
    assert files(folder) == before


def test_a_folder_deleted_under_way(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path / "store", BIG)
    cache = TurboQuantCache.for_model(model, store=opened)
    shutil.rmtree(tmp_path / "store")
    assert torch.equal(run(model, IDS, cache), cold(model, IDS))
    shutil.rmtree(tmp_path / "store")
    assert opened.restore(TurboQuantCache.for_model(model, store=opened), IDS) == 0


def test_stale_temporary_files_are_removed_and_others_left_alone(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    stale = [below / f"x-chunk.tqc{TEMPORARY}1", tmp_path / "a" / f"{STATISTICS}{TEMPORARY}2"]
    fresh = [below / f"y-chunk.tqc{TEMPORARY}3", tmp_path / "a" / f"{STATISTICS}{TEMPORARY}4"]
    foreign = [below / f"notes{TEMPORARY}5", below / "notes.txt"]
    for path in (*stale, *fresh, *foreign):
        path.write_bytes(bytes(100))
    old = time.time() - 7200
    for path in (*stale, *foreign):
        os.utime(path, (old, old))
    opened = TurboQuantStore(tmp_path, 1000)
    assert files(tmp_path) == sorted((*fresh, *foreign))
    assert opened.nbytes == 200  # unfinished files count too
    assert len(opened.tier) == 0


def test_damaged_files_are_evicted_first(tmp_path: Path) -> None:
    counters: Counter[str] = Counter()
    (tmp_path / "damaged.tqc").write_bytes(bytes(300))
    tier = DiskTier(tmp_path, 1000, counters)
    now = time.time_ns() + 1
    for i in range(4):
        assert tier.put(tmp_path / f"{i}.tqc", Kind.CHUNK, 256, bytes(32), bytes(32), [bytes(100)], now + i)
    assert [p.name for p in files(tmp_path)] == ["0.tqc", "1.tqc", "2.tqc", "3.tqc"]
    assert counters["evicted"] == 1


def test_what_cannot_be_deleted_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 500, Counter())
    for i in range(2):
        assert tier.put(tmp_path / f"{i}.tqc", Kind.CHUNK, 256, bytes(32), bytes(32), [bytes(100)], i + 1)

    def fail(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", fail)
    assert not tier.put(tmp_path / "2.tqc", Kind.CHUNK, 256, bytes(32), bytes(32), [bytes(100)], 9)
    assert used(tmp_path) == tier.nbytes <= 500


def test_the_store_waits_for_another_writer_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(disk, "_LOCK_SECONDS", 0.02)
    tier = DiskTier(tmp_path, 1000, Counter())
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert not tier.put(tmp_path / "0.tqc", Kind.CHUNK, 256, bytes(32), bytes(32), [b""], 1)
    assert tier.counters == Counter(refused_locked=1)
    os.close(handle)
    assert tier.put(tmp_path / "0.tqc", Kind.CHUNK, 256, bytes(32), bytes(32), [b""], 1)


def test_two_caches_on_one_store(model: Any, tmp_path: Path) -> None:
    opened = TurboQuantStore(tmp_path, BIG)
    warm(model, prompt(80, 600), tmp_path)
    caches = [TurboQuantCache.for_model(model, store=opened) for _ in range(2)]
    prompts = [prompt(81, 600), prompt(82, 900)]
    for ids in prompts:
        for start in range(0, ids.shape[1] - 1, 256):  # both feed in turn
            for cache, other in zip(caches, prompts, strict=True):
                if cache.get_seq_length() == start < other.shape[1] - 1:
                    model(other[:, start : min(start + 256, other.shape[1] - 1)], past_key_values=cache, use_cache=True)
    assert not events(opened.counters, "refused")
    frozen = caches[0].statistics
    for ids in prompts:
        got, restored, _ = warm(model, ids, tmp_path)
        assert restored == (ids.shape[1] - 1) // 256 * 256
        assert torch.equal(got, cold(model, ids, statistics=frozen))


def test_two_threads_on_one_small_store(tmp_path: Path) -> None:
    bound = 30_000
    tiers = [DiskTier(tmp_path, bound, Counter()) for _ in range(2)]  # the second one like another process
    errors: list[BaseException] = []
    over: list[int] = []

    def work(n: int) -> None:
        try:
            tier = tiers[n % 2]
            for i in range(40):
                path = tmp_path / str(i % 7) / f"{(i * (n + 1)) % 23}.tqc"
                tier.put(path, Kind.CHUNK, 256 * (i % 5), bytes(32), bytes(32), [bytes([i]) * 3000], time.time_ns())
                payload = tier.get(path, Kind.CHUNK, bytes(32), bytes(32), time.time_ns())
                assert payload is None or len(set(payload)) == 1
                tier.refresh()
                over.append(tier.nbytes)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert max(over) <= bound
    assert used(tmp_path) <= bound
    assert not files(tmp_path, f"*{TEMPORARY}*")


def test_two_threads_generate_with_one_store(model: Any, tmp_path: Path) -> None:
    warm(model, prompt(83, 600), tmp_path)
    opened = TurboQuantStore(tmp_path, BIG)
    prompts, got = [prompt(84, 600), prompt(85, 600)], {}

    def work(i: int) -> None:
        cache = TurboQuantCache.for_model(model, store=opened)
        opened.restore(cache, prompts[i])
        got[i] = run(model, prompts[i], cache), cache.statistics

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, ids in enumerate(prompts):
        assert torch.equal(got[i][0], cold(model, ids, statistics=got[i][1]))
        assert found(model, ids, tmp_path) == 512


def test_no_pickle_anywhere(template: tuple[Path, Tensor], model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pickle

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle")

    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, fail)
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(torch, "save", fail)
    assert found(model, IDS, folder) == 512
    warm(model, prompt(86, 600), folder)
    for path in files(folder):
        raw = path.read_bytes()
        assert raw.startswith(b"TQCACHE\0") or path.name == STATISTICS
        assert raw[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
        if path.name != STATISTICS:
            with pytest.raises(Damaged, match="kind"):
                read(path, Kind.SNAPSHOT, None, None)


def test_prompts_with_hidden_tokens_are_not_stored(tmp_path: Path) -> None:
    """A mask changes what the other tokens hold, and keys name token ids alone."""
    model, ids = make(LlamaConfig(num_hidden_layers=3, **SIZES)), prompt(1, 400)
    hidden = torch.ones(1, 400, dtype=torch.long)
    hidden[:, 5:50] = 0
    square = torch.ones(400, 400, dtype=torch.bool).tril()
    square[50:, 5:50] = False
    for mask in (hidden, square[None, None]):
        store = TurboQuantStore(tmp_path, 1 << 28)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=TurboQuantCache.for_model(model, store=store))
        assert store.counters["refused_masked_tokens_are_not_stored"] == 1
        assert store.restore(TurboQuantCache.for_model(model, store=store), ids) == 0


def test_one_changed_weight_is_another_model(tmp_path: Path) -> None:
    model, ids = make(LlamaConfig(num_hidden_layers=3, **SIZES)), prompt(1, 700)
    store = TurboQuantStore(tmp_path, 1 << 28)
    with torch.no_grad():
        model(ids, past_key_values=TurboQuantCache.for_model(model, store=store))
        assert store.restore(TurboQuantCache.for_model(model, store=store), ids) == 512
        model.model.embed_tokens.weight[60, 7] += 1e-3
    assert store.restore(TurboQuantCache.for_model(model, store=store), ids) == 0


def test_windows_that_are_no_whole_pages_are_stored(tmp_path: Path) -> None:
    model, ids = make(LlamaConfig(num_hidden_layers=3, **SIZES)), prompt(1, 700)
    store, config = TurboQuantStore(tmp_path, 1 << 28), TurboQuantConfig(recent_tokens=100)
    with torch.no_grad():
        model(ids, past_key_values=TurboQuantCache.for_model(model, config, store=store))
    assert store.restore(TurboQuantCache.for_model(model, config, store=store), ids) == 512
