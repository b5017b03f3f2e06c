"""Accumulators of several torch.distributed ranks, merged to one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist

from fastagg._errors import PeerError
from fastagg._updates.structure import Structure
from fastagg.averaging.accumulator import Accumulator
from fastagg.distributed.channels import group_of, refusing
from fastagg.distributed.host_executor import in_another_thread
from fastagg.distributed.messages import gather

__all__ = ["merge_over_ranks"]

State = dict[str, Any]  # what Accumulator.state_dict() gives
Message = State | PeerError

_PIECE = 64 * 2**20  # bytes of a message; as many lie on a device where the group's backend wants them there


def merge_over_ranks(
    accumulator: Accumulator, group: dist.ProcessGroup | None = None, *, root: int | None = None
) -> None:
    """Merges the accumulators of all ranks, each with clients of its own, and gives every rank the total.

    ``total = (((0 + 1) + (2 + 3)) + ((4 + 5) + 6)) + …`` of ranks 0, 1, 2, …

    Ranks merge in pairs, pairs in fours and so on: the tree follows from the number of ranks alone. So every run gives
    the same bits, and so do the same merges in one process. Another number of ranks rounds the sums in another order:
    the results then differ seldom, by the last bit, and all are within the error that `Accumulator` states. Clients are
    numbered on from rank to rank, in `dropped` too. A rank may have none.

    The sums travel as bytes, 6 an fp32 element: up the tree, and down again. A rank needs memory for up to three more
    accumulators meanwhile. What it holds changes only once it has the total.

    Args:
        accumulator: this rank's.
        group: the process group; None for the default one. Bytes go through its backend: a CPU one if it has one, else
            through the current CUDA device.
        root: the global rank that alone gets the total, while the others keep what they have; None for all.

    Raises:
        TypeError: a rank has no Accumulator: on every rank, naming that one.
        ValueError: a root outside the group; ranks that differ in names, shapes, dtypes, devices, integer policy, stats
            or root; or a rank with a NaN among the updates that `batch` had left waiting: on every rank, naming that
            rank and the leaf.
        PeerError: a rank has died, or has hung for the group's timeout. Ranks that had the total before keep it.
    """
    link = _Link(group_of(group))
    own = _agreed_state(accumulator, link, root)
    in_another_thread(lambda: _merge(accumulator, own, link, root))


def _merge(accumulator: Accumulator, own: State, link: _Link, root: int | None) -> None:
    gathered = _gathered(own, link)
    total = gathered if link.rank == 0 else link.send(gathered, link.parent)
    total = _spread(total, link) if root is None else _to_root(total, link, link.names.index(root))
    if isinstance(gathered, PeerError):
        raise gathered
    if isinstance(total, PeerError):
        raise total
    if total is not None:
        accumulator.load_state_dict(_as_own(total, own))


class _Outline(NamedTuple):
    """What all ranks must have in common, and what is wrong on one."""

    root: int | None
    integer_policy: str | None
    stats: bool
    device: str  # its kind
    leaves: list[str] | None  # None: a rank without clients
    problem: TypeError | ValueError | None = None


def _agreed_state(accumulator: Accumulator, link: _Link, root: int | None) -> State:
    """This rank's state, once all ranks are known to fit together.

    Raises:
        TypeError, ValueError: they do not, or one has wrong arguments; on every rank.
    """
    state: State = {}
    with refusing(link.group):
        try:
            _check_arguments(accumulator, root, link.names)
            state = accumulator.state_dict()  # updates that waited are folded here
            outline = _outline(state, root)
        except (TypeError, ValueError) as error:  # raised once all know it, on all as it is here
            outline = _Outline(None, "", False, "", None, error)
        own = pickle.dumps(outline)
    everyone = [pickle.loads(one) for one in gather(own, "merge_over_ranks", link.group)]
    reference = _check_alike(everyone, link.names)
    if state["structure"] is None and reference.device == "cuda":
        state["device"] = f"cuda:{torch.cuda.current_device()}"
    return state


def _check_arguments(accumulator: Accumulator, root: int | None, names: list[int]) -> None:
    """Raises TypeError or ValueError if this rank's arguments are wrong."""
    if not isinstance(accumulator, Accumulator):
        raise TypeError(f"accumulator: expected an Accumulator, got {type(accumulator).__name__}")
    if root is not None and root not in names:
        raise ValueError(f"root: expected a global rank of the group, one of {names}, got {root!r}")


def _outline(state: State, root: int | None) -> _Outline:
    leaves = None
    if state["structure"] is not None:
        structure = Structure.described(state["structure"])
        leaves = [
            f"{structure.leaf_name(index)}, {dtype} {tuple(shape)}"
            for index, (_, dtype, _, shape, _, _) in enumerate(state["leaves"])
        ]
    stats = state["statistics"] is not None
    return _Outline(root, state["integer_policy"], stats, state["device"].split(":")[0], leaves)


