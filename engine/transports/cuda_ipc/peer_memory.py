"""Which memory of a peer the kernels of this side reach: found out by mapping it.

Whether two GPUs reach each other can be asked of the driver, if both are visible here. A GPU that
CUDA_VISIBLE_DEVICES hides, as that of an engine's neighbour mostly is, cannot be asked about: its
memory is mapped or not. What is not mapped is staged, as where there is no peer access.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ...errors import EngineError, TransportUnavailable

if TYPE_CHECKING:
    from ...memory.cuda_export import PeerMappings
    from ...memory.descriptors import RegionDescriptor
    from ...memory.regions import MemoryRegion, RegisteredCache
    from ..base import PathHost

log = logging.getLogger(__name__)

_MOST_REMEMBERED = 4096


class PeerReach:
    """What is known of one link's peer. Thread-safe."""

    def __init__(self, link: PathHost, mappings: PeerMappings) -> None:
        self._link = link
        self._mappings = mappings
        self._known: dict[tuple[int, int], tuple[object, str]] = {}
        self._warned = False

    def obstacle(
        self,
        local: tuple[MemoryRegion | RegisteredCache, ...],
        remote: tuple[RegionDescriptor, ...],
    ) -> str:
        """Why kernels of this side, beside `local`, do not reach these regions; or "".

        Once the peer has granted them, they are mapped to find out; until then, as far as can be
        told. What has stood in the way once does so as long as the link lives.
        """
        if not local or not remote or local[0].device < 0:
            return "it is host memory"
        device = local[0].device
        anchor = remote[0] if len(remote) == 1 else remote  # lives as long as its user's descriptor
        known = self._known.get((device, id(anchor)))
        if known is not None and known[0] is anchor:
            return known[1]
        granted = self._link.has_leave(remote)
        reason = ""
        if any(region.device != device for region in local):
            reason = "the local regions are on several GPUs"
        for region in () if reason else remote:
            reason = self._mappings.obstacle(device, region)
            if granted and not reason:
                reason = self._map(device, region)
            if reason:
                break
        if (granted or reason) and not self._link.closed and len(self._known) < _MOST_REMEMBERED:
            self._known[device, id(anchor)] = (anchor, reason)
        return reason

    def _map(self, device: int, region: RegionDescriptor) -> str:
        try:
            self._mappings.address(device, region)
            self._mappings.counters(device, region)
        except TransportUnavailable as error:
            if not self._warned and not self._link.closed:
                self._warned = True
                log.warning(
                    "kvferry: %s; its bytes go through pinned host memory",
                    error,
                )
            return error.message
        except EngineError:
            return ""  # no obstacle: what would use it meets the same, and says so
        return ""
