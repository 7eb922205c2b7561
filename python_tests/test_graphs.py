"""Graphs as PyTorch Geometric's users write them: a graph is one sample, its nodes are rows, copies are disjoint."""

from types import SimpleNamespace

import pytest
import small_models
import torch
import torch.nn.functional as F
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.nn import graphs
from ulr_kernels.nn.interceptor import LayerInterceptor

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

NODES = 12


def ring(nodes):
    ends = torch.arange(nodes), (torch.arange(nodes) + 1) % nodes
    return torch.stack([torch.cat(ends), torch.cat(ends[::-1])])


def graph(kind=SimpleNamespace):
    numbers = torch.arange(NODES)
    features = torch.sin(torch.arange(4.0 * NODES)).view(NODES, 4)
    return kind(x=features, edge_index=ring(NODES), y=numbers % 3, train_mask=numbers % 3 == 0)


class Sum(nn.Module):
    """A linear layer and the mean over neighbours, as a library of graphs computes it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x, edge_index):
        x = self.lin(x)
        index = edge_index[1].view(-1, 1).expand_as(x[edge_index[0]])
        return x + x.new_zeros(x.size(0), x.size(1)).scatter_add_(0, index, x[edge_index[0]]) / 2


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = layer(4, 6), layer(6, 3)

    def forward(self, x, edge_index):
        return self.conv2(torch.tanh(self.conv1(x, edge_index)), edge_index)


class OfData(Net):
    def forward(self, data):
        return super().forward(data.x, data.edge_index)


def of_nodes(outputs, data):
    return F.cross_entropy(outputs[data.train_mask], data.y[data.train_mask], reduction="none")


def compare(model, x, loss_fn, affects=None, y=None, true=None, steps=8, **settings):
    """Raise unless the estimates are autograd's gradient but for noise; returns the plan."""
    model.zero_grad()
    true().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    estimator = ulr.ULR(model, sigma=0.02, copies=256, seed=1, **settings)
    for _ in range(steps):
        estimator.backward(x, y, loss_fn, affects)
    found = torch.cat([p.grad.flatten() for p in model.parameters()]) / steps
    assert F.cosine_similarity(found, expected, 0) > 0.985
    assert abs(found @ expected / expected.square().sum() - 1) < 0.1
    return next(iter(estimator._plans.values()))


HOPS = {"conv1.lin": 2, "conv2.lin": 1}


@pytest.mark.parametrize("model", [Net, OfData])
def test_any_object_with_edges_is_a_graph(model):
    net, data = model(Sum), graph()
    affects = graphs.affects(data, HOPS, losses=data.train_mask, nodes=NODES)
    call = (lambda: net(data)) if model is OfData else (lambda: net(data.x, data.edge_index))
    plan = compare(net, data, of_nodes, affects, true=lambda: of_nodes(call(), data))
    assert all(pass_.expand_late for pass_ in plan.passes)


def test_arguments_by_place_and_by_name_are_the_same_graph():
    net, data = Net(Sum), graph()
    affects = graphs.affects(data.edge_index, HOPS, losses=data.train_mask, nodes=NODES)

    def loss(outputs, targets):
        labels, mask = targets
        return F.cross_entropy(outputs[mask], labels[mask], reduction="none")

    found = []
    for x in ((data.x, data.edge_index), {"x": data.x, "edge_index": data.edge_index}):
        net.zero_grad()
        ulr.ULR(net, copies=4).backward(x, (data.y, data.train_mask), loss, affects)
        found.append(net.conv1.lin.weight.grad.clone())
    assert torch.equal(*found)


def test_losses_of_nodes_need_affects():
    with pytest.raises(ValueError, match="nn.graphs.affects"):
        ulr.ULR(OfData(Sum)).backward(graph(), loss_fn=of_nodes)


def test_a_missing_neighbour_is_found():
    data = graph()
    affects = graphs.affects(data, {"conv1.lin": 1, "conv2.lin": 1}, losses=data.train_mask)
    with pytest.raises(ValueError, match="'affects' must not be 0"):
        ulr.ULR(OfData(Sum)).backward(data, loss_fn=of_nodes, affects=affects)


def test_affects_is_sparse_and_counts_edges():
    found = graphs.affects(ring(NODES), {"a": 2, "b": 0}, nodes=NODES)
    assert found["a"].layout == torch.sparse_csr
    assert torch.equal(found["b"].to_dense(), torch.eye(NODES))
    assert found["a"].to_dense()[0].nonzero().flatten().tolist() == [0, 1, 2, 10, 11]


def test_a_constant_that_takes_the_shape_of_samples_stays_a_constant():
    x, index = torch.ones(6, 4), torch.tensor([[2, 0, 3, 1]])
    with LayerInterceptor({}, [], x) as mode:
        index.expand_as(x)
        x.view_as(index.expand(6, 4))
    assert mode.marks(x)
    assert not mode.marks(index)


# --- torch_geometric -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv"])
def test_networks_of_pytorch_geometric(name):
    layers, data = pytest.importorskip("torch_geometric.nn"), pytest.importorskip("torch_geometric.data")
    net, whole = Net(getattr(layers, name)), graph(data.Data)
    affects = graphs.affects(whole, net, losses=whole.train_mask)
    plan = compare(
        net, whole, of_nodes, affects, true=lambda: of_nodes(net(whole.x, whole.edge_index), whole), steps=16
    )
    assert all(pass_.expand_late for pass_ in plan.passes)


@pytest.mark.filterwarnings("ignore")
def test_graphs_with_a_label_each():
    layers, data = pytest.importorskip("torch_geometric.nn"), pytest.importorskip("torch_geometric.data")

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.lin = layers.SAGEConv(4, 8), nn.Linear(8, 2)

        def forward(self, batch):
            x = torch.tanh(self.conv(batch.x, batch.edge_index))
            return self.lin(layers.global_mean_pool(x, batch.batch))

    sizes = [3, 5, 4, 8, 6]
    each = [
        data.Data(x=torch.sin(torch.arange(4.0 * n) + n).view(n, 4), edge_index=ring(n), y=torch.tensor([n % 2]))
        for n in sizes
    ]
    batch, model = data.Batch.from_data_list(each), Pooled()

    def loss(outputs, batch):
        return F.cross_entropy(outputs, batch.y, reduction="none")

    compare(model, batch, loss, true=lambda: loss(model(batch), batch), steps=16)
