"""What a node's store tells of itself; `memory` counts the slab, `packer` adds the rest."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreStats:
    """One moment of a store; bytes are whole memory pages."""

    capacity_bytes: int
    # All extents, which freed ranges do not shrink.
    extent_bytes: int
    used_bytes: int
    leased_bytes: int
    num_adapters: int
    num_leases: int
    num_holders: int
    # Removed adapters that a lease still keeps.
    num_draining: int
    # Since the start; packs are of adapters' own files.
    num_packs: int
    num_evictions: int
    # Packed adapters on the node's disk, of all its stores.
    num_packed_files: int = 0
    packed_file_bytes: int = 0
    # Since the start: adapters read from there, and leases refused since nothing had the bytes.
    num_disk_reads: int = 0
    num_unavailable: int = 0
