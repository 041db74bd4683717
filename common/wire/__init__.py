"""The messages between processes: msgspec structs as msgpack, with per-token arrays as bytes.

Per-token arrays are little-endian: token ids int32, logprobs float32, version spans int32 triples. A group costs
8 bytes a token plus a small head, and with routed experts one more for each expert that a token was sent to, in each
layer; NumPy views of the bytes are free. Nothing here is ever unpickled.

A request and its answer:

    from         to         request        answer
    anyone       ledger     Hello          Welcome
    anyone       ledger     Beat           BeatAnswer
    anyone       ledger     Watch          Directory      (held until something changes)
    generator    ledger     LeaseRequest   Leases         (held until there is one)
    generator    ledger     GiveBack       Done
    generator    verifier   RoomRequest    Room           (held until there is room)
    generator    verifier   Group          Verdict        (held until the ledger has stored it)
    verifier     ledger     ScoredGroup    Verdict
    learner      ledger     Begin          Begun
    learner      ledger     Reserve        Batch          (held until it is whole)
    learner      ledger     Fetch          Fetched
    learner      ledger     Commit         Committed
    learner      ledger     Publish        Done
    learner      ledger     Checkpoint     Done
    learner      ledger     Evaluate       Done
    learner      ledger     Finish         Finished       (held until the final evaluation is in)
    generator    publisher  PartRequest    PartFiles      (held until the version is encoded)
    generator    publisher  ChunkRequest   Chunk
    anyone       ledger     Status         StatusReport
    anyone       anyone                    Refused        (the request is understood and refused, or is malformed)
"""

from common.wire.arrays import float_bytes as float_bytes, floats as floats, int_bytes as int_bytes, ints as ints
from common.wire.base import LeaseKey as LeaseKey, Message as Message, Role as Role
from common.wire.codec import (
    MAX_MESSAGE_BYTES as MAX_MESSAGE_BYTES,
    Answer as Answer,
    Refused as Refused,
    Request as Request,
    decode as decode,
    encode as encode,
)
from common.wire.fleet import (
    PROTOCOL as PROTOCOL,
    Beat as Beat,
    BeatAnswer as BeatAnswer,
    Directory as Directory,
    Evaluation as Evaluation,
    Hello as Hello,
    Member as Member,
    Span as Span,
    Stats as Stats,
    Status as Status,
    StatusReport as StatusReport,
    Watch as Watch,
    Welcome as Welcome,
)
from common.wire.groups import (
    Completion as Completion,
    FinishReason as FinishReason,
    Grade as Grade,
    Group as Group,
    Outcome as Outcome,
    ScoredGroup as ScoredGroup,
    Verdict as Verdict,
    VersionSpan as VersionSpan,
    span_bytes as span_bytes,
    spans as spans,
)
from common.wire.leases import (
    GiveBack as GiveBack,
    Lease as Lease,
    LeaseRequest as LeaseRequest,
    Leases as Leases,
    Prompt as Prompt,
    Returned as Returned,
    Room as Room,
    RoomRequest as RoomRequest,
    Sampling as Sampling,
)
from common.wire.training import (
    Batch as Batch,
    Begin as Begin,
    Begun as Begun,
    Checkpoint as Checkpoint,
    Commit as Commit,
    Committed as Committed,
    Done as Done,
    Evaluate as Evaluate,
    Fetch as Fetch,
    Fetched as Fetched,
    Finish as Finish,
    Finished as Finished,
    Manifest as Manifest,
    Publish as Publish,
    Reserve as Reserve,
    TrainingGroup as TrainingGroup,
    VisitState as VisitState,
)
from common.wire.weights import (
    CHUNK_BYTES as CHUNK_BYTES,
    Chunk as Chunk,
    ChunkRequest as ChunkRequest,
    Content as Content,
    FileKey as FileKey,
    PartFiles as PartFiles,
    PartRequest as PartRequest,
)
