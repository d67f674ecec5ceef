"""Tile sizes of the kernels, for each GPU architecture: the only place where they stand."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DequantizeTiles:
    """One program decodes `elements` weights (a power of two, from 64 to 16,384) with `warps` warps."""

    elements: int
    warps: int


@dataclasses.dataclass(frozen=True)
class MatmulTiles:
    """One program computes `rows` outputs for at most `tokens` rows of x, over a part of K.

    Attributes:
      tokens: rows of x, a power of two of at least 8.
      rows: rows of W in one program, a power of two of at least 16 per warp.
      blocks: blocks of 64 weights along K in one turn of the loop.
      warps, stages: Triton's warps in a program and depth of its load pipeline.
      programs: how many it takes to keep the card busy. K is cut into parts, whose sums are added afterwards, until
        there are as many.
    """

    tokens: int
    rows: int
    blocks: int
    warps: int
    stages: int
    programs: int

    def split(self, outputs: int, blocks: int, tokens: int) -> int:
        """Into how many parts to cut a K of so many blocks, for so many tiles of outputs.

        Two turns a part at least; and writing and reading the parts' float32 sums shall move no more bytes than the
        weights are: 8 · tokens · split bytes for each output's K/2.
        """
        turns, affordable = blocks // self.blocks, 64 * blocks // (16 * tokens)
        return max(1, min(-(-self.programs // outputs), turns // 2, affordable))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The sizes for one architecture; `matmul` ascends in tokens. More than its last have are not worth fusing."""

    dequantize: DequantizeTiles
    matmul: tuple[MatmulTiles, ...]

    def for_tokens(self, tokens: int) -> MatmulTiles | None:
        """The smallest that holds `tokens` rows of x; None where dequantizing first is the way."""
        return next((tiles for tiles in self.matmul if tokens <= tiles.tokens), None)


def _tiles(programs: int, *matmul: tuple[int, int, int, int, int]) -> Tiles:
    return Tiles(DequantizeTiles(elements=4096, warps=4), tuple(MatmulTiles(*sizes, programs) for sizes in matmul))


# tokens, rows, blocks, warps, stages. Chosen by instructions per weight without spills (tests/aot prints them), and
# eight programs of two warps for each of a card's multiprocessors; benchmarks/gpu_suite.py times them on a GPU.
_MMA = ((8, 64, 2, 2, 4), (16, 64, 2, 2, 4), (32, 128, 1, 4, 4), (64, 128, 1, 4, 3))
_WGMMA = ((8, 64, 2, 2, 4), (16, 128, 1, 4, 4), (32, 128, 1, 4, 4), (64, 128, 1, 4, 3))
TILES = {
    80: _tiles(864, *_MMA),
    86: _tiles(656, *_MMA),
    89: _tiles(1024, *_MMA),
    90: _tiles(1056, *_WGMMA),
}

# The most rows of x that are multiplied in one kernel anywhere: a step of generation, not of training.
FEW_ROWS = max(tiles.matmul[-1].tokens for tiles in TILES.values())


def tiles_for(capability: int | None) -> Tiles:
    """The sizes for a compute capability of at least 80, or those of the newest architecture before it."""
    assert capability is not None  # no kernel is chosen without one
    return TILES[max(known for known in TILES if known <= capability)]
