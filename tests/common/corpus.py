"""At least one message of every type that travels, small."""

from common import wire
from common.versions import Version

V = Version(1, 12)
KEY = wire.LeaseKey(7, 2)
PROMPT = wire.Prompt(id="train/a/1", source="a", token_ids=wire.int_bytes([5, 6]), answer="42", reward="math")
COMPLETION = wire.Completion(
    token_ids=wire.int_bytes([3, 9, 1]),
    logprobs=wire.float_bytes([-0.5, -1.25, 0.0]),
    versions=wire.span_bytes([wire.VersionSpan(1, Version(0, 11)), wire.VersionSpan(3, V)]),
    finish_reason=wire.FinishReason.STOP,
    seed=17,
    routed_experts=bytes([0, 1, 2, 3]),
)
GROUP = wire.Group(
    key=KEY,
    generator="generator-0",
    prompt_id=PROMPT.id,
    answer="42",
    reward="math",
    completions=(COMPLETION, COMPLETION),
    seconds=0.5,
)
GRADE = wire.Grade(outcome=wire.Outcome.CORRECT, correct=1.0, reward=0.75, extracted="42\n")
SCORED = wire.ScoredGroup(group=GROUP, grades=(GRADE, GRADE), verifier="verifier-0")
SPAN = wire.Span(1.5, 2.5)
STATS = wire.Stats(interval=SPAN, busy=(SPAN,), num_tokens=9, num_items=2, gauges={"queue": 3.0})
MANIFEST = wire.Manifest(
    version=V,
    publishers=("tcp://127.0.0.1:7171", "tcp://127.0.0.1:7172"),
    size_bytes=1000,
    probe_token_ids=wire.int_bytes([1, 2, 3]),
    probe_logprobs=wire.float_bytes([-1.0, -2.0]),
)
SAMPLING = wire.Sampling(temperature=1.0, top_p=0.9, top_k=0, max_tokens=16, stop=("\n",), stop_token_ids=(1,))
LEASE = wire.Lease(
    key=KEY,
    prompt=PROMPT,
    num_completions=2,
    sampling=SAMPLING,
    seed=1,
    deadline_s=600.0,
    min_completions=2,
    pinned_version=V,
)
MEMBER = wire.Member(
    role=wire.Role.VERIFIER,
    name="verifier-0",
    seconds=3.0,
    silent_s=0.5,
    busy_share=0.1,
    tokens_per_s=10.0,
    items_per_s=1.0,
    gauges={"num_timeout": 1.0},
)
EVALUATION = wire.Evaluation(
    version=V,
    source="test",
    accuracy=0.5,
    pass_at_k=float("nan"),
    num_prompts=4,
    num_samples=1,
    num_failed=0,
    oldest=Version(0, 3),
    newest=V,
)
CONTENT = wire.Content(key=wire.FileKey(1, V, Version(0, 11)), size_bytes=wire.CHUNK_BYTES + 1, sums=bytes(16))
STATUS_REPORT = wire.StatusReport(
    version=V,
    members=(MEMBER,),
    accounts={"trained": 4},
    epoch=1.5,
    epochs={"train": 1.5},
    filtered_right=1,
    filtered_wrong=0,
    evaluations=(EVALUATION,),
    overlap_share=0.5,
    busy_shares={"learner": 0.5},
    waiting_for="the learner to begin",
    pin_wait_s=0.25,
    refused={"requests": 1},
)
MESSAGES: tuple[wire.Request | wire.Answer, ...] = (
    wire.Hello(role=wire.Role.VERIFIER, name="verifier-0", run="key", endpoint="tcp://127.0.0.1:1", started_at=1.0),
    wire.Welcome(incarnation=3),
    wire.Beat(
        role=wire.Role.GENERATOR, name="generator-0", holds=(KEY, wire.LeaseKey(-3, 1)), finished=(KEY,), stats=STATS
    ),
    wire.BeatAnswer(cancelled=(KEY,), known=True, next_s=2.5),
    wire.Watch(revision=1 << 33),
    wire.Directory(revision=1 << 33, manifest=MANIFEST, verifiers=("tcp://127.0.0.1:1",), closing=False),
    wire.LeaseRequest(name="generator-0", version=V, room=3),
    wire.Leases(leases=(LEASE,), waiting_for="nothing"),
    wire.GiveBack(name="generator-0", leases=(wire.Returned(KEY, "too late"),), leaves=True),
    wire.RoomRequest(num_groups=2),
    wire.Room(num_groups=1),
    GROUP,
    SCORED,
    wire.Verdict(status="refused", reason="too late"),
    wire.Begin(checkpoint=V, sequence=12, num_visits=99),
    wire.Begun(version=V, branches=(None, Version(0, 10))),
    wire.Reserve(version=V, num_groups=2),
    wire.Batch(version=V, visits=(1, 2), waiting_for=""),
    wire.Fetch(version=V, visit=1),
    wire.Fetched(group=wire.TrainingGroup(prompt=PROMPT, scored=SCORED)),
    wire.Commit(version=V, visits=(1, 2)),
    wire.Committed(sequence=13, num_visits=99),
    wire.Publish(manifest=MANIFEST),
    wire.PartRequest(version=V, have=Version(0, 11)),
    wire.PartFiles(part=1, files=(CONTENT,)),
    wire.ChunkRequest(key=CONTENT.key, index=1),
    wire.Chunk(data=memoryview(b"of a delta")),
    wire.Checkpoint(version=V),
    wire.Evaluate(version=V),
    wire.Finish(reason="all steps done"),
    wire.Finished(done=True, accounts={"trained": 4}, waiting_for=""),
    wire.Done(),
    wire.Status(num_evaluations=1),
    STATUS_REPORT,
    wire.Refused(reason="found nothing"),
)
