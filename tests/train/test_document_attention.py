import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from llama32.attention import eager, per_document
from llama32.train.document_attention import DocumentAttention


def test_packed_documents_go_to_the_varlen_kernel_with_cu_seqlens(monkeypatch):
    """The call for a GPU, computed by the plain attention."""
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        inspect.signature(varlen_attn).bind(q, k, v, cu_q, cu_k, 1, 1, **options)
        assert cu_q.dtype == cu_k.dtype == torch.int32
        calls.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k, options))
        return per_document(q, k, v, cu_q.diff().tolist(), eager)

    monkeypatch.setattr("llama32.train.document_attention.varlen_attn", kernel)
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    plain = DocumentAttention((5, 1, 6))(q, k, v)
    assert not calls
    monkeypatch.setattr(
        "llama32.train.document_attention.supports_flash", lambda device, dtype, head_dim: True
    )
    torch.testing.assert_close(DocumentAttention((5, 1, 6))(q, k, v), plain)
    ((*cu_seqlens, max_q, max_k, options),) = calls
    assert cu_seqlens == [[0, 5, 6, 12], [0, 5, 6, 12]]
    assert max_q == max_k == 6
    assert options["window_size"] == (-1, 0)
    assert options.get("enable_gqa", True)
