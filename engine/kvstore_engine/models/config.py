"""What the engine knows of a model's shape."""

from dataclasses import dataclass

from kvstore_engine.model_source import ModelLoadError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base, and how it is stretched for long contexts.

    ``scaling`` is "none", "linear" (``factor``), "llama3" (all but ``factors``) or "factors" (one
    divisor for each frequency, as GGUF files carry them).
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    factors: tuple[float, ...] = ()

    @property
    def canonical(self) -> str:
        """Text for CacheSpec.rope: equal exactly when the rotations are configured alike."""
        text = f"theta={self.theta!r};scaling={self.scaling}"
        if self.scaling in ("linear", "llama3"):
            text += f";factor={self.factor!r}"
        if self.scaling == "llama3":
            text += f";low={self.low_freq_factor!r};high={self.high_freq_factor!r}"
            text += f";original={self.original_context}"
        if self.scaling == "factors":
            text += ";factors=" + ",".join(f"{value:.6g}" for value in self.factors)
        return text


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder; validated once, when it is made.

    ``name`` is what the model's own files call it, "" where they do not.
    """

    architecture: str
    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope: RopeConfig
    rms_eps: float
    max_context: int
    qk_norm: bool = False
    tie_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("intermediate_size", "vocab_size", "max_context"),
        ):
            if getattr(self, name) < 1:
                raise ModelLoadError(f"the model's {name} is {getattr(self, name)}; not usable")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"the model has {self.num_heads} heads for {self.num_kv_heads} KV heads; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"the model's head_dim is {self.head_dim}; rope needs it even")
        if self.rope.factors and len(self.rope.factors) != self.head_dim // 2:
            raise ModelLoadError(
                f"the model has {len(self.rope.factors)} rope factors for head_dim {self.head_dim}"
            )

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of one token's K and V over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes
