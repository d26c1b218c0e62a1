"""The published configurations of GraphGPS, `configs/GPS/*.yaml` of the authors' repository.

Atoms and bonds have the numbers of types that OGB had at the time; later releases have one more. Not here, for they need
what the paper's recipe does not describe: SignNet encodings, the Graphormer hybrids, pairs of nodes (PCQM-Contact) and
sequences (ogbg-code2) as answers.
"""

from __future__ import annotations

from typing import Any

_ATOMS = {"node_types": (119, 4, 12, 12, 10, 6, 6, 2, 2), "edge_types": (5, 6, 2)}
_ZINC = {"local": "gine", "node_types": 28, "edge_types": 4, "rwse_steps": 20, "pooling": "add"}
_PIXELS = {"dim": 52, "depth": 3, "edge_chans": 1, "head": "mlp", "num_classes": 10}
_BLOCKS = {"edge_types": 1, "head": "mlp", "pooling": None}
_MALNET = {
    "attention": "performer",
    "depth": 5,
    "in_chans": 5,
    "edge_types": 1,
    "head": "mlp",
    "pooling": "max",
    "num_classes": 5,
}
_HIV = {**_ATOMS, "depth": 10, "dropout": 0.05}
_PCBA = {
    **_ATOMS,
    "dim": 384,
    "depth": 5,
    "dropout": 0.2,
    "head": "mlp",
    "head_layers": 1,
    "num_classes": 128,
}
_PCQM = {**_ATOMS, "dim": 304, "depth": 5}
_PEPTIDES = {**_ATOMS, "dim": 96, "depth": 4, "lap_dim": 16, "head": "mlp", "head_layers": 1}
_VOC = {"dim": 96, "depth": 4, "num_heads": 8, "in_chans": 14, "edge_chans": 2, "lap_dim": 16, "head": "mlp"}
_WEB = {
    "local": "gcn",
    "depth": 2,
    "norm": None,
    "act": "gelu",
    "dropout": 0.2,
    "attn_dropout": 0.0,
    "lap_dim": 4,
    "head": "mlp",
    "head_layers": 1,
    "pooling": None,
    "num_classes": 5,
}
_CLUSTER = {**_BLOCKS, "dim": 48, "depth": 16, "num_heads": 8, "in_chans": 7, "num_classes": 6}

