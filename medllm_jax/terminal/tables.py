"""Tables of text: aligned for a terminal, or Markdown. The first row is the header, the first column stands left."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows) -> str:
    """Columns of equal width, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Rows, *, numbers: bool = True) -> str:
    """A Markdown table, with its last line end; numbers: all columns but the first stand to the right."""
    header, *body = rows
    rule = f"| {' | '.join(['---', *['---:'] * (len(header) - 1)])} |" if numbers else "|" + "---|" * len(header)
    lines = [_line(header), rule, *map(_line, body)]
    return "".join(f"{line}\n" for line in lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
