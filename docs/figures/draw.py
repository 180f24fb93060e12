"""Draws the figures of ../what-a-llama-4-computes.md from the rules they show: `python docs/figures/draw.py [FOLDER]`.

Needs nothing but Python. tests/test_docs.py checks that the rules written here are the model's, and that the committed
figures are what this file draws.
"""

import pathlib
import sys
from collections.abc import Callable
from xml.sax.saxutils import escape

INK, MUTED, LINE = "#1f2328", "#57606a", "#c4cbd3"
PAPER, WHITE, BLACK = "#fbfbf8", "#ffffff", "#24292f"
CHUNKED, GLOBAL, EXPERTS, DENSE = "#7aa6d6", "#eeb45f", "#86c29b", "#d3d8de"
FOUR = ("#7aa6d6", "#eeb45f", "#86c29b", "#cf9fcf")
TIMES = "\u00d7"


# The rules


def sees(i: int, j: int, positions: list[int], segments: list[int], chunk: int | None) -> bool:
  """Whether the token at index `i` of a row may look at the one at `j`."""
  same = segments[i] == segments[j] and segments[j] > 0
  if not same or positions[j] > positions[i]:
    return False
  return chunk is None or positions[j] // chunk == positions[i] // chunk


def layer_kind(i: int, nope_interval: int, moe_step: int) -> tuple[bool, bool]:
  """(uses RoPE, has experts) of layer `i`, from 0."""
  return (i + 1) % nope_interval != 0, (i + 1) % moe_step == 0


def sorted_places(experts: list[int]) -> list[int]:
  """Tokens in the order in which their experts take them: by expert, then as they came."""
  return sorted(range(len(experts)), key=lambda token: experts[token])


def token_layout(rows: int, columns: int) -> list[list[str]]:
  """The tokens of an image line by line; a number stands for the patch tokens of that tile."""
  lines = [["image_start"]]
  if rows * columns > 1:
    for row in range(rows):
      line = []
      for column in range(columns):
        line += [str(row * columns + column), "tile_x_separator"]
      lines.append([*line[:-1], "tile_y_separator"])
  return [*lines, ["image", str(rows * columns if rows * columns > 1 else 0)], ["image_end"]]


# The pen


