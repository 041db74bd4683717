"""What a service turned away: counted, and logged once per peer."""

from common.log import logger

PEERS = "connections"
MALFORMED = "malformed"
REFUSED = "requests"
_MAX_PEERS = 256


class Refusals:
    """Counts for good, and logs while the peers that it has logged are few: no flood of new ones fills memory or disk.

    Attributes:
        counts: How often, by kind: connections that were not let in, messages that are none, requests that may not be.
    """

    def __init__(self) -> None:
        self.counts = {PEERS: 0, MALFORMED: 0, REFUSED: 0}
        self._logged: set[tuple[str, str]] = set()

    def add(self, kind: str, peer: str, reason: str) -> None:
        """Counts one, and logs it where it is the first of its kind from this peer."""
        self.counts[kind] += 1
        if (kind, peer) in self._logged or len(self._logged) > _MAX_PEERS:
            return
        self._logged.add((kind, peer))
        if len(self._logged) > _MAX_PEERS:
            logger().warning("refusals_no_longer_logged", num_peers=_MAX_PEERS)
        else:
            logger().warning("refused", kind=kind, peer=peer, reason=reason)
