"""What a model is made of: small frozen dataclasses, one per component, strict about what they are given."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Discriminator, TypeAdapter, ValidationError

from longwave.errors import UserError, require, shown
from longwave.files.jsonfile import plain
from longwave.layout import parse

T = TypeVar("T")
MOST = 1 << 27  # of any size: what a matrix of two such sizes holds can still be counted in 64 bits


class Strict:
    """Base of every config: a key that no field knows is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


def build(kind: type[T], values: dict[str, Any], source: str) -> T:
    """Makes a config from plain values; a UserError names the key, its value and what would do.

    source: where the values come from, such as the path of a recipe.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(kind, error)}") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _first_problem(kind: type, error: ValidationError) -> str:
    problem = error.errors()[0]
    location = ".".join(plain(str(step)) for step in problem["loc"])
    if isinstance(cause := problem.get("ctx", {}).get("error"), UserError):
        return f"{location}: {cause}" if location and not str(cause).startswith(f"{location}.") else str(cause)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = get_close_matches(str(problem["loc"][-1]), _field_names(kind), n=1)
        return f"unknown key {location} = {shown(problem['input'])}" + (f"; did you mean {close[0]}?" if close else "")
    if problem["type"] == "missing":
        return f"{location} is missing"
    return f"{location} = {shown(problem['input'])}: {problem['msg'].lower()}"


def _field_names(kind: type) -> list[str]:
    """The names of all fields, of nested configs too."""
    names: list[str] = []
    pending, done = [kind], set[type]()
    while pending:
        one = pending.pop()
        if not dataclasses.is_dataclass(one) or one in done:
            continue
        done.add(one)
        names += [entry.name for entry in dataclasses.fields(one)]
        pending += [
            sub for sub in Strict.__subclasses__() if sub.__name__ in str([f.type for f in dataclasses.fields(one)])
        ]
    return names


@dataclass(frozen=True)
class AttentionConfig(Strict):
    """Softmax attention: query heads, KV heads (all heads by default) and head size (hidden size / heads by default).

    window: tokens that a `W` block sees, its own included.
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        require(self.heads > 0, f"attention.heads = {self.heads}: 1 or more")
        groups = self.heads if self.kv_heads is None else self.kv_heads
        divides = groups > 0 and self.heads % groups == 0
        require(divides, f"attention.kv_heads = {groups} does not divide attention.heads = {self.heads}")
        size = self.head_size
        require(
            size is None or (size > 0 and size % 2 == 0), f"attention.head_size = {size}: an even number, for rotation"
        )
        require(self.window is None or self.window > 0, f"attention.window = {self.window}: 1 or more tokens")


@dataclass(frozen=True)
class MLPConfig(Strict):
    """SwiGLU feed-forward of `size` inner channels."""

    size: int
    bias: bool = False

    def __post_init__(self) -> None:
        require(0 < self.size <= MOST, f"mlp.size = {self.size}: 1 or more, at most {MOST}")


