"""What a compressed cache stores: the configuration, its presets and the arithmetic of bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from .errors import ConfigError

Quantizer = Literal["lloyd_max", "lloyd_max_qjl"]
KeyCenter = Literal["rope_mean", "mean", "none"]
Rotation = Literal["hadamard", "orthogonal"]
#: Bits of one layer: one number for keys and values, a (key, value) pair, or "exact".
LayerBits = int | tuple[int, int] | Literal["exact"]

CODE_BITS = (1, 2, 3, 4)
EXACT_BITS = 16
#: Statistics of the keys are taken from at most this many of the first tokens.
MAX_STATISTICS_TOKENS = 2048

#: name -> (key bits, value bits)
PRESETS: dict[str, tuple[int, int]] = {
    "turboquant_4bit": (4, 4),
    "turboquant_3.5bit": (4, 3),
    "turboquant_3bit": (3, 3),
    "turboquant_2.5bit": (3, 2),
    "turboquant_2bit": (2, 2),
    "turboquant_1.5bit": (2, 1),
}


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    # 3.0 equals 3 and True equals 1, but they are not what was meant and would change the digest.
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ConfigError(f"{name}={value!r} is not supported; choose one of {', '.join(map(repr, allowed))}")


def _count(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be an integer from {low} to {high}")


@dataclass(frozen=True)
class TurboQuantConfig:
    """How keys and values are stored. Immutable; equal configurations store equal bytes.

    Args:
        n_bits: bits of the codes of keys and values alike (1 to 4). ``key_bits`` and ``value_bits`` override it.
        key_bits, value_bits: bits of keys and of values. 16 for both means an exact cache.
        rotation_type: ``"hadamard"`` (randomized, O(d log d)) or ``"orthogonal"`` (Haar, as in the paper).
        quantizer: ``"lloyd_max"``, or ``"lloyd_max_qjl"``: keys get ``key_bits - 1`` bits and a 1-bit QJL residual
            (TurboQuant_prod). The latter is unbiased but noisier than spending the bit on the codebook: several
            groups measured that it hurts attention (see codec/quantizers/prod.py). For research.
        per_head_scale: every KV head has its own scale per token. False lets the heads of a token share one scale.
        sink_tokens: first tokens of every sequence kept exact.
        recent_tokens: at least this many of the last tokens are exact; a page of 64 tokens is packed when it leaves them.
        key_center: what is subtracted from keys before coding: ``"rope_mean"`` (the mean of un-rotated keys, turned to
            each position by the model's rotary embedding), ``"mean"`` (the mean of keys as they are) or ``"none"``.
            Without a rotary embedding ``"rope_mean"`` acts as ``"mean"``.
        key_balance: exponent of the channel balance (q_rms / k_rms); 0 turns it off. Needs queries, so it is active where
            attention runs through this package, and off without centring.
        statistics_tokens: mean and balance are measured once at least this many tokens are there, then frozen.
        seed: of the random rotations.
        layers: overrides by layer index: bits, a (key, value) pair of bits, or ``"exact"``. Negative indices count from
            the last layer.

    Raises:
        ConfigError: a value cannot work; the message names the field and what is allowed.
    """

    n_bits: int = 3
    key_bits: int | None = None
    value_bits: int | None = None
    rotation_type: Rotation = "hadamard"
    quantizer: Quantizer = "lloyd_max"
    per_head_scale: bool = True
    sink_tokens: int = 4
    recent_tokens: int = 128
    key_center: KeyCenter = "rope_mean"
    key_balance: float = 0.25
    statistics_tokens: int = 256
    seed: int = 0
    layers: Mapping[int, LayerBits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bits = (*CODE_BITS, EXACT_BITS)
        _choice("n_bits", self.n_bits, bits)
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.n_bits)
            _choice(name, getattr(self, name), bits)
        _choice("rotation_type", self.rotation_type, ("hadamard", "orthogonal"))
        _choice("quantizer", self.quantizer, ("lloyd_max", "lloyd_max_qjl"))
        _choice("per_head_scale", self.per_head_scale, (True, False))
        _choice("key_center", self.key_center, ("rope_mean", "mean", "none"))
        _count("sink_tokens", self.sink_tokens, 0, 64)
        _count("recent_tokens", self.recent_tokens, 0, 65536)
        _count("statistics_tokens", self.statistics_tokens, 1, MAX_STATISTICS_TOKENS)
        _count("seed", self.seed, 0, 2**48)
        if (
            isinstance(self.key_balance, bool)
            or not isinstance(self.key_balance, (int, float))
            or not 0 <= self.key_balance <= 1
        ):
            raise ConfigError(f"key_balance={self.key_balance!r} must be a number from 0 (off) to 1")
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers={self.layers!r} must map layer indices to bits, (key, value) bits or 'exact'")
        own: dict[int, LayerBits] = {}
        for index, override in self.layers.items():
            if not isinstance(index, int) or isinstance(index, bool):
                raise ConfigError(f"layers: the index {index!r} must be an integer")
            own[index] = self._pair(override, f"layers[{index}]")
        # A copy in one form: later changes to the caller's mapping do not reach the configuration.
        object.__setattr__(self, "layers", own)
        self._check_pair(cast(int, self.key_bits), cast(int, self.value_bits), "key_bits and value_bits")

    def __hash__(self) -> int:
        return hash(self.digest())

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TurboQuantConfig:
        """The configuration of a named recipe, with fields changed by keyword.

        Raises:
            ConfigError: unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        key, value = PRESETS[name]
        # Other bits may be asked for by n_bits alone; they then replace both of the preset's.
        bits = {} if "n_bits" in changes else {"n_bits": key, "key_bits": key, "value_bits": value}
        fields = {**bits, **changes}
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}; see TurboQuantConfig")
        return cls(**cast(Any, fields))

    def _check_pair(self, key: int, value: int, name: str) -> None:
        if (key == EXACT_BITS) != (value == EXACT_BITS):
            raise ConfigError(f"{name} = {key}, {value}: keys and values are either both exact (16) or both coded (1 to 4)")
        if self.quantizer == "lloyd_max_qjl" and key == 1:
            raise ConfigError(f"{name}: quantizer='lloyd_max_qjl' spends one key bit on the residual, so keys need 2 to 4")

    def _pair(self, bits: LayerBits, name: str) -> tuple[int, int]:
        if bits == "exact":
            return EXACT_BITS, EXACT_BITS
        pair = (bits, bits) if isinstance(bits, int) else bits
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"{name}={bits!r} must be bits, a (key, value) pair of bits, or 'exact'")
        for b in pair:
            _choice(name, b, (*CODE_BITS, EXACT_BITS))
        self._check_pair(int(pair[0]), int(pair[1]), name)
        return int(pair[0]), int(pair[1])

    def bits_of_layer(self, layer: int, num_layers: int) -> tuple[int, int]:
        """(key bits, value bits) of a layer; (16, 16) where it stays exact.

        Raises:
            ConfigError: ``layers`` names a layer that the model does not have.
        """
        for index in self.layers:
            if not -num_layers <= index < num_layers:
                raise ConfigError(f"layers: there is no layer {index}; the model has {num_layers}")
        override = self.layers.get(layer, self.layers.get(layer - num_layers))
        if override is None:
            return cast(int, self.key_bits), cast(int, self.value_bits)
        return self._pair(override, f"layers[{layer}]")

    @property
    def name(self) -> str:
        """The preset with these bits and otherwise default settings, or a short description."""
        for preset in PRESETS:
            if TurboQuantConfig.preset(preset).canonical() == self.canonical():
                return preset
        return f"K{self.key_bits}V{self.value_bits}"

    def canonical(self) -> dict[str, Any]:
        """All settings as plain JSON values, independent of how they were given."""
        d = dataclasses.asdict(self)
        del d["n_bits"]
        d["key_balance"] = float(self.key_balance)
        d["layers"] = {str(i): list(self._pair(b, "layers")) for i, b in sorted(self.layers.items())}
        return d

    @classmethod
    def from_canonical(cls, data: Mapping[str, Any]) -> TurboQuantConfig:
        """Inverse of :meth:`canonical`.

        Raises:
            ConfigError: a setting is unknown or wrong (for example written by a newer version).
        """
        fields = {**data, "layers": {int(i): tuple(b) for i, b in dict(data.get("layers", {})).items()}}
        try:
            return cls(n_bits=fields["key_bits"], **fields)
        except (TypeError, KeyError) as e:
            raise ConfigError(f"stored configuration not understood: {e}") from None

    def digest(self) -> str:
        """A hex digest of all settings that decide the stored bytes."""
        return hashlib.blake2b(json.dumps(self.canonical(), sort_keys=True).encode(), digest_size=16).hexdigest()
