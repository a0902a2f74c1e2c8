"""The size of the KV cache."""

import torch

from llama32.cache.int8_kv_cache import int8_bytes_per_token
from llama32.cache.kv_cache import PAGE_SIZE, bytes_per_token
from llama32.cache.paged_attention import QUERY_TILE
from llama32.engine.settings import EngineSettings
from llama32.model import Llama

CPU_BYTES = 4 << 30  # default limit: the full context of Llama 3.2 1B


def page_size(model: Llama, settings: EngineSettings) -> int:
    """Return the slots per page.

    Small pages share more of a prompt; large pages are faster on a GPU.
    """
    on_gpu = model.norm.weight.device.type == "cuda"
    return settings.page_size or (PAGE_SIZE if on_gpu else QUERY_TILE)


def num_pages(model: Llama, settings: EngineSettings) -> int:
    """Return the number of pages, from the settings or from the available memory.

    Unless `cache_tokens` is set, the cache has no more pages than `max_running` requests of full
    context can fill. A draft model has as many pages in memory of its own, which is included.
    Raises ValueError if the memory is too small for a page.
    """
    size = page_size(model, settings)
    weight = model.norm.weight
    per_token = bytes_per_token(model.config, weight.dtype)
    if settings.cache_dtype is not None:
        per_token = int8_bytes_per_token(model.config)
    per_page = size * per_token
    if settings.speculation is not None:
        per_page += size * settings.speculation.bytes_per_token
    context = -(-model.config.max_position_embeddings // size)
    if settings.cache_tokens is not None:
        return -(-settings.cache_tokens // size)
    if settings.cache_bytes is not None:
        room = settings.cache_bytes
    elif weight.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(weight.device)
        room = int(free * settings.memory_fraction)
    else:
        room = CPU_BYTES
    pages = room // per_page
    if not pages:
        raise ValueError(
            f"the KV cache gets {room:,} bytes, and a page of {size} tokens takes {per_page:,}: "
            f"give the cache more memory (cache_bytes or memory_fraction)"
        )
    return min(pages, settings.max_running * context)