@dataclass(frozen=True)
class LinearScaling(Strict):
    """Position interpolation: positions count in units of `factor` (Chen et al. 2023)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _check_scaling(factor=self.factor)


@dataclass(frozen=True)
class Llama3Scaling(Strict):
    """Llama 3.1's: wavelengths above original_window / low_freq_factor are stretched by `factor`, those below
    original_window / high_freq_factor are kept, and a ramp joins them.

    original_window: tokens of a window before the stretching.
    """

    factor: float
    original_window: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _check_scaling(factor=self.factor, original_window=self.original_window)
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high < math.inf, f"rotary.scaling.high_freq_factor = {high}: more than low_freq_factor {low}")


@dataclass(frozen=True)
class YarnScaling(Strict):
    """YaRN (Peng et al. 2023): channels that turn less than `beta_slow` times in `original_window` tokens are stretched
    by `factor`, those that turn more than `beta_fast` times are kept, and a ramp over the channels joins them.

    attention_factor: on cosines and sines; 0.1 ln(factor) + 1 by default. truncate: the ramp begins and ends at whole
    channels.
    """

    factor: float
    original_window: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        attention = 1.0 if self.attention_factor is None else self.attention_factor
        _check_scaling(factor=self.factor, original_window=self.original_window, attention_factor=attention)
        slow, fast = self.beta_slow, self.beta_fast
        require(0 < slow < fast < math.inf, f"rotary.scaling.beta_fast = {fast}: more than beta_slow = {slow}")


@dataclass(frozen=True)
class LongRopeScaling(Strict):
    """LongRoPE (Ding et al. 2024): every pair of channels has a factor of its own by which its wavelength is stretched.

    A model whose `context_window` is larger than `original_window` turns by `long_factors` at every position, any other
    by `short_factors`. Published code switches from short to long once a sequence has grown past `original_window`,
    which leaves keys in the cache that were turned by other angles than the queries that meet them; here an angle is a
    function of the position alone. So prompts short enough for the short factors come out as published when
    `context_window` is set to `original_window`.

    attention_factor: on cosines and sines.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_window: int
    attention_factor: float = 1.0
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self) -> None:
        _check_scaling(original_window=self.original_window, attention_factor=self.attention_factor)
        for name in ("short_factors", "long_factors"):
            legal = all(0 < factor < math.inf for factor in getattr(self, name))
            require(legal, f"rotary.scaling.{name}: every factor is a number above 0")

    def factors(self, context_window: int) -> tuple[float, ...]:
        """The factors by which a model of this context window turns."""
        return self.long_factors if context_window > self.original_window else self.short_factors


def _check_scaling(**positive: float) -> None:
    for name, value in positive.items():
        require(0 < value < math.inf, f"rotary.scaling.{name} = {value}: a number above 0")


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RotaryConfig(Strict):
    """Rotary positions, half-split pairing (Su et al. 2021).

    scaling: how wavelengths are stretched beyond the window of the first training.
    """

    base: float = 10000.0
    scaling: Annotated[RotaryScaling, Discriminator("kind")] | None = None

    def __post_init__(self) -> None:
        require(1 < self.base < math.inf, f"rotary.base = {self.base}: more than 1")