class Figure:
  """An SVG with a background of its own, so that it reads the same on light and on dark pages."""

  def __init__(self, width: int, height: int, title: str):
    self.size, self.title = (width, height), title
    self.parts: list[str] = []

  def rect(self, x, y, width, height, fill=WHITE, stroke=LINE, radius=0, dash=""):
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    self.parts.append(
      f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}"'
      f' stroke="{stroke}"{dashes}/>'
    )

  def text(self, x, y, words, size=12, anchor="middle", fill=INK, weight="normal"):
    self.parts.append(
      f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
      f' font-weight="{weight}">{escape(words)}</text>'
    )

  def line(self, *points, stroke=MUTED, width=1, dash=""):
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    path = " ".join(f"{x},{y}" for x, y in points)
    self.parts.append(
      f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashes}/>'
    )

  def arrow(self, *points, stroke=MUTED, width=1):
    """A line whose last piece runs along an axis, with a head at its end."""
    self.line(*points, stroke=stroke, width=width)
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back, side = (x - 7 * dx, y - 7 * dy), (4 * dy, 4 * dx)
    head = ((x, y), (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1]))
    path = " ".join(f"{a},{b}" for a, b in head)
    self.parts.append(f'<polygon points="{path}" fill="{stroke}"/>')

  def box(self, x, y, width, height, *words, fill=WHITE, size=12, stroke=MUTED):
    """A rounded box around lines of text."""
    self.rect(x, y, width, height, fill, stroke, radius=4)
    first = y + height / 2 + 4 - 8 * (len(words) - 1)
    for number, line in enumerate(words):
      self.text(x + width / 2, first + 16 * number, line, size)

  def grid(self, x, y, cell, count, stroke=LINE):
    """A square of `count` x `count` cells."""
    end = cell * count
    self.rect(x, y, end, end, stroke=stroke)
    for place in range(cell, end, cell):
      self.line((x + place, y), (x + place, y + end), stroke=stroke)
      self.line((x, y + place), (x + end, y + place), stroke=stroke)

  def svg(self) -> str:
    width, height = self.size
    return "\n".join(
      [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(self.title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        *self.parts,
        "</svg>\n",
      ]
    )


# The figures

MASK_LENGTH, MASK_CHUNK = 12, 4
# (title, positions, segments, chunk): what a panel of the figure of masks shows.
MASKS = (
  ("Layer with RoPE: chunks", list(range(12)), [1] * 12, MASK_CHUNK),
  ("Layer without RoPE: all before", list(range(12)), [1] * 12, None),
  ("RoPE, two documents in a row", [*range(7), *range(5)], [1] * 7 + [2] * 5, MASK_CHUNK),
  ("RoPE, two of padding on the left", [0, 0, *range(10)], [0] * 2 + [1] * 10, MASK_CHUNK),
)


def masks() -> Figure:
  figure = Figure(640, 640, "Which keys a query may see, in four rows of twelve tokens")
  for panel, (title, positions, segments, chunk) in enumerate(MASKS):
    left, top, cell = 62 + 308 * (panel % 2), 78 + 290 * (panel // 2), 17
    figure.text(left - 20, top - 40, title, 13, "start", weight="bold")
    figure.text(left - 20, top - 20, "keys, by position", 11, "start", MUTED)
    figure.grid(left, top, cell, MASK_LENGTH)
    for i in range(MASK_LENGTH):
      label = str(positions[i]) if segments[i] else "pad"
      size = 10 if segments[i] else 7
      figure.text(left + cell * i + 8.5, top - 5, label, size, fill=MUTED)
      figure.text(left - 5, top + cell * i + 12, label, size, "end", MUTED)
      for j in range(MASK_LENGTH):
        if sees(i, j, positions, segments, chunk):
          fill = GLOBAL if chunk is None else CHUNKED
          figure.rect(left + cell * j, top + cell * i, cell, cell, fill)
    starts = [
      n for n in range(1, MASK_LENGTH) if chunk and segments[n] and positions[n] % chunk == 0
    ]
    for n in starts:
      place, end = cell * n, cell * MASK_LENGTH
      figure.line((left + place, top), (left + place, top + end), stroke=INK, dash="3 3")
      figure.line((left, top + place), (left + end, top + place), stroke=INK, dash="3 3")
    figure.text(left - 20, top + cell * MASK_LENGTH + 18, "one line a query", 11, "start", MUTED)
  figure.text(
    42, 626, "Coloured: the query may see the key. Dashed: a chunk of 4 starts.", 12, "start"
  )
  return figure


# (name, interval of layers without RoPE, interval of layers with experts)
MODELS = (("Scout", 4, 1), ("Maverick", 4, 2))
NUM_LAYERS, CYCLE = 48, 4


def cycle() -> Figure:
  figure = Figure(720, 520, "The layers of Scout and Maverick, and one cycle of each")
  for number, (name, nope_interval, moe_step) in enumerate(MODELS):
    left, top, cell = 24, 34 + 226 * number, 14
    figure.text(left, top, f"{name}: 48 layers, 12 cycles of 4", 14, "start", weight="bold")
    for i in range(NUM_LAYERS):
      uses_rope, is_moe = layer_kind(i, nope_interval, moe_step)
      x = left + cell * i
      figure.rect(x, top + 14, cell, cell, CHUNKED if uses_rope else GLOBAL)
      figure.rect(x, top + 14 + cell, cell, cell, EXPERTS if is_moe else DENSE)
    figure.rect(left, top + 14, cell * CYCLE, 2 * cell, "none", INK)
    below, first = top + 14 + 2 * cell, top + 76
    figure.line((left, below), (left, first), stroke=MUTED, dash="3 3")
    figure.line((left + cell * CYCLE, below), (left + 672, first), stroke=MUTED, dash="3 3")
    for i in range(CYCLE):
      uses_rope, is_moe = layer_kind(i, nope_interval, moe_step)
      x = left + 168 * i
      figure.text(x + 76, first + 16, f"layer {i}, {i + 4}, {i + 8}, ...", 12, fill=MUTED)
      words = ("chunked attention", "RoPE") if uses_rope else ("global attention", "no RoPE")
      figure.box(x + 4, first + 26, 148, 44, *words, fill=CHUNKED if uses_rope else GLOBAL)
      figure.line((x + 78, first + 70), (x + 78, first + 76))
      words = ("one of the experts", "+ shared expert") if is_moe else ("dense MLP",)
      figure.box(x + 4, first + 76, 148, 44, *words, fill=EXPERTS if is_moe else DENSE)
      if i + 1 < CYCLE:
        figure.arrow((x + 152, first + 73), (x + 172, first + 73))
  for x, fill, words in (
    (24, CHUNKED, "RoPE, chunks"),
    (174, GLOBAL, "no RoPE, global"),
    (344, EXPERTS, "experts"),
    (464, DENSE, "dense"),
  ):
    figure.rect(x, 488, 14, 14, fill)
    figure.text(x + 22, 500, words, 12, "start")
  return figure


def router() -> Figure:
  figure = Figure(760, 380, "One token in a layer with four experts, one of which is chosen")
  figure.box(20, 200, 90, 50, "token x", "(normed)")
  figure.arrow((65, 200), (65, 95), (130, 95))
  figure.box(130, 70, 110, 50, "router", "r = x W")
  figure.arrow((240, 95), (270, 95))
  logits = (-6, 14, 34, -18)
  chosen = logits.index(max(logits))
  figure.line((272, 95), (372, 95), stroke=LINE)
  for e, logit in enumerate(logits):
    x, fill = 278 + 24 * e, EXPERTS if e == chosen else DENSE
    figure.rect(x, 95 - max(logit, 0), 16, abs(logit), fill, MUTED)
    figure.text(x + 8, 130, f"r{e}", 11, fill=MUTED)
  figure.text(322, 40, "the largest is chosen", 12)
  figure.arrow((374, 95), (400, 95))
  figure.box(400, 70, 110, 50, "score", f"sigmoid(r{chosen})")
  figure.arrow((110, 225), (440, 225))
  figure.arrow((455, 120), (455, 209))
  figure.rect(440, 210, 30, 30, WHITE, MUTED, radius=15)
  figure.text(455, 230, TIMES, 18)
  figure.text(290, 326, "x, as it is", 12, fill=MUTED)
  figure.text(515, 216, f"score {TIMES} x", 12, fill=MUTED)
  figure.text(464, 160, "before the expert,", 12, "start")
  figure.text(464, 176, "not behind it", 12, "start")
  for e in range(4):
    y, taken = 124 + 50 * e, e == chosen
    fill = EXPERTS if taken else DENSE
    figure.box(590, y, 90, 40, f"expert {e}", fill=fill, stroke=INK if taken else LINE)
  figure.arrow((470, 225), (560, 225), (560, 244), (590, 244), stroke=INK, width=2)
  figure.arrow((680, 244), (720, 244), (720, 319), stroke=INK, width=2)
  figure.arrow((180, 225), (180, 335), (400, 335), stroke=INK, width=2)
  figure.box(400, 315, 110, 40, "shared expert", fill=EXPERTS, stroke=INK)
  figure.arrow((510, 335), (705, 335), stroke=INK, width=2)
  figure.rect(705, 320, 30, 30, WHITE, MUTED, radius=15)
  figure.text(720, 341, "+", 18)
  figure.text(720, 368, "output", 12)
  return figure


DISPATCHED = [2, 0, 2, 1, 0, 2, 0, 2]  # the expert that each token of the figure chose


def dispatch() -> Figure:
  figure = Figure(720, 400, "Tokens sorted by expert, multiplied group by group, and put back")
  left, cell = 220, 56
  order = sorted_places(DISPATCHED)
  rows = (
    (30, range(len(order)), "tokens, scaled", "by their scores"),
    (130, order, "sorted by expert", "(stable)"),
    (230, order, "after their experts", ""),
    (330, range(len(order)), "back in order", ""),
  )
  for y, tokens, *words in rows:
    for number, line in enumerate(filter(None, words)):
      figure.text(24, y + 18 + 16 * number, line, 13, "start")
    for place, token in enumerate(tokens):
      x = left + cell * place
      figure.box(x, y, cell - 8, 36, f"t{token}", fill=FOUR[DISPATCHED[token]])
  half = (cell - 8) / 2
  for place, token in enumerate(order):
    here, there = left + cell * place + half, left + cell * token + half
    color = FOUR[DISPATCHED[token]]
    figure.line((there, 66), (here, 130), stroke=color, width=2)
    figure.line((here, 266), (there, 330), stroke=color, width=2)
  figure.text(24, 204, "one product a group", 13, "start", MUTED)
  for e in sorted(set(DISPATCHED)):
    places = [place for place, token in enumerate(order) if DISPATCHED[token] == e]
    x, width = left + cell * places[0], cell * len(places) - 8
    figure.line((x, 180), (x, 174), (x + width, 174), (x + width, 180))
    figure.text(x + width / 2, 194, f"expert {e}" if width > 50 else f"ex. {e}", 12)
    figure.arrow((x + width / 2, 200), (x + width / 2, 228))
  figure.text(left, 388, "Colour: the expert that a token chose.", 12, "start", MUTED)
  return figure


# Width and height of the picture in the figure of tiles, its canvas, and its size there; the scale it is drawn at.
PICTURE, CANVAS, PLACED, TILE, SCALE = (700, 500), (2, 3), (700, 500), 336, 4


def tiles() -> Figure:
  figure = Figure(760, 470, "A picture of 700 x 500 pixels becomes seven tiles and 1,017 tokens")
  rows, columns = CANVAS
  side = TILE // SCALE
  left, top = 24, 60
  figure.text(left, 30, "1. On a canvas of 2 x 3 tiles", 14, "start", weight="bold")
  figure.text(left, 48, "700 x 500 pixels, the rest is black", 12, "start", MUTED)
  figure.rect(left, top, side * columns, side * rows, BLACK, MUTED)
  _picture(figure, left, top, PLACED[0] // SCALE, PLACED[1] // SCALE)
  for n in range(rows * columns):
    x, y = left + side * (n % columns), top + side * (n // columns)
    figure.rect(x, y, side, side, "none", "#8c959f")
    figure.box(x + 4, y + 4, 22, 20, str(n), stroke=INK)
  x = 308
  figure.text(x, 30, "2. The whole, squeezed", 14, "start", weight="bold")
  figure.text(x, 48, "into one more tile", 12, "start", MUTED)
  _picture(figure, x, top, side, side)
  figure.rect(x, top, side, side, "none", INK)
  figure.box(x + 4, top + 4, 22, 20, str(rows * columns), stroke=INK)
  x = 536
  figure.text(x, 30, "3. Each tile: 144 vectors", 14, "start", weight="bold")
  figure.text(x, 48, "from the vision encoder", 12, "start", MUTED)
  for n in range(rows * columns + 1):
    figure.rect(x + 10 * n, top + 10 * n, side, side // 2, FOUR[0], INK)
  figure.text(x + 104, top + 86, f"{rows * columns}", 12)
  figure.text(left, 262, "4. In the text", 14, "start", weight="bold")
  y = 276
  for line in token_layout(rows, columns):
    x = left
    for token in line:
      is_patches = token.isdigit()
      words = f"144 {TIMES} patch, tile {token}" if is_patches else token
      width = 124 if is_patches else 104
      figure.box(x, y, width, 28, words, fill=FOUR[0] if is_patches else WHITE, size=11)
      x += width + 6
    y += 36
  return figure


def _picture(figure: Figure, x: int, y: int, width: int, height: int) -> None:
  """A landscape: sky, sun, hill."""
  figure.rect(x, y, width, height, "#cfe3f5", "none")
  figure.parts.append(
    f'<ellipse cx="{x + width * 4 // 5}" cy="{y + height // 4}" rx="{width * 9 // 100}"'
    f' ry="{height // 8}" fill="{GLOBAL}"/>'
  )
  figure.parts.append(
    f'<polygon points="{x},{y + height} {x},{y + height * 3 // 4} {x + width // 3},{y + height // 2}'
    f' {x + width},{y + height * 7 // 8} {x + width},{y + height}" fill="{EXPERTS}"/>'
  )


SIDE, BLOCK, WIDTH = (
  24,
  2,
  1408,
)  # patches along a tile, the pixel shuffle's block, channels of a patch


def patches() -> Figure:
  figure = Figure(760, 330, "A tile's 24 x 24 patches become 12 x 12 vectors")
  left, top, cell = 24, 72, 9
  figure.text(left, 30, "24 x 24 patches of 14 x 14 pixels", 13, "start", weight="bold")
  figure.text(left, 48, f"a vector of {WIDTH:,} each", 12, "start", MUTED)
  figure.grid(left, top, cell, SIDE)
  for n in range(BLOCK * BLOCK):
    a, b = divmod(n, BLOCK)
    figure.rect(left + cell * b, top + cell * a, cell, cell, FOUR[n])
  for n in range(BLOCK, SIDE, BLOCK):
    place, end = cell * n, cell * SIDE
    figure.line((left + place, top), (left + place, top + end))
    figure.line((left, top + place), (left + end, top + place))
  figure.rect(left, top, cell * SIDE, cell * SIDE, "none", MUTED)
  figure.arrow((244, 108), (304, 108))
  figure.text(left, 308, "+ one class token, last, dropped at the end", 12, "start", MUTED)
  figure.text(300, 30, "pixel shuffle", 13, "start", weight="bold")
  figure.text(300, 48, "squares of four become one", 12, "start", MUTED)
  for a in range(BLOCK):
    for b in range(BLOCK):
      n = BLOCK * a + b
      figure.box(310 + 36 * b, top + 36 * a, 36, 36, str(n), fill=FOUR[n])
  figure.arrow((346, 150), (346, 180))
  for n in range(BLOCK * BLOCK):
    figure.box(270 + 44 * n, 184, 44, 26, f"{WIDTH:,}", fill=FOUR[n], size=11)
  figure.text(358, 230, f"{BLOCK * BLOCK * WIDTH:,} channels", 12)
  figure.text(358, 262, "adapter: 5,632 to 4,096", 12, fill=MUTED)
  figure.text(358, 280, "projector: 4,096 to 5,120", 12, fill=MUTED)
  left, cell = 510, 18
  figure.text(left, 30, "12 x 12 = 144 vectors", 13, "start", weight="bold")
  figure.text(left, 48, "as wide as the text's, row by row", 12, "start", MUTED)
  figure.grid(left, top, cell, SIDE // BLOCK, MUTED)
  figure.rect(left, top, cell, cell, MUTED, MUTED)
  figure.arrow((446, 197), (484, 197), (484, top + 9), (506, top + 9))
  return figure


FIGURES: dict[str, Callable[[], Figure]] = {
  "masks": masks,
  "cycle": cycle,
  "router": router,
  "dispatch": dispatch,
  "tiles": tiles,
  "patches": patches,
}


def main() -> None:
  folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent
  for name, draw in FIGURES.items():
    (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
  main()
