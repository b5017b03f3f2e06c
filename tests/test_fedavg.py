"""`fedavg` as users call it: structures, libraries, outputs, policies."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, MutableMapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastagg
from backends import Backend
from data import counts, generator, normal
from reference import FLOATS, assert_mean, assert_same_bits

torch = pytest.importorskip("torch")

by_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
TORCH = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class OnlyDLPack:
    """An array that speaks nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def two(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays whose mean with weights 1 and 3 is [2.5, 3.5, 4.5]."""
    return np.array([1, 2, 3], dtype), np.array([3, 4, 5], dtype)


EXPECTED = [2.5, 3.5, 4.5]


# Structures


def test_a_single_array(backend: Backend) -> None:
    one, other = two()
    result = fastagg.fedavg([backend.put(one), backend.put(other)], [1, 3])
    assert backend.get(result).tolist() == EXPECTED


@pytest.mark.parametrize("container", [list, tuple])
def test_a_sequence(container: type) -> None:
    one, other = two()
    result = fastagg.fedavg([container([one, one]), container([other, one])], [1, 3])
    assert type(result) is container
    assert [leaf.tolist() for leaf in result] == [EXPECTED, [1, 2, 3]]


def test_a_named_tuple() -> None:
    model = namedtuple("model", "weight bias")
    one, other = two()
    result = fastagg.fedavg([model(one, one), model(other, one)], [1, 3])
    assert type(result) is model
    assert result.weight.tolist() == EXPECTED


def test_a_mapping_keeps_its_order() -> None:
    one, other = two()
    result = fastagg.fedavg([{"b": one, "a": one}, {"b": other, "a": one}], [1, 3])
    assert list(result) == ["b", "a"]
    assert result["b"].tolist() == EXPECTED


def test_names_need_not_be_strings() -> None:
    one, other = two()
    assert fastagg.fedavg([{1: one, (2, 3): one}, {(2, 3): other, 1: other}], [1, 3])[(2, 3)].tolist() == EXPECTED


def test_a_read_only_mapping_gives_a_mapping() -> None:
    one, other = two()
    result = fastagg.fedavg([types.MappingProxyType({"a": one}), types.MappingProxyType({"a": other})], [1, 3])
    assert result["a"].tolist() == EXPECTED


def test_a_generator_of_updates() -> None:
    assert fastagg.fedavg((array for array in two()), [1, 3]).tolist() == EXPECTED


def test_a_state_dict_with_metadata_loads_again() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    result = fastagg.fedavg([model.state_dict(), model.state_dict()])
    assert type(result) is OrderedDict
    assert result._metadata == model.state_dict()._metadata
    for name, tensor in model.state_dict().items():
        assert torch.equal(result[name], tensor)
        assert result[name].data_ptr() != tensor.data_ptr()
    model.load_state_dict(result)


def test_the_inputs_are_left_alone() -> None:
    one, other = two()
    update = OrderedDict(a=one)
    fastagg.fedavg([update, OrderedDict(a=other)], [1, 3])
    assert update["a"] is one
    assert one.tolist() == [1, 2, 3]


def test_parameters_that_require_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.from_numpy(array)) for array in two()]
    result = fastagg.fedavg([[parameter] for parameter in parameters], [1, 3])[0]
    assert result.tolist() == EXPECTED
    assert not result.requires_grad


# Arrays


@by_dtype
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (2, 3, 4, 5)])
def test_every_shape(backend: Backend, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    random = generator(1)
    columns = [np.asarray(normal(random, shape, dtype)) for _ in range(3)]
    result = backend.get(fastagg.fedavg(backend.put_all(columns), [1.0, 2.0, 3.0]))
    assert result.dtype == dtype
    if result.size:
        assert_mean(result, columns, [1.0, 2.0, 3.0])
    assert result.shape == shape


@by_dtype
def test_kind_and_dtype_are_kept(dtype: np.dtype) -> None:
    name = next(name for name, known in FLOATS.items() if known == dtype)
    result = fastagg.fedavg(list(two(dtype)), [1, 3])
    assert type(result) is np.ndarray
    assert result.dtype == dtype
    assert result.astype(np.float32).tolist() == EXPECTED
    tensors = [torch.tensor([1, 2, 3], dtype=TORCH[name]), torch.tensor([3, 4, 5], dtype=TORCH[name])]
    mean = fastagg.fedavg(tensors, [1, 3])
    assert type(mean) is torch.Tensor
    assert mean.dtype == TORCH[name]
    assert mean.tolist() == EXPECTED


def test_numpy_and_torch_give_the_same_bits() -> None:
    random = generator(2)
    for dtype in (np.float64, np.float32, np.float16):
        columns, weights = [normal(random, 4099, np.dtype(dtype)) for _ in range(5)], counts(random, 5)
        tensors = [torch.from_numpy(column) for column in columns]
        assert_same_bits(fastagg.fedavg(columns, weights), fastagg.fedavg(tensors, weights).numpy())


def test_scalars_of_numpy() -> None:
    result = fastagg.fedavg([np.float32(1), np.float32(3)])
    assert result.shape == ()
    assert float(result) == 2.0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.repeat(2)[::2],
        lambda x: x[::-1].copy()[::-1],
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(np.stack([x, x], 1))[:, 0],
        lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32),
        lambda x: np.frombuffer(x.tobytes(), np.float32),
    ],
    ids=["strided", "reversed", "big-endian", "column", "unaligned", "read-only"],
)
def test_numpy_memory_of_every_layout(change: Any) -> None:
    one, other = two()
    result = fastagg.fedavg([change(one), change(other)], [1, 3])
    assert result.dtype == np.dtype(np.float32)
    assert result.dtype.isnative
    assert result.tolist() == EXPECTED
    assert fastagg.fedavg([one, change(other)], [1, 3]).tolist() == EXPECTED
    assert fastagg.fedavg([change(one), other], [1, 3]).tolist() == EXPECTED


def test_big_endian_arrays_of_one_dtype_object() -> None:
    swapped = np.dtype(">f4")
    columns = [np.array([1, 2, 3], swapped), np.array([3, 4, 5], swapped)]
    columns = [np.frombuffer(column.tobytes(), swapped) for column in columns]
    result = fastagg.fedavg(columns, [1, 3])
    assert result.tolist() == EXPECTED


def test_fortran_order_is_taken_by_index() -> None:
    random = generator(3)
    c_order = [normal(random, (3, 5), np.dtype(np.float32)) for _ in range(2)]
    mixed = [c_order[0], np.asfortranarray(c_order[1])]
    assert_same_bits(fastagg.fedavg(mixed), fastagg.fedavg(c_order))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.repeat_interleave(2)[::2],
        lambda x: x.reshape(1, 3).expand(4, 3)[2],
        lambda x: torch.stack([x, x], 1).t()[0],
        lambda x: torch._neg_view(-x),
        lambda x: x.requires_grad_(),
    ],
    ids=["strided", "expanded", "transposed", "negative-bit", "requires-grad"],
)
def test_torch_memory_of_every_layout(change: Any) -> None:
    one, other = (torch.from_numpy(array) for array in two())
    assert fastagg.fedavg([change(one.clone()), change(other.clone())], [1, 3]).tolist() == EXPECTED
    assert fastagg.fedavg([one, change(other.clone())], [1, 3]).tolist() == EXPECTED


def test_channels_last() -> None:
    one, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mixed = [one, other.to(memory_format=torch.channels_last)]
    assert torch.equal(fastagg.fedavg(mixed), fastagg.fedavg([one, other]))


def test_objects_that_only_speak_dlpack() -> None:
    one, other = two()
    for columns in ([OnlyDLPack(one), OnlyDLPack(other)], [one, OnlyDLPack(torch.from_numpy(other))]):
        result = fastagg.fedavg(columns, [1, 3])
        assert type(result) is np.ndarray
        assert result.tolist() == EXPECTED
    assert fastagg.fedavg([{"a": OnlyDLPack(one)}, {"a": OnlyDLPack(other)}], [1, 3])["a"].tolist() == EXPECTED


def test_a_dlpack_dtype_that_numpy_lacks_is_named() -> None:
    column = [OnlyDLPack(torch.ones(3, dtype=torch.bfloat16))] * 2
    with pytest.raises(TypeError, match=r"client 0.*'a'"):
        fastagg.fedavg([{"a": leaf} for leaf in column])


# Weights


@pytest.mark.parametrize(
    "weights",
    [[1, 3], (1.0, 3.0), np.array([1, 3]), np.array([0.25, 0.75], np.float32), torch.tensor([1, 3]), iter([1, 3])],
    ids=["list", "tuple", "numpy", "float32", "torch", "iterator"],
)
def test_weights_of_every_kind(weights: Any) -> None:
    assert fastagg.fedavg(list(two()), weights).tolist() == EXPECTED


def test_no_weights_means_equal_weights() -> None:
    assert fastagg.fedavg(list(two())).tolist() == [2, 3, 4]


def test_a_client_of_weight_zero_never_contributes(backend: Backend) -> None:
    # 0 * NaN is NaN in every peer.
    one, other = two()
    for bad in (np.nan, np.inf, -np.inf):
        columns = backend.put_all([one, np.full(3, bad, np.float32), other])
        for policy in ("raise", "drop", "propagate"):
            result = fastagg.fedavg(columns, [1, 0, 3], nan_policy=policy)
            assert backend.get(result).tolist() == EXPECTED


@pytest.mark.parametrize("policy", ["max", "first", "round"])
def test_integers_of_weight_zero_never_contribute(policy: str) -> None:
    columns = [np.array([value], np.int32) for value in (100, 4, 6)]
    result = fastagg.fedavg(columns, [0, 1, 1], integer_policy=policy)
    assert result.tolist() == {"max": [6], "first": [4], "round": [5]}[policy]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0], "all are zero"),
        ([-1, 3], "client 0"),
        ([1, -1], "client 1"),
        ([1, float("nan")], "client 1"),
        ([float("inf"), 1], "client 0"),
        ([1], "expected 2"),
        ([1, 2, 3], "expected 2"),
        ([1, 10**400], "client 1|weights"),
    ],
    ids=["all-zero", "negative", "cancelling", "nan", "infinite", "too-few", "too-many", "beyond-float"],
)
def test_wrong_weights(weights: list[float], message: str) -> None:
    out = np.full(3, 9, np.float32)
    with pytest.raises(ValueError, match=message):
        fastagg.fedavg(list(two()), weights, out=out)
    assert out.tolist() == [9, 9, 9]


@pytest.mark.parametrize("weights", [["a", "b"], [None, 1], 3, ["1", "3"], "13", [[1], [3]]], ids=repr)
def test_weights_that_are_no_numbers(weights: Any) -> None:
    with pytest.raises(TypeError, match=r"weights"):
        fastagg.fedavg(list(two()), weights)


# NaN policies


def with_nan() -> list[dict[str, np.ndarray]]:
    """Three updates; client 1 holds a NaN in leaf "b"."""
    updates = [{"a": np.full(3, k, np.float32), "b": np.full(2, k, np.float16)} for k in (1, 2, 5)]
    updates[1]["b"][1] = np.nan
    return updates


def test_raise_names_the_client_and_the_leaf() -> None:
    with pytest.raises(ValueError, match=r"client 1.*'b'"):
        fastagg.fedavg(with_nan())


def test_drop_leaves_the_client_out_weight_and_all() -> None:
    with pytest.warns(fastagg.DroppedUpdateWarning, match=r"client 1.*'b'"):
        result = fastagg.fedavg(with_nan(), [1, 7, 3], nan_policy="drop")
    assert result["a"].tolist() == [4, 4, 4]
    assert result["b"].tolist() == [4, 4]


def test_drop_warns_of_every_client(backend: Backend) -> None:
    columns = [np.full(40, value, np.float32) for value in (1, np.nan, 3, -np.inf)]
    with pytest.warns(fastagg.DroppedUpdateWarning) as warned:
        result = fastagg.fedavg(backend.put_all(columns), nan_policy="drop")
    assert ["client 1" in str(warned[0].message), "client 3" in str(warned[1].message)] == [True, True]
    assert len(warned) == 2
    assert backend.get(result).tolist() == [2] * 40


def test_drop_counts_integers_of_the_others_only() -> None:
    updates = [{"x": np.ones(1, np.float32), "n": np.array([k])} for k in (3, 90, 5)]
    updates[1]["x"][0] = np.inf
    with pytest.warns(fastagg.DroppedUpdateWarning):
        assert fastagg.fedavg(updates, nan_policy="drop")["n"].tolist() == [5]


def test_drop_of_everyone_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"every contributing client .* client 0, the array; client 1, the array"
    ) as caught:
        fastagg.fedavg([np.array([np.nan])] * 2, nan_policy="drop")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.dropped == {0: "the array", 1: "the array"}
        assert str(error) == str(caught.value)


def test_propagate_keeps_nan_where_it_is() -> None:
    result = fastagg.fedavg(with_nan(), nan_policy="propagate")
    assert np.isnan(result["b"]).tolist() == [False, True]


def test_a_nan_block_of_a_quantized_client_is_found() -> None:
    bad = np.ones(600, np.float32)
    bad[300] = np.inf
    columns = [np.ones(600, np.float32), fastagg.quantize(bad, "int8")]
    with pytest.raises(ValueError, match=r"client 1"):
        fastagg.fedavg(columns)


# dtypes


def test_dtype_says_what_the_result_shall_be() -> None:
    one, other = two()
    for dtype in ("float16", "half", np.float16, np.dtype("f2"), torch.float16, "fp16"):
        assert fastagg.fedavg([one, other], dtype=dtype).dtype == np.float16
    mixed = [one, other.astype(np.float64)]
    assert fastagg.fedavg(mixed, [1, 3], dtype="fp32").tolist() == EXPECTED
    assert fastagg.fedavg([one, other], dtype="bfloat16").dtype == ml_dtypes.bfloat16


def test_dtype_leaves_integers_alone() -> None:
    updates = [{"x": np.ones(2, np.float32), "n": np.array([k], np.int16)} for k in (1, 2)]
    result = fastagg.fedavg(updates, dtype="float64")
    assert [result["x"].dtype, result["n"].dtype] == [np.float64, np.int16]


def test_differing_floats_need_dtype() -> None:
    one, other = two()
    with pytest.raises(TypeError, match=r"client 1, leaf 'a'.*float32.*float64"):
        fastagg.fedavg([{"a": one}, {"a": other.astype(np.float64)}])


@pytest.mark.parametrize("dtype", ["int32", "complex64", "fp8_e4m3", 3, pytest.param(object(), id="object")])
def test_a_result_dtype_that_is_no_float(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"dtype"):
        fastagg.fedavg(list(two()), dtype=dtype)


@pytest.mark.parametrize(
    "array",
    [np.ones(3, complex), np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")])],
    ids=["complex", "text", "object", "date", "structured"],
)
def test_dtypes_that_have_no_mean(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"client 0, leaf 'a'"):
        fastagg.fedavg([{"a": array}, {"a": array}])


@pytest.mark.parametrize("policy", ["max", "first", "round"])
def test_bool(backend: Backend, policy: str) -> None:
    columns = [np.array(values) for values in ([True, False, False], [False, True, False], [False, True, False])]
    result = backend.get(fastagg.fedavg(backend.put_all(columns), integer_policy=policy))
    assert result.dtype == bool
    expected = {"max": [True, True, False], "first": [True, False, False], "round": [False, True, False]}
    assert result.tolist() == expected[policy]
    assert set(result.view(np.uint8).tolist()) <= {0, 1}


def test_batch_norm_counters_take_the_maximum() -> None:
    tensors = [{"num_batches_tracked": torch.tensor(value)} for value in (3, 11, 7)]
    result = fastagg.fedavg(tensors, [1, 2, 3])["num_batches_tracked"]
    assert result.dtype == torch.int64
    assert result.item() == 11


def test_large_integers_keep_every_bit_under_max_and_first() -> None:
    columns = [np.array([2**62 + 1, -(2**63)], np.int64), np.array([2**62, -(2**63) + 1], np.int64)]
    assert fastagg.fedavg(columns).tolist() == [2**62 + 1, -(2**63) + 1]
    assert fastagg.fedavg(columns, integer_policy="first").tolist() == [2**62 + 1, -(2**63)]


# Quantized


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign"])
@pytest.mark.parametrize("clients", [1, 2, 3, 8, 11])
def test_quantized_leaves_give_the_bits_of_their_decoded_arrays(backend: Backend, wire: str, clients: int) -> None:
    random = generator(4)
    columns = [normal(random, 777, np.dtype(np.float32)) * np.float32(k + 1) for k in range(clients)]
    weights = counts(random, clients)
    quantized = [fastagg.quantize(backend.put(column), wire) for column in columns]
    decoded = [fastagg.dequantize(q) for q in quantized]
    assert_same_bits(backend.get(fastagg.fedavg(quantized, weights)), backend.get(fastagg.fedavg(decoded, weights)))


@pytest.mark.parametrize("wire", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign"])
def test_quantized_leaves_keep_the_error_bound(backend: Backend, wire: str) -> None:
    random = generator(5)
    clients = 20 if backend.name == "cuda-on-cpu" else 300
    columns = [normal(random, 777, np.dtype(np.float32)) for _ in range(clients)]
    weights = counts(random, clients)
    quantized = [fastagg.quantize(backend.put(column), wire) for column in columns]
    decoded = [backend.get(fastagg.dequantize(q)) for q in quantized]
    assert_mean(backend.get(fastagg.fedavg(quantized, weights)), decoded, weights)


@by_dtype
def test_quantized_leaves_mix_with_arrays(backend: Backend, dtype: np.dtype) -> None:
    random = generator(5)
    columns = [backend.put(normal(random, (3, 259), dtype)) for _ in range(6)]
    wires = [None, "int8", "fp16", None, "sign", "int4"]
    mixed = [x if wire is None else fastagg.quantize(x, wire) for x, wire in zip(columns, wires, strict=True)]
    decoded = [fastagg.dequantize(x) if isinstance(x, fastagg.Quantized) else x for x in mixed]
    weights = counts(random, 6)
    result = backend.get(fastagg.fedavg(mixed, weights))
    expected = backend.get(fastagg.fedavg(decoded, weights))
    if dtype in (np.float64, np.float32):
        assert_same_bits(result, expected)
    else:  # decoded arrays of 16 bits were rounded once more
        difference = np.abs(result.astype(np.float64) - expected.astype(np.float64))
        assert difference.max() <= 2.0**-6


@pytest.mark.parametrize("wire", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int4"])
def test_quantized_subnormals_are_kept(backend: Backend, wire: str) -> None:
    smallest = {"fp16": 2.0**-24, "bf16": 2.0**-133}.get(wire, 2.0**-149)
    x = fastagg.quantize(backend.put((np.arange(-3, 4) * smallest).astype(np.float32)), wire)
    decoded = backend.get(fastagg.dequantize(x))
    assert decoded[-1] == 3 * smallest
    for clients in (1, 2, 4):
        assert_same_bits(backend.get(fastagg.fedavg([x] * clients)), decoded)


@pytest.mark.parametrize("wire", ["bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int4"])
def test_quantized_large_values_do_not_overflow_on_the_way(backend: Backend, wire: str) -> None:
    x = fastagg.quantize(backend.put(np.full(40, 2.0**127, np.float32)), wire)
    for weight in (1.0, 3.0, 1000.0):
        result = backend.get(fastagg.fedavg([x, x], [weight, weight]))
        assert_same_bits(result, np.full(40, 2.0**127, np.float32))


def test_an_integer_leaf_does_not_mix_with_quantized() -> None:
    integers, quantized = np.arange(4, dtype=np.int32), fastagg.quantize(np.ones(4, np.float32), "int8")
    for columns in ([integers, quantized], [quantized, integers]):
        for policy in ("max", "first", "round"):
            with pytest.raises(TypeError, match=r"client"):
                fastagg.fedavg(columns, integer_policy=policy)


# out=


@pytest.mark.parametrize("container", [lambda x: x, lambda x: [x], lambda x: {"a": x}], ids=["array", "list", "dict"])
def test_out_is_written_and_returned(container: Any) -> None:
    one, other = two()
    out = container(np.zeros(3, np.float32))
    assert fastagg.fedavg([container(one), container(other)], [1, 3], out=out) is out
    leaf = out if isinstance(out, np.ndarray) else next(iter(out.values() if isinstance(out, dict) else out))
    assert leaf.tolist() == EXPECTED


def test_out_of_torch_may_require_gradients() -> None:
    out = torch.nn.Parameter(torch.zeros(3))
    fastagg.fedavg([torch.from_numpy(array) for array in two()], [1, 3], out=out)
    assert out.tolist() == EXPECTED


def read_only() -> np.ndarray:
    out = np.zeros(3, np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.zeros(4, np.float32), ValueError),
        (np.zeros((3, 1), np.float32), ValueError),
        (np.zeros(3, np.float64), TypeError),
        (np.zeros(6, np.float32)[::2], ValueError),
        (np.zeros(3, ">f4"), ValueError),
        (read_only(), ValueError),
        (torch.zeros(3), TypeError),
        ([0, 0, 0], TypeError),
    ],
    ids=["shape", "dimensions", "dtype", "strided", "big-endian", "read-only", "library", "list"],
)
def test_an_out_that_does_not_fit(out: Any, error: type[Exception]) -> None:
    one, other = two()
    whole = {"first": np.full(3, 9, np.float32), "a": out}
    with pytest.raises(error, match=r"out, leaf 'a'"):
        fastagg.fedavg([{"first": one, "a": one}, {"first": other, "a": other}], out=whole)
    assert whole["first"].tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    "out", [{"b": np.zeros(3, np.float32)}, [np.zeros(3, np.float32)], {}, None.__class__], ids=str
)
def test_an_out_of_another_structure(out: Any) -> None:
    one, other = two()
    with pytest.raises((TypeError, ValueError), match=r"out"):
        fastagg.fedavg([{"a": one}, {"a": other}], out=out)


def test_out_may_not_overlap() -> None:
    buffer = np.arange(20, dtype=np.float32)
    before = buffer.copy()
    for start in (1, 4, 5, 6, 9):
        with pytest.raises(ValueError, match=r"overlap"):
            fastagg.fedavg([buffer[5:10], np.ones(5, np.float32)], out=buffer[start : start + 5])
    assert_same_bits(buffer, before)
    fastagg.fedavg([buffer[5:10], np.ones(5, np.float32)], out=buffer[:5])
    fastagg.fedavg([buffer[5:10], np.ones(5, np.float32)], out=buffer[10:15])


def test_an_out_that_overlaps_a_single_array_is_named() -> None:
    buffer = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r"^out, the array: overlaps client 1's array$"):
        fastagg.fedavg([np.ones(5, np.float32), buffer[:5]], out=buffer[2:7])


def test_out_may_not_overlap_any_of_many_arrays() -> None:
    buffer = np.zeros(4000, np.float32)
    updates = [{leaf: buffer[80 * leaf + place :][:7] for leaf in range(49)} for place in (0, 40)]
    for place in (7, 33, 47, 73):  # between the two clients' arrays
        out = {leaf: np.empty(7, np.float32) for leaf in range(49)}
        out[20] = buffer[80 * 20 + place :][:7]
        fastagg.fedavg(updates, out=out)
    for place, client in ((-6, 0), (0, 0), (6, 0), (34, 1), (46, 1)):
        out = {leaf: np.empty(7, np.float32) for leaf in range(49)}
        out[3] = buffer[80 * 20 + place :][:7]
        with pytest.raises(ValueError, match=rf"^out, leaf 3: overlaps client {client}'s leaf 20$"):
            fastagg.fedavg(updates, out=out)
    assert not buffer.any()


def test_outs_may_not_overlap_each_other() -> None:
    buffer, ones = np.zeros(10, np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"overlap"):
        fastagg.fedavg([[ones, ones]] * 2, out=[buffer[:4], buffer[3:7]])
    assert not buffer.any()


def test_out_may_not_overlap_codes() -> None:
    codes = fastagg.quantize(np.ones(64, np.float32), "fp32")
    with pytest.raises(ValueError, match=r"overlap"):
        fastagg.fedavg([codes, np.ones(64, np.float32)], out=codes.data)


# Bad input: the message names the client and the leaf, and nothing is written


ONE = np.arange(3, dtype=np.float32)
BAD_SECOND_UPDATES: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": ({"a": ONE}, ValueError, r"client 1.*missing.*'b'"),
    "unexpected": ({"a": ONE, "b": ONE, "c": ONE}, ValueError, r"client 1.*unexpected.*'c'"),
    "renamed": ({"a": ONE, "B": ONE}, ValueError, r"client 1.*missing.*'b'.*'B'"),
    "shape": ({"a": ONE, "b": np.ones(4, np.float32)}, ValueError, r"client 1, leaf 'b'.*\(3,\).*\(4,\)"),
    "broadcast": ({"a": ONE, "b": np.ones(1, np.float32)}, ValueError, r"client 1, leaf 'b'.*\(3,\).*\(1,\)"),
    "dimension": ({"a": ONE, "b": ONE.reshape(1, 3)}, ValueError, r"client 1, leaf 'b'.*\(3,\).*\(1, 3\)"),
    "dtype": ({"a": ONE, "b": ONE.astype(np.float16)}, TypeError, r"client 1, leaf 'b'.*float32.*float16"),
    "integer": ({"a": ONE, "b": ONE.astype(np.int32)}, TypeError, r"client 1, leaf 'b'.*float32.*int32"),
    "complex": ({"a": ONE, "b": ONE.astype(complex)}, TypeError, r"client 1, leaf 'b'"),
    "library": ({"a": ONE, "b": torch.ones(3)}, TypeError, r"client 1, leaf 'b'.*numpy.*torch"),
    "list": ({"a": ONE, "b": [1.0, 2.0, 3.0]}, TypeError, r"client 1, leaf 'b'.*list"),
    "none": ({"a": ONE, "b": None}, TypeError, r"client 1, leaf 'b'.*NoneType"),
    "number": ({"a": ONE, "b": 1.0}, TypeError, r"client 1, leaf 'b'.*float"),
    "nested": ({"a": ONE, "b": {"c": ONE}}, TypeError, r"client 1, leaf 'b'.*dict"),
    "sequence": ([ONE, ONE], TypeError, r"client 1.*mapping.*list"),
    "array": (ONE, TypeError, r"client 1.*mapping.*ndarray"),
    "nothing": (None, TypeError, r"client 1.*mapping.*NoneType"),
    "quantized": ({"a": ONE, "b": fastagg.quantize(np.ones(4, np.float32))}, ValueError, r"client 1, leaf 'b'"),
    "sparse": ({"a": ONE, "b": torch.ones(3).to_sparse()}, TypeError, r"client 1, leaf 'b'"),
}


@pytest.mark.parametrize("case", BAD_SECOND_UPDATES)
def test_bad_updates_are_named_and_nothing_is_written(case: str) -> None:
    update, error, message = BAD_SECOND_UPDATES[case]
    out = {"a": np.full(3, 7, np.float32), "b": np.full(3, 7, np.float32)}
    before = {name: leaf.tobytes() for name, leaf in out.items()}
    with pytest.raises(error, match=message):
        fastagg.fedavg([{"a": ONE, "b": ONE}, update], out=out)
    assert {name: leaf.tobytes() for name, leaf in out.items()} == before


@pytest.mark.parametrize("second", [torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64)], ids=str)
def test_tensors_of_another_make_are_named(second: torch.Tensor) -> None:
    for client, first in ((1, torch.ones(3)), (0, second)):
        with pytest.raises(TypeError, match=f"client {client}, leaf 'a'"):
            fastagg.fedavg([{"a": first}, {"a": second}])


def test_tensors_without_memory_are_named() -> None:
    # In a process of its own: reading address 0 would end this one.
    program = """
import torch, fastagg
ones, meta = torch.ones(3), torch.ones(3, device="meta")
nothing = torch._efficientzerotensor((3,))  # what forward-mode differentiation leaves
cases = [(0, meta, ones), (1, ones, meta), (0, nothing, ones), (1, ones, nothing), (0, nothing, nothing)]
for client, *updates in cases:
    try:
        fastagg.fedavg([{"a": update} for update in updates])
    except (TypeError, ValueError) as error:
        assert f"client {client}, leaf 'a'" in str(error), error
    else:
        raise SystemExit("no error")
for refuse in (lambda: fastagg.fedavg([ones, ones], out=nothing), lambda: fastagg.quantize(nothing)):
    try:
        refuse()
    except TypeError as error:
        assert "expected a tensor with memory" in str(error), error
    else:
        raise SystemExit("no error")
assert fastagg.fedavg([torch.empty(0, 3)] * 2).shape == (0, 3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] or f"ended with {done.returncode}"


@pytest.mark.parametrize(
    ("updates", "error"),
    [
        ([], ValueError),
        ({}, TypeError),
        ({"a": ONE}, TypeError),
        ([{}], ValueError),
        ([[]], ValueError),
        ([5], TypeError),
        (["ab"], TypeError),
        (5, TypeError),
        (None, TypeError),
    ],
    ids=repr,
)
def test_updates_that_are_none(updates: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fastagg.fedavg(updates)


def test_a_model_is_told_to_pass_its_state_dict() -> None:
    with pytest.raises(TypeError, match=r"state_dict"):
        fastagg.fedavg([torch.nn.Linear(2, 2)] * 2)


@pytest.mark.parametrize(
    "option", [{"nan_policy": "ignore"}, {"integer_policy": "mean"}, {"nan_policy": None}], ids=str
)
def test_policies_that_do_not_exist(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"policy: expected one of"):
        fastagg.fedavg([ONE, ONE], **option)


# What peers get wrong: names after field/federated-aggregation.md, sections 0.3 and 6


def test_flower_inplace_zeroes_integer_buffers() -> None:
    updates = [
        {"n": np.array(n, np.int64), "flag": np.array([False, f]), "u": np.array([n], np.uint8)}
        for n, f in ((5, True), (5, True))
    ]
    result = fastagg.fedavg(updates, [10, 20])
    assert result["n"] == 5
    assert result["flag"].tolist() == [False, True]
    assert result["u"].tolist() == [5]


def test_flower_wraps_uint8() -> None:
    columns = [np.array([200], np.uint8), np.array([100], np.uint8)]
    assert fastagg.fedavg(columns, integer_policy="round").tolist() == [150]
    assert fastagg.fedavg(columns).tolist() == [200]


def test_flower_averages_to_nan_when_all_weights_are_zero() -> None:
    with pytest.raises(ValueError, match=r"all are zero"):
        fastagg.fedavg([ONE, ONE], [0, 0])


@pytest.mark.parametrize("weights", [[-1, 3], [-1, 1]])
def test_negative_weights_extrapolate(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"client 0"):
        fastagg.fedavg([ONE, ONE], weights)


def test_a_nan_number_of_examples_ruins_the_model() -> None:
    with pytest.raises(ValueError, match=r"client 1"):
        fastagg.fedavg([ONE, ONE], [1, np.nan])


@pytest.mark.parametrize("examples", [1000, 70000])
def test_fp16_overflows_with_many_examples(backend: Backend, examples: int) -> None:
    column = backend.put(np.full(5, 100, np.float16))
    assert backend.get(fastagg.fedavg([column, column], [examples, examples])).tolist() == [100] * 5


def test_shapes_broadcast_silently() -> None:
    with pytest.raises(ValueError, match=r"client 1.*\(3,\).*\(1,\)"):
        fastagg.fedavg([ONE, np.ones(1, np.float32)])


def test_flower_pairs_reordered_keys_by_position() -> None:
    a, b = np.zeros(2, np.float32), np.full(2, 100, np.float32)
    result = fastagg.fedavg([{"a": a, "b": b}, {"b": b, "a": a}])
    assert result["a"].tolist() == [0, 0]
    assert result["b"].tolist() == [100, 100]


def test_a_missing_key_is_averaged_over_the_others() -> None:
    with pytest.raises(ValueError, match=r"client 1.*missing.*'b'"):
        fastagg.fedavg([{"a": ONE, "b": ONE}, {"a": ONE}])


def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"at least one"):
        fastagg.fedavg([])


def test_fate_returns_the_unweighted_sum() -> None:
    columns = [np.array([1, 2], np.float32), np.array([3, 4], np.float32)]
    assert fastagg.fedavg(columns, [0.25, 0.75]).tolist() == [2.5, 3.5]


def test_nvflare_gives_a_client_without_steps_weight_one() -> None:
    columns = [np.zeros(3, np.float32), np.ones(3, np.float32)]
    assert fastagg.fedavg(columns, [4, 0]).tolist() == [0, 0, 0]


def test_int64_weighted_mean_rounds_instead_of_zeroing() -> None:
    columns = [np.array([10, 11], np.int64), np.array([20, 22], np.int64)]
    assert fastagg.fedavg(columns, [1, 3], integer_policy="round").tolist() == [18, 19]


def test_fp64_is_as_exact_as_numpy_or_more() -> None:
    random = generator(6)
    columns, weights = [random.normal(size=(7, 5)) for _ in range(3)], [5, 3, 2]
    result = fastagg.fedavg(columns, weights)
    assert_mean(result, columns, weights)
    rounding = np.spacing(np.average(np.abs(columns), axis=0, weights=weights))  # NumPy's, at every step
    assert np.all(np.abs(result - np.average(columns, axis=0, weights=weights)) <= 2 * rounding)


@pytest.mark.parametrize("weight", [3, 0.1, 1 / 3])
def test_the_mean_of_equal_fp64_models_is_that_model(weight: float) -> None:
    for clients in (3, 10, 49, 1000):
        assert fastagg.fedavg([np.array([7.0])] * clients, [weight] * clients) == 7.0


# What a reader found


def mean_of(backend: Backend, columns: list[np.ndarray], weights: list[float], **options: Any) -> np.ndarray:
    """`fedavg` on a backend, from NumPy to NumPy."""
    return backend.get(fastagg.fedavg(backend.put_all(columns), weights, **options))


class Shared(MutableMapping):
    """A mapping whose shallow copy shares its storage."""

    def __init__(self, items: dict) -> None:
        self._items = items

    def __getitem__(self, name: str) -> np.ndarray:
        return self._items[name]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self._items[name] = value

    def __delitem__(self, name: str) -> None:
        del self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_no_mapping_of_a_client_is_written() -> None:
    clients = [Shared({"w": np.full(3, value, np.float32)}) for value in (0, 2)]
    assert np.all(fastagg.fedavg(clients)["w"] == 1)
    assert np.all(clients[0]["w"] == 0)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_weights_far_apart_lose_nothing(backend: Backend, name: str) -> None:
    dtype = FLOATS[name]
    infinite = [np.zeros(9, dtype), np.full(9, np.inf, dtype)]
    assert np.all(np.isinf(mean_of(backend, infinite, [1.0, 1e-60], nan_policy="propagate").astype(np.float64)))
    if name == "bf16":
        small = mean_of(backend, [np.zeros(9, dtype), np.full(9, 3e38, dtype)], [1.0, 1e-60])
        assert np.allclose(small.astype(np.float64), 3e-22, rtol=0.01)
        tiny = mean_of(backend, [np.full(9, 2.0**-100, dtype)] * 2, [5e-324, 5e-324])
        assert np.all(tiny.astype(np.float64) == 2.0**-100)


def test_a_client_of_weight_0_leaves_no_trace_in_the_bits() -> None:
    random = generator(31)
    columns = [random.standard_normal(50) for _ in range(30)]
    weights = np.where(random.random(30) < 0.4, 0.0, random.random(30) * 10)
    contributing = np.flatnonzero(weights)
    alone = fastagg.fedavg([columns[k] for k in contributing], weights[contributing])
    assert_same_bits(fastagg.fedavg(columns, weights), alone)
    assert_mean(alone, [columns[k] for k in contributing], weights[contributing])


@pytest.mark.parametrize("weights", [{0: 10, 1: 20}, b"ab", "12"])
def test_what_only_looks_like_weights_is_refused(weights: object) -> None:
    with pytest.raises(TypeError, match=r"weights"):
        fastagg.fedavg([np.ones(3), np.ones(3)], weights)


def test_python_float_is_float64() -> None:
    assert fastagg.fedavg([np.ones(3, np.float32)], dtype=float).dtype == np.float64


def test_masks_are_not_dropped_in_silence() -> None:
    with pytest.raises(TypeError, match=r"masked"):
        fastagg.fedavg([np.ma.masked_array(np.ones(3, np.float32), [0, 1, 0])] * 2)


def test_no_updates_at_all_is_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"updates: expected a sequence"):
        fastagg.fedavg(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("updates", "dimensions"),
    [
        (np.ones(3, np.float32), "one dimension"),
        (torch.ones(3), "one dimension"),
        (np.array(3.0), "no dimension"),
        (torch.tensor(3.0), "no dimension"),
    ],
)
def test_arrays_that_are_no_sequence_are_named(updates: Any, dimensions: str) -> None:
    # fedavg(a, b) would take b for the weights of a's elements.
    for weights in (None, updates):
        with pytest.raises(
            TypeError, match=f"^updates: expected a sequence of updates, got a single array of {dimensions}$"
        ):
            fastagg.fedavg(updates, weights)