@dataclass(frozen=True)
class ScalesConfig(Strict):
    """muP-style factors on the embedding, on every residual branch and on the logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(math.isfinite(value), f"scales.{name} = {value}: a finite number")


@dataclass(frozen=True)
class InitConfig(Strict):
    """Initial weights: normal, truncated at 3 sigma, output projections of block l divided by sqrt(2 (l + 1)).

    embedding_std: hidden_size ** -0.5 by default.
    """

    std: float = 0.02
    embedding_std: float | None = None

    def __post_init__(self) -> None:
        require(0 < self.std < math.inf, f"init.std = {self.std}: more than 0")


_CAUSAL_ONLY = ("threshold_memory",)
_PUBLISHED_ONLY = ("discard_sampling", "ranking", "balancer", "exact_gaussian")


@dataclass(frozen=True)
class SubllmConfig(Strict):
    """SUBLLM's subsampling, balancer and bypass (arXiv 2406.06571); the defaults are the published ones.

    selection: `published` trains with top-k over the window and runs with a threshold at 0; `causal` trains and runs
        the same function, with a threshold that follows the quantile of the scores (ours).
    discard_sampling: which discarded weight is subtracted from a kept one: a `uniform` draw, the next in `ranked`
        order, or `none` (a control that keeps nearly everything at inference).
    ranking: tokens compete within the training `window` or within their own `document`.
    balancer_*: the gradient nudge that centres the scores; `exact_gaussian` mends its missing square root of 2.
    bypass_*: range of the per-channel bypass, whose lower end falls linearly over `bypass_steps` optimizer steps.
    score_lr_scale: learning rate of the score vector, relative to the model's.
    threshold_memory: how much of the causal threshold is kept at each optimizer step.
    """

    selection: Literal["published", "causal"] = "published"
    discard_sampling: Literal["uniform", "ranked", "none"] = "uniform"
    ranking: Literal["window", "document"] = "window"
    balancer: bool = True
    balancer_margin: float = 0.05
    balancer_min_abs: float = 1.0
    balancer_max_abs: float = 4.0
    balancer_grad_scale: float = 0.04
    balancer_steps: int = 8000
    balancer_final_probability: float = 0.25
    exact_gaussian: bool = False
    bypass_probability: float = 0.6
    bypass_floor: float = 0.9
    bypass_final_floor: float = 0.2
    bypass_steps: int = 20000
    score_lr_scale: float = 0.5
    threshold_memory: float = 0.98

    def __post_init__(self) -> None:
        for name in ("balancer_final_probability", "bypass_probability", "threshold_memory"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"subllm.{name} = {value}: between 0 and 1")
        for name in ("balancer_steps", "bypass_steps"):
            value = getattr(self, name)
            require(value > 0, f"subllm.{name} = {value}: 1 or more optimizer steps")
        idle = _CAUSAL_ONLY if self.selection == "published" else _PUBLISHED_ONLY
        for entry in dataclasses.fields(self):
            changed = entry.name.startswith(idle) and getattr(self, entry.name) != entry.default
            require(not changed, f"subllm.{entry.name} has no effect with selection = {self.selection!r}; leave it out")


@dataclass(frozen=True)
class LightningConfig(Strict):
    """Linear attention with a constant decay per head, for `L` blocks; the defaults are MiniCPM-SALA's and HypeNet's.

    heads, kv_heads, head_size: attention.heads, as many KV heads as heads, and the head size of attention by default.
    slopes: how fast head h of H forgets in layer l of N: `alibi` 2 ** (-8 h / H) in every layer, `minimax` times
        (1 - l / (N - 1) + 1e-5), `transnormer` 8 (h - 1) / H * (1 - l / N).
    silu: which of queries, keys and values go through SiLU: `none`, `qk` (TransNormer), `qkv` (MiniMax-01).
    qk_norm, rotary: whether queries and keys are normed per head, and then rotated. scale: of what is read.
    output_norm: RMSNorm over the channels of all heads. output_gate: times sigmoid of a projection of the input.
    distance: what a head forgets by inside a resampler: tokens of the `original` sequence, or those `kept` there.
    state_dtype: of the recurrent matrices, in models whose activations are no wider.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    slopes: Literal["alibi", "minimax", "transnormer"] = "alibi"
    silu: Literal["none", "qk", "qkv"] = "none"
    qk_norm: bool = True
    rotary: bool = True
    scale: Literal["1/sqrt(d)", "1/d", "1"] = "1/sqrt(d)"
    output_norm: bool = True
    output_gate: bool = True
    distance: Literal["kept", "original"] = "original"
    state_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_size"):
            value = getattr(self, name)
            require(value is None or 0 < value <= MOST, f"lightning.{name} = {value}: 1 or more, at most {MOST}")
        odd = self.rotary and self.head_size is not None and self.head_size % 2
        require(not odd, f"lightning.head_size = {self.head_size}: an even number, for rotation")


