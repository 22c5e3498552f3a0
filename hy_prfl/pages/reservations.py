"""Reserves items for browser windows, so that an item is not judged by more people than requested."""

import time
from collections.abc import Iterator
from dataclasses import dataclass


# Seconds after which an item is given to somebody else if its window does not report. Windows report every minute.
LEASE_SECONDS = 200.0


@dataclass
class Lease:
    """Items that are reserved for a window until `expires`. It shows the first, and has loaded the others in advance."""

    items: list[str]
    expires: float


class Reservations:
    """Leases by annotator and window. They are not stored: after a restart every window asks again."""

    def __init__(self) -> None:
        self._leases: dict[tuple[str, str], Lease] = {}

    def renew(self, annotator: str, window: str) -> Lease:
        """Extend the lease of a window, or give it a new one. Expired leases are removed."""
        now = time.monotonic()
        self._leases = {key: lease for key, lease in self._leases.items() if lease.expires > now}
        lease = self._leases.setdefault((annotator, window), Lease([], 0.0))
        lease.expires = now + LEASE_SECONDS
        return lease

    def show_first(self, annotator: str, window: str, item_id: str) -> None:
        """Take an item away from all other windows, and let this one show it next."""
        for lease in self._leases.values():
            lease.items = [item for item in lease.items if item != item_id]
        lease = self._leases.setdefault((annotator, window), Lease([], time.monotonic() + LEASE_SECONDS))
        lease.items.insert(0, item_id)

    def items_of(self, annotator: str) -> set[str]:
        """Items that are reserved for any window of this person."""
        return {item for (name, _), lease in self._leases.items() if name == annotator for item in lease.items}

    def num_others(self, annotator: str, item_id: str) -> int:
        """Number of windows of other people for which an item is reserved."""
        return sum(item_id in lease.items for (name, _), lease in self._leases.items() if name != annotator)

    def loaded_ahead(self, lease: Lease) -> Iterator[tuple[str, Lease, str]]:
        """Person, lease and item for each item that another window has loaded in advance and does not show yet."""
        for (name, _), other in self._leases.items():
            if other is not lease:
                for item_id in other.items[1:]:
                    yield name, other, item_id
