"""Kinetics: the cost of generating tokens, in FLOPs with memory charged at intensity I.

P active parameters, H = layers × query heads, K = layers × key/value heads, d head size, L prompt
length, G tokens generated, N trials that share one prompt; memory counts elements, eFLOPs adds
(linear layers and the reading of keys don't overlap):

    dense   compute = N (2 P G + 4 (L + G/2) G H d)       memory = 2 (2 L + N G) G K d
    sparse  S = sum_{t<G} min(B, L + t)                   the exact context read under a budget B
            compute = N (2 P G + 4 S H d + search)        memory = N 4 S K d + search memory
            search  = floor((2 L + G)/b) G H d            search memory = floor((2 L + N G)/b) G K d
    eFLOPs  compute + I (memory + P G N / sharing)        sharing: requests per read of the weights

Source: Sadhukhan et al., "Kinetics: Rethinking Test-Time Scaling Laws". Two changes: the sum S is
exact (the published closed form has the wrong sign where the prompt is shorter than the budget),
and reading the parameters is charged.
"""

from dataclasses import dataclass

from ridgeline.cost_model.target import Target


@dataclass(frozen=True, slots=True)
class Decoder:
    """parameters P; heads H and kv_heads K are totals over layers; head_dim d."""

    parameters: float
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Kinetics:
    """compute in FLOPs; memory and parameter_reads in elements."""

    compute: float
    memory: float
    parameter_reads: float

    def eflops(self, intensity: float) -> float:
        """compute + I × elements read; `intensity` in FLOPs per element."""
        return self.compute + intensity * (self.memory + self.parameter_reads)


def intensity(target: Target, dtype: str = "bfloat16", element_bytes: int = 2) -> float:
    """FLOPs per element moved that `target` can do: peak / bandwidth × bytes per element."""
    return target.peaks[dtype] / target.bandwidth_bytes_per_s * element_bytes


def dense(
    decoder: Decoder, prompt: int, generated: int, trials: int = 1, sharing: float = 1.0
) -> Kinetics:
    """Full attention; `sharing` requests share one read of the weights."""
    d = decoder
    scores = 2 * (2 * prompt + generated) * generated * d.heads * d.head_dim
    return Kinetics(
        compute=trials * (2 * d.parameters * generated + scores),
        memory=2.0 * (2 * prompt + trials * generated) * generated * d.kv_heads * d.head_dim,
        parameter_reads=trials * d.parameters * generated / sharing,
    )


def context_sum(budget: int, prompt: int, generated: int) -> int:
    """sum_{t=0}^{G-1} min(B, L + t), exactly, in closed form."""
    rising = min(max(budget - prompt, 0), generated)  # steps that still see their whole context
    return rising * prompt + rising * (rising - 1) // 2 + (generated - rising) * budget


def sparse(
    decoder: Decoder,
    prompt: int,
    generated: int,
    budget: int,
    trials: int = 1,
    block: int | None = None,
    sharing: float = 1.0,
) -> Kinetics:
    """At most `budget` keys per query; `block`: keys per block of a block top-k search."""
    d = decoder
    read = context_sum(budget, prompt, generated)
    search = search_memory = 0
    if block is not None:
        search = (2 * prompt + generated) // block * generated * d.heads * d.head_dim
        search_memory = (2 * prompt + trials * generated) // block * generated
        search_memory *= d.kv_heads * d.head_dim
    return Kinetics(
        compute=trials * (2 * d.parameters * generated + 4 * read * d.heads * d.head_dim + search),
        memory=float(trials * 4 * read * d.kv_heads * d.head_dim + search_memory),
        parameter_reads=trials * d.parameters * generated / sharing,
    )
