"""Integer leaves that are codes of other quantisers, or bytes: refused by name unless a policy is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastagg
from fastagg import robust, trees
from fastagg.asynchronous import FedAsync, FedBuff
from fastagg.files import average
from fastagg.server import FedNova

WORDS = np.full((4, 8), 1 << 30, np.int32)
BYTES = np.arange(32, dtype=np.uint8).reshape(4, 8)
SCALES = np.ones((4, 1), np.float32)
CODES: dict[str, tuple[dict[str, Any], str]] = {
    "compressed-tensors int8": ({"up.weight": BYTES.view(np.int8), "up.weight_scale": SCALES}, "up.weight"),
    "compressed-tensors packed": (
        {"up.weight_packed": WORDS, "up.weight_scale": SCALES, "up.weight_shape": np.array([4, 64])},
        "up.weight_packed",
    ),
    "GPTQ": ({"q.g_idx": np.arange(8, dtype=np.int32), "q.qweight": WORDS, "q.scales": SCALES}, "q.qweight"),
    "AWQ": ({"q.qzeros": WORDS, "q.scales": SCALES}, "q.qzeros"),
    "bitsandbytes int8": ({"l.weight": BYTES[:1, :4].view(np.int8), "l.SCB": SCALES}, "l.weight"),
    "bitsandbytes 4-bit": ({"l.weight": BYTES[:1, :4], "l.weight.absmax": SCALES}, "l.weight"),
    "MXFP4": ({"mlp_blocks": BYTES, "mlp_scales": BYTES[:, 0]}, "mlp_blocks"),
    "quanto": ({"w._data": BYTES[:1, :4].view(np.int8), "w._scale": SCALES}, "w._data"),
    "HQQ": ({"l.W_q": WORDS, "l.scale": SCALES}, "l.W_q"),
    "wide codes": ({"w": WORDS, "w_scale": SCALES}, "w"),
    "zero point": ({"c.scale": SCALES[0], "c.zero_point": np.int64(3)}, "c.zero_point"),
    "zero points": ({"w_zero_point": np.arange(3, dtype=np.int32), "w": SCALES}, "w_zero_point"),
    "without names": ([BYTES.view(np.int8), SCALES], "0"),  # type: ignore[dict-item]
    "booster": ({"0": np.frombuffer(b'{"learner": {}}', np.uint8)}, "0"),
    "Keras 2": ({"d/kernel_quantized:0": WORDS, "d/kernel_scale:0": SCALES}, "d/kernel_quantized:0"),
}
ORDINARY: dict[str, Any] = {
    "num_batches_tracked": np.int64(7),
    "position_ids": np.arange(512).reshape(1, 512),
    "token_type_ids": np.zeros((1, 512), np.int64),
    "attn.relative_position_index": np.arange(2401, dtype=np.int64).reshape(49, 49),
    "attn.logit_scale": SCALES,
    "attn.bias": np.tril(np.ones((1, 1, 32, 32), np.uint8)),
    "attn.scale": SCALES[0],
    "mask": np.ones((8, 8), bool),
    "norm.scale": SCALES,
    "norm.initialized": np.uint8(1),
    "fake_quant_enabled": np.ones(1, np.uint8),
    "steps": np.array([100000], np.int32),
    "seed_generator_state:0": np.array([1 << 31, 5], np.uint32),
}
by_codes = pytest.mark.parametrize(("update", "name"), CODES.values(), ids=CODES)


@by_codes
def test_codes_are_refused_by_name(update: Any, name: str) -> None:
    message = rf"leaf '?{name}'?, u?int\d+ .*integer_policy"
    out = {key: np.zeros_like(x) for key, x in update.items()} if isinstance(update, dict) else None
    for attempt in (
        lambda: fastagg.fedavg([update, update], out=out),
        lambda: fastagg.fedavg([update, update], [0, 1]),
        lambda: fastagg.Accumulator().add(update),
        lambda: robust.median([update] * 3),
        lambda: trees.average([0, 1], load=lambda source: update),
        lambda: FedAsync(update),
        lambda: FedBuff(update),
        lambda: FedNova().step(update, [update], None, [1]),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert out is None or not any(x.any() for x in out.values())


@by_codes
def test_a_policy_says_what_becomes_of_them(update: Any, name: str) -> None:
    for policy in ("max", "first", "round"):
        assert fastagg.fedavg([update], integer_policy=policy) is not None
        fastagg.Accumulator(integer_policy=policy).add(update)
        robust.median([update] * 3, integer_policy=policy)
        FedBuff(update, integer_policy=policy)


def test_ordinary_integers_take_the_maximum() -> None:
    other = {name: x if x.dtype.kind == "f" else (x / 2).astype(x.dtype) for name, x in ORDINARY.items()}
    other["mask"] = np.eye(8, dtype=bool)
    mean = fastagg.fedavg([other, ORDINARY])
    sums = fastagg.Accumulator()
    sums.add(other)
    sums.add(ORDINARY)
    for result in (mean, sums.result()):
        for name, x in ORDINARY.items():
            np.testing.assert_array_equal(result[name], x)
    robust.median([ORDINARY] * 3)


def test_none_and_max_are_one_policy_to_a_merge() -> None:
    first, second = fastagg.Accumulator(), fastagg.Accumulator(integer_policy="max")
    first.add(np.array([3, 4]))
    second.add(np.array([5, 1]))
    first.merge(second)
    assert first.result().tolist() == [5, 4]
    restored = fastagg.Accumulator(integer_policy="first")
    restored.load_state_dict(first.state_dict())
    assert restored.integer_policy is None


def test_files_of_codes_are_refused(tmp_path: Any) -> None:
    for name, (update, _) in CODES.items():
        if isinstance(update, dict):
            np.savez(tmp_path / f"{name}.npz", **update)
            with pytest.raises(ValueError, match=rf"{name}.npz: leaf .*integer_policy"):
                average([tmp_path / f"{name}.npz"] * 2, tmp_path / "out.npz")
            assert not (tmp_path / "out.npz").exists()
            average([tmp_path / f"{name}.npz"] * 2, tmp_path / "out.npz", integer_policy="first", force=True)
            (tmp_path / "out.npz").unlink()
    np.savez(tmp_path / "ordinary.npz", **ORDINARY)
    average([tmp_path / "ordinary.npz"], tmp_path / "out.npz")


MASK = np.eye(8, dtype=np.uint8)
UNLIKE = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.mark.parametrize("order", [1, -1])
def test_every_contributing_client_is_looked_at(order: int) -> None:
    """Whoever comes first: what one client sends must not decide for the others."""
    updates = [{"w": SCALES, "mask": mask} for mask in (MASK, MASK, UNLIKE)][::order]
    at, weights = (2, 0)[order < 0], [1.0, 1.0, 1.0]
    message = rf"client {at}, leaf 'mask', uint8 .*integer_policy"
    for attempt in (lambda: fastagg.fedavg(updates, weights), lambda: robust.median(updates)):
        with pytest.raises(ValueError, match=message):
            attempt()
    sums = fastagg.Accumulator()
    for update in updates[:at]:
        sums.add(update)
    with pytest.raises(ValueError, match=message):
        sums.add(updates[at])
    weights[at] = 0.0
    np.testing.assert_array_equal(fastagg.fedavg(updates, weights)["mask"], MASK)
    sums = fastagg.Accumulator()
    for update, weight in zip(updates, weights, strict=True):
        sums.add(update, weight)
    np.testing.assert_array_equal(sums.result()["mask"], MASK)


@pytest.mark.parametrize("order", [1, -1])
def test_every_file_of_weight_is_looked_at(tmp_path: Any, order: int) -> None:
    np.savez(tmp_path / "ok.npz", mask=MASK)
    np.savez(tmp_path / "bad.npz", mask=UNLIKE)
    paths = [tmp_path / "ok.npz", tmp_path / "bad.npz"][::order]
    with pytest.raises(ValueError, match=r"bad.npz: leaf 'mask', uint8 .*integer_policy"):
        average(paths, tmp_path / "out.npz")
    average(paths, tmp_path / "out.npz", [1, 0][::order])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["mask"], MASK)


@pytest.mark.parametrize(
    "update",
    [
        {("l", "qweight"): WORDS, ("l", "scales"): SCALES},  # Flax's names
        {"l.weight": WORDS.astype(np.int16), "l.scales": SCALES},  # HIGGS
        {"l.weight": WORDS, "l.scales_and_zeros": SCALES},  # torchao
        {"l.trellis": WORDS, "l.suh": SCALES},  # EXL3
        {"l.indices": WORDS, "l.centroids": SCALES},  # VPTQ
    ],
    ids=["flax", "higgs", "torchao", "exl3", "vptq"],
)
def test_codes_of_more_layouts_are_refused(update: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"looks like .*integer_policy"):
        fastagg.fedavg([update, update])
