"""What the backend "pallas" needs of each platform. A module has

- ``there() -> bool``: whether kernels run, are simulated or compiled for this platform now, without slow imports;
- ``taken_unasked() -> bool``: whether ``backend="auto"`` takes these kernels;
- ``DTYPES``, and ``block_sizes(wanted, queries, keys) -> (int, int)``, the tiles of a call (ValueError: not so wanted ones);
- ``packed_rows(rows) -> int``: the rows of a tile that holds a call with few queries, and ``most_runs(rows_and_heads, keys)
  -> int``: into how many runs of keys such a call may be divided;
- ``holds_pages(entries) -> bool``: whether it reads pages through a block table of so many entries;
- ``refusal(part, packed, rectangle) -> str | None``: why it cannot run a part;
- ``READS_NARROW``: whether it reads 8-bit keys and values, and ``HOLDS_ROWS``: whether it finds thresholds of rows in one pass.
  If so, ``rows_fit(part, slots) -> bool``, whether the logits of a block of queries and so many tiles of keys find room, and
  ``thresholds(part, search, numbers, slots)``;
- ``attend(part, packed)`` and ``gradients(part, lse, d_out, delta)``.
"""
