"""Graphs as one sample, in the form of PyTorch Geometric: tensors by name, whose edges count the nodes of all graphs.

A batch of graphs is one graph of several parts, and so are its copies: node n of copy c is node `c * nodes + n`, as in
a `torch_geometric.data.Batch`. Names say how tensors follow one another (`Data.__cat_dim__`, `Data.__inc__`). Nothing
here needs that package: any object with the attribute `edge_index` will do.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ulr_kernels.errors import fail
from ulr_kernels.nn.affects import AffectedLosses, NoiseRows
from ulr_kernels.nn.batch import Batch, LossFunction, ModelInput, repeat
from ulr_kernels.nn.call import Call
from ulr_kernels.nn.eval_mode import eval_mode
from ulr_kernels.nn.interceptor import LayerInterceptor
from ulr_kernels.nn.marks import EDGES, GRAPHS, NODES
from ulr_kernels.nn.module_state import ModuleState
from ulr_kernels.nn.names import layer_names, unwrap

COUNTS = ("num_nodes", "num_graphs", "batch_size")  # names of numbers that grow with the copies


class Graphs:
    """The values of one or more graphs, by name.

    Args:
        values: tensors, numbers and lists; those that are None are left out.
        data: the object that has them as attributes, if there is one.

    Attributes:
        nodes, count: the numbers of nodes and of graphs.
        graph_of: int64 `[nodes]`, the graph of each node.
        edge_index: int64 `[2, edges]`, sources and targets, or None.

    Raises:
        RuleError: a value is sparse, or nothing tells the number of nodes.
    """

    def __init__(self, values: Mapping[str, Any], data: Any = None) -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.data = data
        for name, value in self.values.items():
            if hasattr(value, "sparse_sizes") or (isinstance(value, Tensor) and value.layout != torch.strided):
                rule = "hold graphs with an 'edge_index', int64 [2, edges] (without the transform ToSparseTensor)"
                fail("x", rule, f"{name}, a {type(value).__name__}")
        self.edge_index = self.values.get("edge_index")
        self.nodes = self._number_of_nodes()
        batch = self.values.get("batch")
        self.count: int = 1
        if batch is not None:
            known = getattr(data, "num_graphs", None)
            self.count = int(batch.max()) + 1 if known is None else known
        like = self.edge_index if batch is None else batch
        self.graph_of = batch if batch is not None else like.new_zeros(self.nodes)  # type: ignore[union-attr]

    def _number_of_nodes(self) -> int:
        if (nodes := getattr(self.data, "num_nodes", None)) is not None:
            return nodes
        first = next((v for v in self.values.values() if isinstance(v, Tensor) and v.is_floating_point()), None)
        if first is None:
            fail("x", "hold the features of the nodes, or 'num_nodes'", ", ".join(self.values))
        return first.shape[0]

    @property
    def signature(self) -> tuple:
        """Everything that a model can decide by before it reads values of tensors."""

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.shape, value.dtype, value.device
            return value if isinstance(value, bool | int | float | str) else type(value)

        return self.count, *((name, of(value)) for name, value in self.values.items())

    def copies(self, name: str, copies: int) -> Any:
        """A value of copies of the graphs, one after the other. Tensors are new memory."""
        if name == "batch":
            return _one_after_another(self.graph_of, 0, self.count, copies)
        value = self.values[name]
        if name == "ptr":
            starts = _one_after_another(value[:-1], 0, self.nodes, copies)
            return torch.cat([starts, starts.new_full((1,), copies * self.nodes)])
        if name in COUNTS:
            return value * copies
        if isinstance(value, Tensor):
            return self._copies_of_tensor(name, value if value.dim() else value[None], copies)
        if isinstance(value, list | tuple) and len(value) == self.count:
            return value * copies
        if self.data is not None and isinstance(value, int | float) and not isinstance(value, bool):
            return torch.tensor([value] * copies, device=self.graph_of.device)  # as a batch has it
        return value

    def _copies_of_tensor(self, name: str, value: Tensor, copies: int) -> Tensor:
        counts_nodes = "index" in name or name == "face"
        axis, step = (-1, self.nodes) if counts_nodes else (0, 0)
        if hasattr(self.data, "__cat_dim__"):
            axis, step = self.data.__cat_dim__(name, value), self.data.__inc__(name, value)
        if axis is None:  # stacked on a new axis, which a batch of graphs has already
            axis, value = 0, value if "batch" in self.values else value[None]
        return _one_after_another(value, axis, step, copies)

    def marks(self, name: str) -> int:
        """The marks of a value that tells how nodes belong together; 0 for features."""
        if name == "batch":
            return GRAPHS
        if "index" in name or name in ("face", "ptr"):
            return NODES
        return EDGES if name.startswith("edge") else 0


class GraphInput(ModelInput):
    """The arguments of a model for copies of graphs.

    Args:
        graphs: the graphs.
        values: of all copies, by name.
        copies: their number.
    """

    def __init__(self, graphs: Graphs, values: Mapping[str, Any], copies: int) -> None:
        self._graphs, self._values, self._copies = graphs, values, copies
        self._names = {id(value): name for name, value in values.items() if isinstance(value, Tensor)}
        self.tensors = [value for value in values.values() if isinstance(value, Tensor)]

    def call(self, model: nn.Module) -> Any:
        """The output of a model that takes `x`, `edge_index` and so on, or else an object with these attributes."""
        values, graphs = self._values, self._graphs
        parameters = inspect.signature(model.forward).parameters
        if graphs.data is None or "edge_index" in parameters:
            if "edge_index" not in parameters:  # *args
                return model(*(values[name] for name in graphs.values))
            return model(**{name: values[name] for name in values if name in parameters})
        data = copy.copy(graphs.data)
        for name, value in values.items():
            setattr(data, name, value)
        if hasattr(data, "_num_graphs"):
            data._num_graphs = self._copies * graphs.count
        return model(data)

    @property
    def structure(self) -> Iterator[tuple[Tensor, int]]:
        """The tensors that tell how nodes belong together, with their marks."""
        for tensor in self.tensors:
            if marks := self._graphs.marks(self._names[id(tensor)]):
                yield tensor, marks

    def expanded(self, tensor: Tensor, marks: int, copies: int) -> Tensor:
        """Copies, one after the other, of a tensor of one copy: of an argument, or of what was computed from some.

        `marks`: of the tensor; integers that were computed from numbers of nodes (or graphs) are such themselves.
        """
        name, graphs = self._names.get(id(tensor)), self._graphs
        if name is not None:
            return graphs.copies(name, copies)
        step, axis = 0, 0
        if not tensor.is_floating_point() and tensor.dtype != torch.bool:
            step = graphs.nodes if marks & NODES else graphs.count if marks & GRAPHS else 0
            axis = -1 if tensor.dim() == 2 and tensor.shape[0] == 2 else 0
        return _one_after_another(tensor, axis, step, copies) if tensor.dim() else tensor


def _one_after_another(value: Tensor, axis: int, step: int | Tensor, copies: int) -> Tensor:
    """Copies of a tensor along an axis, copy c plus c * step."""
    axis %= value.dim()
    stacked = value.unsqueeze(axis).expand(*value.shape[:axis], copies, *value.shape[axis:])
    if isinstance(step, Tensor) or step:
        number = torch.arange(copies, device=value.device).view(copies, *(1 for _ in value.shape[axis:]))
        stacked = stacked + number * (step.unsqueeze(axis) if isinstance(step, Tensor) else step)
    return stacked.clone(memory_format=torch.contiguous_format).flatten(axis, axis + 1)


def read_graphs(model: nn.Module, x: Any) -> Graphs | None:
    """The graphs that an input holds; None for any other input.

    They are an object with an attribute `edge_index`; or a tuple or mapping of the arguments of a model whose forward
    names one so.
    """
    if isinstance(x, Tensor):
        return None
    if isinstance(x, tuple | list):
        parameters = inspect.signature(model.forward).parameters.values()
        names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        if not names:  # *args
            names = ["x", "edge_index", "edge_weight"]
        x = dict(zip(names, x, strict=False)) if len(x) <= len(names) else {}
    if isinstance(x, Mapping):
        return Graphs(x) if _is_edge_index(x.get("edge_index")) else None
    return _of_object(x)


def _of_object(x: Any) -> Graphs | None:
    """The graphs of an object with an attribute `edge_index`; None for any other."""
    if not hasattr(x, "edge_index"):
        return None
    return Graphs(x.to_dict() if hasattr(x, "to_dict") else vars(x), x)


def _is_edge_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2 and value.shape[0] == 2


class GraphTargets:
    """The attributes of copies of graphs, for a loss. Each is made when it is first read."""

    def __init__(self, graphs: Graphs, copies: int) -> None:
        self._graphs, self._copies = graphs, copies

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (name != "batch" and name not in self._graphs.values):
            raise AttributeError(f"the graphs have no {name!r}, only {', '.join(self._graphs.values)}")
        value = self._graphs.copies(name, self._copies)
        setattr(self, name, value)
        return value

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    @property
    def num_graphs(self) -> int:
        return self._copies * self._graphs.count


class GraphBatch(Batch):
    """One or more graphs as one sample with many losses.

    Args:
        graphs: the input.
        y: targets, whose first axis is that of the losses or the nodes; None: the loss gets the graphs of all copies.
        affects: the losses that each row's noise can change; None: each graph has one loss, which its rows affect.
    """

    one_row_is_like_many = True

    def __init__(self, graphs: Graphs, y: Any, affects: AffectedLosses | None) -> None:
        self.owner, self.x, self.y, self.samples = "ulr.ULR", graphs, y, 1
        self.first, self.share = 0, 1.0
        self.affects: AffectedLosses = LossOfEachGraph(graphs) if affects is None else affects
        self._of_nodes = affects is not None
        self._one_copy: dict[str, tuple[Any, int]] = {}  # a value, and its version if it is a tensor

    @property
    def signature(self) -> tuple:
        return self.x.signature, super().signature[1:]

    def inputs(self, copies: int) -> GraphInput:
        graphs, copies = self.x, copies * self.samples
        names = dict.fromkeys([*graphs.values, "batch"])
        if copies > 1:
            return GraphInput(graphs, {name: graphs.copies(name, copies) for name in names}, copies)
        for name in names:  # made once for all forwards that do not write into it
            value, version = self._one_copy.get(name, (None, -1))
            if value is None or (isinstance(value, Tensor) and value._version != version):
                value = graphs.copies(name, 1)
                self._one_copy[name] = value, getattr(value, "_version", 0)
        return GraphInput(graphs, {name: self._one_copy[name][0] for name in names}, copies)

    def part(self, rows: slice | Tensor, first: int) -> Batch:
        part = copy.copy(self)
        part.samples = len(range(self.samples)[rows]) if isinstance(rows, slice) else len(rows)
        return part.located(self.first + first, self.share)

    def losses(self, outputs: Any, loss_fn: LossFunction, copies: int) -> Tensor:
        rows = copies * self.samples
        targets = repeat(self.y, rows) if self.y is not None or self.x.data is None else GraphTargets(self.x, rows)
        losses = self._call(loss_fn, outputs, targets)
        of_one = self.affects.losses
        if not isinstance(losses, Tensor) or list(losses.shape) not in ([rows * of_one], [rows, of_one]):
            rule = f"return {of_one} losses for each of {rows} copies, [{rows * of_one}] here, as 'affects' says"
            if not self._of_nodes:
                rule = (
                    f"return a loss for each of {self.x.count} graphs and {rows} copies, [{rows * self.x.count}] here "
                    "(reduction='none'; for losses of nodes give affects=ulr_kernels.nn.graphs.affects(...))"
                )
            self._fail("loss_fn", rule, list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__)
        return losses.to(torch.float32).reshape(copies, self.samples, of_one)


class LossOfEachGraph(AffectedLosses):
    """The matrices of a batch in which each graph has one loss. They follow from the numbers of rows: those of nodes,
    of edges, of edges and loops, or of graphs. Any other rows affect all losses."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._by_rows: dict[tuple[int, ...], Tensor] = {}
        self.losses = graphs.count

    def part(self, samples: slice | Tensor) -> AffectedLosses:
        return self

    @property
    def signature(self) -> tuple:
        return ("graphs",)

    @property
    def device(self) -> torch.device:
        return self._graphs.graph_of.device

    def check(self, rows: NoiseRows) -> None:
        """No matrix is given, so none can be wrong."""

    def matrix(self, layer: str, rows: Sequence[int]) -> Tensor | None:
        if self.losses == 1:
            return None
        key = tuple(rows)
        if key not in self._by_rows:
            graphs = self._graphs
            of_rows = nodes_of_rows(graphs.nodes, graphs.edge_index)
            every = torch.arange(self.losses, device=self.device)
            pairs, start = [], 0
            for count in rows:
                found = [graphs.graph_of[nodes] for nodes in of_rows.get(count, ())]
                found += [every] if count == self.losses else []
                places = torch.arange(start, start + count, device=self.device)
                pairs += [torch.stack([places, losses]) for losses in found] or [torch.cartesian_prod(places, every).T]
                start += count
            self._by_rows[key] = _ones_at(torch.cat(pairs, 1), start, self.losses)
        return self._by_rows[key]


