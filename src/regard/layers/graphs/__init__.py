"""What models on graphs are made of: message passing, attention over nodes, encodings of nodes and edges."""

from regard.layers.graphs.attention import NodeAttention, PerformerAttention
from regard.layers.graphs.bigbird import BigBirdLayer
from regard.layers.graphs.encodings import (
    DepthEncoding,
    ElectrostaticEncoding,
    Encoding,
    FeatureEncoder,
    HeatKernelEncoding,
    LaplacianEncoding,
    LapPE,
    RandomWalkEncoding,
    StableLapPE,
    needed,
)
from regard.layers.graphs.graphormer import GraphormerEncoding
from regard.layers.graphs.index import GraphIndex, GraphLayerNorm, pool, softmax_at_targets, sum_at_targets
from regard.layers.graphs.message_passing import GAT, GCN, GEN, GIN, GINE, PNA, GatedGCN, MessagePassing
from regard.layers.graphs.signnet import SignNet

__all__ = [
    "GAT",
    "GCN",
    "GEN",
    "GIN",
    "GINE",
    "PNA",
    "BigBirdLayer",
    "DepthEncoding",
    "ElectrostaticEncoding",
    "Encoding",
    "FeatureEncoder",
    "GatedGCN",
    "GraphIndex",
    "GraphLayerNorm",
    "GraphormerEncoding",
    "HeatKernelEncoding",
    "LapPE",
    "LaplacianEncoding",
    "MessagePassing",
    "NodeAttention",
    "PerformerAttention",
    "RandomWalkEncoding",
    "SignNet",
    "StableLapPE",
    "needed",
    "pool",
    "softmax_at_targets",
    "sum_at_targets",
]
