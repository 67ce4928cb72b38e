"""vLLM's KV cache groups: layers that share a block table, and what their kind means for a handoff.

Read by names and attributes alone, so that it needs no vLLM and reads any version's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Subclasses have rules of their own (sinks, gaps, compressed states): none of them is meant here.
KINDS = {"FullAttentionSpec": "full", "MLAAttentionSpec": "mla", "SlidingWindowSpec": "swa"}
NULL_BLOCK = 0  # in vLLM's tables: what a sliding window has left behind


class CacheGroup(NamedTuple):
    """One group.

    Attributes:
        table: which of a request's block tables is the group's.
        kind: `full`, `mla` or `swa`, as in `GroupLayout`.
        layers: vLLM's names.
        block_size: tokens of a block of vLLM's block manager.
        window: how many tokens before its own a token attends to; 0 if to all of them. vLLM's
            `sliding_window` counts the token itself too.
    """

    table: int
    kind: str
    layers: tuple[str, ...]
    block_size: int
    window: int = 0

    def needed_from(self, num_tokens: int) -> int:
        """The first of `num_tokens` tokens that the next one attends to."""
        return max(0, num_tokens - self.window) if self.window else 0


def read_groups(kv_cache_config: Any) -> tuple[CacheGroup, ...]:
    """The groups that are to be moved, in vLLM's order.

    Raises:
        ValueError: a kind of cache that cannot be moved; names it and its layers.
    """
    groups = kv_cache_config.kv_cache_groups
    chosen = getattr(kv_cache_config, "transfer_group_ids", range(len(groups)))
    return tuple(_read(index, groups[index]) for index in chosen)


def _read(index: int, group: Any) -> CacheGroup:
    spec = group.kv_cache_spec
    layers = tuple(group.layer_names)
    one_a_layer = getattr(spec, "kv_cache_specs", None)  # layers that differ in shape alone
    specs = list(one_a_layer.values()) if one_a_layer else [spec]
    found = {(type(each).__name__, _window(each)) for each in specs}
    compressed = [each for each in specs if getattr(each, "tokens_per_state", 1) != 1]
    name, window = found.pop()
    if found or compressed or name not in KINDS:
        names = ", ".join(sorted({type(each).__name__ for each in specs}))
        why = " with several tokens in one state" if compressed else ""
        why = why or (" of different windows in one group" if found else "")
        raise ValueError(
            f"KVFerryConnector moves full, sliding-window and MLA attention caches; "
            f"{layers[0] if layers else 'a layer'} has {names}{why}"
        )
    return CacheGroup(index, KINDS[name], layers, spec.block_size, window)


def _window(spec: Any) -> int:
    """As `CacheGroup.window`. Full attention may name a window: its blocks are all kept."""
    if type(spec).__name__ != "SlidingWindowSpec":
        return 0
    return int(spec.sliding_window) - 1 + int(getattr(spec, "extra_retained_tokens", 0))