def _check_alike(everyone: list[_Outline], names: list[int]) -> _Outline:
    """The first outline of a rank that has clients, or of any.

    Raises:
        TypeError, ValueError: one does not fit it, or tells of a problem.
    """
    place = next((place for place, outline in enumerate(everyone) if outline.leaves is not None), 0)
    reference = everyone[place]
    for name, outline in zip(names, everyone, strict=True):
        if outline.problem is not None:
            raise type(outline.problem)(f"rank {name}: {outline.problem}")
        pairs = [
            (f"root {reference.root}", f"root {outline.root}"),
            (f"integer_policy {reference.integer_policy!r}", f"integer_policy {outline.integer_policy!r}"),
            (f"stats={reference.stats}", f"stats={outline.stats}"),
        ]
        if outline.leaves is not None:
            pairs += zip_longest(reference.leaves or [], outline.leaves, fillvalue="no more leaves")
            pairs += [(f"arrays on {reference.device}", f"arrays on {outline.device}")]
        for expected, got in pairs:
            if got != expected:
                raise ValueError(f"ranks differ: rank {names[place]} has {expected}, rank {name} has {got}")
    return reference


def _gathered(own: State, link: _Link) -> Message:
    """The sums of this rank and of all below it in the tree, or who was lost there."""
    total: Accumulator | None = None
    lost: PeerError | None = None
    for child in link.children:
        theirs = link.receive(child)
        if isinstance(theirs, PeerError):
            lost = lost or theirs
        elif lost is None:
            total = total or _restored(own)
            total.merge(_restored({**theirs, "device": own["device"]}))
    return lost or (own if total is None else total.state_dict())


def _spread(message: Message | None, link: _Link) -> Message:
    """The total of all, from the first rank to all, or who was lost."""
    message = message or link.receive(link.parent)
    for child in reversed(link.children):
        message = link.send(message, child) or message
    return message


def _to_root(message: Message | None, link: _Link, root: int) -> Message | None:
    """The total, on the root alone; elsewhere None, or who was lost."""
    if root == 0 or link.rank not in (0, root):
        return message
    if link.rank == root:
        return message or link.receive(0)
    assert message is not None
    return link.send(message, root) or (message if isinstance(message, PeerError) else None)


def _restored(state: State) -> Accumulator:
    accumulator = Accumulator()
    accumulator.load_state_dict(state)
    return accumulator


def _as_own(total: State, own: State) -> State:
    """The total in the arrays and with the options of this rank's accumulator."""
    kept = ["nan_policy", "batch", "low_memory", "device"]
    if own["structure"] is not None:
        kept += ["structure", "leaves"]
    return {**total, **{key: own[key] for key in kept}}


class _Link:
    """This rank's place in the tree, and its way to others, which are numbered as in the group.

    That a rank was lost is a message too: so all whom it concerns learn who it was, and nobody waits for an answer.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.names = dist.get_process_group_ranks(group)
        self.parent = self.rank & (self.rank - 1)
        lowest_bit = self.rank & -self.rank or self.world
        steps = [1 << bit for bit in range(self.world.bit_length())]
        self.children = [self.rank + step for step in steps if step < lowest_bit and self.rank + step < self.world]
        on_host = torch.device("cpu") in group._device_types
        self._device = torch.device("cpu" if on_host else f"cuda:{torch.cuda.current_device()}")

    def send(self, message: Message, peer: int) -> PeerError | None:
        """Sends a message; returns the error if the peer is lost."""
        name = self.names[peer]
        header, sums = message, None
        if not isinstance(message, PeerError):
            header, sums = {**message, "sums": None}, message["sums"]
        try:
            dist.send_object_list([header, 0 if sums is None else len(sums)], name, self.group)
            if sums is not None:
                self._each_piece(torch.from_numpy(sums), lambda piece: dist.send(piece, name, self.group))
        except RuntimeError as error:
            return _lost(name, error)
        return None

    def receive(self, peer: int) -> Message:
        """What a peer has sent, or the error if it is lost."""
        name = self.names[peer]
        received: list[Any] = [None, 0]
        try:
            dist.recv_object_list(received, name, self.group)
            header: Message = received[0]
            size: int = received[1]
            if not isinstance(header, PeerError) and size:
                sums = torch.empty(size, dtype=torch.uint8, device="cpu")
                self._each_piece(sums, lambda piece: dist.recv(piece, name, self.group))
                header["sums"] = sums.numpy()
        except RuntimeError as error:
            return _lost(name, error)
        return header

    def _each_piece(self, sums: torch.Tensor, carry: Callable[[torch.Tensor], Any]) -> None:
        """Sends or receives bytes piece by piece, over the device that the backend wants them on."""
        for piece in sums.split(_PIECE):  # type: ignore[no-untyped-call]
            staged = piece.to(self._device)
            carry(staged)
            if staged is not piece:
                piece.copy_(staged)


def _lost(name: int, error: RuntimeError) -> PeerError:
    return PeerError(name, f"rank {name} has died or hung: {error}")
