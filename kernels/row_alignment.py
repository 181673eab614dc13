"""How rows of an adapter's weights are aligned in its stream; plain numbers, without torch."""

# Rows of an adapter's weights begin at multiples of this many elements of its stream, and a page
# holds a multiple of them, so that no run of so many straddles a page.
ROW_ALIGNMENT = 64


def row_elems(features: int) -> int:
    """Elements from one row of `features` to the next."""
    return -(-features // ROW_ALIGNMENT) * ROW_ALIGNMENT