def nodes_of_rows(nodes: int, edge_index: Tensor | None) -> dict[int, list[Tensor]]:
    """Number of rows -> the node of each row, for rows of nodes, of edges (their targets), and of edges and loops.

    A number may have several, where it can be read in more than one way.
    """
    if edge_index is None:
        return {nodes: [torch.arange(nodes)]}
    every, (sources, targets) = torch.arange(nodes, device=edge_index.device), edge_index
    looped = torch.cat([targets[sources != targets], every])
    found: dict[int, list[Tensor]] = {}
    for of_rows in (every, targets, looped):
        found.setdefault(len(of_rows), []).append(of_rows)
    return found


def _ones_at(places: Tensor, rows: int, columns: int) -> Tensor:
    """A sparse matrix, fp32 `[rows, columns]`, with 1 at places, int64 `[2, any]`, which may repeat."""
    ones = torch.ones(places.shape[1], device=places.device)
    indices = torch.sparse_coo_tensor(places, ones, (rows, columns)).coalesce().indices()
    ones = torch.ones(indices.shape[1], device=places.device)
    return torch.sparse_coo_tensor(indices, ones, (rows, columns), is_coalesced=True).to_sparse_csr()


# --- losses of nodes -------------------------------------------------------------------------------------------------

OWNER = "ulr.nn.graphs"


