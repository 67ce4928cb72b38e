"""kvferry moves paged KV cache between inference engines. See `docs/structure.md`."""
