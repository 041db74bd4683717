"""Who may ask what: a name is spoken by the process that said hello under it last, and the learner leads training."""

from common import wire
from common.errors import RefusedError
from common.wire import Role
from learner.ledger.fleet import Fleet
from learner.ledger.store import Store


class Peers:
    """The fence against processes that were replaced, or never joined.

    A peer is one client's identity, over all its connections (`common/transport.py`). The learner's is stored, and kept
    however long it is silent; that of another member is its first speaker's after a restart of the ledger, for its
    results are fenced by their attempts.
    """

    def __init__(self, fleet: Fleet, store: Store) -> None:
        """Both are shared with the service."""
        self._fleet, self._store, self._learner = fleet, store, store.learner()

    def joined(self, peer: bytes, hello: wire.Hello) -> None:
        """The process has the name from now on."""
        if hello.role is Role.LEARNER:
            self._learner = peer
            self._store.save_learner(peer)

    def admit(self, peer: bytes, request: wire.Request) -> None:
        """Lets a request pass.

        Raises:
            RefusedError: The peer is not the process that may ask it.
        """
        match request:
            case wire.Hello() | wire.Watch() | wire.Status():
                return
            case wire.Beat():
                self._fleet.admit(request.name, request.role, peer)
            case wire.LeaseRequest() | wire.GiveBack():
                self._fleet.admit(request.name, Role.GENERATOR, peer)
            case wire.ScoredGroup():
                if request.verifier not in self._fleet:
                    raise RefusedError(f"found a group from {request.verifier}, expected its hello first")
                self._fleet.admit(request.verifier, Role.VERIFIER, peer)
            case _:
                if peer != self._learner:
                    raise RefusedError(
                        f"found {type(request).__name__} from {peer.hex()}, expected the learner that joined last"
                    )
