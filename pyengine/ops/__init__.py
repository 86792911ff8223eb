"""The engine's ops: each a public function and its reference in plain MLX.

Generated from the files beside this one by `python .ci/ops_page.py`.
"""

from .accept_block import accept_block, accept_block_reference
from .block_attention import block_attention, block_attention_reference
from .copy_pages import copy_pages, copy_pages_reference
from .dense_matmul import dense_matmul, dense_matmul_reference
from .dispatch import status, use
from .draw_token import draw_token, draw_token_reference
from .embed import embed, embed_reference
from .filter_logits import filter_logits, filter_logits_reference
from .glu import glu, glu_reference
from .move_rows import move_rows, move_rows_reference
from .norm_rope import norm_rope, norm_rope_reference
from .prepare_qkv import prepare_qkv, prepare_qkv_reference
from .quantized_expert_matmul import quantized_expert_matmul, quantized_expert_matmul_reference
from .quantized_filter_logits import quantized_filter_logits, quantized_filter_logits_reference
from .quantized_gated_matmul import quantized_gated_matmul, quantized_gated_matmul_reference
from .quantized_matmul import quantized_matmul, quantized_matmul_reference
from .quantized_matmuls import quantized_matmuls, quantized_matmuls_reference
from .random_uniform import random_uniform, random_uniform_reference
from .residual_norm import residual_norm, residual_norm_reference
from .rms_norm import rms_norm, rms_norm_reference
from .route_experts import route_experts, route_experts_reference
from .softcap import softcap, softcap_reference
from .weigh_experts import weigh_experts, weigh_experts_reference

__all__ = [
    "accept_block",
    "accept_block_reference",
    "block_attention",
    "block_attention_reference",
    "copy_pages",
    "copy_pages_reference",
    "dense_matmul",
    "dense_matmul_reference",
    "draw_token",
    "draw_token_reference",
    "embed",
    "embed_reference",
    "filter_logits",
    "filter_logits_reference",
    "glu",
    "glu_reference",
    "move_rows",
    "move_rows_reference",
    "norm_rope",
    "norm_rope_reference",
    "prepare_qkv",
    "prepare_qkv_reference",
    "quantized_expert_matmul",
    "quantized_expert_matmul_reference",
    "quantized_filter_logits",
    "quantized_filter_logits_reference",
    "quantized_gated_matmul",
    "quantized_gated_matmul_reference",
    "quantized_matmul",
    "quantized_matmul_reference",
    "quantized_matmuls",
    "quantized_matmuls_reference",
    "random_uniform",
    "random_uniform_reference",
    "residual_norm",
    "residual_norm_reference",
    "rms_norm",
    "rms_norm_reference",
    "route_experts",
    "route_experts_reference",
    "softcap",
    "softcap_reference",
    "status",
    "use",
    "weigh_experts",
    "weigh_experts_reference",
]