# name, authors' config, parameters, options
TABLE: tuple[tuple[str, str, int | None, dict[str, Any]], ...] = (
    ("zinc_rwse", "zinc-GPS+RWSE", 423_717, {**_ZINC, "rwse_dim": 28}),
    ("zinc_lappe", "zinc-GPS", 423_833, {**_ZINC, "lap_dim": 8}),
    ("zinc_lappe_rwse", "zinc-GPS-LapPE+RWSE", 423_693, {**_ZINC, "lap_dim": 4, "rwse_dim": 24}),
    ("zinc_eslappe", "zinc-GPS-ESLapPE", None, {**_ZINC, "stable_freqs": 8}),
    ("cifar10_lappe", "cifar10-GPS", 112_726, {**_PIXELS, "in_chans": 5, "lap_dim": 8, "head_layers": 2}),
    ("cifar10_rwse", "cifar10-GPS+RWSE", 112_798, {**_PIXELS, "in_chans": 5, "rwse_dim": 16, "head_layers": 2}),
    (
        "cifar10_eslappe",
        "cifar10-GPS-ESLapPE",
        113_529,
        {**_PIXELS, "in_chans": 5, "stable_freqs": 8, "head_layers": 2},
    ),
    ("mnist_lappe", "mnist-GPS", 115_394, {**_PIXELS, "in_chans": 3, "lap_dim": 8}),
    ("mnist_eslappe", "mnist-GPS-ESLapPE", 116_181, {**_PIXELS, "in_chans": 3, "stable_freqs": 8}),
    ("pattern_lappe", "pattern-GPS", 337_201, {**_BLOCKS, "depth": 6, "in_chans": 3, "lap_dim": 16}),
    ("pattern_eslappe", "pattern-GPS-ESLapPE", 338_503, {**_BLOCKS, "depth": 6, "in_chans": 3, "stable_freqs": 10}),
    ("cluster_lappe", "cluster-GPS", 502_054, {**_CLUSTER, "lap_dim": 16, "dropout": 0.1}),
    ("cluster_eslappe", "cluster-GPS-ESLapPE", 504_406, {**_CLUSTER, "stable_freqs": 10, "dropout": 0.01}),
    ("malnet_lappe", "malnettiny-GPS", 527_701, {**_MALNET, "lap_dim": 16}),
    ("malnet_rwse", "malnettiny-GPS+RWSE", 527_425, {**_MALNET, "rwse_dim": 20}),
    ("malnet_eslappe", "malnettiny-GPS-ESLapPE", 528_842, {**_MALNET, "stable_freqs": 10}),
    ("malnet_nope", "malnettiny-GPS-noPE", 527_237, {**_MALNET, "pre_layer": True}),
    ("molhiv_rwse", "ogbg-molhiv-GPS+RWSE", 558_625, {**_HIV, "rwse_dim": 16}),
    ("molhiv_lappe", "ogbg-molhiv-GPS", 559_889, {**_HIV, "lap_dim": 8}),
    ("molhiv_eslappe", "ogbg-molhiv-GPS-ESLapPE", 563_595, {**_HIV, "stable_freqs": 8}),
    (
        "molhiv_rwse_dev",
        "ogbg-molhiv-GPS+RWSEdev",
        148_953,
        {**_HIV, "dim": 72, "depth": 2, "rwse_dim": 16, "dropout": 0.3, "head": "mlp", "head_layers": 1},
    ),
    ("molpcba_rwse", "ogbg-molpcba-GPS+RWSE", 9_744_496, {**_PCBA, "rwse_dim": 20}),
    ("molpcba_lappe", "ogbg-molpcba-GPS", 9_745_440, {**_PCBA, "lap_dim": 16}),
    ("molpcba_lappe_rwse", "ogbg-molpcba-GPS-LapPE+RWSE", 9_743_864, {**_PCBA, "lap_dim": 4, "rwse_dim": 20}),
    (
        "ppa",
        "ogbg-ppa-GPS",
        3_434_533,
        {
            "attention": "performer",
            "dim": 256,
            "depth": 3,
            "num_heads": 8,
            "node_types": 1,
            "edge_chans": 7,
            "dropout": 0.1,
            "head": "mlp",
            "head_layers": 2,
            "num_classes": 37,
        },
    ),
    ("pcqm4m_small_rwse", "pcqm4m-GPS+RWSE", 6_152_001, {**_PCQM, "rwse_dim": 20}),
    ("pcqm4m_small_lappe", "pcqm4m-GPS", 6_153_889, {**_PCQM, "lap_dim": 8}),
    ("pcqm4m_small_eslappe", "pcqm4m-GPS-ESLapPE", 6_162_390, {**_PCQM, "stable_freqs": 8}),
    (
        "pcqm4m_medium_rwse",
        "pcqm4m-GPSmedium+RWSE",
        19_414_641,
        {**_PCQM, "dim": 384, "depth": 10, "num_heads": 16, "rwse_dim": 20, "dropout": 0.1, "attn_dropout": 0.1},
    ),
    (
        "pcqm4m_deep_rwse",
        "pcqm4m-GPSdeep+RWSE",
        13_807_345,
        {
            **_PCQM,
            "dim": 256,
            "depth": 16,
            "num_heads": 8,
            "rwse_dim": 20,
            "dropout": 0.1,
            "attn_dropout": 0.1,
            "act": "gelu",
        },
    ),
    ("peptides_func", "peptides-func-GPS", 504_362, {**_PEPTIDES, "num_classes": 10}),
    ("peptides_struct", "peptides-struct-GPS", 504_459, {**_PEPTIDES, "num_classes": 11}),
    ("vocsuperpixels", "vocsuperpixels-GPS", 510_453, {**_VOC, "pooling": None, "num_classes": 21}),
    ("cocosuperpixels", "cocosuperpixels-GPS", 516_273, {**_VOC, "pooling": None, "num_classes": 81}),
    ("actor", "actor-GPS", 131_117, {**_WEB, "in_chans": 932}),
    ("webkb", "webkb-cor-GPS (-tex and -wis are equal)", 177_377, {**_WEB, "in_chans": 1703}),
    (
        "chameleon",
        "wn-chameleon-GPS",
        465_673,
        {**_WEB, "in_chans": 2325, "dim": 96, "depth": 3, "attn_dropout": 0.5},
    ),
    ("squirrel", "wn-squirrel-GPS", 200_537, {**_WEB, "in_chans": 2089, "attn_dropout": 0.5}),
)
