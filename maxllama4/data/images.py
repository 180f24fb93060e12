"""Image files to the tiles that the vision encoder reads, and to the token ids that stand for an image in a text.

An image is laid on a canvas, a grid of rows x columns square tiles, at the upper left; the rest of the canvas stays
black. The tiles come row by row. If there are several, the whole image squeezed into one tile follows as the last
one, the global tile. The recipe is Meta's: the same canvases and sizes, Pillow's bilinear filter, float32 in -1..1.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from maxllama4.data.sources import DataError

ImageSource = str | os.PathLike | BinaryIO | Image.Image

# Files of other kinds are refused, although Pillow knows more: some of them (EPS) run programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 2**28 // 3  # 256 MiB as RGB; from here on Pillow, too, suspects a decompression bomb
# What Pillow raises on broken files besides OSError: its readers let errors of their parsers through.
_BROKEN = (
  OSError,
  SyntaxError,
  ValueError,
  TypeError,
  AttributeError,
  LookupError,
  EOFError,
  ArithmeticError,
  RuntimeError,
  struct.error,
  zlib.error,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenIds:
  """Ids of the special tokens that frame an image; the comments give those of the released models."""

  image_start: int  # 200080
  image_end: int  # 200081
  image: int  # 200090, before the global tile
  patch: int  # 200092, each replaced by one row of the vision encoder
  tile_x_separator: int  # 200084, between the tiles of a row
  tile_y_separator: int  # 200085, after each row


def load_image(source: ImageSource) -> Image.Image:
  """An RGB image, upright (EXIF orientation applied), on white where it was transparent; of several frames the first.

  `source` is a path, a binary file, or an image of Pillow's. 16-bit grey is scaled to 8 bits. So is 32-bit grey, whose
  white is 1 (in float images), 255 or 65535: the first that no value exceeds.

  Raises: DataError naming the file when it cannot be read, is damaged or of a format not in FORMATS, has no pixels or
  more than MAX_PIXELS (known from its header: nothing is decoded), or grey values of no such range.
  """
  if isinstance(source, Image.Image):
    return _to_rgb(source, getattr(source, "filename", None) or "the image")
  if not isinstance(source, str | os.PathLike):
    return _read(source, getattr(source, "name", None) or "the image")
  try:
    file = pathlib.Path(source).expanduser().open("rb")
  except (
    OSError,
    ValueError,
    RuntimeError,
  ) as error:  # the last two: a null character, an unknown ~user
    reason = getattr(error, "strerror", None) or error
    raise DataError(f"{source} cannot be read: {reason}.") from None
  with file:
    return _read(file, source)


def best_canvas(
  width: int,
  height: int,
  tile_size: int = 336,
  max_tiles: int = 16,
  resize_to_max_canvas: bool = False,
) -> tuple[int, int]:
  """(rows, columns) of the canvas, of at most `max_tiles` tiles, for an image of `width` x `height` pixels.

  Of the canvases that hold the image without shrinking it, those on which it could be enlarged least (with
  `resize_to_max_canvas`: most); if there is none, those that shrink it least. Of these, the one of fewest tiles.

  Raises: ValueError on numbers below 1.
  """
  if min(width, height, tile_size, max_tiles) < 1:
    raise ValueError(
      f"width={width}, height={height}, tile_size={tile_size} and max_tiles={max_tiles} must be 1 or more."
    )
  grids = [
    (rows, columns)
    for rows in range(1, max_tiles + 1)
    for columns in range(1, max_tiles // rows + 1)
  ]
  scales = [min(columns * tile_size / width, rows * tile_size / height) for rows, columns in grids]
  unshrunk = [scale for scale in scales if scale >= 1]
  chosen = min(unshrunk) if unshrunk and not resize_to_max_canvas else max(scales)
  # There are no ties: the tiles that two grids of this scale share are a grid of this scale, too.
  return min((grid for grid, scale in zip(grids, scales) if scale == chosen), key=math.prod)


def size_on_canvas(
  width: int,
  height: int,
  canvas: tuple[int, int],
  tile_size: int = 336,
  resize_to_max_canvas: bool = False,
) -> tuple[int, int]:
  """(width, height) in pixels to which the image is resized on a `canvas` of (rows, columns), its shape kept.

  It fills the canvas one way with `resize_to_max_canvas`; else it is enlarged to one tile at most. At least 1 pixel.
  """
  rows, columns = canvas
  limit_width, limit_height = columns * tile_size, rows * tile_size
  if not resize_to_max_canvas:
    limit_width = min(max(width, tile_size), limit_width)
    limit_height = min(max(height, tile_size), limit_height)
  # Divided first and in floating point, as in the reference: rounding down feels the difference, if seldom.
  scale_width, scale_height = limit_width / width, limit_height / height
  if scale_width < scale_height:
    return limit_width, max(1, min(math.floor(height * scale_width), limit_height))
  return max(1, min(math.floor(width * scale_height), limit_width)), limit_height


def image_tiles(
  source: ImageSource,
  tile_size: int = 336,
  max_tiles: int = 16,
  resize_to_max_canvas: bool = False,
) -> tuple[np.ndarray, tuple[int, int]]:
  """Tiles float32 [tiles, 3, S, S] in -1..1 (padding -1), and the canvas's (rows, columns); S is `tile_size`.

  rows * columns tiles row by row, and the global tile behind them if they are more than one. Raises: as `load_image`.
  """
  image = load_image(source)
  rows, columns = best_canvas(*image.size, tile_size, max_tiles, resize_to_max_canvas)
  size = size_on_canvas(*image.size, (rows, columns), tile_size, resize_to_max_canvas)
  canvas = np.zeros((rows * tile_size, columns * tile_size, 3), np.uint8)
  canvas[: size[1], : size[0]] = _resized(image, size)
  tiles = canvas.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2)
  tiles = tiles.reshape(rows * columns, tile_size, tile_size, 3)
  if len(tiles) > 1:
    tiles = np.concatenate([tiles, _resized(image, (tile_size, tile_size))[None]])
  pixels = tiles.transpose(0, 3, 1, 2).astype(np.float32, order="C")
  return (pixels / 255 - 0.5) / 0.5, (rows, columns)


def stack_images(
  sources: Sequence[ImageSource],
  tile_size: int = 336,
  max_tiles: int = 16,
  resize_to_max_canvas: bool = False,
) -> tuple[np.ndarray, list[tuple[int, int]]]:
  """Tiles of all images in order, float32 [tiles, 3, S, S], and each image's (rows, columns); raises as `load_image`.

  The order is that of the patch tokens of `image_token_layout`, image after image. No image gives no tile.
  """
  images = [image_tiles(source, tile_size, max_tiles, resize_to_max_canvas) for source in sources]
  none = np.zeros((0, 3, tile_size, tile_size), np.float32)
  return np.concatenate([none, *(tiles for tiles, _ in images)]), [canvas for _, canvas in images]


def image_token_layout(
  rows: int, columns: int, patches_per_tile: int, ids: ImageTokenIds
) -> list[int]:
  """Token ids of one image on a canvas of `rows` x `columns` tiles, from image_start to image_end.

  They hold `patches_per_tile` patch ids for each tile of `image_tiles`, in its order.
  """
  tile = [ids.patch] * patches_per_tile
  row = [*tile, ids.tile_x_separator] * (columns - 1) + [*tile, ids.tile_y_separator]
  grid = row * rows if rows * columns > 1 else []
  return [ids.image_start, *grid, ids.image, *tile, ids.image_end]


def _read(file: BinaryIO, name: str | os.PathLike) -> Image.Image:
  """The RGB image in `file`, which errors call `name`."""
  try:
    image = Image.open(file, formats=FORMATS)
  except Image.UnidentifiedImageError:
    raise DataError(
      f"{name} is not an image that can be read, or its header is damaged; convert it to PNG or JPEG"
      f" (known: {', '.join(FORMATS)})."
    ) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise DataError(
      f"{name} has more than the {MAX_PIXELS} pixels that are read; scale it down."
    ) from None
  except _BROKEN as error:
    raise DataError(f"{name} is damaged: {_first_line(error)}.") from None
  return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
  """What `load_image` promises, of an image whose pixels need not be decoded yet."""
  width, height = image.size
  if width * height == 0:
    raise DataError(f"{name} has no pixels: it is {width} wide and {height} high.")
  if width * height > MAX_PIXELS:
    raise DataError(
      f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS} that are read; scale it down."
    )
  try:
    image = ImageOps.exif_transpose(image)  # decodes it
    is_wide_grey = image.mode.startswith("I") or image.mode == "F"
    if not is_wide_grey:
      image = image.convert("RGBA" if image.has_transparency_data else "RGB")
  except _BROKEN as error:
    raise DataError(f"{name} is damaged or cut short: {_first_line(error)}.") from None
  if is_wide_grey:
    return _grey_to_rgb(image, name)
  if image.mode == "RGB":
    return image
  white = Image.new("RGB", image.size, (255, 255, 255))
  white.paste(image, mask=image.getchannel("A"))
  return white


def _grey_to_rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
  """RGB of more than 8 bits of grey; Pillow's own conversion would turn all above 255 white."""
  values = np.asarray(image)
  low, high = values.min(), values.max()
  declares_16_bits = image.mode.startswith("I;16")
  if not (low >= 0 and high <= 65535):  # nor NaN
    raise DataError(f"{name} has grey values from {low} to {high}; scale them to 0..65535.")
  if image.mode == "F" and high <= 1:
    grey = np.rint(values * 255)
  elif high <= 255 and not declares_16_bits:
    grey = np.rint(values)
  else:
    grey = values // 256  # the high byte, which Pillow takes of 16-bit colours
  if "transparency" in image.info:  # the one grey value that is
    grey = np.where(values == image.info["transparency"], 255, grey)
  return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
  """uint8 [height, width, 3] for a `size` of (width, height)."""
  return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