@torch.no_grad()
def affects(
    graph: Any, layers: nn.Module | Mapping[str, int], losses: Tensor | None = None, nodes: int | None = None
) -> dict[str, Tensor]:
    """The losses of nodes that the noise of each row can change, for `ulr.ULR.backward`.

    The noise of a node reaches the nodes to which edges lead, by as many edges as there are sums over neighbours after
    the layer. PyTorch Geometric's `GCNConv` has its linear layer before the sum, and its bias after it.

    Args:
        graph: the input of `ulr.ULR.backward`; with a mapping as `layers` an object with `edge_index`, or the
            `edge_index` itself, int64 `[2, edges]`, sources and targets.
        layers: the model, which is run once without noise; or a mapping from names of layers to the number of sums over
            neighbours after them, as `hops` gives it.
        losses: the nodes that have losses, in their order: bool `[nodes]` or int64 `[losses]`; None: all nodes.
        nodes: their number, needed where `graph` is an `edge_index`.

    Returns:
        layer -> sparse fp32 `[rows, losses]`, with 1 where noise of the row can change the loss. A layer whose rows are
        neither nodes nor edges is left out, and so affects all losses.

    Raises:
        RuleError: an argument breaks these rules, or the model is none for `hops`.
    """
    rows: Mapping[str, Sequence[int]] = {}
    edge_index = graph
    if not isinstance(graph, Tensor):
        graphs = read_graphs(layers, graph) if isinstance(layers, nn.Module) else _of_object(graph)
        if graphs is None:
            fail("graph", "hold an 'edge_index'", type(graph).__name__, f"{OWNER}.affects")
        edge_index, nodes = graphs.edge_index, graphs.nodes
    if isinstance(layers, nn.Module):
        layers, rows = _watch(layers, graph)
    if not _is_edge_index(edge_index) or nodes is None:
        rule = "hold an 'edge_index', int64 [2, edges], and with an edge_index alone 'nodes' be their number"
        fail("graph", rule, f"{type(graph).__name__} and {nodes}", f"{OWNER}.affects")
    every = torch.arange(nodes, device=edge_index.device)
    own = every if losses is None else every[losses.to(every.device)]
    step = _ones_at(torch.cat([edge_index, every.expand(2, -1)], 1), nodes, nodes).to_sparse_coo()
    places = torch.stack([own, torch.arange(len(own), device=own.device)])
    reaches = [places]  # by the number of sums: nodes and the losses that they reach
    for _ in range(max(layers.values(), default=0)):
        reach = _ones_at(reaches[-1], nodes, len(own)).to_sparse_coo()
        reaches.append((step @ reach).coalesce().indices())
    of_rows = nodes_of_rows(nodes, edge_index)
    found, made = {}, {}
    for layer, count in layers.items():
        key = count, tuple(rows.get(layer, [nodes]))
        if all(each in of_rows for each in key[1]):
            if key not in made:  # layers share it
                reach = _ones_at(reaches[count], nodes, len(own)).to_sparse_coo()
                parts, start = [], 0
                for each in key[1]:
                    parts += [reach.index_select(0, which).coalesce().indices() for which in of_rows[each]]
                    for part in parts[-len(of_rows[each]) :]:
                        part[0] += start
                    start += each
                made[key] = _ones_at(torch.cat(parts, 1), start, len(own))
            found[layer] = made[key]
    return found


