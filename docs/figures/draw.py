"""Draws the figures of docs/kernels.md.

python docs/figures/draw.py            # writes lanes.svg and page.svg beside this file
python docs/figures/draw.py --check    # exit code 1 if they are not what this script draws
"""

from __future__ import annotations

import argparse
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: By c, the number of a lane within its group of four (tints of Okabe and Ito's colours).
TINTS = ("#bfe0f5", "#fbdfa8", "#bfe6d8", "#efcfe0")
INK, FAINT, MARK = "#222222", "#888888", "#c03000"
#: The lane whose registers are outlined.
LANE_G, LANE_C = 2, 1


class Drawing:
    """SVG elements on a white page. Texts: m middle, e end-aligned, f faint, r of a register, b bold."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif">',
            "<style>rect{stroke:#fff}text{font-size:11px}.m{text-anchor:middle}.e{text-anchor:end}.b{font-weight:bold}"
            f".f{{fill:{FAINT}}}.r{{font-size:9px;fill:{FAINT};text-anchor:middle}}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str, edge: str | None = None) -> None:
        """A filled rectangle with white edges, or an outline."""
        line = f' style="stroke:{edge};stroke-width:{2 if fill == "none" else 1}"' if edge else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"{line}/>')

    def text(self, x: float, y: float, s: str, kind: str = "", size: float | None = None) -> None:
        """One line of text with its baseline at y; ``kind``: classes of the style sheet."""
        s = s.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        large = f' style="font-size:{size}px"' if size else ""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{named}{large}>{s}</text>')

    def arrow(self, d: str, x: float, y: float) -> None:
        """A line along the path ``d`` that goes on to the right and ends at (x, y)."""
        self.parts.append(f'<path d="{d} H{x - 7:g}" fill="none" stroke="{INK}" stroke-width="1.5"/>')
        self.parts.append(f'<polygon points="{x:g},{y:g} {x - 7:g},{y - 4:g} {x - 7:g},{y + 4:g}" fill="{INK}"/>')

    def done(self) -> str:
        """The file."""
        return "\n".join([*self.parts, "</svg>", ""])


def tile_token(k: int) -> int:
    """Token of a tile of 16 that stands in fragment row k: as in csrc/decode_pages.cuh."""
    return (k & 8) + ((k & 7) >> 1) + ((k & 1) << 2)


def left_operand(d: Drawing, x: float, y: float, title: str, columns: list[str], rows: list[str]) -> None:
    """16 x 8 registers; lane (g, c) has rows g and g + 8 of columns c and c + 4."""
    w, h = 48, 18
    d.text(x, y - 26, title, "b", 12)
    for j, name in enumerate(columns):
        d.text(x + (j + 0.5) * w, y - 7, name, "m f")
    for i, name in enumerate(rows):
        d.text(x - 6, y + (i + 0.5) * h + 4, name, "e f")
        for j in range(8):
            d.box(x + j * w, y + i * h, w, h, TINTS[j % 4])
            d.text(x + (j + 0.5) * w, y + (i + 0.5) * h + 4, f"a{i // 8 + 2 * (j // 4)}", "r")
    for i in (LANE_G, LANE_G + 8):
        for j in (LANE_C, LANE_C + 4):
            d.box(x + j * w, y + i * h, w, h, "none", MARK)


def right_operand(d: Drawing, x: float, y: float, title: str, rows: list[str]) -> None:
    """8 x 8 registers; lane (g, c) has column g of rows c and c + 4."""
    w, h = 28, 18
    d.text(x, y - 26, title, "b", 12)
    for j in range(8):
        d.text(x + (j + 0.5) * w, y - 7, str(j), "m f")
    for i, name in enumerate(rows):
        d.text(x - 6, y + (i + 0.5) * h + 4, name, "e f")
        for j in range(8):
            d.box(x + j * w, y + i * h, w, h, TINTS[i % 4])
            d.text(x + (j + 0.5) * w, y + (i + 0.5) * h + 4, f"b{i // 4}", "r")
    for i in (LANE_C, LANE_C + 4):
        d.box(x + LANE_G * w, y + i * h, w, h, "none", MARK)


def result(d: Drawing, x: float, y: float, title: str, rows: list[str]) -> None:
    """16 x 4 pairs of numbers; lane (g, c) has rows g and g + 8 of pair c."""
    w, h = 42, 18
    d.text(x, y - 26, title, "b", 12)
    for j in range(4):
        d.text(x + (j + 0.5) * w, y - 7, f"{2 * j}, {2 * j + 1}", "m f")
    for i, name in enumerate(rows):
        d.text(x - 6, y + (i + 0.5) * h + 4, name, "e f")
        for j in range(4):
            d.box(x + j * w, y + i * h, w, h, TINTS[j])
    for i in (LANE_G, LANE_G + 8):
        d.box(x + LANE_C * w, y + i * h, w, h, "none", MARK)


def note(d: Drawing, x: float, y: float, lines: list[str], last: str) -> None:
    """Lines of text, and a faint one."""
    for i, line in enumerate(lines):
        d.text(x, y + 18 * i, line)
    d.text(x, y + 18 * len(lines) + 12, last, "f")


def lanes() -> str:
    """Fragments of the two products of the decode kernel at head_dim 128."""
    d = Drawing(1130, 870)
    a, b, o = 92, 604, 936
    d.text(20, 28, "Who holds what in the decode kernel (head_dim 128)", "b", 15)
    d.text(20, 48, "A cell is one 32-bit register of one lane, lane = 4 g + c. Colour: c.")
    for c in range(4):
        d.box(410 + 64 * c, 37, 14, 14, TINTS[c])
        d.text(430 + 64 * c, 48, f"c = {c}")
    d.box(676, 37, 14, 14, "none", MARK)
    d.text(698, 48, f"the registers of lane {4 * LANE_G + LANE_C} (g = {LANE_G}, c = {LANE_C})")

    top = 118
    tokens = [f"token {tile_token(k)}" for k in range(16)]
    dims = [f"{32 * c + e}..{32 * c + e + 3}" for e in (0, 4) for c in range(4)]
    left_operand(d, a, top, "K codes as int8: 16 tokens x 32 dims", dims, tokens)
    right_operand(d, b, top, "Queries as int8: dims x 8 query rows", dims)
    result(d, o, top, "Scores: tokens x query rows", [str(tile_token(k)) for k in range(16)])
    d.text(a + 8 * 48 + 36, top + 80, "x", "m", 20)
    d.text(b + 8 * 28 + 40, top + 80, "=", "m", 20)
    notes = [
        "Two products: with the high and with the low byte of",
        "the query. Dims are those of step 0; step s adds 8 s,",
        "so that the four steps of lane c take its own 32 dims,",
        "read from the page as whole words.",
    ]
    note(d, b - 60, top + 170, notes, "mma m16n8k32, 4 steps for 128 dims")

    low = 560
    pairs = [f"{tile_token(k)}, {tile_token(k + 1)}" for k in range(0, 16, 2)]
    mid = top + 16 * 18
    d.text(o + 76, mid + 30, "scales of K, centring, mask, running maximum, then", "e")
    d.text(o + 76, mid + 46, "p = 2^(score - maximum), times the scale of V, as pairs of fp16", "e")
    d.arrow(f"M{o + 84},{mid + 6} V{mid + 98} H{b - 52} V{low + 72}", b - 36, low + 72)
    d.box(o - 6, mid + 62, 180, 22, "#eeeeee", FAINT)
    d.text(o + 84, mid + 77, "movmatrix: 8 x 8 transposed", "m")

    left_operand(
        d, a, low, "V as fp16 pairs of tokens: 16 dims x 16 tokens", pairs, [f"dim {16 * (k % 8) + k // 8}" for k in range(16)]
    )
    right_operand(d, b, low, "p: tokens x 8 query rows", pairs)
    result(d, o, low, "Output: dims x query rows", [str(16 * (k % 8) + k // 8) for k in range(16)])
    d.text(a + 8 * 48 + 36, low + 80, "x", "m", 20)
    d.text(b + 8 * 28 + 40, low + 80, "=", "m", 20)
    notes = [
        "Dims are those of the first tile. The lanes of a g own",
        "16 dims; the second tile adds 2, each further pair 4.",
        "Tokens c, c + 4, c + 8, c + 12 of lane c: the order in",
        "which movmatrix leaves p, while four lanes still read",
        "neighbouring rows of the page.",
    ]
    note(d, b - 60, low + 170, notes, "mma m16n8k16, 8 tiles for 128 dims")
    return d.done()


def page() -> str:
    """Bytes of a page of 3-bit keys and values at head_dim 128, and bits of the plane words."""
    d = Drawing(1060, 470)
    d.text(20, 28, "A page: 64 tokens of one KV head (3-bit keys and values, head_dim 128: 6,400 bytes)", "b", 15)
    x, y, scale = 20.0, 62, 1020 / 6400
    fields = (
        ("K plane A", 2048, 0),
        ("K plane B", 1024, 1),
        ("V plane A", 2048, 0),
        ("V plane B", 1024, 1),
        ("", 128, 2),
        ("", 128, 3),
    )
    at = 0
    for name, size, tint in fields:
        d.box(x, y, size * scale, 44, TINTS[tint])
        d.text(x, y - 6, str(at) if size > 128 else "", "f")
        if name:
            d.text(x + size * scale / 2, y + 19, name, "m", 12)
            d.text(x + size * scale / 2, y + 35, f"64 rows of {size // 64} bytes", "m f")
        x, at = x + size * scale, at + size
    d.text(1040, y + 62, "from 6144: K scales, then V scales, 64 fp16 each", "e f")

    def word(top: int, title: str, meaning: str, cells: list[tuple[int, str, int]]) -> None:
        """A 32-bit word, bit 0 on the left, of cells (bits, text, tint)."""
        d.text(20, top - 10, title, "b", 12)
        d.text(20 + 7.6 * len(title), top - 10, meaning, "f")
        left = 20.0
        for bits, s, tint in cells:
            d.box(left, top, bits * 31.875, 28, TINTS[tint])
            d.text(left + bits * 31.875 / 2, top + 18, s, "m")
            left += bits * 31.875
        for k in range(9):
            d.box(20 + k * 127.5 - 0.75, top - 3, 1.5, 34, INK, INK)

    word(160, "Word of plane A:", "16 dims, the two low bits of their codes (bit 0 on the left, lines between nibbles)",
         [(2, str(8 * r + n), r) for n in range(8) for r in (0, 1)])  # fmt: skip
    word(236, "Word of plane B:", "32 dims, bit 2 of their codes", [(1, str(8 * i + n), i) for n in range(8) for i in range(4)])
    word(
        312,
        "Word of plane C:",
        "32 dims, signs (4-bit codes, 1-bit codes, QJL)",
        [(1, str(4 * s + e), s % 4) for e in range(4) for s in range(8)],
    )
    selector = [cell for n in range(8) for cell in ((2, f"A: {n}", 0), (1, f"B: {n}", 1), (1, "0", 2))]
    word(
        398,
        "Selectors of a byte permute:",
        "(A >> 2 r & 0x33333333) | (rotate(B, 2 - i) & 0x44444444), here r = 0, i = 0: nibble n is the code of dim n",
        selector,
    )
    d.text(
        20,
        452,
        "One prmt takes four nibbles and the eight bytes of the table (two registers) and gives the levels of four dims.",
    )
    return d.done()


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, drawn in (("lanes.svg", lanes()), ("page.svg", page())):
        if not check:
            (HERE / name).write_text(drawn, encoding="utf-8")
        elif (HERE / name).read_text(encoding="utf-8") != drawn:
            print(f"{name} is old: run python docs/figures/draw.py")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
