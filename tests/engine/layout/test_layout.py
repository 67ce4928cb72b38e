"""Layouts describe tensors of any strides, and name the axis that does not fit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from kvferry.engine.errors import LayoutError
from kvferry.engine.layout.kv_layout import GroupLayout, KVLayout
from kvferry.engine.layout.region import Axis, RegionLayout

NHD = "plane block token head dim"


def pools(num_layers: int = 3, **shape: int) -> list[np.ndarray[Any, Any]]:
    sizes = {"plane": 2, "block": 7, "token": 4, "head": 3, "dim": 8} | shape
    return [np.zeros(tuple(sizes.values()), np.float16) for _ in range(num_layers)]


def test_one_region_for_each_tensor() -> None:
    layout = KVLayout.from_tensors(pools(), NHD)
    assert len(layout.regions) == layout.num_layers == 3
    region = layout.regions[1]
    assert region.layers == (1,)
    assert region.planes == ("k", "v")
    assert (region.num_slots, region.tokens_per_slot, region.elem_bytes) == (7, 4, 2)
    assert region.slot_nbytes == 4 * 3 * 8 * 2
    assert region.slot_stride == region.slot_nbytes
    assert region.plane_stride == 7 * region.slot_nbytes
    assert region.axes == (Axis("token", 4, 48), Axis("head", 3, 16), Axis("dim", 8, 2))
    assert layout.block_nbytes == 3 * 2 * region.slot_nbytes
    assert (layout.head_start, layout.head_stop, layout.dtype) == (0, 3, "float16")


def test_a_stacked_tensor_is_one_region_of_many_layers() -> None:
    layout = KVLayout.from_tensors(
        np.zeros((5, 3, 2, 4, 2, 8), np.float32), "block layer " + "plane token head dim"
    )
    assert len(layout.regions) == 1
    assert layout.layers == (0, 1, 2)
    assert layout.regions[0].layer_stride == 2 * 4 * 2 * 8 * 4
    assert layout.regions[0].slot_stride == 3 * layout.regions[0].layer_stride


def test_a_torch_tensor_and_its_numpy_view_have_one_layout() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 7, 4, 3, 8, dtype=torch.float16).permute(0, 1, 3, 2, 4)
    dims = "plane block head token dim"
    assert KVLayout.from_tensors([tensor], dims).digest() == (
        KVLayout.from_tensors([tensor.numpy()], dims).digest()
    )


def test_mla_has_one_plane_and_no_heads() -> None:
    layout = KVLayout.from_tensors(
        [np.zeros((9, 16, 576), np.int16)], "block token dim", kind="mla"
    )
    assert layout.regions[0].planes == ("latent",)
    assert (layout.head_start, layout.head_stop) == (0, 1)


def test_a_digest_is_the_same_in_every_process_and_tells_layouts_apart() -> None:
    code = (
        "import numpy as np; from kvferry.engine.layout.kv_layout import KVLayout;"
        "print(KVLayout.from_tensors([np.zeros((2, 7, 4, 3, 8), np.float16)],"
        " 'plane block token head dim').digest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = KVLayout.from_tensors(pools(1), NHD)
    assert run.stdout.strip() == ours.digest()
    others = [
        KVLayout.from_tensors(pools(2), NHD),
        KVLayout.from_tensors(pools(1, block=8), NHD),
        KVLayout.from_tensors(pools(1), NHD, head_start=3),
        KVLayout.from_tensors(pools(1), "plane block head token dim"),
        KVLayout.from_tensors(pools(1), NHD, codec="private", opaque=("token",)),
    ]
    assert len({layout.digest() for layout in [ours, *others]}) == 6


def test_a_layout_survives_the_wire() -> None:
    layout = KVLayout.from_tensors(
        pools(), NHD, layers=[4, 5, 9], window=24, kind="swa", null_slot=0
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout) == layout


@pytest.mark.parametrize(
    ("tensors", "dims", "options", "says"),
    [
        (pools(), "plane block token heads dim", {}, "axis 'heads' is unknown"),
        (pools(), "plane block token token dim", {}, "axis 'token' is named twice"),
        (pools(), "plane token head dim layer", {}, "axis 'block' is missing"),
        (pools(), "plane block token head", {}, "axis 'dim' is missing"),
        (pools(), "block token head dim", {}, r"shape \(2, 7, 4, 3, 8\) does not have the 4 axes"),
        (pools(), "layer block token head dim", {}, "one tensor is expected, not 3"),
        ([], NHD, {}, "no tensors were given"),
        ([*pools(1), *pools(1, head=5)], NHD, {}, "axis 'head' has size 3 in tensor 0 but 5 in tensor 1"),
        ([pools(1)[0], pools(1)[0].astype(np.float32)], NHD, {}, "float16 in tensor 0 but float32"),
        (pools(), NHD, {"layers": [0, 1]}, "axis 'layer' has 3 entries"),
        (pools(), NHD, {"layers": [0, 1, 1]}, "axis 'layer' has 3 entries"),
        (pools(), NHD, {"planes": ["k"]}, "axis 'plane' has 2 entries"),
        (pools(1, plane=3), NHD, {}, "axis 'plane' has 3 entries: name them, planes="),
        (pools(), NHD.split(), {}, r"dims is one text.*, not \['plane', "),
        (pools(1), "plane block token dim head", {}, "axis 'dim' must be innermost"),
        ([np.zeros((2, 7, 4, 3, 16), np.float16)[..., ::2]], NHD, {}, "axis 'dim' must be innermost"),
        ([np.broadcast_to(pools(1)[0][:, :1], (2, 7, 4, 3, 8))], NHD, {}, "axis 'block' has stride 0"),
        ([pools(1)[0][::-1]], NHD, {}, "axis 'plane' has stride -"),
        ([np.zeros((2, 0, 4, 3, 8), np.float16)], NHD, {}, "axis 'block' is empty"),
    ],
)  # fmt: skip
def test_a_contradiction_is_named(
    tensors: list[np.ndarray[Any, Any]], dims: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(LayoutError, match=says):
        KVLayout.from_tensors(tensors, dims, **options)


def region(**changes: Any) -> RegionLayout:
    good = RegionLayout(
        layers=(0,),
        planes=("k", "v"),
        layer_stride=0,
        plane_stride=640,
        slot_stride=64,
        num_slots=10,
        tokens_per_slot=4,
        elem_bytes=2,
        axes=(Axis("token", 4, 16), Axis("dim", 8, 2)),
        base_offset=0,
        nbytes=1280,
    )
    return msgspec.structs.replace(good, **changes)


def layout_of(*regions: RegionLayout, groups: tuple[GroupLayout, ...] | None = None) -> KVLayout:
    groups = groups or (GroupLayout("full", tuple(range(len(regions)))),)
    return KVLayout(regions, groups, "float16", 0, 1)


def test_a_peers_layout_is_checked_like_ours() -> None:
    layout_of(region()).check()
    bad = [
        (layout_of(region(slot_stride=63)), "axis 'block' steps 63 bytes"),
        (layout_of(region(plane_stride=600)), "axis 'plane' steps 600 bytes"),
        (layout_of(region(nbytes=1279)), "needs 1280 bytes but has 1279"),
        (layout_of(region(base_offset=1)), "needs 1281 bytes"),
        (layout_of(region(tokens_per_slot=8)), "axis 'token' has size 4"),
        (layout_of(region(num_slots=0)), "axis 'block' has size 0"),
        (layout_of(region(slot_stride=-64)), "axis 'block'"),
        (
            layout_of(region(), groups=(GroupLayout("full", ()),)),
            "every region must be in one group",
        ),
        (layout_of(region(), groups=(GroupLayout("full", (1,)),)), "region 1"),
        (layout_of(region(), region(num_slots=9)), "axis 'block' differs within a full group"),
        (msgspec.structs.replace(layout_of(region()), version=3), "layout version 3 is not 2"),
    ]
    for layout, says in bad:
        with pytest.raises(LayoutError, match=says):
            layout.check()
