"""The table of divergences: one vocabulary, and for each id a demonstration whose outcome is as the table says."""

from normkit._convert.rules import RULES
from normkit.conformance.differences import DIFFERENCES
from normkit.conformance.divergences import DIVERGENCES, GROUPS


def test_ids_are_one_vocabulary():
    assert len(DIVERGENCES) == sum(map(len, GROUPS.values()))
    assert set(RULES) <= set(DIVERGENCES)
    for difference in DIFFERENCES:
        assert difference.reason and difference.link


def test_every_row_says_what_it_is():
    for d in DIVERGENCES.values():
        assert d.title and d.explanation and d.links and (d.sides or d.unseen)
        assert not d.explanation.endswith(".") and all(link.startswith("https://") for link in d.links.values())
        labels = [label for side in d.sides for label in side.by]
        assert len(labels) == len(set(labels))