@dataclass(frozen=True)
class InfllmConfig(Strict):
    """Block-sparse attention (InfLLM-V2, arXiv 2509.24663), for `S` blocks; the defaults are MiniCPM-SALA's.

    kernel_size, kernel_stride: tokens of the windows whose mean keys are scored, and their distance; the windows of the
        coarse denominator are four times as long and as far apart.
    block_size: tokens of a block of keys, of which each query chooses topk + window_size / block_size; among these are
        the init_blocks first ones, its own, and the window_size / block_size before that.
    dense_len: with regime `auto`, a query whose context, itself included, is shorter attends to all of it.
    regime: `auto` decides by query, and so keeps every law; `auto_published` by the sequence's length in each call, as
        the published code does, which breaks chunking; `sparse` and `dense` always are.
    denominator: of the scores: the sum over `coarse` windows (published), or the `exact` softmax.
    rotary, output_gate: whether queries and keys are rotated, and the output is gated by the input.
    logit_scaling: base a of HypeNet's log_a(position + a), by which queries are multiplied (arXiv 2601.22156).
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    init_blocks: int = 1
    dense_len: int = 8192
    regime: Literal["auto", "sparse", "dense", "auto_published"] = "auto"
    denominator: Literal["coarse", "exact"] = "coarse"
    rotary: bool = False
    output_gate: bool = True
    logit_scaling: float | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_stride", "block_size", "topk"):
            require(0 < getattr(self, name) <= MOST, f"infllm.{name} = {getattr(self, name)}: 1 or more")
        for name in ("window_size", "init_blocks", "dense_len"):
            require(0 <= getattr(self, name) <= MOST, f"infllm.{name} = {getattr(self, name)}: 0 or more")
        kernel, stride, block, window = self.kernel_size, self.kernel_stride, self.block_size, self.window_size
        require(kernel == 2 * stride, f"infllm.kernel_size = {kernel}: twice kernel_stride, {2 * stride}")
        require(block % stride == 0, f"infllm.block_size = {block}: a multiple of kernel_stride = {stride}")
        require(window % block == 0, f"infllm.window_size = {window}: a multiple of block_size = {block}")
        enough, forced = self.topk + self.local_blocks, self.init_blocks + self.local_blocks + 1
        problem = f"infllm.topk = {self.topk}: with window_size / block_size it makes {enough} blocks"
        require(enough >= forced, f"{problem}, fewer than the {forced} forced ones; {self.init_blocks + 1} or more")
        base = self.logit_scaling
        require(base is None or 1 < base < math.inf, f"infllm.logit_scaling = {base}: more than 1, or left out")

    @property
    def local_blocks(self) -> int:
        """Blocks before its own that a query always sees."""
        return self.window_size // self.block_size


@dataclass(frozen=True)
class ModelConfig(Strict):
    """One decoder: vocabulary, width, layout, and the config of each component.

    layout: the one-line notation of `longwave.layout`.
    context_window: the longest sequence the model is meant for, in tokens.
    """

    vocab_size: int
    hidden_size: int
    layout: str
    attention: AttentionConfig
    mlp: MLPConfig
    context_window: int = 2048
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    init: InitConfig = field(default_factory=InitConfig)
    subllm: SubllmConfig | None = None
    lightning: LightningConfig | None = None
    infllm: InfllmConfig | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        parse(self.layout)  # a layout that does not parse is refused before anything is read or built
        for name in ("vocab_size", "hidden_size", "context_window"):
            value = getattr(self, name)
            require(0 < value <= MOST, f"{name} = {value}: 1 or more, at most {MOST}")
        require(0 <= self.norm_eps < math.inf, f"norm_eps = {self.norm_eps}: a number of at least 0")
        head_size = self.attention.head_size
        even = head_size is not None or self.hidden_size % (2 * self.attention.heads) == 0
        require(
            even,
            f"hidden_size = {self.hidden_size} is no even multiple of attention.heads = {self.attention.heads}; "
            "give attention.head_size",
        )
        width = self.attention.heads * self.head_size
        require(width <= MOST, f"attention.heads = {self.attention.heads} of {self.head_size}: at most {MOST} in all")
        self._check_factors()

    def _check_factors(self) -> None:
        scaling, sizes = self.rotary.scaling, {self.head_size}
        if self.lightning is not None and self.lightning.rotary:
            sizes.add(self.lightning.head_size or self.head_size)
        for name in ("short_factors", "long_factors") if isinstance(scaling, LongRopeScaling) else ():
            found = len(getattr(scaling, name))
            for size in sorted(sizes):
                problem = f"rotary.scaling.{name} has {found} factors; heads of {size} need {size // 2}"
                require(found == size // 2, problem)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.attention.head_size or self.hidden_size // self.attention.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads of softmax attention."""
        return self.attention.kv_heads or self.attention.heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `build` makes the same config from."""
        return dataclasses.asdict(self)


def retention_of(text: str) -> Fraction:
    """A retention ratio as the exact decimal that was written; a UserError if it is outside (0, 1]."""
    try:
        ratio = Decimal(text)
        legal = Decimal("1e-9") <= ratio <= 1
    except InvalidOperation:
        raise UserError(f"layout: retention {text!r} is not a number in (0, 1]") from None
    require(legal, f"layout: retention {text} is outside (0, 1]")
    return Fraction(ratio)
