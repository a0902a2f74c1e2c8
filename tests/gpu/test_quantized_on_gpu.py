"""Quantized layers on a GPU, each fast form beside its plain one. Skipped without CUDA; not yet run
on a GPU."""

from typing import Any

import pytest
import torch

from llama32 import Engine, EngineSettings, Sampling
from llama32.kernels.autotune import optimize
from llama32.kernels.packed_cuda import CUDAFloat8Linear, CUDAInt4Linear, CUDAInt8Linear
from llama32.quantization.quantize import quantize
from llama32.quantization.quantized_linear import Float8Linear, Int4Linear, Int8Linear
from tests.checkpoints import random_model, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PAIRS = [
    (Int8Linear, CUDAInt8Linear, 0.02),
    (Int4Linear, CUDAInt4Linear, 0.01),
    (Float8Linear, CUDAFloat8Linear, 0.05),
]


def packed(plain: Any, form: Any, columns: int = 256) -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(0)
    layer = plain.from_float(torch.randn(384, columns, generator=draw)).cuda()
    if not form.supports(layer):
        pytest.skip("not on this GPU")
    return layer, form(layer)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 300])
@pytest.mark.parametrize(("plain", "form", "error"), PAIRS)
def test_a_fast_form_multiplies_as_the_plain_one(plain, form, error, rows):
    layer, fast = packed(plain, form)
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 256, generator=draw).cuda().bfloat16()
    wanted = x.float() @ layer.dequantized().mT
    assert (fast(x).float() - wanted).norm() <= error * wanted.norm()
    assert fast(x).dtype == torch.bfloat16


def test_fine_activations_leave_only_the_rounding_of_the_result():
    layer, _ = packed(Int8Linear, CUDAInt8Linear)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).cuda()
    wanted = x @ layer.dequantized().mT
    assert (CUDAInt8Linear(layer, residual=True)(x) - wanted).norm() <= 2e-4 * wanted.norm()


@pytest.mark.parametrize("columns", [32, 64, 96, 128, 160])
def test_rows_of_four_bits_of_any_whole_number_of_groups(columns):
    layer, fast = packed(Int4Linear, CUDAInt4Linear, columns)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    wanted = x.float() @ layer.dequantized().mT
    assert (fast(x).float() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_quantized_model_generates_by_graphs_what_it_does_eagerly(scheme):
    config = tiny_config(head_dim=64, vocab_size=1000, hidden_size=256, intermediate_size=512)
    model = quantize(random_model(config, dtype=torch.bfloat16).cuda(), scheme)
    print(optimize(model))
    texts = []
    for has_graphs in (False, True):
        settings = EngineSettings(cache_tokens=8192, deterministic=False, cuda_graphs=has_graphs)
        engine = Engine.of(model, settings)
        greedy = Sampling(temperature=0, max_new_tokens=20, ignore_eos=True)
        request = engine.add([1, 2, 3, 4], greedy)
        while engine.is_busy:
            engine.step()
        texts.append(request.output)
    assert texts[0] == texts[1]
