"""One call of slot_attention's kernels: its constants, chunks and common arguments, from shapes alone; their builds."""

import torch
import triton
from torch import Tensor

from ..build import Build
from ..concept_attention.forward import tile_rows
from ..splits import Split, choose_chunk, matrix_units, split_build
from .tokens import token_kernel

TOKEN_TILES = {  # of token_kernel, which needs no accumulator: {units: (BLOCK_C, BLOCK_N, num_warps, num_stages)}
    "wgmma": (64, 32, 8, 2), "mma": (32, 64, 4, 2), "fma": (16, 16, 4, 1),
}  # fmt: skip


class Launch:
    def __init__(
        self, tiles: dict, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
        normalize: str, eps: float, chunk: int | None, max_tile: int | None,
    ):  # fmt: skip
        num_sequences, num_concepts, num_heads, head_dim = q.shape
        num_tokens, num_kv_heads = k.shape[:2]
        self.inputs, self.num_concepts, self.num_heads = (q, k, v, cu_seqlens), num_concepts, num_heads
        block_d = max(triton.next_power_of_2(head_dim), 16)
        self.units = matrix_units(q)
        table = tiles[self.units, block_d > 64]
        block_c = tile_rows(num_concepts, [size for size in table if size <= (max_tile or size)])
        self.config = dict(zip(("BLOCK_N", "num_warps", "num_stages"), table[block_c], strict=True))
        self.num_tiles = triton.cdiv(num_concepts, block_c)
        self.constants = {
            "D": head_dim, "BLOCK_D": block_d, "GROUP": num_heads // num_kv_heads, "MEAN": normalize == "mean",
            "PRECISION": "ieee", "enable_fp_fusion": True,
        }  # fmt: skip
        self.tile = {
            "BLOCK_C": block_c, "EVEN_C": num_concepts % block_c == 0, "ONE_TILE": self.num_tiles == 1, **self.config
        }  # fmt: skip
        if chunk is None:
            programs = num_heads * self.num_tiles
            chunk = choose_chunk(num_tokens, max_seqlen, programs, self.config["num_warps"], self.config["BLOCK_N"])
        self.split = Split(num_tokens, num_sequences, max_seqlen, chunk)
        self.sizes = num_sequences, num_heads, num_concepts, chunk
        self.strides = *q.stride()[:3], *k.stride()[:2], *v.stride()[:2]
        self.scalars = scale, eps if normalize == "mean" else 0.0

    def part(self, *shape: int) -> Tensor:
        """Float32 partials [slots, H, C, ...]."""
        size = self.split.num_slots, self.num_heads, self.num_concepts, *shape
        return torch.empty(size, dtype=torch.float32, device=self.inputs[0].device)

    def token_pass(self, gradients: tuple | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(log-sum-exp, sum_c A dA) of every token [T, H]; the second if given (out, mass, dout, dmass); or None."""
        if self.num_tiles == 1:
            return None, None
        block_c, *config = TOKEN_TILES[self.units]
        num_tokens = self.inputs[1].shape[0]
        lse = torch.empty(num_tokens, self.num_heads, dtype=torch.float32, device=self.inputs[0].device)
        delta = None if gradients is None else torch.empty_like(lse)
        token_kernel[(self.split.num_slots * self.num_heads,)](
            *self.inputs, *(gradients or (None,) * 4), lse, delta,
            *self.sizes, *self.strides, *gradient_strides(gradients), *self.scalars,
            BLOCK_C=block_c, EVEN_C=self.num_concepts % block_c == 0, SINGLE=self.split.single, **self.constants,
            **dict(zip(("BLOCK_N", "num_warps", "num_stages"), config, strict=True)),
        )  # fmt: skip
        return lse, delta


def gradient_strides(gradients: tuple | None) -> tuple[int, ...]:
    """Strides b, c, h of dout and b, h, c of dmass, in (out, mass, dout, dmass); 0 for what is not there."""
    if gradients is None:
        return (0,) * 6
    dout, dmass = gradients[2:]
    return *dout.stride()[:3], *((0, 0, 0) if dmass is None else dmass.stride())


def tile_builds(name: str, kernel, tiles: dict, part: tuple[str, ...], single: tuple[str, ...]) -> list[Build]:
    """``part``, ``single``: the pointers that hold float32 with several chunks a sequence and with one."""
    found = []
    for (units, wide), table in tiles.items():
        dtype, head_dim = "fp32" if units == "fma" else "bf16", 128 if wide else 64
        for block_c, launch in table.items():
            tile = block_c, launch[0], head_dim
            found.append(one_build(name, kernel, units, dtype, tile, launch[1:], part))
    for units, dtype, head_dim, flags in (
        ("wgmma", "bf16", 64, {"EVEN_C": False, "SINGLE": True}),
        ("wgmma", "bf16", 64, {"ONE_TILE": False, "GROUP": 2}),
        ("wgmma", "fp16", 32, {"MEAN": False}),
        ("mma", "fp16", 64, {"EVEN_C": False, "SINGLE": True}),
        ("mma", "bf16", 16, {"ONE_TILE": False, "GROUP": 2}),
    ):
        launch = tiles[units, False][128]
        tile, kept = (128, launch[0], head_dim), single if flags.get("SINGLE") else part
        found.append(one_build(name, kernel, units, dtype, tile, launch[1:], kept, flags))
    return found


def one_build(
    name: str, kernel, units: str, dtype: str, tile: tuple[int, int, int], launch: tuple[int, int],
    single: tuple[str, ...], flags: dict | None = None, absent: tuple[str, ...] = (),
) -> Build:  # fmt: skip
    block_c, block_n, head_dim = tile
    constants = {"D": head_dim, "BLOCK_C": block_c, "BLOCK_N": block_n, "BLOCK_D": head_dim, "PRECISION": "ieee"}
    constants |= {"GROUP": 1, "MEAN": True, "ONE_TILE": True, "EVEN_C": True, "SINGLE": False, **(flags or {})}
    constants |= {"GAIN": 8192.0 if dtype == "fp16" else 1.0}
    if constants["ONE_TILE"] and kernel is not token_kernel:
        absent = *absent, "token_lse_ptr", "delta_ptr"
    single = *single, "token_lse_ptr", "delta_ptr", "dmass_ptr"
    if constants["GROUP"] > 1 or not constants["ONE_TILE"]:
        single = *single, "dk_ptr", "dv_ptr"
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    constants |= {pointer: None for pointer in absent if pointer in kernel.arg_names}
    label = f"{name}/{units}/{dtype}/C{block_c}xN{block_n}xD{head_dim}"
    label += "".join(f"/{key}={value}" for key, value in (flags or {}).items())
    return with_eps(split_build(label, kernel, dtype, constants, launch, units, single))


def with_eps(build: Build) -> Build:
    return build._replace(signature={**build.signature, "eps": "fp32"})
