"""Of inputs any integer that differs is told, and large tensors are not read whole."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from ridgeline.ir.call import flatten
from ridgeline.passes.parallel.sampled import EXACT, SAMPLED, facts_of, sums_of


class Largest(TorchDispatchMode):
    """Elements of the largest memory that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(
            isinstance(a, Tensor) and a.data_ptr() == result.data_ptr() for a in args
        ):
            self.elements = max(self.elements, result.numel())
        return result


def of(*args: object) -> dict[str, str]:
    return facts_of(flatten(args, {}))


def test_the_order_of_a_dictionary_is_no_difference() -> None:
    near, far = torch.randn(2, 3), torch.ones(4, dtype=torch.int64)
    one, other = {"near": near, "far": [far, True]}, {"far": [far, True], "near": near}
    assert of(one) == of(other) != of({"near": far, "far": [near, True]})
    assert sums_of(flatten((one,), {}), 2) == sums_of(flatten((other,), {}), 2)


@pytest.mark.parametrize("place", [(0, 0), (3, 4001), (7, 8190), (7, 8191)])
def test_one_integer_that_differs_is_told(place: tuple[int, int]) -> None:
    x = torch.ones(8, 8192, dtype=torch.int64)
    y = x.clone()
    y[place] = 0
    assert x.numel() == EXACT
    assert of(x) != of(y)


def test_integers_in_another_order_are_told() -> None:
    x = torch.arange(12).view(2, 6)
    assert of(x) != of(x.flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.int64])
def test_large_tensors_are_not_read_whole(dtype: torch.dtype) -> None:
    """The reading of an expanded mask, of one that is not contiguous, and of a long one."""
    expanded = torch.zeros(1, 1, 512, 512, dtype=dtype).expand(64, 8, 512, 512)
    strided = torch.zeros(512, 2, 512, dtype=dtype).transpose(0, 2)
    call = flatten((expanded, strided, torch.zeros(2**20, dtype=dtype)), {})
    facts_of(call), sums_of(call, 8)  # what is kept is made
    with Largest() as largest:
        facts_of(call), sums_of(call, 8)
    assert 0 < largest.elements <= EXACT


def test_samples_of_a_long_tensor_are_not_in_a_few_columns() -> None:
    """A mask of which one half of the columns, or the last token alone, is another."""
    x = torch.zeros(2048, 2048, dtype=torch.int64)
    assert x.numel() > SAMPLED
    for columns in (slice(0, 1024), slice(1, None, 2), slice(700, 1200)):
        y = x.clone()
        y[:, columns] = 1
        assert of(x) != of(y)
    x = torch.zeros(1, 2**17, dtype=torch.int64)
    y = x.clone()
    y[0, -1] = 1
    assert of(x) != of(y)


def test_other_devices_are_not_read() -> None:
    """Nothing can be read of a meta tensor."""
    call = flatten((torch.ones(2, 3, device="meta"), torch.ones(4, device="meta").long()), {})
    assert facts_of(call)["shapes of inputs"] == "float32[2, 3], int64[4]"
    assert sums_of(call, 2) == [(0.0, 0.0)] * 2


def test_each_input_has_a_sum_of_its_own() -> None:
    x = torch.full((3,), 2.0, dtype=torch.bfloat16)
    sums = sums_of(flatten((x, x + 1, torch.complex(x.float(), x.float())), {}), 8)
    norms = [norm for _, norm in sums]
    assert norms == pytest.approx([12**0.5, 27**0.5, 24**0.5, 0, 0, 0, 0, 0])
    folded = sums_of(flatten((x, x + 1), {}), 1)
    assert folded == [pytest.approx((sums[0][0] + sums[1][0], 39**0.5))]


def test_plain_arguments_and_structure_are_told_and_devices_by_their_type() -> None:
    assert of(1.0) != of(1) != of([1]) != of([2])
    assert of(torch.device("cuda:0")) == of(torch.device("cuda:1")) != of(torch.device("cpu"))
    x = torch.ones(3)
    assert of(x, x) != of(x, x.clone())


def cache(heads: int, tokens: int, sequences: int = 2) -> DynamicCache:
    made = DynamicCache()
    for layer in range(2):
        keys = torch.randn(sequences, heads, tokens, 8)
        made.update(keys, keys, layer)
    return made


def test_of_a_cache_all_but_heads_and_values_is_told() -> None:
    x = torch.ones(2, 1)
    said = of(x, cache(1, 5))
    assert said["lengths of caches"] == "float32[2, 5, 8] x 4"
    assert said == of(x, cache(2, 5))
    assert said != of(x, cache(1, 4))
    assert said != of(x, cache(1, 5, sequences=3))
