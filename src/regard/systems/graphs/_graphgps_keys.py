"""The names in the authors' checkpoints of GraphGPS, and what they are here.

GraphGym saves the model with the prefix "model.". What a node encoder is made of decides its names: `encoder1` is the
encoder of features and `encoder2`, `encoder3` the encodings where there are several, an encoding that brings its own
linear map of the features stands alone. Layers of PyTorch Geometric have their names in its releases 2.2 to 2.8.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from regard.checkpoint import KeyMap

Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]

_LAYER = r"^((?:layers\.\d+\.)?)"
_ENCODING = r"^(node_encoder\.encodings\.\d\.)"

_FEATURES: Rules = [
    (r"^encoder\.node_encoder\.(encoder1\.encoder|encoder|linear_x)\.", "node_encoder.features.encoder."),
    (r"^encoder\.node_encoder\.encoder1\.atom_embedding_list\.", "node_encoder.features.tables."),
    (r"^encoder\.node_encoder\.type_encoder\.", "node_encoder.features.tables.0."),
    (r"^encoder\.node_encoder\.attribute_encoder\.", "node_encoder.features.tables.1."),
    (r"^encoder\.edge_encoder\.bond_embedding_list\.", "edge_encoder.features.tables."),
    (r"^encoder\.edge_encoder\.embedding_type\.", "edge_encoder.features.tables.0."),
    (r"^encoder\.edge_encoder\.embedding_direction\.", "edge_encoder.features.tables.1."),
    (r"^encoder\.edge_encoder\.", "edge_encoder.features."),
    (r"^pre_mp\.Layer_0\.layer\.model\.", "node_encoder.features.encoder."),
    (r"^pre_mp\.Layer_0\.post_layer\.0\.", "node_encoder.norm."),
]
_ENCODINGS: Rules = [
    (r"^encoder\.node_encoder\.encoder(\d)\.", lambda m: f"node_encoder.encodings.{int(m[1]) - 2}."),
    (r"^encoder\.node_encoder\.", "node_encoder.encodings.0."),
    (_ENCODING + r"sign_inv_net\.enc\.layers\.(\d+)\.nn\.", r"\1phi.layers.\2."),
    (_ENCODING + r"sign_inv_net\.enc\.", r"\1phi."),
    (_ENCODING + r"sign_inv_net\.", r"\1"),
    (_ENCODING + r"0\.graph_token$", r"\1token_bias"),
    (_ENCODING + r"1\.graph_token$", r"\1token"),
    (_ENCODING + r"[01]\.((spatial|edge|edge_dis|in_degree|out_degree)_encoder\.)", r"\1\2"),
]
_LOCAL: Rules = [
    (_LAYER + r"local_model\.nn\.0\.", r"\1local.mlp.fc1."),
    (_LAYER + r"local_model\.nn\.2\.", r"\1local.mlp.fc2."),
    (_LAYER + r"local_model\.mlp_r_ij\.0\.", r"\1local.gate.fc1."),
    (_LAYER + r"local_model\.mlp_r_ij\.2\.", r"\1local.gate.fc2."),
    (_LAYER + r"local_model\.bn_node_x\.", r"\1local.norm_nodes."),
    (_LAYER + r"local_model\.bn_edge_e\.", r"\1local.norm_edges."),
    (_LAYER + r"local_model\.mlp\.0\.", r"\1local.fc1."),
    (_LAYER + r"local_model\.mlp\.1\.", r"\1local.norm."),
    (_LAYER + r"local_model\.mlp\.4\.", r"\1local.fc2."),
    (_LAYER + r"local_model\.lin_src\.", r"\1local.lin."),
    (_LAYER + r"local_model\.pre_nns\.0\.0\.", r"\1local.pre."),
    (_LAYER + r"local_model\.post_nns\.0\.0\.", r"\1local.post."),
    (_LAYER + r"local_model\.aggr_module\.", r"\1local."),
    (_LAYER + r"local_model\.", r"\1local."),
]
_ATTENTION: Rules = [
    (_LAYER + r"self_attn\.encoder\.layers\.0\.attention\.self\.query\.", r"\1attention.q."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.attention\.self\.key\.", r"\1attention.k."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.attention\.self\.value\.", r"\1attention.v."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.attention\.output\.dense\.", r"\1attention.proj."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.attention\.output\.LayerNorm\.", r"\1attention.norm1."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.intermediate\.dense\.", r"\1attention.fc1."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.output\.dense\.", r"\1attention.fc2."),
    (_LAYER + r"self_attn\.encoder\.layers\.0\.output\.LayerNorm\.", r"\1attention.norm2."),
    (_LAYER + r"self_attn\.in_proj_", r"\1attention.qkv."),
    (_LAYER + r"self_attn\.(out_proj|to_out)\.", r"\1attention.proj."),
    (_LAYER + r"self_attn\.to_", r"\1attention."),
    (_LAYER + r"self_attn\.fast_attention\.projection_matrix", r"\1attention.projection"),
]
_REST: Rules = [
    (_LAYER + r"norm1_local\.", r"\1norm_local."),
    (_LAYER + r"norm1_attn\.", r"\1norm_attention."),
    (_LAYER + r"norm2\.", r"\1norm."),
    (_LAYER + r"ff_linear(\d)\.", r"\1fc\2."),
    (r"^post_mp\.FC_layers\.2\.", "head.out."),
    (r"^post_mp\.FC_layers\.", "head.hidden."),
    (r"^post_mp\.graph_pred_linear_list\.", "head.outs."),
    (r"^post_mp\.ln\.", "head.norm."),
    (r"^post_mp\.layers\.0\.", "head.out."),
    (r"^post_mp\.layer_post_mp\.model\.0\.Layer_(\d+)\.layer\.model\.", r"head.hidden.\1."),
    (r"^post_mp\.layer_post_mp\.model\.[01]\.model\.", "head.out."),
]

AUTHORS_KEYS = KeyMap(
    rules=[(r"^model\.", ""), *_FEATURES, *_ENCODINGS, *_LOCAL, *_ATTENTION, *_REST],
    # eps is a constant 0, lin_dst is lin_src once more.
    drop=[r"local_model\.eps$", r"sign_inv_net\.enc\.layers\.\d+\.eps$", r"local_model\.lin_dst\."],
)
