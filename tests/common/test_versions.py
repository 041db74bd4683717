"""Versions and lineages, against a table that is written from the definition."""

import pytest
from hypothesis import given, strategies as st

from common.errors import WireError
from common.versions import Lineages, Version


def test_within_a_lineage_staleness_is_the_number_of_updates() -> None:
    assert Lineages().staleness(Version(0, 3), Version(0, 7)) == 4
    assert Lineages().staleness(Version(0, 7), Version(0, 7)) == 0


@pytest.mark.parametrize(
    ("token", "current", "staleness"),
    [
        ((0, 10), (1, 10), 0),  # the checkpoint itself
        ((0, 7), (1, 12), 5),  # before the branch, on the path
        ((0, 13), (1, 12), 5),  # abandoned: (12 - 10) + |13 - 10|
        ((0, 13), (1, 10), 3),
        ((1, 11), (1, 12), 1),
        ((0, 13), (2, 12), 5),  # 2.12 is two updates past 0.10 through 1.11, and 0.13 is three
        ((1, 14), (2, 12), 4),  # (12 - 11) + (14 - 11)
    ],
)
def test_a_token_of_an_older_lineage_is_as_stale_as_the_path_between(
    token: tuple[int, int], current: tuple[int, int], staleness: int
) -> None:
    lineages = Lineages().opened_at(Version(0, 10)).opened_at(Version(1, 11))
    assert lineages.staleness(Version(*token), Version(*current)) == staleness


@st.composite
def histories(draw: st.DrawFn) -> tuple[Lineages, list[Version]]:
    """Lineages of a run with some crashes, and versions that were published."""
    lineages, at, published = Lineages(), Version(0, 0), [Version(0, 0)]
    for _ in range(draw(st.integers(0, 5))):
        for _ in range(draw(st.integers(0, 4))):
            at = at.next()
            published.append(at)
        resumed = draw(st.sampled_from([v for v in published if v.lineage == at.lineage]))
        lineages = lineages.opened_at(resumed)
        at = Version(lineages.newest, resumed.number)
        published.append(at)
    return lineages, published


@given(histories())
def test_staleness_is_the_number_of_updates_between_two_weights(history: tuple[Lineages, list[Version]]) -> None:
    """Counted by walking: each version has one parent, a lineage's first is the very weights that it resumed from."""
    lineages, published = history
    current = published[-1]

    def path(version: Version) -> list[tuple[int, int]]:
        """Weights from the version back to the start, each named by the lineage that first made it."""
        found = []
        while True:
            branch = lineages.branches[version.lineage]
            if branch is not None and version.number == branch.number:
                version = branch
                continue
            found.append(tuple(version))
            if version.number == 0:
                return found
            version = Version(version.lineage, version.number - 1)

    ahead = path(current)
    for version in published:
        behind = path(version)
        shared = len(set(ahead) & set(behind))
        assert lineages.staleness(version, current) == len(ahead) + len(behind) - 2 * shared


@given(st.integers(0, 10**8), st.integers(0, 10**8))
def test_a_version_survives_as_text(lineage: int, number: int) -> None:
    assert Version.parse(str(Version(lineage, number))) == Version(lineage, number)


@pytest.mark.parametrize("text", ["", "1", "1.2.3", "-1.2", "1.x", "default"])
def test_other_text_is_no_version(text: str) -> None:
    with pytest.raises(WireError, match="expected a policy version"):
        Version.parse(text)