def hops(model: nn.Module, graph: Any) -> dict[str, int]:
    """The number of sums over neighbours after each trained layer of a model of PyTorch Geometric's layers.

    The model is run once without noise. All of its sums over neighbours must be those of `MessagePassing` modules,
    whose calls are counted. A layer that is called several times has the number of its first call.

    Args:
        model: the network.
        graph: the input of `ulr.ULR.backward`.

    Returns:
        layer -> number, for `affects`.

    Raises:
        RuleError: there is no such module, or its messages flow from targets to sources.
    """
    return dict(_watch(model, graph)[0])


@torch.no_grad()
def _watch(model: nn.Module, graph: Any) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Of each trained layer the number of sums over neighbours after its first call, and the rows of all its calls."""
    model = unwrap(model)
    sums = [module for module in model.modules() if hasattr(module, "register_propagate_forward_pre_hook")]
    if not sums:
        rule = "have MessagePassing modules of torch_geometric (for any other give a mapping from layers to numbers)"
        fail("model", rule, type(model).__name__, f"{OWNER}.hops")
    if any(getattr(module, "flow", None) != "source_to_target" for module in sums):
        rule = "have messages from sources to targets (for others give a mapping, and edge_index.flip(0))"
        fail("model", rule, "flow='target_to_source'", f"{OWNER}.hops")
    graphs = read_graphs(model, graph)
    if graphs is None:
        fail("graph", "hold an 'edge_index'", type(graph).__name__, f"{OWNER}.hops")
    inputs = GraphBatch(graphs, None, None).inputs(1)
    watcher = _Watcher(layer_names(model), list(model.parameters()), inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for module in sums:
            handle = module.register_propagate_forward_pre_hook(watcher.on_sum)  # type: ignore[operator]
            stack.callback(handle.remove)
        state = ModuleState(model)
        stack.callback(state.restore)
        watcher.run(model, inputs, state)
    return {name: watcher.sums - before for name, before in watcher.before.items()}, watcher.rows


class _Watcher(LayerInterceptor):
    """A forward without noise that counts the sums over neighbours.

    Attributes:
        sums: their number so far.
        before: layer -> the number before its first call.
        rows: layer -> the rows of the outputs of its calls.
    """

    def __init__(self, layers: Mapping[int, str], parameters: list[nn.Parameter], inputs: GraphInput) -> None:
        super().__init__(layers, parameters, inputs)
        self.sums = 0
        self.before: dict[str, int] = {}
        self.rows: dict[str, list[int]] = {}

    def on_sum(self, *_: Any) -> None:
        self.sums += 1

    def on_layer_call(self, call: Call) -> tuple[Tensor, int]:
        with torch.no_grad():
            output = call.clean()
        layer = self.trained_layer(call)
        if layer is not None:
            columns = output.shape[call.feature_dim] if output.dim() > 1 else 1
            self.before.setdefault(layer, self.sums)
            self.rows.setdefault(layer, []).append(output.numel() // max(1, columns))
        return output, 0
