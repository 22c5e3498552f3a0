"""What the windows of a study show now, so that two people do not judge one item more often than asked."""

import time
from collections.abc import Iterator
from dataclasses import dataclass


# Seconds after which a clip that a window shows goes to somebody else, unless the window reports, as it does every minute.
LEASE_SECONDS = 200.0


@dataclass
class Lease:
    """Items that a window shows (the first) and has loaded ahead (the others), until `expires`."""

    items: list[str]
    expires: float


class Reservations:
    """Leases by annotator and window. They are in no file: after a restart every window asks again."""

    def __init__(self) -> None:
        self._leases: dict[tuple[str, str], Lease] = {}

    def renew(self, annotator: str, window: str) -> Lease:
        """The lease of a window, which is a new one if it had none. Those that have expired are removed."""
        now = time.monotonic()
        self._leases = {key: lease for key, lease in self._leases.items() if lease.expires > now}
        lease = self._leases.setdefault((annotator, window), Lease([], 0.0))
        lease.expires = now + LEASE_SECONDS
        return lease

    def show_first(self, annotator: str, window: str, item_id: str) -> None:
        """Take an item from all other windows, and let this one show it next."""
        for lease in self._leases.values():
            lease.items = [item for item in lease.items if item != item_id]
        lease = self._leases.setdefault((annotator, window), Lease([], time.monotonic() + LEASE_SECONDS))
        lease.items.insert(0, item_id)

    def items_of(self, annotator: str) -> set[str]:
        """Items that any window of this person has."""
        return {item for (name, _), lease in self._leases.items() if name == annotator for item in lease.items}

    def num_others(self, annotator: str, item_id: str) -> int:
        """Windows of other people that have an item."""
        return sum(item_id in lease.items for (name, _), lease in self._leases.items() if name != annotator)

    def loaded_ahead(self, lease: Lease) -> Iterator[tuple[str, Lease, str]]:
        """Person, lease and item of what other windows have loaded ahead and do not show yet."""
        for (name, _), other in self._leases.items():
            if other is not lease:
                for item_id in other.items[1:]:
                    yield name, other, item_id
