"""A plan in the words of others: DTensor placements, Megatron flags, and a layout file for checkpoints.

Called by users who found a plan here and run it elsewhere. Each export refuses, with the reason, what the other side
cannot express: nothing is rounded to the next best thing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement

from collectives.errors import CorruptFile, Unsupported, UsageError
from parallel.graph import Node, Phase, Role
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Split
from parallel.plans import Plan, Sharding

# --- DTensor ---


def device_mesh(mesh: Mesh) -> DeviceMesh:
    """The same mesh for torch; every rank of the process group calls it, on CPU.

    Raises:
        Unsupported: ranks along an axis do not ascend; torch's groups put them in order, and shards in other places.

    """
    if any(list(line) != sorted(line) for axis in range(len(mesh.axes)) for line in mesh.groups(axis)):
        raise Unsupported(f"torch orders the ranks along an axis; those of mesh {mesh}, {list(mesh.ranks)}, are not so")
    return DeviceMesh("cpu", torch.tensor(mesh.ranks).reshape(mesh.shape), mesh_dim_names=mesh.names)


def dtensor_placements(layout: Layout, shape: tuple[int, ...]) -> tuple[TorchPlacement, ...]:
    """Placements with which `distribute_tensor` on `device_mesh(layout.mesh)` gives each rank the layout's shard.

    Raises:
        Unsupported: torch cuts the tensor otherwise (it gives all ranks but the last the larger part, a balanced split
            the remainder one each), or has no such placement.

    """
    layout.check(shape)
    found = tuple(map(_torch_placement, layout.placements))
    for rank in layout.mesh.ranks:
        ours, theirs = layout.shard(shape, rank).box.shape, _torch_shape(layout, shape, rank)
        if ours != theirs:
            raise Unsupported(
                f"rank {rank} holds {list(ours)} of a tensor of shape {list(shape)} that lives on {layout}, but "
                f"DTensor would give it {list(theirs)}: balanced splits and torch's chunks differ where sizes do not "
                "divide; pad the dimension to a multiple of the axis, or pin another placement"
            )
    return found


def _torch_placement(placement: Placement) -> TorchPlacement:
    if isinstance(placement, Split):
        return Shard(placement.dim)
    if isinstance(placement, Partial):
        return TorchPartial("product" if placement.op == "prod" else placement.op)
    if isinstance(placement, Flat):
        raise Unsupported("DTensor has no placement for parts of a flattened tensor; use a split of dimension 0")
    return Replicate()


def _torch_shape(layout: Layout, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """What torch's chunks leave to a rank: parts of the size rounded up, as many as there is something for."""
    sizes = list(shape)
    for placement, parts, at in zip(layout.placements, layout.mesh.shape, layout.mesh.place(rank), strict=True):
        if isinstance(placement, Split):
            size = sizes[placement.dim]
            each = -(-size // parts)
            sizes[placement.dim] = max(0, min(size, (at + 1) * each) - at * each)
    return tuple(sizes)


# --- checkpoints ---


def save_layouts(plan: Plan, path: str | Path) -> None:
    """Write where parameters, optimizer state and buffers live, by name, as JSON that `load_layouts` reads."""
    kept = {source.name for source in plan.graph.inputs if source.role in (Role.PARAMETER, Role.STATE, Role.BUFFER)}
    layouts = {name: layout.to_json() for name, layout in plan.layouts.items() if name in kept}
    Path(path).write_text(json.dumps({"ringhold_layouts": 1, "layouts": layouts}, indent=1) + "\n")


def load_layouts(path: str | Path) -> dict[str, Layout]:
    """Read a layout file, for `layouts=` of `checkpoint.save` and `checkpoint.load`.

    Raises:
        UsageError: there is no such file.
        CorruptFile: it is not one that `save_layouts` wrote.

    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name a layout file") from None
    except ValueError as error:
        raise CorruptFile(f"{path} is no JSON ({error}); export the layouts again") from None
    layouts = data.get("layouts") if isinstance(data, dict) and data.get("ringhold_layouts") == 1 else None
    if not isinstance(layouts, Mapping):
        raise CorruptFile(f"{path} is no layout file of version 1; export the layouts again")
    try:
        return {str(name): Layout.from_json(layout) for name, layout in layouts.items()}
    except UsageError as error:
        raise CorruptFile(f"{path}: {error}; export the layouts again") from None


# --- Megatron ---


def megatron_flags(plan: Plan) -> tuple[str, ...]:
    """The flags of Megatron-LM's training scripts that shard as this plan does; sizes of data parallelism are implied.

    Raises:
        Unsupported: the plan is none of Megatron's; the message says which axis and why.

    """
    flags: dict[str, str] = {}
    for axis, name in enumerate(plan.mesh.names):
        if plan.mesh.shape[axis] == 1:
            continue
        uses = _products(plan, axis)
        if set(uses.values()) == {"batch"}:
            _refuse_uneven(plan, axis, Role.BATCH)
            flags |= _data_parallel(plan, axis)
        elif set(uses.values()) <= {"column", "row"} and uses:
            _refuse_uneven(plan, axis, Role.PARAMETER)
            _refuse_unpaired(name, uses)
            if "--tensor-model-parallel-size" in flags:
                raise Unsupported("two axes of the mesh split weights; Megatron has one tensor-parallel axis")
            flags["--tensor-model-parallel-size"] = str(plan.mesh.shape[axis])
            if _splits_sequence(plan, axis):
                flags["--sequence-parallel"] = ""
        else:
            listing = ", ".join(f"{node} {use}" for node, use in list(uses.items())[:6])
            raise Unsupported(f"axis {name} is neither data parallel nor tensor parallel throughout: {listing}")
    return tuple(part for flag, value in flags.items() for part in (flag, value) if part)


def _products(plan: Plan, axis: int) -> dict[str, str]:
    """How each product of the forward pass with a weight uses an axis, by the node's module or name."""
    weights = {source.value.name for source in plan.graph.inputs if source.role == Role.PARAMETER}
    found = {}
    for node, how in zip(plan.graph.nodes, plan.nodes, strict=True):
        at = [number for number, value in enumerate(node.inputs) if value.name in weights]
        if node.phase == Phase.FORWARD and node.op == "aten.einsum.default" and len(at) == 1:
            found[f"{node.module or node.name} ({node.inputs[at[0]].name})"] = _use(node, how, at[0], axis)
    return found


def _use(node: Node, how: Sharding, weight: int, axis: int) -> str:
    given = how.inputs[1 - weight][axis]
    if isinstance(how.inputs[weight][axis], Split):
        return "row" if isinstance(how.outputs[0][axis], Partial) else "column"
    if given == Split(0):
        return "batch"
    return "whole" if given == Broadcast() else f"with activations {given}"


def _refuse_uneven(plan: Plan, axis: int, role: Role) -> None:
    """Megatron cuts weights and batches into equal parts."""
    parts = plan.mesh.shape[axis]
    for source, placed in zip(plan.graph.inputs, plan.starts, strict=True):
        cut = placed[axis]
        if source.role == role and isinstance(cut, Split) and source.value.shape[cut.dim] % parts:
            raise Unsupported(
                f"axis {plan.mesh.names[axis]} of {parts} splits dimension {cut.dim} of {source.name}, of shape "
                f"{list(source.value.shape)}, into uneven parts; Megatron's are equal"
            )


def _refuse_unpaired(name: str, uses: Mapping[str, str]) -> None:
    """Megatron splits the first weight of a pair by columns and the second by rows; the output layer by columns."""
    expected = "column"
    for where, use in uses.items():
        if use != expected:
            raise Unsupported(f"axis {name} splits {where} by {use}s where Megatron splits it by {expected}s")
        expected = "row" if use == "column" else "column"


def _data_parallel(plan: Plan, axis: int) -> dict[str, str]:
    """Flags for how much of the state is sharded over a data-parallel axis."""
    split = {
        role: any(
            isinstance(placed[axis], Split)
            for source, placed in zip(plan.graph.inputs, plan.starts, strict=True)
            if source.role == role
        )
        for role in (Role.PARAMETER, Role.STATE)
    }
    if split[Role.PARAMETER]:
        return {"--use-torch-fsdp2": "", "--no-gradient-accumulation-fusion": "", "--ckpt-format": "torch_dist"}
    return {"--use-distributed-optimizer": ""} if split[Role.STATE] else {}


def _splits_sequence(plan: Plan, axis: int) -> bool:
    """Whether norms work on a part of the sequence each."""
    return any(
        node.phase == Phase.FORWARD
        and "norm" in node.module.rpartition(".")[2]
        and any(placed[axis] == Split(1) for placed in how.outputs)
        for node, how in zip(plan.graph.nodes, plan.nodes, strict=True)
    )


def describe(plan: Plan) -> dict[str, Any]:
    """DTensor placements of everything that has some, and why not where not, by name; and Megatron's flags likewise."""
    told: dict[str, Any] = {"dtensor": {}, "refused": {}}
    shapes = {source.name: source.value.shape for source in plan.graph.inputs}
    for name, layout in plan.layouts.items():
        try:
            told["dtensor"][name] = [str(placement) for placement in dtensor_placements(layout, shapes[name])]
        except Unsupported as error:
            told["refused"][name] = str(error)
    try:
        told["megatron"] = list(megatron_flags(plan))
    except Unsupported as error:
        told["refused"]["megatron"] = str(error)
    return told
