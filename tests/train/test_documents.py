import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from llama32.attention import eager, one_by_one
from llama32.train.documents import Documents


def test_packed_documents_go_to_the_varlen_kernel_with_their_ends(monkeypatch):
    """The call that a GPU would get, answered by the plain form."""
    calls = []

    def kernel(q, k, v, q_starts, k_starts, longest_q, longest_k, **options):
        inspect.signature(varlen_attn).bind(q, k, v, q_starts, k_starts, 1, 1, **options)
        assert q_starts.dtype == k_starts.dtype == torch.int32
        calls.append((q_starts.tolist(), k_starts.tolist(), longest_q, longest_k, options))
        return one_by_one(q, k, v, q_starts.diff().tolist(), eager)

    monkeypatch.setattr("llama32.train.documents.varlen_attn", kernel)
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    plain = Documents((5, 1, 6))(q, k, v)
    assert not calls
    monkeypatch.setattr("llama32.train.documents.has_flash", lambda device, dtype, head_dim: True)
    torch.testing.assert_close(Documents((5, 1, 6))(q, k, v), plain)
    ((*starts, longest_q, longest_k, options),) = calls
    assert starts == [[0, 5, 6, 12], [0, 5, 6, 12]]
    assert longest_q == longest_k == 6
    assert options["window_size"] == (-1, 0)
    assert options.get("enable_gqa", True)
