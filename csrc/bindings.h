#pragma once
// bindings.h: each op binds itself, at the end of its own .cpp.

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace pyengine {

void bind_launch(nb::module_& m);
void bind_dense_matmul(nb::module_& m);
void bind_quantized_matmul(nb::module_& m);
void bind_quantized_gated_matmul(nb::module_& m);
void bind_quantized_expert_matmul(nb::module_& m);
void bind_quantized_matmuls(nb::module_& m);
void bind_route_experts(nb::module_& m);
void bind_weigh_experts(nb::module_& m);
void bind_embed(nb::module_& m);
void bind_random_uniform(nb::module_& m);
void bind_rms_norm(nb::module_& m);
void bind_norm_rope(nb::module_& m);
void bind_residual_norm(nb::module_& m);
void bind_filter_logits(nb::module_& m);
void bind_quantized_filter_logits(nb::module_& m);
void bind_geglu(nb::module_& m);
void bind_softcap(nb::module_& m);
void bind_write_cache(nb::module_& m);
void bind_block_attention(nb::module_& m);
void bind_mathfn(nb::module_& m);
void bind_draw_token(nb::module_& m);
void bind_accept_block(nb::module_& m);
void bind_prepare_qkv(nb::module_& m);
void bind_recorded(nb::module_& m);

} // namespace pyengine