def test_the_rows_of_an_array_are_updates() -> None:
    rows = np.array(two())
    assert fastagg.fedavg(rows, [1, 3]).tolist() == EXPECTED
    assert fastagg.fedavg(torch.from_numpy(rows), [1, 3]).tolist() == EXPECTED
    objects = np.empty(2, object)
    objects[:] = [{"a": row} for row in rows]
    assert fastagg.fedavg(objects, [1, 3])["a"].tolist() == EXPECTED


def test_out_may_not_overlap_scales() -> None:
    memory = np.zeros(64, np.float32)
    quantized = fastagg.quantize(np.ones(64, np.float32), "int8", block=32)
    memory[:2] = quantized.scales
    inside = fastagg.Quantized(quantized.data, memory[:2], wire="int8", shape=(64,), block=32)
    with pytest.raises(ValueError, match=r"overlaps"):
        fastagg.fedavg([inside, inside], out=memory)
    with pytest.raises(ValueError, match=r"overlaps"):
        fastagg.dequantize(inside, out=memory)


def test_a_graph_notices_that_out_was_written() -> None:
    leaf = torch.ones(3, requires_grad=True)
    saved = leaf.detach().clone()
    product = (leaf * saved).sum()
    fastagg.fedavg([torch.full((3,), 5.0)] * 2, out=saved)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        product.backward()
